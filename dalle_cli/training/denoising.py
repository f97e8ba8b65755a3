"""What the trainings of diffusion models over pictures share: what is drawn, and figures by timestep.

B batch, S side in pixels, T timesteps. What is drawn for a picture is a function of (seed, update, its slot in the
batch), so that parts of a batch, and several processes, draw what one would.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from dalle_cli.diffusion.losses import by_timestep, losses
from dalle_cli.diffusion.noise import noise_for
from dalle_cli.diffusion.process import Process
from dalle_cli.sampling.decoder import to_signed

AHEAD = 2  # batches whose draws lie ready
N_BINS = 4  # of the timesteps, for validation
_DRAWS = 3  # the last word of a seed, as in data/loader.py
_GOLDEN = 0.6180339887498949  # whose multiples, modulo 1, are spread evenly however many there are

T = TypeVar("T")


class Draws(NamedTuple):
    """Of each picture: its timestep (B,) int64, its noise (B, 3, S, S) float32, and numbers in [0, 1) (B, k)."""

    t: Tensor
    noise: Tensor
    uniform: np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def drawn(seed: int, step: int, slots: Sequence[int], n_timestep: int, side: int, n_uniform: int) -> Draws:
    """What is drawn for these slots of an update's batch."""
    t = np.empty(len(slots), dtype=np.int64)
    noise = np.empty((len(slots), 3, side, side), dtype=np.float32)
    uniform = np.empty((len(slots), n_uniform))
    for i, slot in enumerate(slots):
        rng = np.random.default_rng([seed, step, slot, _DRAWS])
        t[i], uniform[i] = rng.integers(n_timestep), rng.random(n_uniform)
        rng.standard_normal(out=noise[i], dtype=np.float32)
    return Draws(torch.from_numpy(t), torch.from_numpy(noise), uniform)


def made_ahead(make: Callable[[int], T], start: int) -> Generator[T]:
    """make(start), make(start + 1), ... for ever, each made while those before are used."""
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(make, start + i) for i in range(AHEAD))
        for step in count(start + AHEAD):
            ready = ahead.popleft().result()
            ahead.append(pool.submit(make, step))
            yield ready


def denoising(
    process: Process,
    predict: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    t: Tensor,
    noise: Tensor,
    min_snr: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a network (x, t) -> output at noised pictures, uint8 (B, 3, S, S), and its parts: -> ()."""
    here = t.cpu()  # where the schedule is; the one wait for the device
    x_start = to_signed(images)
    x = process.noised(x_start, here, noise)
    found = losses(process, predict(x, t), x_start, x, here, noise, min_snr=min_snr or None)
    figures = {"mse": found.simple.mean()}
    if found.bound is not None:
        figures["bits"] = found.bound.mean()
    return found.total.mean(), figures


class Bins:
    """Squared error of held-out pictures in equal bins of the timesteps; each picture is noised once in each bin."""

    def __init__(self, process: Process) -> None:
        self.process, self.n = process, len(process.schedule)
        self.sums, self.counts = torch.zeros(N_BINS), torch.zeros(N_BINS)

    def add(self, predict: Callable[[Tensor, Tensor], Tensor], images: Tensor, numbers: Sequence[int]) -> None:
        """Pictures (B, 3, S, S) uint8 by their numbers in the data set, which alone decide timesteps and noise."""
        x_start, n_bins = to_signed(images), min(N_BINS, self.n)
        for number in range(n_bins):
            within = [(number + i * _GOLDEN % 1) / n_bins for i in numbers]
            t = torch.tensor([min(int(share * self.n), self.n - 1) for share in within])
            noise = noise_for(0, numbers, number, x_start.shape[1:], "validation").to(x_start.device)
            x = self.process.noised(x_start, t, noise)
            found = losses(self.process, predict(x, t.to(x.device)), x_start, x, t, noise)
            sums, counts = by_timestep(found.simple.cpu(), t, self.n, N_BINS)
            self.sums += sums
            self.counts += counts

    def figures(self) -> dict[str, float]:
        """The mean, and that of each bin; nothing before any picture came."""
        if not self.counts.sum():
            return {}
        figures = {"mse_held_out": float(self.sums.sum() / self.counts.sum())}
        for number in range(N_BINS):
            first, last = -(-number * self.n // N_BINS), -(-(number + 1) * self.n // N_BINS) - 1
            if self.counts[number]:
                figures[f"mse_t{first}_{last}"] = float(self.sums[number] / self.counts[number])
        return figures
