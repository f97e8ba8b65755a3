"""Training an upsampler on crops of pictures beside their corrupted small ones (Ramesh et al. 2022, sec. 2.1).

Shapes: B batch, S side of a crop, s side of the small one; f = S / s.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dalle_cli.data import augment, degrade
from dalle_cli.data.augment import Pixels
from dalle_cli.data.datasets import Dataset
from dalle_cli.data.loader import Loader, sequential
from dalle_cli.data.split import split
from dalle_cli.diffusion.noise import row_noise
from dalle_cli.errors import DalleError
from dalle_cli.models.upsampler import Upsampler, UpsamplerConfig, enlarge
from dalle_cli.sampling.decoder import Brush, process, to_signed, to_stored, upsample
from dalle_cli.training.config import TrainConfig
from dalle_cli.training.denoising import Bins, Draws, denoising, drawn, made_ahead
from dalle_cli.training.loop import Batch, mix
from dalle_cli.viz.grid import sheet

VALIDATION_BATCH = 16
_DEGRADE = 4  # the last word of a seed, as in data/loader.py


@dataclass(frozen=True)
class UpsamplerTrain(TrainConfig):
    """The paper's numbers for the first upsampler (table 3); small recipes say their own."""

    steps: int = 1_000_000
    batch_size: int = 1024
    lr: float = 1.2e-4
    schedule: str = "constant"
    ema: float = 0.9999
    augment: str = "center"
    flip: bool = False
    crop: int = 4  # the side of a picture is so many times that of a crop
    corruption: str = "blur"  # of the small picture; or "bsr", the paper's for the second upsampler, or "none"
    blur_sigma: float = 0.6  # pixels of the small picture; from memory, not in the paper
    corruption_strength: float = 1.0  # share of the ranges of "bsr"
    min_snr: float = 0.0
    sheet_pictures: int = 4  # held-out pictures that are enlarged at each validation; 0 = none
    sheet_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        augment.by_name(self.augment)
        degrade.by_name(self.corruption, self.blur_sigma, self.corruption_strength)
        if self.crop < 1:
            raise DalleError(f"expected crop of at least 1, found {self.crop}; 4 is the paper's, 1 is no crop")
        if self.min_snr < 0:
            raise DalleError(f"expected min_snr of at least 0, found {self.min_snr}; 5 is usual, 0 is off")
        if self.sheet_pictures < 0 or self.sheet_steps < 1:
            found = f"{self.sheet_pictures} and {self.sheet_steps}"
            raise DalleError(f"expected sheet_pictures of 0 or more and sheet_steps of 1 or more, found {found}")


