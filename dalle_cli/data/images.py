"""Picture files -> RGB, or a BadSample that says why not.

The decoders are opened by the file's first bytes rather than through `Image.open`: that keeps the rarely used and
risky formats out, and PIL's decompression-bomb check, which prints a warning and is set for the whole process, too.
Size is checked in the header before any pixel is decoded. Of an animated picture the first frame is read. EXIF
orientation is applied, alpha is composited on white, 16-bit gray is divided by 257; color profiles are not applied.
"""

import contextlib
import hashlib
import io
import os
import warnings
from collections.abc import Callable

import numpy as np
from PIL import BmpImagePlugin, Image, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from dalle_cli.data import files
from dalle_cli.data.filters import Filters
from dalle_cli.data.skips import BadSample
from dalle_cli.errors import DalleError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# Broken EXIF makes PIL warn once for each picture; what can be read of such a picture is read.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

_NO_ALPHA = ("RGB", "L", "1", "P", "CMYK", "YCbCr", "RGBX")
_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


def _decoder(data: bytes) -> Callable[[io.BytesIO], Image.Image]:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.jpeg_factory
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    if data.startswith(b"BM"):
        return BmpImagePlugin.BmpImageFile
    raise BadSample("unreadable: neither PNG, JPEG, WebP nor BMP" if data else "unreadable: zero bytes")


def decode(data: bytes, filters: Filters) -> Image.Image:
    """The bytes of a picture file -> an image in mode RGB.

    Raises:
        BadSample: Not a picture, broken, truncated, oversized, or of an aspect ratio that is filtered out.
    """
    decoder = _decoder(data)
    try:
        image = decoder(io.BytesIO(data))
        filters.size(*image.size)
        image.load()
        return _to_rgb(_upright(image))
    except BadSample:
        raise
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, struct.error, KeyError ... on broken files
        raise BadSample(f"unreadable: {error or type(error).__name__}") from error


def read_image(source: str | os.PathLike[str] | bytes, option: str = "the path") -> tuple[Image.Image, str]:
    """Read one image from a path, a URL that fsspec opens, or the bytes of a file: -> (RGB image, SHA-256 of its file).

    `option` is the option or argument that an error message names.

    Raises:
        DalleError: there is no file, or it is not an image that can be read.
    """
    name = "bytes" if isinstance(source, bytes) else os.fspath(source)
    try:
        data = source if isinstance(source, bytes) else files.read(name)
        return decode(data, Filters()), hashlib.sha256(data).hexdigest()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DalleError(f"expected an image, found {reason}: {name}; check {option}") from None
    except BadSample as reason:
        raise DalleError(f"expected an image, found {name} {reason}; check {option}") from None


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; tags too broken to be read count as none."""
    if not any(key in image.info for key in _ORIENTATION):
        return image
    with contextlib.suppress(Exception):  # as many kinds of them as there are ways to break EXIF
        return ImageOps.exif_transpose(image)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _from_deep(image)
    if image.mode in _NO_ALPHA and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def _from_deep(image: Image.Image) -> Image.Image:
    """16-bit gray -> RGB; PIL's own conversion would clip at 255."""
    deep = np.asarray(image)
    if deep.dtype.kind not in "iu" or deep.min() < 0 or deep.max() > 65535:
        raise BadSample(f"unreadable: pixels of type {image.mode}")
    gray = np.rint(deep / 257).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        gray[deep == transparent] = 255
    return Image.fromarray(gray).convert("RGB")
