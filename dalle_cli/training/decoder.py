"""Training the diffusion decoder (Ramesh et al. 2022, sec. 2.1).

Shapes: B batch, S side in pixels, D width of an embedding, T caption length.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_cli.data.augment import by_name
from dalle_cli.data.conditions import Conditions
from dalle_cli.data.datasets import Dataset
from dalle_cli.data.loader import Loader, sequential
from dalle_cli.data.split import split
from dalle_cli.diffusion.noise import row_noise
from dalle_cli.diffusion.process import Process
from dalle_cli.errors import DalleError
from dalle_cli.models.decoder import Decoder, DecoderConfig
from dalle_cli.sampling.decoder import Brush, paint, process, to_signed
from dalle_cli.training.config import TrainConfig
from dalle_cli.training.denoising import Bins, Draws, denoising, drawn, made_ahead
from dalle_cli.training.loop import Batch, mix
from dalle_cli.viz.grid import sheet

VALIDATION_BATCH = 32
N_PICKS = 4  # of the embedding and of the caption among several, and whether each is dropped
_EMBEDDINGS = 5  # the last word of a seed, as in training/denoising.py


@dataclass(frozen=True)
class DecoderTrain(TrainConfig):
    """The paper's numbers (sec. 2.1 and table 3), which want 2048 pictures a step; small recipes say their own."""

    steps: int = 800_000
    batch_size: int = 2048
    lr: float = 1.2e-4
    schedule: str = "constant"
    ema: float = 0.9999
    augment: str = "center"  # as `encode-images` crops
    flip: bool = False
    embedding_dropout: float = 0.1  # share of embeddings that are null, for guidance
    caption_dropout: float = 0.5
    embedding_noise: float = 0.0  # up to so much of their rms is added to the entries of z_i, as a prior errs, too
    min_snr: float = 0.0  # gamma of Hang et al. 2023, who take 5; 0 = every timestep counts as much
    sheet_pictures: int = 12  # held-out embeddings that are painted at each validation; 0 = none
    sheet_steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        by_name(self.augment)
        for name in ("embedding_dropout", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise DalleError(f"expected {name} in [0, 1], found {getattr(self, name)}")
        if self.embedding_noise < 0:
            raise DalleError(f"expected embedding_noise of at least 0, found {self.embedding_noise}; 0 is off")
        if self.min_snr < 0:
            raise DalleError(f"expected min_snr of at least 0, found {self.min_snr}; 5 is usual, 0 is off")
        if self.sheet_pictures < 0 or self.sheet_steps < 1:
            found = f"{self.sheet_pictures} and {self.sheet_steps}"
            raise DalleError(f"expected sheet_pictures of 0 or more and sheet_steps of 1 or more, found {found}")


def loss_of(
    model: Decoder, process: Process, images: Tensor, t: Tensor, noise: Tensor, told: Sequence[Tensor], min_snr: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch, and its parts; `told` is what `Decoder.condition` takes.

    A sketch is to be the mean of the pictures that embedding and caption stand for: its loss is the squared error to
    the picture, made as small, and has the weight of the noise's.
    """
    conditioning = model.condition(*told)
    loss, figures = denoising(process, lambda x, t: model(x, t, conditioning), images, t, noise, min_snr)
    if conditioning.sketch is not None:
        small = F.adaptive_avg_pool2d(to_signed(images), conditioning.sketch.shape[-1])
        figures["sketch"] = (conditioning.sketch.float() - small).square().mean()
        loss = loss + figures["sketch"]
    return loss, figures


def astray(embeddings: Tensor, most: float, seed: int, step: int, slots: Sequence[int]) -> Tensor:
    """Embeddings (B, D) with noise of U[0, most] of their entries' root mean square, of these slots of an update."""
    if not most:
        return embeddings
    noise = np.empty(embeddings.shape, dtype=np.float32)
    for i, slot in enumerate(slots):
        rng = np.random.default_rng([seed, step, slot, _EMBEDDINGS])
        noise[i] = most * rng.random() * rng.standard_normal(embeddings.shape[1], dtype=np.float32)
    return embeddings + torch.from_numpy(noise) * embeddings.square().mean(1, keepdim=True).sqrt()


class DecoderTask:
    """Pictures, each with an embedding and, where there is one, a caption of the same id."""

    def __init__(
        self, config: DecoderConfig, train: DecoderTrain, data: Dataset, told: Conditions, seed: int, workers: int
    ):
        """Every picture of `data` has an embedding in `told`."""
        self.config, self.options, self.data, self.told = config, train, data, told
        self.seed, self.workers = seed, workers
        self.process = process(config)
        torch.manual_seed(mix(seed, -1))
        self.model = Decoder(config)
        self.rank, self.world = 0, 1
        self.rows, held_out = split(data.ids, train.validation)
        self.held_out = held_out[: train.max_validation]

    def share(self, rank: int, world: int) -> None:
        """From now on this process reads its part of each batch alone."""
        self.rank, self.world = rank, world

    def batches(self, start: int) -> Generator[Batch]:
        """What is to be denoised and what is told of it, a function of the seed and the update.

        Pictures (B, 3, S, S) uint8, noise (B, 3, S, S), timesteps (B,), embeddings (B, D), whether each counts (B,),
        tokens (B, T) and lengths (B,), 0 for a null caption.
        """
        o, c = self.options, self.config
        part = o.batch_size // self.world
        slots = range(self.rank * part, (self.rank + 1) * part)
        loader = Loader(
            self.data, c.image_size, by_name(o.augment, o.flip), part, self.seed, self.workers, self.rows,
            rank=self.rank, world=self.world,
        )  # fmt: skip

        def draw(step: int) -> Draws:
            return drawn(self.seed, step, slots, c.n_timestep, c.image_size, N_PICKS)

        with closing(made_ahead(draw, start)) as draws:
            for step, batch, own in zip(count(start), loader.batches(start), draws, strict=False):
                rows = self._told(batch.rows, own.uniform[:, :2])
                given = torch.from_numpy(own.uniform[:, 2] >= o.embedding_dropout)
                lengths = rows[2].masked_fill(torch.from_numpy(own.uniform[:, 3] < o.caption_dropout), 0)
                embeddings = astray(rows[0], o.embedding_noise, self.seed, step, slots)
                yield torch.from_numpy(batch.images), own.noise, own.t, embeddings, given, rows[1], lengths

    def _told(self, rows: NDArray[np.int64], picks: NDArray[np.float64]) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, tokens and lengths of rows of the data set."""
        embeddings, tokens, lengths = self.told.of([self.data.ids[row] for row in rows.tolist()], picks)
        return torch.from_numpy(embeddings), torch.from_numpy(tokens), torch.from_numpy(lengths)

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the noise, and the bound that teaches the variance; and of the sketch, if there is one."""
        images, noise, t, *told = batch
        return loss_of(self.model, self.process, images, t, noise, told, self.options.min_snr)

    def split(self, batch: Batch, parts: int, step: int, generator: torch.Generator) -> list[Batch]:
        """Equal parts, each with what was drawn for its pictures."""
        return list(zip(*(column.chunk(parts) for column in batch), strict=True))

    def _held_out(self, most: int) -> Iterator[tuple[list[int], Tensor, list[Tensor]]]:
        """The first so many held-out pictures: their rows, pictures uint8, and what `Decoder.denoise` is told."""
        size = self.config.image_size
        for rows, images in sequential(self.data, size, self.held_out[:most].tolist(), VALIDATION_BATCH, self.workers):
            embeddings, tokens, lengths = self._told(rows, np.zeros((len(rows), 2)))
            given = torch.ones(len(rows), dtype=torch.bool)
            yield rows.tolist(), torch.from_numpy(images), [embeddings, given, tokens, lengths]

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Squared error on held-out pictures, by timestep, each with its embedding and its first caption."""
        assert isinstance(model, Decoder)
        bins = Bins(self.process)
        for rows, images, told in self._held_out(len(self.held_out)):
            conditioning = model.condition(*(column.to(device) for column in told))
            bins.add(lambda x, t, c=conditioning: model(x, t, c), images.to(device), rows)  # type: ignore[misc]
        return bins.figures()

    def sheet(self, model: nn.Module, device: torch.device, path: Path) -> None:
        """Held-out originals above what is painted from their embeddings, always with the same noise."""
        assert isinstance(model, Decoder)
        found = next(self._held_out(min(self.options.sheet_pictures, len(self.held_out), VALIDATION_BATCH)), None)
        if found is None:
            return
        rows, images, (embeddings, _, tokens, lengths) = found
        noise = row_noise(self.seed, rows, "decoder")
        painted = paint(model, embeddings, tokens, lengths, Brush(self.options.sheet_steps), noise)
        pixels = [*images.numpy(), *painted.cpu().numpy()]
        path.parent.mkdir(parents=True, exist_ok=True)
        title = "held-out originals, and what is painted from their embeddings"
        sheet(pixels, columns=len(rows), title=title).save(path)
