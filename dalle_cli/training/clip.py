"""Training a CLIP (Radford et al. 2021): the reranker of both systems, and DALL-E 2's encoder.

Shapes: B batch, S image side, T caption length, D embedding width.
"""

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dalle_cli.data import tokenizer as tokenizers
from dalle_cli.data.datasets import Dataset
from dalle_cli.data.tokenizer import Tokenizer
from dalle_cli.models.clip import CLIP, CLIPConfig
from dalle_cli.models.pixels import from_uint8
from dalle_cli.training.config import ImageTrainConfig, setting
from dalle_cli.training.distributed import gather_rows
from dalle_cli.training.options import TrainingOptions
from dalle_cli.training.stage import Trainable, TrainingStage, image_inputs
from dalle_cli.training.task import Batch, ImageTask, int64, seeded


@dataclass(frozen=True)
class CLIPTrain(ImageTrainConfig):
    """Numbers near the published model's (ViT-B/32, 32 epochs of 400M pairs); small recipes set their own."""

    steps: int = 400_000
    batch_size: int = 32_768
    lr: float = 5e-4
    warmup: int = 2000
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.2
    clip_norm: float = 1.0
    augment: str = setting("prior", deterministic="center")


class CLIPTask(ImageTask):
    """Images with captions; each epoch picks one caption of each image anew.

    Of several processes each embeds its own part of a batch, and compares it with the embeddings of all.
    """

    options: CLIPTrain
    validation_batch = 64

    def __init__(
        self, config: CLIPConfig, train: CLIPTrain, data: Dataset, tokenizer: Tokenizer, seed: int, workers: int
    ):
        super().__init__(train, data, seed, workers)
        self.config, self.tokenizer, self.captions = config, tokenizer, data.captions
        self.model = seeded(seed, lambda: CLIP(config))

    def batches(self, start: int) -> Generator[Batch]:
        """Images (B, 3, S, S) uint8, tokens (B, T) and lengths (B,) int64."""
        for step, batch in enumerate(self.loaded(start, self.config.image_size), start):
            uniform = np.random.default_rng((self.seed, 2, step)).random(self.options.batch_size)[self.slots]
            yield (torch.from_numpy(batch.images), *self._captions(batch.rows, uniform))

    def _captions(self, rows: NDArray[np.int64], uniform: NDArray[np.float64]) -> tuple[Tensor, ...]:
        """One caption of each row, chosen by a number in [0, 1): tokens (B, T), lengths (B,), int64."""
        texts = [(c := self.captions[row])[int(u * len(c))] for row, u in zip(rows.tolist(), uniform, strict=True)]
        return int64(*self.tokenizer.encode_batch(texts, self.config.n_text)[:2])

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The contrastive or sigmoid loss of the batch."""
        images, tokens, lengths = batch
        gather = {"gather": gather_rows} if self.world > 1 else {}
        return self.model.loss(from_uint8(images), tokens, lengths, **gather)

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Among groups of 64 held-out images: the loss, and how often the own caption is the nearest."""
        assert isinstance(model, CLIP)
        found: list[tuple[float, float]] = []
        for rows, images in self.held_out_images(self.config.image_size):
            if len(rows) < min(self.validation_batch, len(self.held_out)):
                continue  # a smaller last group would be easier
            tokens, lengths = self._captions(rows, np.zeros(len(rows)))
            loss, metrics = model.loss(from_uint8(images.to(device)), tokens.to(device), lengths.to(device))
            found.append((loss.item(), metrics["accuracy"].item()))
        means = [sum(column) / len(found) for column in zip(*found, strict=True)]
        return dict(zip(("loss_held_out", "accuracy_held_out"), means, strict=False))

    def samples(self, model: nn.Module, device: torch.device) -> None:
        """A CLIP makes no images."""


TRAINABLE = Trainable("train-clip", "weights.clip", "clip", CLIPConfig, CLIPTrain)


def train_clip(
    dataset: str | Path, tokenizer: str | Path, out: str | Path, *, workers: int = 2, **options: Any
) -> dict[str, Any]:
    """Train a CLIP on the images and captions of a data set; the last validation's metrics.

    `tokenizer` is the file of one, `options` are the fields of `TrainingOptions`.

    Raises:
        DalleError: a recipe or a data set that does not fit, and as `training.loop.train`.
    """
    o, bpe = TrainingOptions(**options), tokenizers.load(tokenizer)
    data, inputs = image_inputs(dataset, o, need_captions=True)
    inputs.sizes["n_text_vocab"] = bpe.vocab_size
    inputs.header["tokenizer"] = inputs.provenance["tokenizer"] = bpe.digest
    stage = TrainingStage(TRAINABLE, out, o, inputs)
    return stage.run(lambda: CLIPTask(stage.model, stage.train, data, bpe, o.seed, workers))
