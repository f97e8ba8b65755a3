"""Training the diffusion decoder (Ramesh et al. 2022, sec. 2.1).

Shapes: B batch, S image side, D embedding width, T caption length.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_cli import config as recipes
from dalle_cli import console
from dalle_cli.artifacts import Artifact, open_artifact
from dalle_cli.data import loader
from dalle_cli.data.datasets import Dataset
from dalle_cli.data.pairs import Conditions
from dalle_cli.devices import rank
from dalle_cli.diffusion.noise import row_noise
from dalle_cli.diffusion.process import Process
from dalle_cli.errors import DalleError
from dalle_cli.models.decoder import Decoder, DecoderConfig
from dalle_cli.models.patch_decoder import PatchDecoder, PatchDecoderConfig
from dalle_cli.sampling.decoder import CaptionBatch, DecoderNetwork, SamplerConfig, sample_images, to_images, to_signed
from dalle_cli.sampling.embeddings import PromptBatch
from dalle_cli.training import warm_start
from dalle_cli.training.config import check_at_least, check_share, setting
from dalle_cli.training.denoising import DenoisingTask, DenoisingTrain, Draws, Predict, denoising
from dalle_cli.training.options import TrainingOptions
from dalle_cli.training.stage import Trainable, TrainingStage, image_inputs
from dalle_cli.training.states import StatesOf
from dalle_cli.training.task import Batch, seeded
from dalle_cli.viz.grid import image_grid

_EMBEDDINGS = 5  # the last word of a seed, as in training/denoising.py


@dataclass(frozen=True)
class DecoderTrain(DenoisingTrain):
    """The paper's numbers (sec. 2.1 and table 3) for 2048 images per update; small recipes set their own."""

    steps: int = 800_000
    batch_size: int = 2048
    embedding_dropout: float = setting(0.1, deterministic=0.0)  # share of null embeddings, for guidance
    caption_dropout: float = setting(0.5, deterministic=0.0)
    # noise of up to this share of their rms is added to the entries of z_i: a prior errs, too
    embedding_noise: float = setting(0.0, deterministic=0.0)
    grid_images: int = setting(12, affects="nothing")
    grid_steps: int = setting(20, affects="nothing")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "embedding_dropout", "caption_dropout")
        check_at_least(self, 0, "embedding_noise")


