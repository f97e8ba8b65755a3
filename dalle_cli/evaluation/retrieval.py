"""Do pictures fit their captions: CLIP score (Hessel et al. 2021, arXiv 2104.08718), and retrieval.

Shapes: N generated rows, M real rows, U captions, D features, k pictures to choose among.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dalle_cli.evaluation.store import Rows

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
BLOCK = 256


def cosines(pictures: Rows, captions: Rows, own: Ints) -> Floats:
    """Cosine of each picture with the caption of number own[i]: (N,)."""
    out = np.empty(len(pictures))
    for start in range(0, len(pictures), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(pictures)))
        out[rows] = (_unit(pictures.take(rows)) * _unit(captions.take(own[rows]))).sum(axis=1)
    return out


def shuffled(own: Ints, seed: int) -> Ints | None:
    """The caption of another picture for each: (N,) -> (N,), none its own; None where half of the rows share one.

    Groups of equal captions in random order, moved on by the size of the largest.
    """
    values, group, counts = np.unique(own, return_inverse=True, return_counts=True)
    most = int(counts.max(initial=0))
    if 2 * most > len(own):
        return None
    place = np.random.default_rng(seed).permutation(len(values))[group]
    order = np.argsort(place, kind="stable")
    out = np.empty_like(own)
    out[order] = own[np.roll(order, most)]
    return out


def ranks(generated: Rows, real: Rows, own: Sequence[Sequence[int]], k: int, seed: int) -> Ints:
    """How many of k - 1 other real pictures are at least as near as the nearest of one's own: (N,), 0 is best.

    `own` has the real rows of each generated row's caption; the others are drawn anew for each row. Near is by cosine.
    A tie counts against the picture, or features that are blind would find everything.
    """
    out = np.empty(len(generated), np.int64)
    for row, mine in enumerate(own):
        others = _others(len(real), mine, k - 1, seed, row)
        near = _unit(real.take([*mine, *others])) @ _unit(generated.take([row]))[0]
        out[row] = (near[len(mine) :] >= near[: len(mine)].max()).sum()
    return out


def _others(n: int, mine: Sequence[int], count: int, seed: int, row: int) -> Ints:
    """`count` numbers below n that are not among `mine`, a function of (seed, row)."""
    drawn = np.random.default_rng([seed, row]).choice(n - len(mine), count, replace=False).astype(np.int64)
    for number in sorted(mine):  # each gap that a row of one's own leaves moves up what lies behind it
        drawn += drawn >= number
    return drawn


def _unit(rows: Floats) -> Floats:
    length = np.sqrt((rows**2).sum(axis=1, keepdims=True))
    return np.asarray(rows / np.where(length > 0, length, 1.0))
