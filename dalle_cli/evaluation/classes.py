"""Inception score (Salimans et al. 2016, arXiv 1606.03498, sec. 4): exp E KL(p(y|x), p(y)), over parts.

Shapes: N rows, K classes, R replicates. Rows come in blocks; memory is (PARTS + R) x K.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
PARTS = 10  # as published
FEWEST = 2 * PARTS


def inception_score(blocks: Iterable[npt.NDArray[np.floating]], replicates: int, seed: int) -> dict[str, float]:
    """Mean over ten parts, their standard deviation `error`, and the score's interval, from blocks of logits (n, K).

    Row i belongs to part i mod 10, since consecutive rows may share a prompt. The interval is a Poisson bootstrap: in a
    replicate each row counts Poisson(1) times. Each part and each replicate is a weighting of the rows.
    """
    start, sums = 0, [np.zeros(0)]
    for number, logits in enumerate(blocks):
        p = _softmax(logits.astype(np.float64))
        belongs = (start + np.arange(len(p))) % PARTS == np.arange(PARTS)[:, None]
        poisson = np.random.default_rng([seed, number]).poisson(1.0, (replicates, len(p)))
        weights = np.concatenate([belongs, poisson]).astype(np.float64)
        block = [weights.sum(axis=1), weights @ p, weights @ _entropy(p)]
        sums = block if number == 0 else [before + new for before, new in zip(sums, block, strict=True)]
        start += len(p)
    weight, classes, entropy = sums
    scores = np.exp(_entropy(classes / weight[:, None]) - entropy / weight)
    parts, again = scores[:PARTS], scores[PARTS:]
    out = {"value": float(parts.mean()), "error": float(parts.std(ddof=1))}
    if replicates > 1:
        half = 1.96 * float(again.std(ddof=1))
        out |= {"low": out["value"] - half, "high": out["value"] + half}
    return out


def _softmax(logits: Floats) -> Floats:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def _entropy(p: Floats) -> Floats:
    """In nats, over the last dimension; 0 ln 0 is 0."""
    return np.asarray(-(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1))
