"""Bootstrap intervals of 95% (Efron 1979); a replicate is a function of (seed, its number).

Shapes: N rows of one set, D features, R replicates.
"""

import numpy as np
import numpy.typing as npt

from dalle_cli.evaluation.frechet import Floats, quick_frechet
from dalle_cli.evaluation.store import FeatureRows

FRECHET_ROWS = 5000  # rows of each set, at most, that the Frechet distance is resampled from


def _resampled(n: int, seed: int, stream: int, number: int) -> npt.NDArray[np.int64]:
    """How often each of n rows occurs in a sample of n with replacement."""
    rows = np.random.default_rng([seed, stream, number]).integers(0, n, n)
    return np.bincount(rows, minlength=n)


def of_mean(values: npt.NDArray[np.generic], replicates: int, seed: int, stream: int) -> dict[str, float]:
    """The mean of (N,) values, and the middle 95% of the means of replicates."""
    numbers = values.astype(np.float64)
    out = {"value": float(numbers.mean())}
    if replicates:
        means = [numbers @ _resampled(len(numbers), seed, stream, r) / len(numbers) for r in range(replicates)]
        out["low"], out["high"] = (float(x) for x in np.percentile(means, (2.5, 97.5)))
    return out


def of_frechet(value: float, a: FeatureRows, b: FeatureRows, replicates: int, seed: int) -> dict[str, float]:
    """The distance plus and minus 1.96 standard deviations of its replicates.

    Percentiles would be biased: a replicate has fewer distinct rows, so its distance is larger. A set of more than
    FRECHET_ROWS rows is subsampled first, and the deviation is scaled down to that of the whole set.
    """
    out = {"value": value}
    if replicates < 2:
        return out
    parts = [x.sample(FRECHET_ROWS, seed) for x in (a, b)]
    distances = []
    for r in range(replicates):
        moments = [_moments(part, _resampled(len(part), seed, side, r)) for side, part in enumerate(parts)]
        distances.append(quick_frechet(*moments[0], *moments[1]))
    share = max(len(part) / len(x) for part, x in zip(parts, (a, b), strict=True))
    half = 1.96 * float(np.std(distances, ddof=1) * np.sqrt(share))
    return {**out, "low": max(value - half, 0.0), "high": value + half}


def _moments(rows: npt.NDArray[np.floating], counts: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Mean (D,) and covariance (D, D) of rows (N, D), each counted this often."""
    covariance = np.cov(rows, rowvar=False, fweights=counts, dtype=np.float64)
    return np.average(rows, axis=0, weights=counts), np.atleast_2d(covariance)
