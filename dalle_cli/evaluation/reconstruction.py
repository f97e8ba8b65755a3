"""What a tokenizer of pictures keeps of them: PSNR, SSIM, bits, and how its codes are used.

Shapes: B batch, H W pixels or code grid, V vocabulary, N all pictures; pixels are 8-bit RGB, on any device that has
float64, in which all is computed.
"""

import bisect
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_cli.errors import DalleError
from dalle_cli.evaluation.features import Features, title
from dalle_cli.evaluation.frechet import Moments, between
from dalle_cli.evaluation.likelihood import mean
from dalle_cli.models.pixels import from_uint8

PEAK = 255.0
MOST_DB = 100.0  # the PSNR of equal pictures, so that a mean over pictures is a number
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # Wang et al. 2004, sec. III-C
AT_ONCE = 1 << 20  # pixel values whose windows are averaged at a time


def squared_error(images: Tensor, shown: Tensor) -> Tensor:
    """Mean over the values of each picture: (B, 3, H, W) uint8, twice -> (B,) float64."""
    return (images.double() - shown.double()).square().mean((1, 2, 3))


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of 8-bit pictures from their squared error: (B,) -> (B,) dB, at most 100."""
    return (10 * (PEAK**2 / error).log10()).clamp_max(MOST_DB)


def ssim(images: Tensor, shown: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13 and 17): (B, 3, H, W) uint8, twice -> (B,) float64 in [-1, 1].

    The mean over all whole windows (11x11, Gaussian of sigma 1.5) of each color, and over the three colors.

    Raises: DalleError where a picture is smaller than a window.
    """
    height, width = images.shape[2:]
    if min(height, width) < WINDOW:
        raise DalleError(f"expected pictures of at least {WINDOW} pixels for SSIM, found {height} x {width}")
    rows, columns = (_windows(side).to(images.device) for side in (height, width))
    at_once = max(1, AT_ONCE // (3 * height * width))
    parts = zip(torch.split(images, at_once), torch.split(shown, at_once), strict=True)
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
    likeness = (2 * mu_x * mu_y + c1) * (2 * cov + c2)
    return (likeness / ((mu_x.square() + mu_y.square() + c1) * (var_x + var_y + c2))).mean((1, 2, 3))


def usage(counts: Tensor) -> tuple[int, float, float]:
    """Codes in use, their perplexity, and the bits of one code by their own shares: (V,) counts -> three numbers.

    The bits are those of an ideal entropy coder that was told the shares; telling it is not counted.
    """
    share = counts.double() / counts.sum().clamp_min(1)
    entropy = float(torch.special.entr(share).sum())
    return int((counts > 0).sum()), math.exp(entropy), entropy / math.log(2)


@dataclass(frozen=True)
class Seen:
    """A picture and its reconstruction, (3, H, W) uint8 each, its row in the data set, and its scores."""

    row: int
    image: Tensor
    shown: Tensor
    psnr: float
    ssim: float | None

    @property
    def place(self) -> tuple[float, int]:
        """Where it stands among the worst: by PSNR, then by row."""
        return self.psnr, self.row


class Reconstructions:
    """Scores of pictures beside their reconstructions, a batch at a time; of the pictures only the worst are kept."""

    def __init__(self, n_vocab: int, keep: int = 0) -> None:
        self.keep = keep
        self.counts = torch.zeros(n_vocab, dtype=torch.int64)
        self.worst: list[Seen] = []  # by PSNR
        self.rows: list[int] = []
        self._errors: list[Tensor] = []
        self._ssim: list[Tensor] = []
        self._per_pixel = 0.0  # codes

    def add(self, rows: list[int], images: Tensor, shown: Tensor, codes: Tensor) -> None:
        """Take in B pictures: their rows, (B, 3, H, W) uint8, the same of reconstructions, codes (B, h, w)."""
        errors = squared_error(images, shown).cpu()
        alike = ssim(images, shown).cpu() if min(images.shape[2:]) >= WINDOW else None
        self._per_pixel = codes[0].numel() / images[0, 0].numel()
        self.counts += torch.bincount(codes.flatten().cpu(), minlength=len(self.counts))
        self.rows += rows
        self._errors.append(errors)
        self._ssim += [] if alike is None else [alike]
        for i, (row, value) in enumerate(zip(rows, psnr(errors).tolist(), strict=True)):
            if len(self.worst) < self.keep or (self.keep and (value, row) < self.worst[-1].place):
                pixels = images[i].cpu().clone(), shown[i].cpu().clone()  # a view would hold the whole batch
                seen = Seen(row, *pixels, value, None if alike is None else float(alike[i]))
                bisect.insort(self.worst, seen, key=lambda one: one.place)
                del self.worst[self.keep :]

    def pictures(self, which: Tensor | None = None) -> dict[str, object]:
        """Scores of all pictures, or of those of a mask (N,): means, with standard errors over pictures.

        `psnr_pooled` is that of the squared error over all pictures at once; `identical` counts equal pictures.
        """
        errors = torch.cat(self._errors)
        errors = errors if which is None else errors[which]
        if not len(errors):
            return {"pictures": 0}
        of_each = mean(psnr(errors))
        told: dict[str, object] = {"pictures": len(errors), "psnr": of_each.value, "psnr_error": of_each.error}
        told |= {"psnr_pooled": float(psnr(errors.mean())), "identical": int((errors == 0).sum())}
        if self._ssim:
            alike = torch.cat(self._ssim)
            of_each = mean(alike if which is None else alike[which])
            told |= {"ssim": of_each.value, "ssim_error": of_each.error}
        return told

    def codes(self) -> dict[str, object]:
        """Bits per pixel, written plainly and by an entropy coder of single codes; codes in use, and perplexity."""
        n_vocab = len(self.counts)
        used, perplexity, bits = usage(self.counts)
        return {
            "bits_per_pixel": math.log2(n_vocab) * self._per_pixel,
            "bits_per_pixel_entropy": bits * self._per_pixel,
            "n_vocab": n_vocab,
            "codes_used": used,
            "perplexity": perplexity,
        }


class Shift:
    """Frechet distance of reconstructions to their originals, a batch at a time."""

    def __init__(self, features: Features) -> None:
        self.features = features
        self.originals, self.reconstructions = Moments(features.width), Moments(features.width)

    def check(self, n: int) -> None:
        """Raises: DalleError if n pictures are too few for the features' covariance."""
        if n <= (width := self.features.width):
            raise DalleError(
                f"expected at least {width + 1} pictures for the covariance of {width} features of "
                f"{self.features.name}, found {n}; give more, or features of fewer dimensions"
            )

    def add(self, images: Tensor, shown: Tensor) -> None:
        """Take in B pictures and their reconstructions, (B, 3, H, W) uint8."""
        for pixels, moments in ((images, self.originals), (shown, self.reconstructions)):
            moments.add(self.features(from_uint8(pixels)).features)

    def figures(self) -> dict[str, object]:
        """The distance, what it is called, and by which features it was taken.

        Raises: DalleError if too few pictures could be read.
        """
        self.check(self.originals.count)
        value = between(self.originals, self.reconstructions)
        return {"called": title(self.features), "value": value, "features": self.features.name}