class UpsamplerTask:
    """Pictures alone: each crop is to be denoised beside the small picture that is made of it."""

    def __init__(self, config: UpsamplerConfig, train: UpsamplerTrain, data: Dataset, seed: int, workers: int):
        self.config, self.options, self.data, self.seed, self.workers = config, train, data, seed, workers
        if config.image_size % (train.crop * config.factor):
            found = f"crops of a {train.crop}th of {config.image_size} pixels"
            raise DalleError(f"expected crops that {config.factor} divides, found {found}; lower crop")
        self.side = config.image_size // train.crop
        config.check_side(self.side)
        self.process = process(config)
        torch.manual_seed(mix(seed, -1))
        self.model = Upsampler(config)
        self.degrade = degrade.by_name(train.corruption, train.blur_sigma, train.corruption_strength)
        self.rank, self.world = 0, 1
        self.rows, held_out = split(data.ids, train.validation)
        self.held_out = held_out[: train.max_validation]

    def share(self, rank: int, world: int) -> None:
        """From now on this process reads its part of each batch alone."""
        self.rank, self.world = rank, world

    def batches(self, start: int) -> Generator[Batch]:
        """What is to be denoised and what is seen beside it, a function of the seed and the update.

        Crops (B, 3, S, S) uint8, noise (B, 3, S, S), timesteps (B,), small pictures (B, 3, s, s) in [-1, 1] and the
        timesteps that they are noised to (B,), -1 for not at all.
        """
        o, c = self.options, self.config
        part = o.batch_size // self.world
        slots = range(self.rank * part, (self.rank + 1) * part)
        crop = degrade.crops(augment.by_name(o.augment, o.flip), c.image_size)
        loader = Loader(
            self.data, self.side, crop, part, self.seed, self.workers, self.rows, rank=self.rank, world=self.world
        )

        def draw(step: int) -> Draws:
            return drawn(self.seed, step, slots, c.n_timestep, self.side, 0)

        with closing(made_ahead(draw, start)) as draws, ThreadPoolExecutor(max(self.workers, 1)) as pool:
            for batch, own in zip(loader.batches(start), draws, strict=False):
                low, levels = self._small(batch.images, batch.rows.tolist(), batch.epochs.tolist(), pool)
                yield torch.from_numpy(batch.images), own.noise, own.t, low, levels

    def _small(
        self, images: Pixels, rows: Sequence[int], epochs: Sequence[int], pool: ThreadPoolExecutor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Small pictures in [-1, 1], and the timesteps that they are noised to: -> (B, 3, s, s), (B,).

        Each is a function of (seed, row, epoch) and the picture.
        """
        c = self.config
        small, most = images.shape[-1] // c.factor, int(c.low_noise * c.n_timestep)

        def make(picture: Pixels, row: int, epoch: int) -> tuple[Pixels, int, NDArray[np.float32]]:
            rng = np.random.default_rng([self.seed, row, epoch, _DEGRADE])
            low = self.degrade(np.ascontiguousarray(picture.transpose(1, 2, 0)), small, rng).transpose(2, 0, 1)
            if not most:
                return low, -1, np.zeros(0, np.float32)
            return low, int(rng.integers(-1, most)), rng.standard_normal(low.shape, dtype=np.float32)

        pictures, numbers, noise = zip(*(pool.map if pool else map)(make, images, rows, epochs), strict=True)
        low, levels = to_signed(torch.from_numpy(np.stack(pictures))), torch.tensor(numbers)
        if most:
            noised = self.process.noised(low, levels.clamp(min=0), torch.from_numpy(np.stack(noise)))
            low = torch.where((levels < 0)[:, None, None, None], low, noised)
        return low, levels

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the noise, and the bound that teaches the variance."""
        images, noise, t, low, levels = batch
        beside = enlarge(low, self.config.factor)
        return denoising(
            self.process, lambda x, t: self.model(x, t, beside, levels), images, t, noise, self.options.min_snr
        )

    def split(self, batch: Batch, parts: int, step: int, generator: torch.Generator) -> list[Batch]:
        """Equal parts, each with what was drawn for its pictures."""
        return list(zip(*(column.chunk(parts) for column in batch), strict=True))

    def _held_out(self, most: int) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
        """The first so many held-out pictures, whole: their rows, they as uint8, and what `_small` makes of them."""
        size = self.config.image_size
        for rows, images in sequential(self.data, size, self.held_out[:most].tolist(), VALIDATION_BATCH, self.workers):
            yield rows.tolist(), torch.from_numpy(images), *self._small(images, rows.tolist(), [0] * len(rows))

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Squared error on held-out pictures, whole, by timestep."""
        assert isinstance(model, Upsampler)
        bins = Bins(self.process)
        for rows, images, low, levels in self._held_out(len(self.held_out)):
            beside = enlarge(low.to(device), self.config.factor), levels.to(device)
            bins.add(lambda x, t, b=beside: model(x, t, *b), images.to(device), rows)  # type: ignore[misc]
        return bins.figures()

    def sheet(self, model: nn.Module, device: torch.device, path: Path) -> None:
        """Held-out pictures made small, enlarged by the model, and as they are."""
        assert isinstance(model, Upsampler)
        found = next(self._held_out(min(self.options.sheet_pictures, len(self.held_out), VALIDATION_BATCH)), None)
        if found is None:
            return
        rows, images, signed, _ = found
        low = to_stored(signed)
        larger = upsample(model, low, Brush(self.options.sheet_steps), row_noise(self.seed, rows, "upsampler"))
        shown = low.repeat_interleave(self.config.factor, 2).repeat_interleave(self.config.factor, 3)
        pixels = [*shown.numpy(), *larger.cpu().numpy(), *images.numpy()]
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet(pixels, columns=len(rows), title="held-out pictures: small, enlarged, and as they are").save(path)
