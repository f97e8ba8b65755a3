"""Similarity of thumbnails: a cosine that compression, size, a small crop and a small change of color hardly change.

Shapes: B images or pairs, S = SIDE pixels, C cells along a side, K windows along an axis, V views, D features.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 48  # pixels of a thumbnail, the whole image resized to a square
COARSE, FINE = 8, 16  # cells of a side: for candidates, and for pairs
CONTRAST = 4.0  # levels of 255 added to the contrast, so that flat images are alike
Cut = tuple[float, float]  # shares of an axis that are cut off at both ends; negative ones reach beyond the image
# Crops of 0, 5 and 10 percent of an axis, at either end or at both.
CUTS: tuple[Cut, ...] = (
    (0, 0), (0, 0.05), (0.025, 0.025), (0.05, 0), (0, 0.1), (0.03, 0.07), (0.05, 0.05), (0.07, 0.03), (0.1, 0),
)  # fmt: skip
VIEWS: tuple[Cut, ...] = ((0, 0), (0.035, 0.035), (-0.0375, -0.0375))  # whole, cropped, and as if it was cropped


def keys(images: Tensor) -> Tensor:
    """(B, 3, S, S) in 0 to 255 -> (B, D) of length 1, to find candidates by."""
    return _windows(images, COARSE, [(0, 0)])[:, 0]


def queries(images: Tensor) -> Tensor:
    """(B, 3, S, S) in 0 to 255 -> (B, V, D): keys of an image, its middle, and the larger one it may be a crop of."""
    return torch.cat([_windows(images, COARSE, [cut]) for cut in VIEWS], 1)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """The largest cosine of one image of a pair with any window of the other: (B, 3, S, S), twice -> (B,)."""
    whole = [_windows(x, FINE, [(0, 0)])[:, 0] for x in (a, b)]
    windows = [_windows(x, FINE, CUTS) for x in (a, b)]
    both = [torch.einsum("bvd,bd->bv", w, x).amax(1) for w, x in ((windows[0], whole[1]), (windows[1], whole[0]))]
    return torch.maximum(*both)


def _windows(images: Tensor, cells: int, cuts: Sequence[Cut]) -> Tensor:
    """Means of cells without brightness and tint, of length 1: (B, 3, S, S) -> (B, K * K, 3 * C * C + 1)."""
    images = images.float()
    tables = torch.stack([_coverage(images.shape[-1], cells, *cut) for cut in cuts]).to(images)
    found = torch.einsum("kyv,bcvu,jxu->bkjcyx", tables, images, tables).flatten(1, 2)
    found = (found - found.mean((-2, -1), keepdim=True)).flatten(2)
    return F.normalize(F.pad(found, (0, 1), value=CONTRAST * math.sqrt(found.shape[2])), dim=2)


def _coverage(old: int, new: int, first: float, last: float) -> Tensor:
    """The weight of each of `old` pixels in each of `new` cells of a window: (new, old), rows sum to 1."""
    edges = old * (first + (1 - first - last) * torch.arange(new + 1) / new)
    pixels = torch.arange(old)
    part = (torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)).clamp_min(0)
    return part / part.sum(1, keepdim=True)
