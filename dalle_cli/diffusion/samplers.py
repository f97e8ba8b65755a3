"""Samplers: plain functions over a denoiser, for variance-preserving diffusion.

B batch. A sampler takes x at the first of its timesteps, which is noise (`noise(0, shape)`) or comes from an inversion,
and returns data. Samples of a batch do not affect each other.
"""

import math

import torch
from torch import Tensor

from dalle_cli.diffusion.denoiser import Denoiser
from dalle_cli.diffusion.noise import Noise
from dalle_cli.diffusion.process import posterior_mean, variance_bounds
from dalle_cli.diffusion.schedules import SIGMA_MAX, Schedule, Timesteps, select_timesteps, to_sigma
from dalle_cli.errors import DalleError

SAMPLERS = ("ddpm", "ddim", "dpm++", "heun")
VARIANCES = ("learned_range", "fixed_small", "fixed_large")


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
    variance: str | None = None,
) -> Tensor:
    """Sample in n steps with the sampler of this name: (B, ...) noise -> (B, ...) data.

    `heun` calls the denoiser up to 2n - 1 times, the others n times. `eta` is for `ddim`, `variance` for
    `ddpm`. By default `heun` uses karras timesteps and the others trailing ones.

    Raises:
        DalleError: an unknown sampler or spacing, or a number of steps or an eta out of range.
    """
    if sampler not in SAMPLERS:
        raise DalleError(f"expected a sampler among {', '.join(SAMPLERS)}, found {sampler!r}; take one of them")
    steps = select_timesteps(schedule, n, spacing or default_spacing(sampler))
    if sampler == "ddpm":
        return ddpm(denoise, x, steps, noise, variance)
    if sampler == "ddim":
        return ddim(denoise, x, steps, eta, noise)
    return dpm_solver(denoise, x, steps) if sampler == "dpm++" else heun(denoise, x, steps)


def default_spacing(sampler: str) -> str:
    """The spacing of a sampler's timesteps where none is given."""
    return "karras" if sampler == "heun" else "trailing"


