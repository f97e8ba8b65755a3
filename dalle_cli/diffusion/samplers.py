"""Samplers: plain functions over a denoiser, in variance-preserving time.

B batch. Each takes x at the first of its steps' levels, from noise (`noise(0, shape)`) or from an inversion, and gives
x at the last, which is data. All samples of a batch are drawn side by side and none sees another.
"""

import math

import torch
from torch import Tensor

from dalle_cli.diffusion.denoiser import Denoiser
from dalle_cli.diffusion.noise import Noise
from dalle_cli.diffusion.process import posterior_mean, variance_bounds
from dalle_cli.diffusion.schedules import SIGMA_MAX, Schedule, Steps, sigma_of_level, spaced
from dalle_cli.errors import DalleError

SAMPLERS = ("ddpm", "ddim", "dpm++", "heun")


def sample(
    sampler: str,
    denoise: Denoiser,
    schedule: Schedule,
    x: Tensor,
    n: int,
    noise: Noise,
    *,
    eta: float = 0.0,
    spacing: str | None = None,
) -> Tensor:
    """Draw by a sampler's name in n steps, `heun` in up to 2n - 1 calls: (B, ...) noise -> (B, ...) data.

    `eta` is of `ddim` alone. Exclude `spacing`, `heun` takes karras and the others trailing timesteps.

    Raises:
        DalleError: an unknown sampler or spacing, a number of steps or an eta out of its range.
    """
    if sampler not in SAMPLERS:
        raise DalleError(f"expected a sampler among {', '.join(SAMPLERS)}, found {sampler!r}; take one of them")
    steps = spaced(schedule, n, spacing or ("karras" if sampler == "heun" else "trailing"))
    if sampler == "ddpm":
        return ddpm(denoise, x, steps, noise)
    if sampler == "ddim":
        return ddim(denoise, x, steps, eta, noise)
    return dpm_solver(denoise, x, steps) if sampler == "dpm++" else heun(denoise, x, steps)


@torch.no_grad()
def ddpm(denoise: Denoiser, x: Tensor, steps: Steps, noise: Noise, large: bool = False) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) over any of the timesteps (Nichol & Dhariwal 2021, eq. 19).

    The variance is the learned one (their eq. 15), or the lower bound, or, with `large`, the upper.
    """
    for i, t in enumerate(steps.timesteps):
        level, following = steps.levels[i : i + 2]
        x_start, _, place = denoise(x, t)
        x = posterior_mean(x_start, x, level, following)
        if following < 1:
            small, most = variance_bounds(level, following)
            deviation: Tensor | float = math.sqrt(most if large else small)
            if place is not None:
                deviation = ((place * math.log(most) + (1 - place) * math.log(small)) / 2).exp()
            x = x + deviation * _noise(noise, i + 1, x)
    return x


@torch.no_grad()
def ddim(denoise: Denoiser, x: Tensor, steps: Steps, eta: float = 0.0, noise: Noise | None = None) -> Tensor:
    """DDIM (Song et al. 2021): eta 0 follows the probability-flow ODE, eta 1 has the noise of DDPM.

    Raises:
        DalleError: eta is not in [0, 1], or is above 0 without noise.
    """
    if not 0 <= eta <= 1:
        raise DalleError(f"expected eta in [0, 1], found {eta}; 0 adds no noise, 1 as much as DDPM")
    for i, t in enumerate(steps.timesteps):
        level, following = steps.levels[i : i + 2]
        x_start, epsilon, _ = denoise(x, t)
        variance = eta**2 * variance_bounds(level, following)[0]  # eq. 16
        x = math.sqrt(following) * x_start + math.sqrt(1 - following - variance) * epsilon  # eq. 12
        if variance > 0:
            if noise is None:
                raise DalleError(f"expected noise for eta {eta}, found none; give it, or take eta 0")
            x = x + math.sqrt(variance) * _noise(noise, i + 1, x)
    return x


@torch.no_grad()
def ddim_invert(denoise: Denoiser, x: Tensor, steps: Steps, iterations: int = 1) -> Tensor:
    """The noise from which `ddim` in the same steps draws x: (B, ...) data -> (B, ...) noise.

    A step of DDIM read backwards wants epsilon at the point that is sought. One iteration takes epsilon at the point
    known, but at the timestep sought, and is off by the order of a step; each further one takes it at the point found
    (as Pan et al. 2023, arXiv 2309.04907), which comes near the exact inverse at the price of a call. A threshold is no
    part of the ODE: leave it off.

    Raises:
        DalleError: no iteration.
    """
    if iterations < 1:
        raise DalleError(f"expected 1 iteration or more, found {iterations}; 1 is the usual inversion")
    for i in reversed(range(len(steps.timesteps))):
        level, following = steps.levels[i : i + 2]
        found = x
        for _ in range(iterations):
            epsilon = denoise(found, steps.timesteps[i]).epsilon
            x_start = (x - math.sqrt(1 - following) * epsilon) / math.sqrt(following)
            found = math.sqrt(level) * x_start + math.sqrt(1 - level) * epsilon
        x = found
    return x


@torch.no_grad()
def dpm_solver(denoise: Denoiser, x: Tensor, steps: Steps) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), h being the step in log(alpha / sigma).

    The first step, and the last where it ends at data and h is infinite, are of first order.
    """
    previous, h_previous = None, math.inf
    for i, t in enumerate(steps.timesteps):
        level, following = steps.levels[i : i + 2]
        x_start = denoise(x, t).x_start
        # exp(-h) = sigma_s alpha_t / (sigma_t alpha_s): a ratio, as at the ends the logarithms are infinite
        shrink = math.sqrt((1 - following) / (1 - level) * (level / following))
        h = -math.log(shrink) if shrink > 0 else math.inf
        ahead = x_start
        if previous is not None and math.isfinite(h):
            ahead = x_start + h / (2 * h_previous) * (x_start - previous)  # r = h_previous / h
        x = math.sqrt((1 - following) / (1 - level)) * x + math.sqrt(following) * (1 - shrink) * ahead
        previous, h_previous = x_start, h
    return x


@torch.no_grad()
def heun(denoise: Denoiser, x: Tensor, steps: Steps) -> Tensor:
    """Heun's second-order steps in sigma (Karras et al. 2022, algorithm 1), without added noise.

    x / sqrt(level) and sigma are their x and sigma, and d x / d sigma is epsilon. The last step is of first order, and
    so is one from above their largest sigma: where x is all noise DDIM makes no error, a mean of slopes a large one.
    """
    for i, t in enumerate(steps.timesteps):
        level, following = steps.levels[i : i + 2]
        x_start, epsilon, _ = denoise(x, t)
        euler = math.sqrt(following) * x_start + math.sqrt(1 - following) * epsilon
        if sigma_of_level(level) > 1.01 * SIGMA_MAX or i + 1 == len(steps.timesteps):
            x = euler
            continue
        slope = (epsilon + denoise(euler, steps.timesteps[i + 1]).epsilon) / 2
        width = sigma_of_level(following) - sigma_of_level(level)
        x = math.sqrt(following) * (x / math.sqrt(level) + width * slope)
    return x


def _noise(noise: Noise, step: int, x: Tensor) -> Tensor:
    return noise(step, x.shape[1:]).to(x.dtype).to(x.device)
