"""The paper's augmentations (Ramesh et al. 2021, app. A.2 listing 1 and app. B.1 listing 2), for any target size.

Shapes: S target size, s short side of the image, t the size it is resized to. All results are (S, S, 3) uint8.
The paper gives numbers for S = 256: t in [256, 288] for the prior, up to 384 for the dVAE; here 9/8 S and 3/2 S.
Images smaller than S, which the paper does not have, are enlarged to S.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dalle_cli.errors import DalleError

Pixels = NDArray[np.uint8]
Augment = Callable[[Image.Image, int, np.random.Generator], Pixels]


def dvae(image: Image.Image, size: int, rng: np.random.Generator, flip: bool = True) -> Pixels:
    """Crop a random s x s square, resize to U[min(s, 9S/8), min(s, 3S/2)], crop S at random, flip at random."""
    s = min(image.size)
    left, top = (_uniform(rng, 0, side - s) for side in image.size)
    t = _uniform(rng, min(s, round(9 / 8 * size)), min(s, round(12 / 8 * size)))
    pixels = _crop(_resize(_square(image, left, top, s), max(t, size)), size, rng)
    if flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return pixels


def prior(image: Image.Image, size: int, rng: np.random.Generator) -> Pixels:
    """Crop an s x s square at 3/8 to 5/8 of the slack, resize to U[S, min(s, 9S/8)], crop S at random.

    Never flipped: a flip makes "left of" untrue.
    """
    s = min(image.size)
    left, top = (
        _uniform(rng, 3 * (side - s) // 8, max(3 * (side - s) // 8, 5 * (side - s) // 8 - 1)) for side in image.size
    )
    t = _uniform(rng, size, max(size, min(s, round(9 / 8 * size))))
    return _crop(_resize(_square(image, left, top, s), t), size, rng)


def place(image: Image.Image, size: int, rng: np.random.Generator) -> Pixels:
    """Shrink the center square to U[15S/16, S], place it at random, fill the rest with its border's median color.

    For images that fill their frame on a plain background, such as emoji: nothing is cut off or flipped. Not in the
    paper.
    """
    pixels = center(image, _uniform(rng, -(-15 * size // 16), size))
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    ground = np.empty((size, size, 3), np.uint8)
    ground[:] = np.median(border, axis=0)
    top, left = (_uniform(rng, 0, size - len(pixels)) for _ in range(2))
    ground[top : top + len(pixels), left : left + len(pixels)] = pixels
    return ground


def center(image: Image.Image, size: int, rng: np.random.Generator | None = None) -> Pixels:
    """Crop the center square and resize it to S; not random."""
    s = min(image.size)
    width, height = image.size
    return _resize(_square(image, (width - s) // 2, (height - s) // 2, s), size)


AUGMENTATIONS: dict[str, Augment] = {"dvae": dvae, "prior": prior, "place": place, "center": center}


def by_name(name: str, flip: bool = True) -> Augment:
    """The augmentation of this name; only "dvae" uses `flip`.

    Raises:
        DalleError: no such name.
    """
    if name not in AUGMENTATIONS:
        raise DalleError(f"expected an augmentation of {', '.join(AUGMENTATIONS)}, found {name}; correct the recipe")
    return partial(dvae, flip=flip) if name == "dvae" else AUGMENTATIONS[name]


def _uniform(rng: np.random.Generator, low: int, high: int) -> int:
    """A random integer in [low, high]; uses no random numbers if there is no choice."""
    return int(rng.integers(low, high + 1)) if high > low else low


def _square(image: Image.Image, left: int, top: int, side: int) -> Pixels:
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    return np.asarray(image)


def _crop(pixels: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    top = _uniform(rng, 0, pixels.shape[0] - size)
    left = _uniform(rng, 0, pixels.shape[1] - size)
    return pixels[top : top + size, left : left + size]


def _resize(pixels: Pixels, t: int) -> Pixels:
    """Resize (s, s, 3) to (t, t, 3): area average to reduce, bicubic to enlarge."""
    if pixels.shape[0] < t:
        return np.asarray(Image.fromarray(pixels).resize((t, t), Image.Resampling.BICUBIC))
    return area(pixels, t) if pixels.shape[0] > t else pixels


def area(pixels: Pixels, t: int) -> Pixels:
    """Reduce (s, s, 3) to (t, t, 3): each new pixel is the average of the area it covers, fractions of pixels included.

    PIL's BOX uses whole pixels only: for 1 < s/t < 2 some new pixels average two and others copy one.
    """
    index, weight = _coverage(pixels.shape[0], t)
    rows = np.zeros((t, *pixels.shape[1:]), np.float32)
    both = np.zeros((t, t, pixels.shape[2]), np.float32)
    for i, w in zip(index, weight, strict=True):
        rows += pixels[i] * w[:, None, None]
    for i, w in zip(index, weight, strict=True):
        both += np.take(rows, i, axis=1) * w[:, None]
    return np.rint(both).astype(np.uint8)


@lru_cache(maxsize=1024)
def _coverage(s: int, t: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """The old pixels that each of t new ones covers, and their weights: (K, t) and (K, t), columns sum to 1."""
    edges = np.arange(t + 1) * s / t
    first = np.floor(edges[:-1]).astype(np.intp)
    index = first + np.arange(int(np.ceil(s / t)) + 1)[:, None]
    overlap = np.minimum(index + 1, edges[1:]) - np.maximum(index, edges[:-1])
    weight = np.clip(overlap, 0, None)
    return np.minimum(index, s - 1), (weight / weight.sum(axis=0)).astype(np.float32)