@torch.no_grad()
def ddpm(denoise: Denoiser, x: Tensor, steps: Timesteps, noise: Noise, variance: str | None = None) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) over any of the timesteps (Nichol & Dhariwal 2021, eq. 19).

    The variance is the learned one, between its bounds (their eq. 15, `learned_range`), the lower bound (`fixed_small`)
    or the upper (`fixed_large`); by default the learned one if the denoiser gives one, else the lower bound.

    Raises:
        DalleError: an unknown variance, or a learned one that the denoiser does not give.
    """
    if variance not in (None, *VARIANCES):
        raise DalleError(f"expected a variance among {', '.join(VARIANCES)}, found {variance!r}; take one of them")
    for i, t in enumerate(steps.timesteps):
        alpha_bar, alpha_bar_next = steps.alphas_cumprod[i : i + 2]
        x_start, _, interpolation = denoise(x, t)
        if interpolation is None and variance == "learned_range":
            raise DalleError("expected a model with a learned variance for learned_range, found another; leave it out")
        x = posterior_mean(x_start, x, alpha_bar, alpha_bar_next)
        if alpha_bar_next < 1:
            small, most = variance_bounds(alpha_bar, alpha_bar_next)
            deviation: Tensor | float = math.sqrt(most if variance == "fixed_large" else small)
            if interpolation is not None and variance in (None, "learned_range"):
                deviation = ((interpolation * math.log(most) + (1 - interpolation) * math.log(small)) / 2).exp()
            x = x + deviation * _noise(noise, i + 1, x)
    return x


@torch.no_grad()
def ddim(denoise: Denoiser, x: Tensor, steps: Timesteps, eta: float = 0.0, noise: Noise | None = None) -> Tensor:
    """DDIM (Song et al. 2021): eta 0 is deterministic (the probability-flow ODE), eta 1 adds as much noise as DDPM.

    Raises:
        DalleError: eta is not in [0, 1], or is above 0 without `noise`.
    """
    if not 0 <= eta <= 1:
        raise DalleError(f"expected eta in [0, 1], found {eta}; 0 adds no noise, 1 as much as DDPM")
    for i, t in enumerate(steps.timesteps):
        alpha_bar, alpha_bar_next = steps.alphas_cumprod[i : i + 2]
        x_start, epsilon, _ = denoise(x, t)
        variance = eta**2 * variance_bounds(alpha_bar, alpha_bar_next)[0]  # eq. 16
        x = math.sqrt(alpha_bar_next) * x_start + math.sqrt(1 - alpha_bar_next - variance) * epsilon  # eq. 12
        if variance > 0:
            if noise is None:
                raise DalleError(f"expected noise for eta {eta}, found none; give it, or take eta 0")
            x = x + math.sqrt(variance) * _noise(noise, i + 1, x)
    return x


@torch.no_grad()
def ddim_invert(denoise: Denoiser, x: Tensor, steps: Timesteps, iterations: int = 1) -> Tensor:
    """DDIM inversion: the noise from which `ddim` at the same timesteps samples x, (B, ...) data -> (B, ...) noise.

    Inverting a step exactly needs epsilon at the noisier point, which is unknown. The first iteration evaluates epsilon
    at the known point, with the noisier timestep, which has an error of the order of a step. Each further one evaluates
    it at the last estimate (Pan et al. 2023, arXiv 2309.04907), a fixed-point iteration. Use a denoiser
    without a threshold, which is not part of the ODE.

    Raises:
        DalleError: fewer than 1 iteration.
    """
    if iterations < 1:
        raise DalleError(f"expected 1 iteration or more, found {iterations}; 1 is the usual inversion")
    for i in reversed(range(len(steps.timesteps))):
        alpha_bar, alpha_bar_next = steps.alphas_cumprod[i : i + 2]
        found = x
        for _ in range(iterations):
            epsilon = denoise(found, steps.timesteps[i]).epsilon
            x_start = (x - math.sqrt(1 - alpha_bar_next) * epsilon) / math.sqrt(alpha_bar_next)
            found = math.sqrt(alpha_bar) * x_start + math.sqrt(1 - alpha_bar) * epsilon
        x = found
    return x


@torch.no_grad()
def dpm_solver(denoise: Denoiser, x: Tensor, steps: Timesteps) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2); h is the step in log(alpha / sigma).

    The first step is of first order, and so is the last one if it ends at data, where h is infinite.
    """
    previous, h_previous = None, math.inf
    for i, t in enumerate(steps.timesteps):
        alpha_bar, alpha_bar_next = steps.alphas_cumprod[i : i + 2]
        x_start = denoise(x, t).x_start
        # exp(-h) = sigma_s alpha_t / (sigma_t alpha_s), as a ratio because the logarithms are infinite at the ends
        shrink = math.sqrt((1 - alpha_bar_next) / (1 - alpha_bar) * (alpha_bar / alpha_bar_next))
        h = -math.log(shrink) if shrink > 0 else math.inf
        ahead = x_start
        if previous is not None and math.isfinite(h):
            ahead = x_start + h / (2 * h_previous) * (x_start - previous)  # r = h_previous / h
        x = math.sqrt((1 - alpha_bar_next) / (1 - alpha_bar)) * x + math.sqrt(alpha_bar_next) * (1 - shrink) * ahead
        previous, h_previous = x_start, h
    return x


@torch.no_grad()
def heun(denoise: Denoiser, x: Tensor, steps: Timesteps) -> Tensor:
    """Heun's second-order method in sigma (Karras et al. 2022, algorithm 1), deterministic.

    Their x is x / sqrt(alpha_bar), and d x / d sigma is epsilon. The last step is of first order. So is a step
    from above their largest sigma: where x is pure noise a DDIM step is exact, but an average of two slopes is far off.
    """
    for i, t in enumerate(steps.timesteps):
        alpha_bar, alpha_bar_next = steps.alphas_cumprod[i : i + 2]
        x_start, epsilon, _ = denoise(x, t)
        euler = math.sqrt(alpha_bar_next) * x_start + math.sqrt(1 - alpha_bar_next) * epsilon
        if to_sigma(alpha_bar) > 1.01 * SIGMA_MAX or i + 1 == len(steps.timesteps):
            x = euler
            continue
        slope = (epsilon + denoise(euler, steps.timesteps[i + 1]).epsilon) / 2
        width = to_sigma(alpha_bar_next) - to_sigma(alpha_bar)
        x = math.sqrt(alpha_bar_next) * (x / math.sqrt(alpha_bar) + width * slope)
    return x


def _noise(noise: Noise, step: int, x: Tensor) -> Tensor:
    return noise(step, x.shape[1:]).to(x.dtype).to(x.device)
