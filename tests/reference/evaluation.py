"""Slow float64 twins of the scores, as their papers define them: one pair of rows after another.

Shapes: N rows, D features, K classes.
"""

import itertools
import math

import numpy as np


def kernel(x, y):
    """(x.y / D + 1)^3 (Binkowski et al. 2018, sec. 4)."""
    return (sum(a * b for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3


def squared_mmd(xs, ys):
    """The unbiased estimate of Gretton et al. 2012, eq. 3."""
    n, m = len(xs), len(ys)
    within_x = sum(kernel(xs[i], xs[j]) for i, j in itertools.permutations(range(n), 2)) / (n * (n - 1))
    within_y = sum(kernel(ys[i], ys[j]) for i, j in itertools.permutations(range(m), 2)) / (m * (m - 1))
    return within_x + within_y - 2 * sum(kernel(x, y) for x in xs for y in ys) / (n * m)


def covered(points, centers, k):
    """For each point whether it lies no further from a center than that center's k-th neighbor (2019, eq. 1)."""

    def radius(i):
        return sorted(math.dist(centers[i], other) for j, other in enumerate(centers) if j != i)[k - 1]

    reach = [radius(i) for i in range(len(centers))]
    return [any(math.dist(p, c) <= r for c, r in zip(centers, reach, strict=True)) for p in points]


def inception_score(logits):
    """exp E KL(p(y|x), p(y)) of one part of the pictures (Salimans et al. 2016, sec. 4)."""
    rows = []
    for row in logits:
        shifted = [math.exp(v - max(row)) for v in row]
        rows.append([v / sum(shifted) for v in shifted])
    marginal = [sum(row[k] for row in rows) / len(rows) for k in range(len(rows[0]))]
    return math.exp(
        sum(p * math.log(p / q) for row in rows for p, q in zip(row, marginal, strict=True) if p > 0) / len(rows)
    )


def rank(picture, own, others):
    """How many of the others are at least as near by cosine as the nearest of one's own."""

    def cosine(a, b):
        return float(np.dot(a, b) / (math.sqrt(np.dot(a, a)) * math.sqrt(np.dot(b, b))))

    best = max(cosine(picture, o) for o in own)
    return sum(cosine(picture, o) >= best for o in others)


def blurred(row, sigma):
    """A Gaussian over a row of pixels, whose ends go on for ever."""
    reach = math.ceil(4 * sigma)
    weights = [math.exp(-(d**2) / (2 * sigma**2)) for d in range(-reach, reach + 1)]
    out = []
    for i in range(len(row)):
        values = [row[min(max(i + d, 0), len(row) - 1)] for d in range(-reach, reach + 1)]
        out.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    return out


def bilinear(row, size):
    """A row of pixels stretched to `size` by half-pixel centers, without antialiasing."""
    out = []
    for i in range(size):
        at = max((i + 0.5) * len(row) / size - 0.5, 0)
        low = min(int(at), len(row) - 1)
        share = at - low
        out.append(row[low] * (1 - share) + row[min(low + 1, len(row) - 1)] * share)
    return out
