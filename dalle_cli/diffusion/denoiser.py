"""From a network to what samplers call: guidance, parameterization, thresholds.

B batch, C channels. A *network* is a function (x, t) of (B, C, ...) and (B,) timesteps that closes over its
conditioning; a *denoiser* a function (x, t) of a batch and one timestep for all of it. Both are plain functions: to
show progress, or to cut a batch that is too large, wrap them in another.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dalle_cli.diffusion.process import Process, to_epsilon, to_x_start
from dalle_cli.diffusion.schedules import Schedule, sigma_of_level
from dalle_cli.errors import DalleError


class Denoised(NamedTuple):
    """Data and noise that x_t is made of, (B, C, ...), and where between its bounds the log variance is, if learned."""

    x_start: Tensor
    epsilon: Tensor
    place: Tensor | None = None


Network = Callable[[Tensor, Tensor], Tensor]
Denoiser = Callable[[Tensor, float], Denoised]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, null + scale * (conditional - null) (Ho & Salimans 2022, eq. 6, with scale = 1 + w).

    It holds where low < sigma <= high (Kynkäänniemi et al. 2024, arXiv 2404.07724); elsewhere, and everywhere at scale
    1, no null is computed.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = math.inf

    def holds(self, level: float) -> bool:
        """Whether a timestep of this level is guided."""
        return self.scale != 1 and self.low < sigma_of_level(level) <= self.high


def guided_span(schedule: Schedule, scale: float, begin: float, end: float) -> Guidance:
    """Guidance from one share of the way to another, 0 being noise and 1 data, whatever the number of steps.

    Spans that meet share no timestep, and 0 to 1 is all.

    Raises:
        DalleError: they are no shares, or the wrong way round.
    """
    if not 0 <= begin <= end <= 1:
        found = f"{begin} to {end}"
        raise DalleError(f"expected guidance from a share of the way to a later one, found {found}; 0 to 1 is all")
    high, low = (sigma_of_level(schedule.level((1 - share) * (len(schedule) - 1))) for share in (begin, end))
    return Guidance(scale, 0.0 if end == 1 else low, math.inf if begin == 0 else high)


@dataclass(frozen=True)
class Threshold:
    """Keep x_start within [-limit, limit], what the data never leave.

    With a quantile in (0, 1) it is dynamic: a sample is cut at s, that quantile of its absolute values or the limit if
    that is more, and scaled back by limit / s (Saharia et al. 2022, sec. 2.3). Exclude, it is clipped.
    """

    limit: float = 1.0
    quantile: float | None = None

    def __call__(self, x_start: Tensor) -> Tensor:
        if self.quantile is None:
            return x_start.clamp(-self.limit, self.limit)
        # one at a time: torch takes no quantile of more than 2^24 numbers
        cuts = torch.stack([sample.abs().flatten().quantile(self.quantile) for sample in x_start])
        cuts = cuts.clamp(min=self.limit).view(-1, *[1] * (x_start.ndim - 1))
        return x_start.clamp(-cuts, cuts) * (self.limit / cuts)


UNGUIDED = Guidance()


def _timesteps(t: float, x: Tensor) -> Tensor:
    """(B,) of one timestep, int64 where it is whole; a fraction in 32 bits or more, as bfloat16 knows no 999.5."""
    dtype = torch.int64 if t == int(t) else torch.promote_types(x.dtype, torch.float32)
    return torch.full((len(x),), t, dtype=dtype, device=x.device)


def denoiser(
    network: Network, process: Process, guidance: Guidance = UNGUIDED, threshold: Threshold | None = None
) -> Denoiser:
    """The denoiser that a network makes: guided, then read as x_start and epsilon, then within the threshold.

    Guided, the network is called with each x twice, (2B, C, ...), and must take the first half as conditional, the
    second as null; otherwise with (B, C, ...), all conditional. So it closes over 2B rows of conditioning, and takes as
    many of them as there are x. Its arithmetic may be in another dtype than x; the rest is in that of x.
    """

    def denoise(x: Tensor, t: float) -> Denoised:
        level = process.schedule.level(t)
        guided = guidance.holds(level)
        rows = torch.cat([x, x]) if guided else x
        output, place = process.split(network(rows, _timesteps(t, rows)), x)
        if guided:
            conditional, null = output.chunk(2)
            # all three predictions are linear in each other at a given x: it is the same to guide any of them
            output = null + guidance.scale * (conditional - null)
            place = None if place is None else place.chunk(2)[0]  # the variance is the conditional one, as in GLIDE
        x_start = to_x_start(process.prediction, output, x, level)
        if threshold is None:
            return Denoised(x_start, to_epsilon(process.prediction, output, x, level), place)
        x_start = threshold(x_start)
        return Denoised(x_start, to_epsilon("x_start", x_start, x, level), place)

    return denoise
