"""Image files -> RGB.

The file's first bytes choose the decoder, not `Image.open`: rarely used formats stay out, and so does PIL's
process-wide decompression-bomb warning. The size is checked in the header before any pixel is decoded. The first frame
of an animation is read, EXIF orientation applied, alpha composited on white, 16-bit gray divided by 257; color profiles
are ignored.
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

# PIL warns of each image with broken EXIF, which is read all the same.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

_NO_ALPHA = ("RGB", "L", "1", "P", "CMYK", "YCbCr", "RGBX")
_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


_DECODERS: dict[bytes, Callable[[io.BytesIO], Image.Image]] = {  # by a file's first bytes
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    b"\xff\xd8\xff": JpegImagePlugin.jpeg_factory,
    b"RIFF": WebPImagePlugin.WebPImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
}


def decode(data: bytes, filters: Filters) -> Image.Image:
    """Decode the bytes of an image file to mode RGB.

    Raises:
        BadSample: not an image, broken, truncated, oversized, or filtered by its aspect ratio.
    """
    decoder = next((decoder for magic, decoder in _DECODERS.items() if data.startswith(magic)), None)
    if decoder is None:
        raise BadSample("unreadable: neither PNG, JPEG, WebP nor BMP" if data else "unreadable: zero bytes")
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
    """Apply the EXIF orientation; ignore it if the tags are broken."""
    if not any(key in image.info for key in _ORIENTATION):
        return image
    with contextlib.suppress(Exception):  # broken EXIF raises many kinds of errors
        return ImageOps.exif_transpose(image)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _from_deep(image)
    if image.mode in _NO_ALPHA and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def _from_deep(image: Image.Image) -> Image.Image:
    """Convert 16-bit gray to RGB; PIL's own conversion would clip at 255."""
    deep = np.asarray(image)
    if deep.dtype.kind not in "iu" or deep.min() < 0 or deep.max() > 65535:
        raise BadSample(f"unreadable: pixels of type {image.mode}")
    gray = np.rint(deep / 257).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        gray[deep == transparent] = 255
    return Image.fromarray(gray).convert("RGB")
