"""Bits of an image: as codes by a prior, and as PNG and WebP of the same image.

Shapes: N images, H W code grid, T caption length; images are (S, S, 3) uint8.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from withheld import Pixels

from dalle_cli.artifacts import Artifact
from dalle_cli.data import tokenizer as tokenizers
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.evaluation.reconstruction import psnr, squared_error
from dalle_cli.hub import bundles
from dalle_cli.pipelines import loading
from dalle_cli.pipelines.codec import Codec
from dalle_cli.pipelines.scoring import nats

AT_ONCE = 32
METHOD = 6  # of WebP: the slowest, smallest


@dataclass(frozen=True)
class Kept:
    """A form of N images: bits of each, and PSNR of each where it loses something."""

    bits: npt.NDArray[np.float64]
    psnr: npt.NDArray[np.float64] | None = None


def dvae_codes(weights: Artifact, images: Sequence[Pixels], machine: Arithmetic) -> tuple[torch.Tensor, list[Pixels]]:
    """Codes of images, (N, H, W) int64, and what the decoder makes of them.

    Raises:
        DalleError: images of another size than the dVAE's.
    """
    codec = Codec(weights, machine)
    if (side := images[0].shape[0]) != (wanted := codec.size):
        raise DalleError(f"expected images of {wanted} pixels for {weights.path.name}, found {side}; make data again")
    codes, shown = [], []
    for at in range(0, len(images), AT_ONCE):
        lot = np.stack(images[at : at + AT_ONCE]).transpose(0, 3, 1, 2)
        grid = codec.encode(np.ascontiguousarray(lot))
        codes.append(torch.from_numpy(grid.astype(np.int64)))
        shown += list(codec.decode(grid).transpose(0, 2, 3, 1))
    return torch.cat(codes), shown


def decibels(images: Sequence[Pixels], shown: Sequence[Pixels]) -> npt.NDArray[np.float64]:
    """PSNR of each image: (N,) dB."""
    first, second = (torch.from_numpy(np.stack(side)).permute(0, 3, 1, 2) for side in (images, shown))
    return psnr(squared_error(first, second)).numpy()


def prior_bits(
    weights: Artifact, encoder: Artifact, codes: torch.Tensor, captions: Sequence[str], machine: Arithmetic
) -> dict[str, npt.NDArray[np.float64]]:
    """Bits of each image's codes given its caption, given none, and of the caption itself: (N,) each.

    Raises:
        DalleError: the prior was trained on another dVAE's codes.
    """
    bundles.check_digest("dVAE", encoder.digest, weights.require("encoder", str), weights.path)
    prior = loading.prior(weights, machine.device)
    rows, n, _ = tokenizers.load(bundles.tokenizer(weights)).encode_batch(list(captions), prior.config.n_text)
    tokens, lengths = torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(n.astype(np.int64))
    parts = []
    for at in range(0, len(codes), AT_ONCE):
        here = slice(at, at + AT_ONCE)
        given = [x[here].to(machine.device) for x in (tokens, lengths, codes)]
        with machine.autocast():
            text, image = nats(prior, *given)
            _, alone = nats(prior, given[0], torch.zeros_like(given[1]), given[2])
        parts.append(torch.stack([x.sum(1) for x in (image, alone, text)]))
    given_caption, without, caption = (torch.cat(parts, dim=1) / math.log(2)).numpy()
    return {"caption": given_caption, "none": without, "text": caption}


# Other formats


def png(image: Pixels) -> int:
    """Bytes of the smallest PNG that Pillow writes: in true color, or with a palette where there are few colors."""
    sizes = [_size(Image.fromarray(image), "PNG", optimize=True)[0]]
    colors, place = np.unique(image.reshape(-1, 3), axis=0, return_inverse=True)
    if len(colors) <= 256:
        indexed = Image.fromarray(place.reshape(image.shape[:2]).astype(np.uint8))
        indexed.putpalette(colors.tobytes())
        sizes.append(_size(indexed, "PNG", optimize=True)[0])
    return min(sizes)


def webp(image: Pixels) -> int:
    """Bytes as lossless WebP."""
    return _size(Image.fromarray(image), "WEBP", lossless=True, quality=100, method=METHOD)[0]


def lossy_webp(image: Pixels, wanted: float) -> tuple[int, float]:
    """Fewest bytes of lossy WebP that reach a PSNR, and the PSNR; those of the highest quality, where none does.

    Every quality is tried: neither bytes nor PSNR of so small an image only grow with it.
    """
    every = [_lossy(image, quality) for quality in range(101)]
    return min((found for found in every if found[1] >= wanted), default=every[100])


def _lossy(image: Pixels, quality: int) -> tuple[int, float]:
    size, data = _size(Image.fromarray(image), "WEBP", quality=quality, method=METHOD)
    shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return size, float(decibels([image], [shown])[0])


def _size(image: Image.Image, format_: str, **options: bool | int) -> tuple[int, bytes]:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.tell(), buffer.getvalue()


def others(images: Sequence[Pixels], wanted: npt.NDArray[np.float64]) -> dict[str, Kept]:
    """The images as PNG, lossless WebP, and lossy WebP of at least these PSNR, each image by itself."""
    lossy = np.array([lossy_webp(own, float(least)) for own, least in zip(images, wanted, strict=True)])
    return {
        "PNG": Kept(8.0 * np.array([png(own) for own in images])),
        "WebP, lossless": Kept(8.0 * np.array([webp(own) for own in images])),
        "WebP, lossy, of the same PSNR or just above": Kept(8.0 * lossy[:, 0], lossy[:, 1]),
    }
