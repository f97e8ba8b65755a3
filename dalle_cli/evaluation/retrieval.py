"""How well images fit their captions: CLIP score, and retrieval of an image's real counterpart.

Shapes: N generated rows, M real rows, D features, k images to choose among.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dalle_cli.evaluation.store import FeatureRows

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
BLOCK = 256


def cosines(images: FeatureRows, captions: FeatureRows, own: Ints) -> Floats:
    """Cosine of each image with the caption of number own[i]: (N,)."""
    out = np.empty(len(images))
    for start in range(0, len(images), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(images)))
        out[rows] = (_unit(images.take(rows)) * _unit(captions.take(own[rows]))).sum(axis=1)
    return out


def clip_score(mean_cosine: float) -> float:
    """max(100 cos, 0) of the mean cosine, as torchmetrics' CLIPScore.

    Hessel et al. 2021 (arXiv 2104.08718, sec. 3) use another scale: 2.5 max(cos, 0), averaged over images.
    """
    return max(100 * mean_cosine, 0.0)


def shuffled(own: Ints, seed: int) -> Ints | None:
    """The caption of another image for each: (N,) -> (N,), none its own; None if over half of the rows share one.

    Groups of equal captions are put in random order, and captions are shifted by the size of the largest group.
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


def ranks(generated: FeatureRows, real: FeatureRows, own: Sequence[Sequence[int]], k: int, seed: int) -> Ints:
    """How many of k - 1 other real images have at least the cosine of the nearest own one: (N,), 0 is best.

    `own` has the real rows of each generated row's caption; the others are a random choice per row. A tie counts as a
    miss, or constant features would find everything.
    """
    out = np.empty(len(generated), np.int64)
    for row, mine in enumerate(own):
        others = _others(len(real), mine, k - 1, seed, row)
        cosine = _unit(real.take([*mine, *others])) @ _unit(generated.take([row]))[0]
        out[row] = (cosine[len(mine) :] >= cosine[: len(mine)].max()).sum()
    return out


def _others(n: int, mine: Sequence[int], count: int, seed: int, row: int) -> Ints:
    """`count` numbers below n that are not among `mine`, a function of (seed, row)."""
    chosen = np.random.default_rng([seed, row]).choice(n - len(mine), count, replace=False).astype(np.int64)
    for number in sorted(mine):  # skip the rows of `mine`
        chosen += chosen >= number
    return chosen


def _unit(rows: Floats) -> Floats:
    length = np.sqrt((rows**2).sum(axis=1, keepdims=True))
    return np.asarray(rows / np.where(length > 0, length, 1.0))
