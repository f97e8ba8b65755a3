"""Slow twin of a prior's scores: one pair, one position at a time, from the twin of the prior."""

import math
import statistics
from collections import Counter

from reference import prior as reference


def costs(tokens, length, codes, weights, sizes):
    """Nats of each token of a caption and of each code of its grid, as lists."""
    text, image = reference.prior(tokens, length, codes, weights, sizes)
    flat = [code for row in codes for code in row]
    return (
        [reference.nats(text[t], tokens[t]) for t in range(length)],
        [reference.nats(image[j], code) for j, code in enumerate(flat)],
    )


def smoothed(counted, targets, n_vocab):
    """What targets cost by add-one smoothed shares of what was counted."""
    counts = Counter(counted)
    return [-math.log((counts[target] + 1) / (len(counted) + n_vocab)) for target in targets]


def mean_and_error(values):
    """The mean of a list and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def ratio_and_error(values, counts):
    """Sum over sum, and the usual linearized standard error of a ratio of means (Cochran 1977, eq. 6.13)."""
    ratio, n = sum(values) / sum(counts), len(values)
    squares = sum((value - ratio * count) ** 2 for value, count in zip(values, counts, strict=True))
    return ratio, math.sqrt(squares / (n - 1) / n) / (sum(counts) / n)


def judged(pairs, others, counted, weights, sizes):
    """All scores of pairs (tokens, length, codes), with the captions (tokens, length) of others."""
    own = [costs(*pair, weights, sizes) for pair in pairs]
    null = [costs(tokens, 0, codes, weights, sizes)[1] for tokens, _, codes in pairs]
    other = [costs(*caption, pair[2], weights, sizes)[1] for pair, caption in zip(pairs, others, strict=True)]
    image = [sum(codes) / len(codes) for _, codes in own]
    width = sizes["grid"]
    by_position = [statistics.fmean(codes[j] for _, codes in own) for j in range(width * width)]
    without = [statistics.fmean(codes[j] for codes in null) for j in range(width * width)]
    guessed = [
        statistics.fmean(smoothed(counted, [c for row in codes for c in row], sizes["n_image_vocab"]))
        for _, _, codes in pairs
    ]
    gain = [sum(n) / len(n) - mean for n, mean in zip(null, image, strict=True)]
    shuffled = [sum(o) / len(o) - mean for o, mean in zip(other, image, strict=True)]
    return {
        "image_nats": mean_and_error(image),
        "text_nats": ratio_and_error([sum(text) for text, _ in own], [length for _, length, _ in pairs]),
        "image_nats_unigram": mean_and_error(guessed),
        "gain_over_null": mean_and_error(gain),
        "gain_over_shuffled": mean_and_error(shuffled),
        "by_position": [by_position[r * width : (r + 1) * width] for r in range(width)],
        "gain_over_null_by_position": [
            [without[r * width + c] - by_position[r * width + c] for c in range(width)] for r in range(width)
        ],
    }
