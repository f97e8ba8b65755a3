"""Whether two pictures are one, up to compression, size, a slight crop and a slight change of color.

Two steps, both on thumbnails of the whole picture squeezed into a square. `signature` and `views` are a few numbers, by
which candidates are found among millions. `likeness` then compares a pair of thumbnails: one of them is taken for a
window of the other, found on a grid and refined by least squares (Gruen 1985, adaptive least squares correlation);
colors are brought together by a linear map; and the parts that agree least decide, because two faces of a set agree
everywhere but in eyes and mouth.

Shapes: B pairs, S = SIDE pixels, G = S / 2 of the grid's search, K windows along an axis, V views, D features.
A window is (B, 4): the shares of the other picture that are cut off at its left, right, top and bottom.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle_cli.data.augment import Pixels

SIDE = 48
CELLS = 8  # of a signature, along a side
FAINT = 4.0  # levels of 255: contrast that counts for little, so that two flat pictures are alike
VIEWS = (0.93, 1.0, 1 / 0.93)  # of a picture: cropped, whole, and as if it had been cropped
# Cuts at both ends of an axis that are tried: none, 5 % and 10 % of it, in all ways that matter.
CUTS = ((0, 0), (0, 0.05), (0.025, 0.025), (0.05, 0), (0, 0.1), (0.03, 0.07), (0.05, 0.05), (0.07, 0.03), (0.1, 0))
DEEPEST = 0.12  # that is cut off at one end
REFINED = 5  # steps of least squares
BLOCK = 8  # pixels
WORST = 0.1  # share of blocks that decide
NOISE = 130.0  # squared levels: variance in a block that counts for little
OFF, RECOLORED = 45.0, 130.0  # levels by which a color may differ: after the map, and before
STIFF = 100.0  # squared levels: how much a color map is drawn to one that changes nothing
LUMA = (0.299, 0.587, 0.114)


def thumbnail(image: Image.Image, size: int = SIDE) -> Pixels:
    """The whole picture, squeezed: -> (size, size, 3) uint8."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def signature(images: Tensor) -> Tensor:
    """(B, 3, S, S) in 0 to 255 -> (B, D) of length 1: a small thumbnail without brightness, tint and contrast."""
    cells = F.adaptive_avg_pool2d(images, CELLS)
    cells = (cells - cells.mean((2, 3), keepdim=True)).flatten(1)
    return F.normalize(F.pad(cells, (0, 1), value=FAINT * math.sqrt(cells.shape[1])), dim=1)


def views(images: Tensor) -> Tensor:
    """The signatures of a picture, of its middle, and of what it may be the middle of: -> (B, V, D)."""
    cuts = [(1 - side) / 2 for side in VIEWS]
    return torch.stack([signature(window(images, images.new_full((len(images), 4), cut))) for cut in cuts], 1)


def window(images: Tensor, cuts: Tensor) -> Tensor:
    """A window, stretched to the whole: (B, C, n, n), (B, 4) -> (B, C, n, n); beyond an edge is the edge."""
    at = _centers(images)
    x = cuts[:, :1] + at * (1 - cuts[:, :1] - cuts[:, 1:2])
    y = cuts[:, 2:3] + at * (1 - cuts[:, 2:3] - cuts[:, 3:])
    n = len(at)
    places = torch.stack([x[:, None, :].expand(-1, n, -1), y[:, :, None].expand(-1, -1, n)], -1) * 2 - 1
    return F.grid_sample(images, places, padding_mode="border", align_corners=False)


def likeness(a: Tensor, b: Tensor) -> Tensor:
    """How much alike pairs of thumbnails are, 1 if they are equal, near 0 if they have little in common.

    (B, 3, S, S) each, in 0 to 255 -> (B,).
    """
    whole, part = aligned(a, b)
    # Both ways, as a map can make anything look like a pale picture by taking its contrast.
    agree = torch.minimum(_agreement(whole, part), _agreement(part, whole)).flatten(1)
    worst = agree.sort(1).values
    return worst[:, : math.ceil(WORST * worst.shape[1])].mean(1)


def _agreement(a: Tensor, b: Tensor) -> Tensor:
    """How far aligned pictures agree, block by block, once the colors of b were mapped: (B, 3, S, S) -> (B, n, n)."""
    mapped = recolored(b, a)
    means = [F.avg_pool2d(x, BLOCK) for x in (a, b, mapped)]
    off, moved = ((means[0] - mean).square().sum(1) for mean in (means[2], means[1]))
    return _structure(gray(a), gray(mapped)) / (1 + off / OFF**2 + moved / RECOLORED**2)


