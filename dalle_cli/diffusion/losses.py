"""Losses of a denoising network, one for each sample.

B batch, C channels, T timesteps. `t` is best on the CPU (see `schedules.spread`).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dalle_cli.diffusion.process import Process, posterior_mean, target, times, to_x_start, variance_bounds
from dalle_cli.diffusion.schedules import Schedule, spread

BOUND_WEIGHT = 0.001  # Nichol & Dhariwal 2021, sec. 3.1: lambda
HALF_BIN = 1 / 255  # pixels are 256 values in [-1, 1]


class Losses(NamedTuple):
    """What to minimize, and its parts: weighted squared error, and the bound in bits a value; (B,) each."""

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
    bound_weight: float = BOUND_WEIGHT,
) -> Losses:
    """The loss of a network's output at x = process.noised(x_start, t, noise).

    (B, C or 2C, ...), (B,) int64 and thrice (B, C, ...). Squared error of what the network predicts (Ho et al. 2020,
    eq. 14), averaged over a sample's values, and weighted where `min_snr` is a gamma. Where the variance is learned,
    plus the bound, T * bound_weight times (Nichol & Dhariwal 2021, eq. 16); for that x_start is pixels in [-1, 1].
    """
    x_start, x, noise = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (x_start, x, noise))
    prediction, place = process.split(output, x)
    wanted = target(process.prediction, x_start, noise, process.schedule.at(t, x))
    simple = (prediction - wanted).square().flatten(1).mean(1)
    if min_snr is not None:
        simple = times(spread(min_snr_weights(process.schedule, process.prediction, min_snr), t, simple), simple)
    if place is None:
        return Losses(simple, simple, None)
    # eq. 16 is to teach the variance alone: the mean is taken as given
    bound = variational_bound(process, prediction.detach(), place, x_start, x, t)
    return Losses(simple + bound_weight * len(process.schedule) * bound, simple, bound)


def min_snr_weights(schedule: Schedule, prediction: str, gamma: float = 5.0) -> Tensor:
    """Weights that are min(SNR, gamma) for x_start, whatever is predicted: (T,) float64 (Hang et al. 2023, sec. 3.4).

    An error of epsilon is one of x_start times sqrt(SNR), one of v times sqrt(SNR + 1).
    """
    snr = schedule.snr
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR, also where SNR is 0
    capped = snr.clamp(max=gamma)
    return capped if prediction == "x_start" else capped / (snr + 1)


def variational_bound(
    process: Process, prediction: Tensor, place: Tensor, x_start: Tensor, x: Tensor, t: Tensor
) -> Tensor:
    """One term of the bound, L_t in bits a value (Ho et al. 2020, eq. 5): (B, C, ...) ... -> (B,).

    KL(q(x_s | x_t, x_start) || p(x_s | x_t)), and at t = 0 the likelihood of the pixels.
    """
    level, following = process.schedule.at(t, x), spread(process.schedule.previous, t, x)
    low, high = (spread(logs, t, x) for logs in _log_variance_bounds(process.schedule))
    mean = posterior_mean(to_x_start(process.prediction, prediction, x, level), x, level, following)
    log_variance = times(high, place) + times(low, 1 - place)  # Nichol & Dhariwal 2021, eq. 15
    true_mean, true_log_variance = posterior_mean(x_start, x, level, following), times(low, torch.ones_like(x))
    divergence = normal_kl(true_mean, true_log_variance, mean, log_variance)
    surprise = -discretized_log_likelihood(x_start, mean, log_variance)
    first = (t == 0).to(x.device)
    return torch.where(first, surprise.flatten(1).mean(1), divergence.flatten(1).mean(1)) / math.log(2)


def normal_kl(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL(q || p) of two normal distributions, value by value, in nats."""
    ratio = (log_variance_q - log_variance_p).exp() + (mean_q - mean_p).square() * (-log_variance_p).exp()
    return (log_variance_p - log_variance_q + ratio - 1) / 2


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """ln of a normal distribution's mass in the bin of each pixel, the outermost open (Ho et al. 2020, eq. 13).

    x is one of 256 values in [-1, 1]. A mass below 1e-12 counts as that, as in the papers' code.
    """
    scale = (-log_variance / 2).exp() * math.sqrt(0.5)
    above, below = ((x - mean + side * HALF_BIN) * scale for side in (1, -1))
    upper = torch.where(x > 1 - HALF_BIN, 1.0, above.erf())
    lower = torch.where(x < -1 + HALF_BIN, -1.0, below.erf())
    return ((upper - lower) / 2).clamp(min=1e-12).log()


def by_timestep(values: Tensor, t: Tensor, n_timesteps: int, n_bins: int) -> tuple[Tensor, Tensor]:
    """Sums and counts of (B,) values in equal bins of their timesteps, both (n_bins,), to add up over batches."""
    bins = t.to(values.device) * n_bins // n_timesteps
    sums = values.new_zeros(n_bins).index_add(0, bins, values.detach())
    return sums, torch.bincount(bins, minlength=n_bins)


def _log_variance_bounds(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Of every timestep, (T,) each; the first lower bound, which is 0, is the second's (Nichol & Dhariwal's code)."""
    small, large = variance_bounds(schedule.alphas_cumprod, schedule.previous)
    return torch.cat([small[1:2], small[1:]]).log(), large.log()
