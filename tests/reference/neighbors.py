"""Nearest neighbours one by one, in float64."""

import math


def nearest(queries, keys, most):
    """For each query, a list of views, its `most` keys: [(row, similarity)], the nearest first, ties by row."""
    found = []
    for views in queries:
        scored = []
        for row, key in enumerate(keys):
            best = max(math.fsum(float(a) * float(b) for a, b in zip(view, key, strict=True)) for view in views)
            scored.append((-best, row))
        found.append([(row, -negative) for negative, row in sorted(scored)[:most]])
    return found
