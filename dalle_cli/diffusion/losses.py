"""Losses of a denoising network, one for each sample.

B batch, C channels, T timesteps. `t` is best on the CPU (see `schedules.extract`).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dalle_cli.diffusion.process import Process, posterior_mean, scale, target, to_x_start, variance_bounds
from dalle_cli.diffusion.schedules import Schedule, extract

BOUND_WEIGHT = 0.001  # Nichol & Dhariwal 2021, sec. 3.1: lambda
MAX_VELOCITY_WEIGHT = 400.0  # Li & He 2025: near data the error of v is that of x_start without bound
HALF_BIN = 1 / 255  # pixels are 256 values in [-1, 1]


class Losses(NamedTuple):
    """The loss of each sample and its parts, the weighted squared error and the bound in bits per value: (B,) each."""

    total: Tensor
    simple: Tensor
    bound: Tensor | None


def losses(
    process: Process,
    output: Tensor,
    x_start: Tensor,
    x: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    min_snr: float | None = None,
    velocity: bool = False,
    bound_weight: float = BOUND_WEIGHT,
) -> Losses:
    """The loss of a network's output at x = process.add_noise(x_start, t, noise).

    `output` is (B, C or 2C, ...), t (B,) int64, the others (B, C, ...). The loss is the squared error of the prediction
    (Ho et al. 2020, eq. 14), averaged over a sample's values, and weighted if `min_snr` is a gamma, or with `velocity`
    so that it is the squared error of v, whatever the network predicts. If the variance is learned, T * bound_weight
    times the bound is added (Nichol & Dhariwal 2021, eq. 16); x_start must then be pixels in [-1, 1].
    """
    x_start, x, noise = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (x_start, x, noise))
    prediction, interpolation = process.split(output, x)
    wanted = target(process.prediction, x_start, noise, process.schedule.at(t, x))
    simple = (prediction - wanted).square().flatten(1).mean(1)
    if velocity:
        simple = scale(extract(velocity_weights(process.schedule, process.prediction), t, simple), simple)
    elif min_snr is not None:
        simple = scale(extract(min_snr_weights(process.schedule, process.prediction, min_snr), t, simple), simple)
    if interpolation is None:
        return Losses(simple, simple, None)
    # eq. 16 trains the variance alone: no gradient flows to the mean
    bound = variational_bound(process, prediction.detach(), interpolation, x_start, x, t)
    return Losses(simple + bound_weight * len(process.schedule) * bound, simple, bound)


def min_snr_weights(schedule: Schedule, prediction: str, gamma: float = 5.0) -> Tensor:
    """Loss weights equal to min(SNR, gamma) in terms of x_start: (T,) float64 (Hang et al. 2023, sec. 3.4).

    An error of epsilon is that of x_start times sqrt(SNR); an error of v is that of x_start times sqrt(SNR + 1).
    """
    snr = schedule.snr
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR, also where SNR is 0
    capped = snr.clamp(max=gamma)
    return capped if prediction == "x_start" else capped / (snr + 1)


def velocity_weights(schedule: Schedule, prediction: str) -> Tensor:
    """Loss weights that make a squared error that of v: (T,) float64, at most MAX_VELOCITY_WEIGHT.

    An error of x_start is that of v times sqrt(1 - alpha_bar); an error of epsilon is that of v times sqrt(alpha_bar).
    """
    alpha_bars = schedule.alphas_cumprod
    variance = {"x_start": 1 - alpha_bars, "epsilon": alpha_bars, "v": torch.ones_like(alpha_bars)}[prediction]
    return (1 / variance).clamp(max=MAX_VELOCITY_WEIGHT)


def variational_bound(
    process: Process, prediction: Tensor, interpolation: Tensor, x_start: Tensor, x: Tensor, t: Tensor
) -> Tensor:
    """One term of the variational bound, L_t in bits per value (Ho et al. 2020, eq. 5): (B, C, ...) ... -> (B,).

    KL(q(x_s | x_t, x_start) || p(x_s | x_t)); at t = 0 the negative log-likelihood of the pixels.
    """
    alpha_bar, alpha_bar_next = process.schedule.at(t, x), extract(process.schedule.previous, t, x)
    low, high = (extract(logs, t, x) for logs in _log_variance_bounds(process.schedule))
    mean = posterior_mean(to_x_start(process.prediction, prediction, x, alpha_bar), x, alpha_bar, alpha_bar_next)
    log_variance = scale(high, interpolation) + scale(low, 1 - interpolation)  # Nichol & Dhariwal 2021, eq. 15
    true_mean, true_log_variance = posterior_mean(x_start, x, alpha_bar, alpha_bar_next), scale(low, torch.ones_like(x))
    divergence = normal_kl(true_mean, true_log_variance, mean, log_variance)
    surprise = -discretized_log_likelihood(x_start, mean, log_variance)
    first = (t == 0).to(x.device)
    return torch.where(first, surprise.flatten(1).mean(1), divergence.flatten(1).mean(1)) / math.log(2)


def normal_kl(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL(q || p) of two normal distributions, elementwise, in nats."""
    ratio = (log_variance_q - log_variance_p).exp() + (mean_q - mean_p).square() * (-log_variance_p).exp()
    return (log_variance_p - log_variance_q + ratio - 1) / 2


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """ln of a normal distribution's mass in each pixel's bin; the outermost bins are open (Ho et al. 2020, eq. 13).

    x holds 256 possible values in [-1, 1]. The mass is clamped to at least 1e-12, as in the papers' code.
    """
    scale = (-log_variance / 2).exp() * math.sqrt(0.5)
    above, below = ((x - mean + side * HALF_BIN) * scale for side in (1, -1))
    upper = torch.where(x > 1 - HALF_BIN, 1.0, above.erf())
    lower = torch.where(x < -1 + HALF_BIN, -1.0, below.erf())
    return ((upper - lower) / 2).clamp(min=1e-12).log()


def by_timestep(values: Tensor, t: Tensor, n_timesteps: int, n_bins: int) -> tuple[Tensor, Tensor]:
    """Sums and counts of (B,) values in equal bins of their timesteps: (n_bins,) each; add them up over batches."""
    bins = t.to(values.device) * n_bins // n_timesteps
    sums = values.new_zeros(n_bins).index_add(0, bins, values.detach())
    return sums, torch.bincount(bins, minlength=n_bins)


def _log_variance_bounds(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Log variance bounds, (T,) each; the first lower one, log 0, is replaced by the second, as in their code."""
    small, large = variance_bounds(schedule.alphas_cumprod, schedule.previous)
    return torch.cat([small[1:2], small[1:]]).log(), large.log()
