"""What the trainings of diffusion models over images share: random draws, loss, and metrics by timestep.

B batch, S image side, T timesteps. What is drawn for an image is a function of (seed, update, its slot in the batch):
parts of a batch, and several processes, draw what one would.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dalle_cli.data import loader
from dalle_cli.data.datasets import Dataset
from dalle_cli.diffusion.losses import by_timestep, losses
from dalle_cli.diffusion.noise import noise_for
from dalle_cli.diffusion.process import Process
from dalle_cli.errors import DalleError
from dalle_cli.sampling.decoder import DenoiserConfig, to_signed, unet_process
from dalle_cli.training.config import ImageTrainConfig, check_at_least, setting
from dalle_cli.training.task import Batch, EqualParts, ImageTask

N_BINS = 4  # of the timesteps, for validation
_DRAWS = 3  # the last word of a seed, as in data/loader.py
_GOLDEN = 0.6180339887498949  # whose multiples, modulo 1, are spread evenly however many there are

Predict = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> the network's output


@dataclass(frozen=True)
class DenoisingTrain(ImageTrainConfig):
    """What the paper's decoder and upsamplers have in common (2022, table 3)."""

    lr: float = 1.2e-4
    schedule: str = "constant"
    ema: float = 0.9999
    min_snr: float = 0.0  # gamma of Hang et al. 2023, who take 5; 0 weights all timesteps equally
    velocity_loss: bool = False  # the squared error of v, whatever the network predicts
    # timesteps from a logistic-normal (Esser et al. 2024, sec. 3.1), of this mean and standard deviation before the
    # logistic function, 1 being noise; 0 = uniform
    timestep_mean: float = 0.0
    timestep_std: float = 0.0
    grid_images: int = setting(0, affects="nothing")  # held-out images sampled at each validation; 0 = none
    grid_steps: int = setting(10, affects="nothing")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "min_snr", "timestep_std", "grid_images")
        if self.velocity_loss and self.min_snr:
            raise DalleError("expected velocity_loss or min_snr, found both; leave one out")
        check_at_least(self, 1, "grid_steps")


class Draws(NamedTuple):
    """Of each image: its timestep (B,) int64, its noise (B, 3, S, S) float32, and numbers in [0, 1) (B, k)."""

    t: Tensor
    noise: Tensor
    uniform: NDArray[np.float64]


def draws(
    seed: int, step: int, slots: Sequence[int], n_timestep: int, side: int, n_uniform: int,
    timesteps: tuple[float, float] = (0.0, 0.0),
) -> Draws:  # fmt: skip
    """What is drawn for these slots of an update's batch; `timesteps` are mean and deviation of the logistic-normal."""
    mean, std = timesteps
    t = np.empty(len(slots), dtype=np.int64)
    noise = np.empty((len(slots), 3, side, side), dtype=np.float32)
    uniform = np.empty((len(slots), n_uniform))
    for i, slot in enumerate(slots):
        rng = np.random.default_rng([seed, step, slot, _DRAWS])
        t[i] = n_timestep / (1 + np.exp(-mean - std * rng.standard_normal())) if std else rng.integers(n_timestep)
        uniform[i] = rng.random(n_uniform)
        rng.standard_normal(out=noise[i], dtype=np.float32)
    return Draws(torch.from_numpy(t), torch.from_numpy(noise), uniform)


