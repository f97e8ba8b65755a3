"""Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1-2).

A set's manifold is the union of balls around its rows, each with the distance to the k-th nearest neighbor as radius.
Shapes: N M rows, D features. At most DISTANCES distances are held at a time.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
NEIGHBORS = 3  # sec. 3
BLOCK, DISTANCES = 512, 1 << 19  # most rows of a block, and distances in it
SLACK = 1e-12  # a squared distance below this share of the squares is a rounding error


def precision_recall(
    generated: Floats, real: Floats, k: int = NEIGHBORS
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which generated rows lie in the real manifold, which real ones in the generated: (N, D), (M, D) -> (N,), (M,).

    Their means are precision and recall.
    """
    center = real.mean(axis=0)  # centered products lose fewer digits
    generated, real = generated - center, real - center
    return inside(generated, real, radii(real, k)), inside(real, generated, radii(generated, k))


def radii(rows: Floats, k: int) -> Floats:
    """Squared distance of each row to its k-th nearest other row: (N, D) -> (N,)."""
    out, block = np.empty(len(rows)), _block(len(rows))
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        distances = squared_distances(rows[part], rows)
        distances[np.arange(len(distances)), np.arange(start, start + len(distances))] = -1.0  # itself, first
        out[part] = np.partition(distances, k, axis=1)[:, k]
    return out


def inside(points: Floats, centers: Floats, squared_radii: Floats) -> npt.NDArray[np.bool_]:
    """Whether each point lies in any ball: (N, D), (M, D), (M,) -> (N,)."""
    block = _block(len(centers))
    parts = [
        (squared_distances(points[start : start + block], centers) <= squared_radii).any(axis=1)
        for start in range(0, len(points), block)
    ]
    return np.concatenate(parts)


def _block(n: int) -> int:
    """How many rows are compared with n others at a time."""
    return max(1, min(BLOCK, DISTANCES // n))


def squared_distances(a: Floats, b: Floats) -> Floats:
    """(N, D), (M, D) -> (N, M); exactly 0 for equal rows."""
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)
    distances = squares - 2 * (a @ b.T)
    distances[distances < SLACK * squares] = 0.0
    return np.asarray(distances)
