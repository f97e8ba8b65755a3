"""Kernel distance, as KID (Binkowski et al. 2018, arXiv 1801.01401, sec. 4): an unbiased MMD with a cubic kernel.

Shapes: N M rows of the two sets, D features, S rows of a subset.
"""

import numpy as np
import numpy.typing as npt

from dalle_cli.evaluation.store import FeatureRows

Floats = npt.NDArray[np.float64]
SUBSETS, SUBSET = 100, 1000  # as published
FEWEST = 4  # rows of each set: subsets of two


def kernel_distance(a: FeatureRows, b: FeatureRows, seed: int) -> dict[str, float]:
    """Mean over random subsets, their standard deviation `error`, and an interval of 95% for the mean.

    A subset has half of the smaller set's rows if those are fewer than 2,000. Subsets of s out of n rows, without
    replacement, vary by sqrt((n - s) / s) times the standard error of the whole set.
    """
    n = min(len(a), len(b))
    size = min(SUBSET, n // 2)
    values = np.array([_subset(a, b, size, seed, number) for number in range(SUBSETS)])
    value, error = float(values.mean()), float(values.std(ddof=1))
    half = 1.96 * error * float(np.sqrt(size / (n - size)))
    return {"value": value, "low": value - half, "high": value + half, "error": error, "subset": size}


def _subset(a: FeatureRows, b: FeatureRows, size: int, seed: int, number: int) -> float:
    picked = (np.random.default_rng([seed, number, side]).choice(len(x), size, False) for side, x in enumerate((a, b)))
    return squared_mmd(*(x.take(np.sort(rows)) for x, rows in zip((a, b), picked, strict=True)))


def squared_mmd(x: Floats, y: Floats) -> float:
    """Unbiased estimate of the squared MMD with k(x, y) = (x.y / D + 1)^3 (eq. 4): (S, D), (S, D) -> may be below 0."""
    n, m, width = len(x), len(y), x.shape[1]
    xx, yy, xy = ((p @ q.T / width + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * xy.mean())