def denoising(
    process: Process, predict: Predict, images: Tensor, t: Tensor, noise: Tensor, options: DenoisingTrain
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a network at noised images, uint8 (B, 3, S, S), and its parts: -> ()."""
    here = t.cpu()  # where the schedule is; the one wait for the device
    x_start = to_signed(images)
    x = process.add_noise(x_start, here, noise)
    weighted: dict[str, Any] = {"min_snr": options.min_snr or None, "velocity": options.velocity_loss}
    found = losses(process, predict(x, t), x_start, x, here, noise, **weighted)
    metrics = {"mse": found.simple.mean()}
    if found.bound is not None:
        metrics["bits"] = found.bound.mean()
    return found.total.mean(), metrics


class Bins:
    """Squared error of held-out images in equal bins of the timesteps; each image is noised once in each bin."""

    def __init__(self, process: Process) -> None:
        self.process, self.n = process, len(process.schedule)
        self.sums, self.counts = torch.zeros(N_BINS), torch.zeros(N_BINS)

    def add(self, predict: Predict, images: Tensor, numbers: Sequence[int]) -> None:
        """Images (B, 3, S, S) uint8 by their rows in the data set, which alone decide timesteps and noise."""
        x_start, n_bins = to_signed(images), min(N_BINS, self.n)
        for number in range(n_bins):
            within = [(number + i * _GOLDEN % 1) / n_bins for i in numbers]
            t = torch.tensor([min(int(share * self.n), self.n - 1) for share in within])
            noise = noise_for(0, numbers, number, x_start.shape[1:], "validation").to(x_start.device)
            x = self.process.add_noise(x_start, t, noise)
            found = losses(self.process, predict(x, t.to(x.device)), x_start, x, t, noise)
            sums, counts = by_timestep(found.simple.cpu(), t, self.n, N_BINS)
            self.sums += sums
            self.counts += counts

    def metrics(self) -> dict[str, float]:
        """The mean, and that of each bin; nothing if there was no image."""
        if not self.counts.sum():
            return {}
        metrics = {"mse_held_out": float(self.sums.sum() / self.counts.sum())}
        for number in range(N_BINS):
            first, last = -(-number * self.n // N_BINS), -(-(number + 1) * self.n // N_BINS) - 1
            if self.counts[number]:
                metrics[f"mse_t{first}_{last}"] = float(self.sums[number] / self.counts[number])
        return metrics


class DenoisingTask(EqualParts, ImageTask, ABC):
    """A diffusion model over images, each with some conditioning; one subclass per model."""

    config: DenoiserConfig
    options: DenoisingTrain
    model: nn.Module
    side: int  # of the training images
    n_uniform = 0  # further random numbers that an image needs

    def __init__(self, config: DenoiserConfig, train: DenoisingTrain, data: Dataset, seed: int, workers: int):
        super().__init__(train, data, seed, workers)
        self.config, self.process = config, unet_process(config)

    @abstractmethod
    def conditioning(self, batch: loader.Batch, own: Draws, pool: ThreadPoolExecutor) -> Batch:
        """The conditioning of a batch of training images."""

    @abstractmethod
    def held_out_conditioning(self, rows: list[int], images: Tensor) -> Batch:
        """The conditioning of held-out images, always the same."""

    @abstractmethod
    def predict(self, model: Any, conditioning: Sequence[Tensor]) -> Predict:
        """The network with its conditioning."""

    def batches(self, start: int) -> Generator[Batch]:
        """Images (B, 3, S, S) uint8, noise (B, 3, S, S), timesteps (B,), and the columns of their conditioning."""
        slots = self.slots

        def make(step: int) -> Draws:
            o, n_timestep = self.options, len(self.process.schedule)
            timesteps = (o.timestep_mean, o.timestep_std)
            return draws(self.seed, step, slots, n_timestep, self.side, self.n_uniform, timesteps)

        with closing(loader.prefetch(make, start)) as ahead, ThreadPoolExecutor(max(self.workers, 1)) as pool:
            for batch, own in zip(self.loaded(start, self.side), ahead, strict=False):
                yield torch.from_numpy(batch.images), own.noise, own.t, *self.conditioning(batch, own, pool)

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the noise, and the bound that teaches the variance."""
        images, noise, t, *conditioning = batch
        return denoising(self.process, self.predict(self.model, conditioning), images, t, noise, self.options)

    def held_out_batches(self, n: int | None = None) -> Iterator[tuple[list[int], Tensor, Batch]]:
        """The first n held-out images (default: all), whole: rows, (b, 3, S, S) uint8, and their conditioning."""
        for rows, images in self.held_out_images(self.config.image_size, n):
            yield rows.tolist(), images, self.held_out_conditioning(rows.tolist(), images)

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Squared error on held-out images, by timestep."""
        bins = Bins(self.process)
        for rows, images, conditioning in self.held_out_batches():
            bins.add(self.predict(model, [c.to(device) for c in conditioning]), images.to(device), rows)
        return bins.metrics()
