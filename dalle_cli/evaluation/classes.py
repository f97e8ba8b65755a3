"""Inception score (Salimans et al. 2016, arXiv 1606.03498, sec. 4): exp E KL(p(y|x), p(y)), over parts.

Shapes: N rows, K classes, R replicates. Rows come in blocks; memory is (PARTS + R) x K.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
PARTS = 10  # as published
FEWEST = 2 * PARTS


class _Sums:
    """For each of several weightings of the rows: their weight, summed probabilities and summed entropies."""

    def __init__(self, weightings: int, classes: int):
        self.weight, self.entropy = np.zeros(weightings), np.zeros(weightings)
        self.classes = np.zeros((weightings, classes))

    def add(self, weights: Floats, p: Floats, entropy: Floats) -> None:
        self.weight += weights.sum(axis=1)
        self.classes += weights @ p
        self.entropy += weights @ entropy

    def scores(self) -> Floats:
        """exp(H of the mean - mean of H)."""
        mean = self.classes / self.weight[:, None]
        return np.asarray(np.exp(_entropy(mean) - self.entropy / self.weight))


def inception_score(blocks: Iterable[npt.NDArray[np.floating]], replicates: int, seed: int) -> dict[str, float]:
    """Mean over ten parts, their standard deviation `error`, and the score's interval, from blocks of logits (n, K).

    Row i belongs to part i mod 10, since consecutive rows may share a prompt. The interval is a Poisson bootstrap: in a
    replicate each row counts Poisson(1) times.
    """
    start, parts, again = 0, _Sums(PARTS, 0), _Sums(replicates, 0)
    for number, logits in enumerate(blocks):
        if number == 0:
            parts, again = _Sums(PARTS, logits.shape[1]), _Sums(replicates, logits.shape[1])
        p = _softmax(logits.astype(np.float64))
        entropy = _entropy(p)
        belongs = (start + np.arange(len(p))) % PARTS == np.arange(PARTS)[:, None]
        parts.add(belongs.astype(np.float64), p, entropy)
        again.add(
            np.random.default_rng([seed, number]).poisson(1.0, (replicates, len(p))).astype(np.float64), p, entropy
        )
        start += len(p)
    scores = parts.scores()
    out = {"value": float(scores.mean()), "error": float(scores.std(ddof=1))}
    if replicates > 1:
        half = 1.96 * float(again.scores().std(ddof=1))
        out |= {"low": out["value"] - half, "high": out["value"] + half}
    return out


def _softmax(logits: Floats) -> Floats:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def _entropy(p: Floats) -> Floats:
    """In nats, over the last dimension; 0 ln 0 is 0."""
    return np.asarray(-(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1))