def loss_of(
    model: Decoder | PatchDecoder,
    process: Process,
    images: Tensor,
    t: Tensor,
    noise: Tensor,
    inputs: Sequence[Tensor],
    options: DecoderTrain,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch, and its parts; `inputs` are the arguments of `Decoder.condition`.

    A sketch learns to be the mean of the images of its embedding and caption: its loss is the squared error to the
    image, made as small, with the weight of the noise's.
    """
    conditioning = model.condition(*inputs)
    loss, metrics = denoising(process, lambda x, t: model(x, t, conditioning), images, t, noise, options)
    if conditioning.sketch is not None:
        small = F.adaptive_avg_pool2d(to_signed(images), conditioning.sketch.shape[-1])
        metrics["sketch"] = (conditioning.sketch.float() - small).square().mean()
        loss = loss + metrics["sketch"]
    return loss, metrics


def embedding_noise(embeddings: Tensor, most: float, seed: int, step: int, slots: Sequence[int]) -> Tensor:
    """Embeddings (B, D) with noise of U[0, most] times their root mean square, for these slots of an update."""
    if not most:
        return embeddings
    noise = np.empty(embeddings.shape, dtype=np.float32)
    for i, slot in enumerate(slots):
        rng = np.random.default_rng([seed, step, slot, _EMBEDDINGS])
        noise[i] = most * rng.random() * rng.standard_normal(embeddings.shape[1], dtype=np.float32)
    return embeddings + torch.from_numpy(noise) * embeddings.square().mean(1, keepdim=True).sqrt()


class DecoderTask(DenoisingTask):
    """Images, each with the embedding and, if there is one, a caption of the same id."""

    config: DecoderConfig | PatchDecoderConfig
    options: DecoderTrain
    model: DecoderNetwork
    n_uniform = 4  # the choice of an embedding and of a caption among several, and whether each is dropped

    def __init__(
        self, config: DecoderConfig | PatchDecoderConfig, train: DecoderTrain, data: Dataset, conditions: Conditions,
        seed: int, workers: int, states: StatesOf | None = None,
    ):  # fmt: skip
        """Every image of `data` has an embedding in `conditions`; `states` is for a decoder of CLIP's states."""
        super().__init__(config, train, data, seed, workers)
        self.conditions, self.side, self.states = conditions, config.image_size, states
        self.model = seeded(seed, lambda: build(config))

    def conditioning(self, batch: loader.Batch, own: Draws, pool: ThreadPoolExecutor) -> Batch:
        """Embeddings (B, D), whether each is given (B,), tokens (B, T) and lengths (B,), 0 for a null caption."""
        o, uniform = self.options, own.uniform
        embeddings, tokens, lengths = self._rows(batch.rows.tolist(), uniform[:, :2])
        given = torch.from_numpy(uniform[:, 2] >= o.embedding_dropout)
        lengths = lengths.masked_fill(torch.from_numpy(uniform[:, 3] < o.caption_dropout), 0)
        return embedding_noise(embeddings, o.embedding_noise, self.seed, batch.step, self.slots), given, tokens, lengths

    def held_out_conditioning(self, rows: list[int], images: Tensor) -> Batch:
        """The first embedding and the first caption of each image."""
        embeddings, tokens, lengths = self._rows(rows, np.zeros((len(rows), 2)))
        return embeddings, torch.ones(len(rows), dtype=torch.bool), tokens, lengths

    def _rows(self, rows: list[int], uniform: NDArray[np.float64]) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, tokens and lengths of rows of the data set."""
        embeddings, tokens, lengths = self.conditions.of([self.data.ids[row] for row in rows], uniform)
        return torch.from_numpy(embeddings), torch.from_numpy(tokens), torch.from_numpy(lengths)

    def predict(self, model: Any, conditioning: Sequence[Tensor]) -> Predict:
        """The decoder, conditioned once for all timesteps."""
        conditioned = model.condition(*self.inputs(conditioning))
        return lambda x, t: model(x, t, conditioned)

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the noise, the bound that teaches the variance, and the sketch's error if there is one."""
        images, noise, t, *conditioning = batch
        return loss_of(self.model, self.process, images, t, noise, self.inputs(conditioning), self.options)

    def inputs(self, conditioning: Sequence[Tensor]) -> Sequence[Tensor]:
        """The arguments of `Decoder.condition`: captions as they are, or CLIP's states of them."""
        embeddings, given, *captions = conditioning
        return (embeddings, given, *self._captions(*captions))

    def _captions(self, tokens: Tensor, lengths: Tensor, *more: Tensor) -> Sequence[Tensor]:
        return (tokens, lengths, *more) if self.states is None else self.states(PromptBatch(tokens, lengths, tokens))

    def samples(self, model: nn.Module, device: torch.device) -> Image.Image | None:
        """Held-out originals above what is decoded from their embeddings, always with the same noise."""
        assert isinstance(model, Decoder | PatchDecoder)
        for rows, images, (embeddings, _, tokens, lengths) in self.held_out_batches(self.options.grid_images):
            noise, brush = row_noise(self.seed, rows, "decoder"), SamplerConfig(self.options.grid_steps)
            text, n_tokens, *z_t = self._captions(tokens, lengths)
            read = CaptionBatch(text, n_tokens, z_t[0] if z_t else None)
            decoded = to_images(sample_images(model, embeddings, read, brush, noise))
            title = "held-out originals, and what is decoded from their embeddings"
            return image_grid([*images.numpy(), *decoded.cpu().numpy()], columns=len(rows), title=title)
        return None


def build(config: DecoderConfig | PatchDecoderConfig) -> DecoderNetwork:
    """A new decoder of either network."""
    return PatchDecoder(config) if isinstance(config, PatchDecoderConfig) else Decoder(config)


def trainable(body: object) -> Trainable:
    """The network that a recipe's table [decoder], or a header, chooses: a patch transformer by `kind`, or a U-Net."""
    network = PatchDecoderConfig if isinstance(body, dict) and "kind" in body else DecoderConfig
    return Trainable("train-decoder", "weights.decoder", "decoder", network, DecoderTrain)


def _states(body: object, texts: Artifact | None, folders: Sequence[Path]) -> StatesOf | None:
    """What makes states of captions for a decoder of these settings, if it takes them.

    Raises:
        DalleError: it takes them and there are no captions, or not their CLIP; or its images are latents.
    """
    settings = body if isinstance(body, dict) else {}
    if settings.get("channels", 3) != 3:
        raise DalleError("expected a decoder of pixels to train, found one of latents; it can be sampled, not trained")
    if settings.get("captions") != "states":
        return None
    if texts is None:
        raise DalleError("expected captions for a decoder that takes states of them, found none; give --captions")
    return StatesOf.find(texts, *folders)


def train_decoder(
    dataset: str | Path,
    embeddings: str | Path,
    out: str | Path,
    *,
    captions: str | Path | None = None,
    workers: int = 2,
    **options: Any,
) -> dict[str, Any]:
    """Train a diffusion decoder of images given their CLIP embeddings; the last validation's metrics.

    `embeddings` are what `encode-images` wrote, `captions` what `tokenize` wrote, for a decoder that reads them.
    `options` are the fields of `TrainingOptions`.

    Raises:
        DalleError: a recipe or inputs that do not fit, and as `training.loop.train`.
    """
    o = TrainingOptions(**options)
    data, inputs = image_inputs(dataset, o)
    latents = open_artifact(embeddings, "embeddings")
    texts = None if captions is None else open_artifact(captions, "captions")
    conditions = Conditions(latents, texts)
    inputs.provenance["embeddings"], inputs.header["encoder"] = latents, latents.require("encoder", str)
    if texts is not None:
        inputs.provenance["captions"], inputs.header["tokenizer"] = texts, texts.require("tokenizer", str)
    inputs.sizes |= {
        "n_embedding": conditions.width, "n_text": conditions.n_text, "n_text_vocab": conditions.n_vocab,
    }  # fmt: skip
    table = recipes.read(o.config, o.sets)
    start = warm_start.open_weights(o.init, "weights.decoder", "train-decoder")
    body = table.get("decoder") if start is None else start.require("model", dict)
    states = _states(body, texts, [Path(out).parent, *([] if start is None else [start.path.parent])])
    if states is not None:
        del inputs.sizes["n_text_vocab"]  # the CLIP's
    stage = TrainingStage(trainable(body), out, o, inputs, table)
    if (missing := conditions.missing(data.ids)) and rank() == 0:
        console.note(f"{len(missing)} of {len(data)} images have no embedding and are left out")
    data = data.exclude(missing)
    return stage.run(lambda: DecoderTask(stage.model, stage.train, data, conditions, o.seed, workers, states))
