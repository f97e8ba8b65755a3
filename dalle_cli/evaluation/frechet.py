"""Frechet distance between Gaussians fitted to features (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

Shapes: N rows, D features. All is float64.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from dalle_cli.errors import DalleError

Floats = npt.NDArray[np.float64]


class Moments:
    """Mean and covariance of rows, added block by block in D x D memory."""

    def __init__(self, width: int):
        self.count = 0
        self.mean = np.zeros(width)
        self._scatter = np.zeros((width, width))

    @classmethod
    def of(cls, blocks: Iterable[npt.NDArray[np.floating]], width: int) -> "Moments":
        """The moments of all rows of blocks (n, D)."""
        moments = cls(width)
        for block in blocks:
            moments.add(block)
        return moments

    def add(self, rows: npt.NDArray[np.floating]) -> None:
        """Add rows (n, D), merged about the block's own mean for accuracy (Chan et al. 1979, eq. 2.1).

        Raises:
            DalleError: a feature is not finite.
        """
        if not len(rows):
            return
        block = np.asarray(rows, np.float64)
        if not np.isfinite(block).all():
            found = "NaN or infinity; give --dtype float32 or other --features"
            raise DalleError(f"expected finite features, found {found}")
        mean = block.mean(axis=0)
        block = block - mean
        total, delta = self.count + len(rows), mean - self.mean
        self._scatter += block.T @ block + np.outer(delta, delta) * (self.count * len(rows) / total)
        self.mean += delta * (len(rows) / total)
        self.count = total

    @property
    def covariance(self) -> Floats:
        """(D, D), unbiased.

        Raises:
            DalleError: fewer than two rows.
        """
        if self.count < 2:
            raise DalleError(f"expected at least 2 images for a covariance, found {self.count}; give more")
        return self._scatter / (self.count - 1)


def frechet(mean_a: Floats, covariance_a: Floats, mean_b: Floats, covariance_b: Floats) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)); (D,), (D, D), (D,), (D, D) -> at least 0.

    With C = F F^T, the trace of the root is the sum of the singular values of F_a^T F_b. No square root of a square is
    taken, which would turn rounding errors of 1e-16 into 1e-8.
    """
    cross = np.linalg.svd(_factor(covariance_a).T @ _factor(covariance_b), compute_uv=False).sum()
    return _distance(mean_a, covariance_a, mean_b, covariance_b, float(cross))


def quick_frechet(mean_a: Floats, covariance_a: Floats, mean_b: Floats, covariance_b: Floats) -> float:
    """The same in a third of the time, for bootstrap replicates; small distances lose digits."""
    try:
        lower = np.linalg.cholesky(covariance_a)
    except np.linalg.LinAlgError:  # singular
        return frechet(mean_a, covariance_a, mean_b, covariance_b)
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(lower.T @ covariance_b @ lower), 0, None)).sum()
    return _distance(mean_a, covariance_a, mean_b, covariance_b, float(cross))


def between(a: Moments, b: Moments) -> float:
    """The Frechet distance of two sets of rows.

    Raises:
        DalleError: fewer than two rows in one of them.
    """
    return frechet(a.mean, a.covariance, b.mean, b.covariance)


def _factor(covariance: Floats) -> Floats:
    """F (D, R) with F F^T = C, from the eigenvectors; eigenvalues that rounding made negative are dropped."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > 0
    return np.asarray(vectors[:, kept] * np.sqrt(values[kept]))


def _distance(mean_a: Floats, covariance_a: Floats, mean_b: Floats, covariance_b: Floats, cross: float) -> float:
    apart = float(((mean_a - mean_b) ** 2).sum())
    return max(apart + float(np.trace(covariance_a) + np.trace(covariance_b)) - 2 * cross, 0.0)
