"""Reduce and corrupt the conditioning image of an upsampler, to make it robust to a decoder's flaws.

The paper blurs for the first upsampler and uses BSR, a chain of corruptions in random order, for the second (Ramesh et
al. 2022, sec. 2.1; Zhang et al. 2021, arXiv 2103.14006). Shapes: S side of the large image, s side of the small one;
all are (side, side, 3) uint8.
"""

import io
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dalle_cli.data.augment import Augment, Pixels, area
from dalle_cli.errors import DalleError

Rng = np.random.Generator
Degrade = Callable[[Pixels, int, Rng], Pixels]
Flaw = Callable[[Pixels, Rng], Pixels]

BLUR_SIZE = 3  # pixels, as the paper's
KERNEL_SIZES = (7, 9, 11, 13, 15, 17, 19, 21)  # Zhang et al. 2021, sec. 3.1
ISOTROPIC, ANISOTROPIC = (0.1, 2.8), (0.5, 8.0)  # standard deviations in pixels, for a factor of 4
NOISE = (1 / 255, 25 / 255)  # sec. 3.3
QUALITY, JPEG_SHARE = (30, 95), 0.75  # sec. 3.3
RESIZES = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def by_name(name: str, sigma: float = 0.6, strength: float = 1.0) -> Degrade:
    """The corruption "none", "blur" with a standard deviation in pixels, or "bsr" with a strength in (0, 1].

    Raises:
        DalleError: no such name, or a number out of range.
    """
    if not (sigma > 0 and 0 < strength <= 1):
        raise DalleError(f"expected blur_sigma above 0 and corruption_strength in (0, 1], found {sigma}, {strength}")
    known: dict[str, Degrade] = {
        "none": none, "blur": partial(blur, sigma=sigma), "bsr": partial(bsr, strength=strength),
    }  # fmt: skip
    if name not in known:
        raise DalleError(f"expected a corruption of {', '.join(known)}, found {name}; correct the recipe")
    return known[name]


def crops(augment: Augment, whole: int) -> Augment:
    """An augmentation to images of side `whole`, followed by a random crop to the target size."""

    def cut(image: Image.Image, size: int, rng: Rng) -> Pixels:
        pixels = augment(image, whole, rng)
        top, left = rng.integers(0, whole - size + 1, 2).tolist()
        return pixels[top : top + size, left : left + size]

    return cut


def none(pixels: Pixels, small: int, rng: Rng) -> Pixels:
    """Reduce by area averages: (S, S, 3) -> (s, s, 3)."""
    return area(pixels, small)


def blur(pixels: Pixels, small: int, rng: Rng, sigma: float = 0.6) -> Pixels:
    """Reduce, then blur by a Gaussian of 3 x 3 pixels: (S, S, 3) -> (s, s, 3)."""
    return filtered(area(pixels, small), gaussian(BLUR_SIZE, sigma, sigma, 0.0))


def bsr(pixels: Pixels, small: int, rng: Rng, strength: float = 1.0) -> Pixels:
    """Two blurs, a reduction, noise and JPEG in random order, then JPEG again: (S, S, 3) -> (s, s, 3).

    As Zhang et al. 2021, sec. 3.4, without camera sensor noise. A strength below 1 scales the ranges of blur, noise
    and JPEG loss.
    """
    factor = pixels.shape[0] / small
    flaws: list[Flaw] = [
        lambda x, r: _blurred(x, r, strength, factor, isotropic=True),
        lambda x, r: _blurred(x, r, strength, factor, isotropic=False),
        lambda x, r: _reduced(x, small, r),
        lambda x, r: _noised(x, r, strength),
        lambda x, r: _compressed(x, r, strength) if r.random() < JPEG_SHARE else x,
    ]
    for place in rng.permutation(len(flaws)).tolist():
        pixels = flaws[place](pixels, rng)
    return _compressed(pixels, rng, strength)


def gaussian(size: int, along: float, across: float, angle: float) -> NDArray[np.float64]:
    """A kernel (size, size) of sum 1 with standard deviations along and across a direction in radians."""
    span = np.arange(size) - (size - 1) / 2
    y, x = np.meshgrid(span, span, indexing="ij")
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    kernel = np.exp(-((u / along) ** 2 + (v / across) ** 2) / 2)
    normal: NDArray[np.float64] = kernel / kernel.sum()
    return normal


def filtered(pixels: Pixels, kernel: NDArray[np.float64]) -> Pixels:
    """Convolve with a kernel (k, k), k odd; the image is mirrored at its edges."""
    reach, (height, width) = kernel.shape[0] // 2, pixels.shape[:2]
    padded = np.pad(pixels.astype(np.float64), ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    shape = padded.shape[:2]
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel, shape)[..., None]
    whole = np.fft.irfft2(spectrum, shape, axes=(0, 1))  # wrapped values are cut off below
    return _stored(whole[2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width])


def _stored(values: NDArray[np.float64]) -> Pixels:
    return np.rint(values).clip(0, 255).astype(np.uint8)


def _blurred(pixels: Pixels, rng: Rng, strength: float, factor: float, isotropic: bool) -> Pixels:
    """Blur by a random Gaussian, isotropic or not (sec. 3.1), scaled in proportion for factors other than 4."""
    low, high = ISOTROPIC if isotropic else ANISOTROPIC
    high = max(low, high * strength * factor / 4)
    along, across = rng.uniform(low, high, 2).tolist()
    kernel = gaussian(int(rng.choice(KERNEL_SIZES)), along, along if isotropic else across, rng.uniform(0, np.pi))
    return filtered(pixels, kernel)


def _resize(pixels: Pixels, side: int, rng: Rng) -> Pixels:
    method = RESIZES[int(rng.integers(len(RESIZES)))]
    return np.asarray(Image.fromarray(pixels).resize((side, side), method))


def _reduced(pixels: Pixels, small: int, rng: Rng) -> Pixels:
    """Resize to the small side, directly or through a size between (sec. 3.2), by random interpolations."""
    if rng.random() < 0.5:
        pixels = _resize(pixels, int(rng.integers(small, pixels.shape[0] + 1)), rng)
    return _resize(pixels, small, rng)


def _noised(pixels: Pixels, rng: Rng, strength: float) -> Pixels:
    """Add Gaussian noise: gray, independent per channel, or correlated between channels (sec. 3.3)."""
    low, high = NOISE
    level = 255 * rng.uniform(low, max(low, high * strength))
    kind = rng.random()
    if kind < 0.4:
        noise = level * rng.standard_normal((*pixels.shape[:2], 1))
    elif kind < 0.8:
        noise = level * rng.standard_normal(pixels.shape)
    else:
        directions, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        noise = level * (rng.standard_normal(pixels.shape) * rng.random(3)) @ directions.T
    return _stored(pixels + noise)


def _compressed(pixels: Pixels, rng: Rng, strength: float) -> Pixels:
    """Encode and decode as JPEG of a random quality."""
    low, high = QUALITY
    least = min(high, round(100 - (100 - low) * strength))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=int(rng.integers(least, high + 1)))
    return np.asarray(Image.open(file).convert("RGB"))