def aligned(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """One picture of each pair as it is, and the window of the other that fits it best."""
    ways = [search(gray(x), gray(y)) for x, y in ((a, b), (b, a))]
    first = (ways[0][1] >= ways[1][1])[:, None, None, None]
    whole, other = torch.where(first, a, b), torch.where(first, b, a)
    cuts = torch.where(first[:, :, 0, 0], ways[0][0], ways[1][0])
    return whole, window(other, refine(gray(whole), gray(other), cuts))


def gray(images: Tensor) -> Tensor:
    """(B, 3, n, n) -> (B, 1, n, n)."""
    weights = images.new_tensor(LUMA)[:, None, None]
    return (images * weights).sum(1, keepdim=True)


def search(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of all windows of b on the grid the one that correlates best with a, and how well.

    (B, 1, S, S) each -> (B, 4), (B,).
    """
    small = a.shape[-1] // 2
    tables = torch.stack([_coverage(b.shape[-1], small, *cut) for cut in CUTS]).to(b)
    windows = torch.einsum("kyv,bvu,jxu->bkjyx", tables, b[:, 0], tables)
    found = torch.einsum("bkjyx,byx->bkj", _normal(windows), _normal(F.avg_pool2d(a, 2)[:, 0])).flatten(1)
    best, place = found.max(1)
    cuts = a.new_tensor(CUTS)
    return torch.cat([cuts[place % len(CUTS)], cuts[place // len(CUTS)]], 1), best


def refine(a: Tensor, b: Tensor, cuts: Tensor) -> Tensor:
    """The window of b, near the one given, that a is a brighter or darker copy of, by least squares.

    (B, 1, S, S) each, (B, 4) -> (B, 4); never one that correlates less.
    """
    best, most = cuts, _correlation(a, window(b, cuts))
    for _ in range(REFINED):
        cuts = (cuts + _step(a, b, cuts)).clamp(0, DEEPEST)
        found = _correlation(a, window(b, cuts))
        best, most = torch.where((found > most)[:, None], cuts, best), torch.maximum(found, most)
    return best


def _step(a: Tensor, b: Tensor, cuts: Tensor) -> Tensor:
    """A step of Gauss and Newton, damped: (B, 4)."""
    w, at = window(b, cuts), _centers(a)
    dx, dy = _slopes(w)
    dx, dy = dx / (1 - cuts[:, 0] - cuts[:, 1])[:, None, None], dy / (1 - cuts[:, 2] - cuts[:, 3])[:, None, None]
    slopes = torch.stack([dx * (1 - at), -dx * at, dy * (1 - at[:, None]), -dy * at[:, None]], -1).flatten(1, 2)
    slopes = slopes - slopes.mean(1, keepdim=True)
    a, w = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (a, w))
    gain = ((a * w).sum(1) / a.square().sum(1).clamp_min(1)).clamp_min(0.1)
    square = slopes.mT @ slopes
    size = square.diagonal(dim1=1, dim2=2)
    square = square + torch.diag_embed(1e-2 * size + 1e-4 * size.amax(1, keepdim=True) + 1e-3)
    step: Tensor = torch.linalg.solve(square, slopes.mT @ (gain[:, None] * a - w)[..., None])[..., 0]
    return step.clamp(-0.03, 0.03)


def _slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """By how much a picture changes along its width and height: (B, 1, n, n) -> (B, n, n) each."""
    padded, n = F.pad(x, (1, 1, 1, 1), mode="replicate")[:, 0], x.shape[-1]
    return (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) * n / 2, (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) * n / 2


def recolored(part: Tensor, whole: Tensor) -> Tensor:
    """A picture with its colors mapped linearly to come near another's: (B, 3, S, S) each -> (B, 3, S, S).

    Ridge regression, towards the map that changes nothing but the mean.
    """
    x, y = part.flatten(2), whole.flatten(2)
    x = x - x.mean(2, keepdim=True)
    mean = y.mean(2, keepdim=True)
    ridge = STIFF * torch.eye(3, device=x.device, dtype=x.dtype)
    square, mixed = x @ x.mT / x.shape[2] + ridge, x @ (y - mean).mT / x.shape[2] + ridge
    turned: Tensor = torch.linalg.solve(square, mixed).mT @ x + mean
    return turned.view(part.shape)


def _structure(a: Tensor, b: Tensor) -> Tensor:
    """Contrast and structure of SSIM (Wang et al. 2004, eq. 13) in blocks side by side: (B, 1, S, S) -> (B, n, n)."""
    mean_a, mean_b = F.avg_pool2d(a, BLOCK), F.avg_pool2d(b, BLOCK)
    spread = F.avg_pool2d(a.square(), BLOCK) - mean_a.square() + F.avg_pool2d(b.square(), BLOCK) - mean_b.square()
    shared = F.avg_pool2d(a * b, BLOCK) - mean_a * mean_b
    return ((2 * shared + NOISE) / (spread + NOISE))[:, 0]


def _centers(images: Tensor) -> Tensor:
    """Where the pixels of a side lie, in shares of it: (n,)."""
    n = images.shape[-1]
    return (torch.arange(n, device=images.device, dtype=images.dtype) + 0.5) / n


def _coverage(old: int, new: int, first: float, last: float) -> Tensor:
    """What share of each of `new` pixels is of which of `old` ones, both ends cut: (new, old), rows sum to 1."""
    edges = old * (first + (1 - first - last) * torch.arange(new + 1) / new)
    pixels = torch.arange(old)
    part = (torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)).clamp_min(0)
    return part / part.sum(1, keepdim=True)


def _normal(x: Tensor) -> Tensor:
    """Each picture without its mean, and of length 1: (..., n, n)."""
    x = x - x.mean((-2, -1), keepdim=True)
    length: Tensor = x.norm(dim=(-2, -1), keepdim=True)
    return x / length.clamp_min(1e-3)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """(B, 1, n, n) each -> (B,)."""
    return (_normal(a) * _normal(b)).sum((1, 2, 3))
