"""Slow twin of the scores of reconstructions: pictures as nested lists [color][row][column] of 0..255."""

import math
from collections import Counter


def psnr(a, b):
    """In dB; infinite for equal pictures."""
    total = count = 0
    for plane_a, plane_b in zip(a, b, strict=True):
        for row_a, row_b in zip(plane_a, plane_b, strict=True):
            for x, y in zip(row_a, row_b, strict=True):
                total += (x - y) ** 2
                count += 1
    return 10 * math.log10(255 * 255 * count / total) if total else math.inf


def window():
    """Wang et al. 2004, sec. III-C: 11x11 circular-symmetric Gaussian, standard deviation 1.5, unit sum."""
    weights = {(i, j): math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5 * 1.5)) for i in range(11) for j in range(11)}
    total = sum(weights.values())
    return {place: weight / total for place, weight in weights.items()}


def ssim_here(a, b, top, left, weights):
    """Eq. 13, from the weighted means, standard deviations and correlation of eq. 14 to 16."""
    pairs = [(w, a[top + i][left + j], b[top + i][left + j]) for (i, j), w in weights.items()]
    mean_a = sum(w * x for w, x, _ in pairs)
    mean_b = sum(w * y for w, _, y in pairs)
    var_a = sum(w * (x - mean_a) ** 2 for w, x, _ in pairs)
    var_b = sum(w * (y - mean_b) ** 2 for w, _, y in pairs)
    cov = sum(w * (x - mean_a) * (y - mean_b) for w, x, y in pairs)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance * (2 * cov + c2) / (var_a + var_b + c2)


def ssim(a, b):
    """Eq. 17, over whole windows, then over the colors."""
    weights = window()
    height, width = len(a[0]), len(a[0][0])
    values = [
        ssim_here(plane_a, plane_b, top, left, weights)
        for plane_a, plane_b in zip(a, b, strict=True)
        for top in range(height - 10)
        for left in range(width - 10)
    ]
    return sum(values) / len(values)


def usage(codes):
    """How many codes differ, their perplexity, and bits a code of an ideal coder, from a flat list."""
    counts = Counter(codes)
    bits = -sum(n / len(codes) * math.log2(n / len(codes)) for n in counts.values())
    return len(counts), 2**bits, bits
