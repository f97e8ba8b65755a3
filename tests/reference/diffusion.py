"""Diffusion in plain numbers: one value at a time, by other formulas than the package's where there are others."""

import itertools
import math

import numpy as np
from scipy import integrate


def levels(betas: list[float]) -> list[float]:
    """Products of 1 - beta, none above 0.999."""
    out, product = [], 1.0
    for beta in betas:
        product *= 1 - min(beta, 0.999)
        out.append(product)
    return out


def linear(n: int) -> list[float]:
    """Ho et al. 2020, stretched to n timesteps."""
    return levels([1000 / n * (1e-4 + (0.02 - 1e-4) * i / (n - 1)) for i in range(n)])


def cosine(n: int) -> list[float]:
    """Nichol & Dhariwal 2021."""

    def f(t: int) -> float:
        return math.cos((t / n + 0.008) / 1.008 * math.pi / 2) ** 2

    return levels([1 - f(t + 1) / f(t) for t in range(n)])


def zero_snr(old: list[float]) -> list[float]:
    """Lin et al. 2023, algorithm 1, line by line."""
    roots = [math.sqrt(level) for level in old]
    first, last = roots[0], roots[-1]
    roots = [root - last for root in roots]
    return [(root * first / (first - last)) ** 2 for root in roots]


def posterior(x_start: float, x: float, level: float, following: float) -> tuple[float, float]:
    """Mean and variance of x_s given x_t and x_start by Bayes' rule: two Gaussians over x_s multiplied."""
    ratio = math.sqrt(level / following)
    if following == 1:
        return x_start, 0.0
    precision_prior = 1 / (1 - following)  # x_s ~ N(sqrt(following) x_start, 1 - following)
    precision_seen = ratio**2 / (1 - ratio**2)  # x_t ~ N(ratio x_s, 1 - ratio^2)
    seen = x / ratio * precision_seen if ratio else 0.0
    precision = precision_prior + precision_seen
    return (math.sqrt(following) * x_start * precision_prior + seen) / precision, 1 / precision


def estimate(prediction: str, output: float, x: float, level: float) -> float:
    """x_start of an output, with angles: x = cos x_start + sin epsilon, v = cos epsilon - sin x_start."""
    angle = math.acos(math.sqrt(level))
    if prediction == "epsilon":
        return (x - math.sin(angle) * output) / math.cos(angle)
    return output if prediction == "x_start" else math.cos(angle) * x - math.sin(angle) * output


def phi(z: float) -> float:
    """The normal distribution function."""
    return 0.5 * math.erfc(-z / math.sqrt(2))


def bound(prediction: str, output: float, place: float, x_start: float, x: float, t: int, table: list[float]) -> float:
    """One value's term of the bound in bits, as Nichol & Dhariwal (2021) compute it."""
    before = [1.0, *table]

    def variance(t: int) -> float:
        return posterior(0.0, 0.0, table[t], before[t])[1]

    low = math.log(variance(max(t, 1)))
    high = math.log(1 - table[t] / before[t])
    log_variance = low + place * (high - low)
    mean = posterior(estimate(prediction, output, x, table[t]), x, table[t], before[t])[0]
    if t == 0:
        deviation = math.exp(log_variance / 2)
        upper = 1.0 if x_start > 0.999 else phi((x_start + 1 / 255 - mean) / deviation)
        lower = 0.0 if x_start < -0.999 else phi((x_start - 1 / 255 - mean) / deviation)
        return -math.log2(max(upper - lower, 1e-12))
    true = posterior(x_start, x, table[t], before[t])[0]
    variance_p, variance_q = math.exp(log_variance), variance(t)
    nats = 0.5 * math.log(variance_p / variance_q) + (variance_q + (true - mean) ** 2) / (2 * variance_p) - 0.5
    return nats / math.log(2)


def min_snr(prediction: str, level: float, gamma: float) -> float:
    """Hang et al. 2023: how an error of x_start counts, divided by what an error of the prediction is worth."""
    snr = level / (1 - level)
    return min(snr, gamma) / {"epsilon": snr, "x_start": 1.0, "v": snr + 1}[prediction]


class Gaussian:
    """Data N(mean, deviation^2), diagonal: the best denoiser and the exact flow."""

    def __init__(self, mean: list[float], deviation: list[float]):
        self.mean, self.deviation = np.array(mean), np.array(deviation)

    def marginal(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of x_t."""
        return math.sqrt(level) * self.mean, np.sqrt(level * self.deviation**2 + 1 - level)

    def x_start(self, x: np.ndarray, level: float) -> np.ndarray:
        """E[x_start | x_t]."""
        mean, deviation = self.marginal(level)
        return self.mean + math.sqrt(level) * self.deviation**2 / deviation**2 * (x - mean)

    def flow(self, x: np.ndarray, level: float, following: float) -> np.ndarray:
        """The probability-flow ODE from one level to another: each coordinate keeps its place in its marginal."""
        (mean, deviation), (mean_2, deviation_2) = self.marginal(level), self.marginal(following)
        return mean_2 + deviation_2 / deviation * (x - mean)

    def ancestral(self, levels: tuple[float, ...], large: bool) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of what DDPM draws in these steps: a chain of linear maps and noises, followed exactly."""
        mean, variance = np.zeros_like(self.mean), np.ones_like(self.mean)
        for level, following in itertools.pairwise(levels):
            at_0 = self.x_start(np.zeros_like(mean), level)
            slope = self.x_start(np.ones_like(mean), level) - at_0
            to = np.array([posterior(1.0, 0.0, level, following)[0], posterior(0.0, 1.0, level, following)[0]])
            added = 1 - level / following if large else posterior(0.0, 0.0, level, following)[1]
            gain = to[0] * slope + to[1]
            mean = gain * mean + to[0] * at_0
            variance = gain**2 * variance + (added if following < 1 else 0.0)
        return mean, np.sqrt(variance)


class Mixture:
    """Two isotropic Gaussians of equal deviation; the flow by a high-order solver of scipy."""

    def __init__(self, means: list[list[float]], weights: list[float], deviation: float):
        self.means, self.weights, self.deviation = np.array(means), np.array(weights), deviation

    def x_start(self, x: np.ndarray, level: float) -> np.ndarray:
        """E[x_start | x_t] for (B, D)."""
        variance = level * self.deviation**2 + 1 - level
        gaps = x[:, None] - math.sqrt(level) * self.means
        logs = np.log(self.weights) - (gaps**2).sum(-1) / (2 * variance)
        share = np.exp(logs - logs.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        each = self.means + math.sqrt(level) * self.deviation**2 / variance * gaps
        return (share[..., None] * each).sum(1)

    def flow(self, x: np.ndarray, level: float, following: float) -> np.ndarray:
        """The flow, d y / d ln sigma = y - E[x_start | y] with y = x / sqrt(level) (Karras et al. 2022, eq. 3)."""

        def slope(log_sigma: float, y: np.ndarray) -> np.ndarray:
            at = 1 / (1 + math.exp(2 * log_sigma))
            y = y.reshape(x.shape)
            return (y - self.x_start(math.sqrt(at) * y, at)).ravel()

        ends = [0.5 * math.log((1 - at) / at) for at in (level, following)]
        start = (x / math.sqrt(level)).ravel()
        solved = integrate.solve_ivp(slope, ends, start, method="DOP853", rtol=1e-11, atol=1e-12)
        return math.sqrt(following) * solved.y[:, -1].reshape(x.shape)
