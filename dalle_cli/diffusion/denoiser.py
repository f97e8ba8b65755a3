"""Make a denoiser, which samplers call, from a network: guidance, parameterization, thresholds.

B batch, C channels. A *network* is a function (x, t) of (B, C, ...) and (B,) timesteps that closes over its
conditioning. A *denoiser* is a function (x, t) of a batch and one timestep for all of it. Wrap either in another
function to show progress or to split a large batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dalle_cli.diffusion.process import Process, to_epsilon, to_x_start
from dalle_cli.diffusion.schedules import Schedule, to_sigma
from dalle_cli.errors import DalleError


class Denoised(NamedTuple):
    """Estimates of the data and the noise in x_t, (B, C, ...); if the variance is learned, its interpolation, too.

    The interpolation is v of Nichol & Dhariwal (2021, eq. 15): 0 at the log variance's lower bound, 1 at the upper.
    """

    x_start: Tensor
    epsilon: Tensor
    interpolation: Tensor | None = None


Network = Callable[[Tensor, Tensor], Tensor]
Denoiser = Callable[[Tensor, float], Denoised]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, null + scale * (conditional - null) (Ho & Salimans 2022, eq. 6, with scale = 1 + w).

    It applies where low < sigma <= high (Kynkäänniemi et al. 2024, arXiv 2404.07724). Elsewhere, and at
    scale 1, the null prediction is not computed.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = math.inf

    def applies_at(self, alpha_bar: float) -> bool:
        """Whether a timestep with this alpha_bar is guided."""
        return self.scale != 1 and self.low < to_sigma(alpha_bar) <= self.high


def guidance_interval(schedule: Schedule, scale: float, begin: float, end: float) -> Guidance:
    """Guidance over an interval of the sampling trajectory, 0 being noise and 1 data, for any number of steps.

    Adjacent intervals share no timestep; 0 to 1 is the whole trajectory.

    Raises:
        DalleError: `begin` and `end` are not 0 <= begin <= end <= 1.
    """
    if not 0 <= begin <= end <= 1:
        found = f"{begin} to {end}"
        raise DalleError(f"expected a guidance interval within 0 to 1, found {found}; 0 to 1 guides every step")
    high, low = (to_sigma(schedule.alpha_bar((1 - share) * (len(schedule) - 1))) for share in (begin, end))
    return Guidance(scale, 0.0 if end == 1 else low, math.inf if begin == 0 else high)


@dataclass(frozen=True)
class Threshold:
    """Keep x_start within [-limit, limit], the range of the data.

    Without a quantile, clip. With a quantile in (0, 1), use dynamic thresholding (Saharia et al. 2022, sec. 2.3): clip
    a sample at s, that quantile of its absolute values or the limit if that is more, and scale it by limit / s.
    """

    limit: float = 1.0
    quantile: float | None = None

    def __call__(self, x_start: Tensor) -> Tensor:
        if self.quantile is None:
            return x_start.clamp(-self.limit, self.limit)
        # one sample at a time: torch computes no quantile of more than 2^24 numbers
        cuts = torch.stack([sample.abs().flatten().quantile(self.quantile) for sample in x_start])
        cuts = cuts.clamp(min=self.limit).view(-1, *[1] * (x_start.ndim - 1))
        return x_start.clamp(-cuts, cuts) * (self.limit / cuts)


UNGUIDED = Guidance()


def _timesteps(t: float, x: Tensor) -> Tensor:
    """One timestep as (B,): int64 if it is whole, else in 32 bits or more, since bfloat16 cannot represent 999.5."""
    dtype = torch.int64 if t == int(t) else torch.promote_types(x.dtype, torch.float32)
    return torch.full((len(x),), t, dtype=dtype, device=x.device)


def denoiser(
    network: Network, process: Process, guidance: Guidance = UNGUIDED, threshold: Threshold | None = None
) -> Denoiser:
    """Make a denoiser of a network: guide its output, convert it to x_start and epsilon, apply the threshold.

    At a guided timestep the network is called with x twice, (2B, C, ...), and must treat the first half as conditional,
    the second as null; otherwise with (B, C, ...), all conditional. So it closes over 2B rows of conditioning and uses
    the first len(x) of them. The network may compute in another dtype than x; the rest is in that of x.
    """

    def denoise(x: Tensor, t: float) -> Denoised:
        alpha_bar = process.schedule.alpha_bar(t)
        guided = guidance.applies_at(alpha_bar)
        rows = torch.cat([x, x]) if guided else x
        output, interpolation = process.split(network(rows, _timesteps(t, rows)), x)
        if guided:
            conditional, null = output.chunk(2)
            # at a given x the three predictions are linear in each other: guiding any of them is the same
            output = null + guidance.scale * (conditional - null)
            if interpolation is not None:
                interpolation = interpolation.chunk(2)[0]  # the conditional one, as in GLIDE
        x_start = to_x_start(process.prediction, output, x, alpha_bar)
        if threshold is None:
            return Denoised(x_start, to_epsilon(process.prediction, output, x, alpha_bar), interpolation)
        x_start = threshold(x_start)
        return Denoised(x_start, to_epsilon("x_start", x_start, x, alpha_bar), interpolation)

    return denoise
