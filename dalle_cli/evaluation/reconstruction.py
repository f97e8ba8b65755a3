"""Metrics of a dVAE's reconstructions: PSNR, SSIM, bits per pixel, use of codes, and Frechet distance.

Shapes: B batch, H W pixels or code grid, V vocabulary, N all images. Pixels are 8-bit RGB on a device that has float64,
in which all is computed.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dalle_cli.errors import DalleError
from dalle_cli.evaluation.feature_batch import Features
from dalle_cli.evaluation.features import check_enough, title
from dalle_cli.evaluation.frechet import Moments, between
from dalle_cli.evaluation.likelihood import mean
from dalle_cli.models.pixels import from_uint8

PEAK = 255.0
MAX_DB = 100.0  # the PSNR of equal images, so that a mean over images is finite
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # Wang et al. 2004, sec. III-C
MAX_VALUES = 1 << 20  # pixel values whose windows are averaged at a time


def squared_error(images: Tensor, decoded: Tensor) -> Tensor:
    """Mean squared error of each image: (B, 3, H, W) uint8, twice -> (B,) float64."""
    return (images.double() - decoded.double()).square().mean((1, 2, 3))


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of 8-bit images from their squared error: (B,) -> (B,) dB, at most 100."""
    return (10 * (PEAK**2 / error).log10()).clamp_max(MAX_DB)


def ssim(images: Tensor, decoded: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13 and 17): (B, 3, H, W) uint8, twice -> (B,) float64 in [-1, 1].

    The mean over all whole windows (11x11, Gaussian of sigma 1.5) and over the three colors.

    Raises:
        DalleError: an image is smaller than a window.
    """
    height, width = images.shape[2:]
    if min(height, width) < WINDOW:
        raise DalleError(f"expected images of at least {WINDOW} pixels for SSIM, found {height} x {width}")
    rows, columns = (_windows(side).to(images.device) for side in (height, width))
    rows_at_once = max(1, MAX_VALUES // (3 * height * width))
    parts = zip(torch.split(images, rows_at_once), torch.split(decoded, rows_at_once), strict=True)
    return torch.cat([_ssim(x.double(), y.double(), rows, columns) for x, y in parts])


def _windows(side: int) -> Tensor:
    """The Gaussian of each whole window along a side, as rows: (side - 10, side) float64, rows sum to 1."""
    offsets = torch.arange(WINDOW, dtype=torch.double) - WINDOW // 2
    weights = (-offsets.square() / (2 * SIGMA**2)).exp()
    band = torch.zeros(side - WINDOW + 1, side, dtype=torch.double)
    for first, row in enumerate(band):
        row[first : first + WINDOW] = weights / weights.sum()
    return band


def _ssim(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    def average(values: Tensor) -> Tensor:
        return rows @ values @ columns.mT

    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    mu_x, mu_y = average(x), average(y)
    var_x, var_y = average(x * x) - mu_x.square(), average(y * y) - mu_y.square()
    cov = average(x * y) - mu_x * mu_y
    similarity = (2 * mu_x * mu_y + c1) * (2 * cov + c2)
    return (similarity / ((mu_x.square() + mu_y.square() + c1) * (var_x + var_y + c2))).mean((1, 2, 3))


def usage(counts: Tensor) -> tuple[int, float, float]:
    """Codes in use, their perplexity, and their entropy in bits per code: (V,) counts -> three numbers."""
    share = counts.double() / counts.sum().clamp_min(1)
    entropy = float(torch.special.entr(share).sum())
    return int((counts > 0).sum()), math.exp(entropy), entropy / math.log(2)


class Reconstruction(NamedTuple):
    """An image and its reconstruction, (3, H, W) uint8 each. The order of the fields sorts by PSNR, then by row."""

    psnr: float
    row: int
    image: Tensor
    decoded: Tensor
    ssim: float | None


class Reconstructions:
    """Metrics of images and their reconstructions, added batch by batch; only the `keep` worst images are kept."""

    def __init__(self, n_vocab: int, keep: int = 0) -> None:
        self.keep = keep
        self.counts = torch.zeros(n_vocab, dtype=torch.int64)
        self.worst: list[Reconstruction] = []  # by PSNR
        self.rows: list[int] = []
        self._errors: list[Tensor] = []
        self._ssim: list[Tensor] = []
        self._codes_per_pixel = 0.0

    def add(self, rows: list[int], images: Tensor, decoded: Tensor, codes: Tensor) -> None:
        """Add B images: their rows, (B, 3, H, W) uint8, the same of reconstructions, codes (B, h, w)."""
        errors = squared_error(images, decoded).cpu()
        similarity = ssim(images, decoded).cpu() if min(images.shape[2:]) >= WINDOW else None
        self._codes_per_pixel = codes[0].numel() / images[0, 0].numel()
        self.counts += torch.bincount(codes.flatten().cpu(), minlength=len(self.counts))
        self.rows += rows
        self._errors.append(errors)
        self._ssim += [] if similarity is None else [similarity]
        for i, (row, value) in enumerate(zip(rows, psnr(errors).tolist(), strict=True)):
            if len(self.worst) < self.keep or (self.keep and (value, row) < self.worst[-1][:2]):
                pixels = images[i].cpu().clone(), decoded[i].cpu().clone()  # a view would hold the whole batch
                match = None if similarity is None else float(similarity[i])
                self.worst = sorted([*self.worst, Reconstruction(value, row, *pixels, match)])[: self.keep]

    def image_metrics(self, which: Tensor | None = None) -> dict[str, object]:
        """Metrics of all images, or of those of a mask (N,): means, with standard errors over images.

        `psnr_pooled` is the PSNR of the mean squared error over all images; `identical` counts equal images.
        """
        chosen = slice(None) if which is None else which
        errors = torch.cat(self._errors)[chosen]
        if not len(errors):
            return {"images": 0}
        out: dict[str, object] = {"images": len(errors), **mean(psnr(errors)).as_dict("psnr")}
        out |= {"psnr_pooled": float(psnr(errors.mean())), "identical": int((errors == 0).sum())}
        return out | (mean(torch.cat(self._ssim)[chosen]).as_dict("ssim") if self._ssim else {})

    def code_metrics(self) -> dict[str, object]:
        """Bits per pixel, at a fixed length and by an entropy coder of single codes; codes in use, and perplexity."""
        used, perplexity, bits = usage(self.counts)
        return {
            "bits_per_pixel": math.log2(len(self.counts)) * self._codes_per_pixel,
            "bits_per_pixel_entropy": bits * self._codes_per_pixel,
            **{"n_vocab": len(self.counts), "codes_used": used, "perplexity": perplexity},
        }


class ReconstructionDistance:
    """Frechet distance between originals and reconstructions, added batch by batch."""

    def __init__(self, features: Features) -> None:
        self.features = features
        self.originals, self.reconstructions = Moments(features.width), Moments(features.width)

    def add(self, images: Tensor, decoded: Tensor) -> None:
        """Add B images and their reconstructions, (B, 3, H, W) uint8."""
        for pixels, moments in ((images, self.originals), (decoded, self.reconstructions)):
            moments.add(self.features(from_uint8(pixels)).features)

    def metrics(self) -> dict[str, object]:
        """The distance, its name, and its features. Raises: DalleError if too few images could be read."""
        check_enough(self.features, readable=self.originals.count)
        value = between(self.originals, self.reconstructions)
        return {"name": title(self.features), "value": value, "features": self.features.name}
