"""Image grids: images in rows, with captions and scores, as one image.

Contrast and colors of the images are never rescaled.
"""

import math
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dalle_cli.errors import DalleError

Pixels = NDArray[np.uint8]

BACKGROUND, INK, FAINT = (246, 246, 244), (38, 38, 38), (110, 110, 106)
MARGIN, GAP, UNDER = 24, 12, 7  # pixels: around the grid, between cells, between an image and its caption
LINE, TITLE_LINE = 16, 20  # pixels from one line of text to the next
CAPTION_LINES, HEADING_LINES = 3, 2
MIN_CELL, MAX_CELL, MAX_WIDTH = 112, 256, 1280  # pixels
MIN_TEXT = 220  # pixels of text width, for a single small image
MAX_TEXT = 500  # characters; the rest of a text is cut

PRIMARY_FONTS = ("NotoSans-Regular.ttf", "DejaVuSans.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf")
BOLD_FONTS = ("NotoSans-Bold.ttf", "DejaVuSans-Bold.ttf", "LiberationSans-Bold.ttf", "Arial Bold.ttf", "arialbd.ttf")
FALLBACK_FONTS = (
    *("DejaVuSans.ttf", "NanumGothic.ttf", "NotoSansCJK-Regular.ttc", "NotoSansKR-Regular.otf"),
    *("AppleSDGothicNeo.ttc", "malgun.ttf", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf"),
    *("NotoEmoji-Regular.ttf", "Symbola.ttf", "Apple Symbols.ttf", "seguisym.ttf"),
)


class Style(NamedTuple):
    """How text looks: its size in pixels, color and weight, and the distance between lines."""

    size: int
    color: tuple[int, int, int]
    bold: bool = False
    leading: int = LINE


TITLE, HEADING = Style(15, INK, bold=True, leading=TITLE_LINE), Style(13, INK, bold=True)
BODY, SCORE = Style(12, INK), Style(11, FAINT)


class Row(NamedTuple):
    """Images side by side, by number, and the heading above them, which may be empty."""

    members: tuple[int, ...]
    heading: str
    captioned: bool  # whether each image has its own caption below
    first: bool  # whether it is the first row of its block


def image_grid(
    images: Sequence[Pixels], captions: Sequence[str] | None = None, scores: Sequence[float] | None = None,
    columns: int | None = None, cell: int | None = None, title: str | None = None, groups: Sequence[int] | None = None,
) -> Image.Image:  # fmt: skip
    """Arrange images, each (3, H, W) or (H, W, 3) uint8, in rows; each run of one group starts a new row.

    `cell` is the side in pixels of the square that each image is fitted into. By default small images are enlarged by
    a whole factor and large ones reduced. A caption that a whole row shares is written once above it.

    Raises:
        DalleError: there are no images.
    """
    if not len(images):
        raise DalleError("expected at least one image for the grid, found none; select more rows")
    for name, values in (("captions", captions), ("scores", scores), ("groups", groups)):
        if values is not None and len(values) != len(images):
            raise ValueError(f"{len(images)} images but {len(values)} {name}")
    found = [to_image(pixels) for pixels in images]
    side = cell or _side(max(max(image.size) for image in found))
    texts = [_clean(caption) for caption in captions or [""] * len(found)]
    blocks = _blocks(len(found), texts, groups)
    rows = _rows(blocks, texts, columns or _columns([len(block) for block in blocks], side))
    fitted = [_fit_square(image, side) for image in found]
    columns = max(len(row.members) for row in rows)
    width = max(columns * (side + GAP) - GAP, MIN_TEXT)
    under = width if columns == 1 else side  # a single column has room beside the image
    parts = [(0, _paragraph(_clean(title or ""), HEADING_LINES, TITLE, width))]
    for row in rows:
        gap = (2 * GAP if row.first else GAP) if len(parts) > 1 else GAP if title else 0
        parts += [(gap, _draw_row(row, fitted, texts, scores, side, width, under))]
    body = _stack(parts, width)
    canvas = Image.new("RGB", (width + 2 * MARGIN, body.height + 2 * MARGIN), BACKGROUND)
    canvas.paste(body, (MARGIN, MARGIN))
    return canvas


def to_image(pixels: Pixels) -> Image.Image:
    """(3, H, W) or (H, W, 3) uint8 -> RGB."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or 3 not in (pixels.shape[0], pixels.shape[2]):
        raise ValueError(f"expected a uint8 image (3, H, W) or (H, W, 3), found {pixels.dtype} {pixels.shape}")
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0) if pixels.shape[0] == 3 else pixels))


def _side(longest: int) -> int:
    """A whole multiple of a small image's size, so that all of its pixels are enlarged equally."""
    return min(longest * math.ceil(MIN_CELL / longest), MAX_CELL)


def _columns(sizes: Sequence[int], side: int) -> int:
    """As many as fit, or fewer so that the rows of the largest block are evenly filled and not wider than 3 to 2."""
    fit = max(1, (MAX_WIDTH - 2 * MARGIN + GAP) // (side + GAP))
    largest = max(sizes)
    if largest <= min(fit, 8 if len(sizes) > 1 else 5):
        return largest
    at_most = min(fit, largest, math.ceil(math.sqrt(1.5 * largest)) if len(sizes) == 1 else 8)
    return math.ceil(largest / math.ceil(largest / at_most))


def _blocks(count: int, texts: Sequence[str], groups: Sequence[int] | None) -> list[list[int]]:
    """Runs of one group; without groups, runs of equal captions if each has at least two images."""
    keys: Sequence[object] = texts if groups is None else groups
    runs = [list(members) for _, members in groupby(range(count), key=keys.__getitem__)]
    return runs if groups is not None or min(map(len, runs)) > 1 else [list(range(count))]


def _rows(blocks: Sequence[Sequence[int]], texts: Sequence[str], columns: int) -> list[Row]:
    """A caption becomes a heading if a whole block shares it (once, above the block) or a whole row does."""
    rows = []
    for block in blocks:
        whole = _share_caption(block, texts)
        for start in range(0, len(block), columns):
            members = tuple(block[start : start + columns])
            shared = whole or _share_caption(members, texts)
            heading = texts[members[0]] if shared and not (whole and start) else ""
            rows.append(Row(members, heading, captioned=not shared, first=start == 0))
    return rows


def _share_caption(members: Sequence[int], texts: Sequence[str]) -> bool:
    return len(members) > 1 and len({texts[i] for i in members}) == 1


def _draw_row(
    row: Row, images: Sequence[Image.Image], texts: Sequence[str], scores: Sequence[float] | None, side: int,
    width: int, under: int,
) -> Image.Image:  # fmt: skip
    """Heading, images aligned at the bottom, and below each image its score and caption, `under` pixels wide."""
    height = max(images[i].height for i in row.members)
    cells = []
    for i in row.members:
        score = _paragraph(_number(scores[i]) if scores is not None else "", 1, SCORE, under)
        caption = _paragraph(texts[i] if row.captioned else "", CAPTION_LINES, BODY, under)
        gap = 0 if scores is not None else UNDER
        cells.append(_stack([(height - images[i].height, images[i]), (UNDER, score), (gap, caption)], under))
    strip = Image.new("RGB", (width, max(cell.height for cell in cells)), BACKGROUND)
    for number, cell in enumerate(cells):
        strip.paste(cell, (number * (side + GAP), 0))
    heading = _paragraph(row.heading, HEADING_LINES, HEADING, width)
    return _stack([(0, heading), (UNDER if heading.height else 0, strip)], width)


def _stack(parts: Sequence[tuple[int, Image.Image]], width: int) -> Image.Image:
    """Images one below another, each with a gap of so many pixels above it; those without height are left out."""
    parts = [(gap, part) for gap, part in parts if part.height]
    canvas = Image.new("RGB", (width, sum(gap + part.height for gap, part in parts)), BACKGROUND)
    top = 0
    for gap, part in parts:
        canvas.paste(part, (0, top + gap))
        top += gap + part.height
    return canvas


def _number(score: float) -> str:
    return f"{score:.3f}" if math.isfinite(score) else "\N{EN DASH}"


def _fit_square(image: Image.Image, side: int) -> Image.Image:
    """The image resized so that its longer side is `side`."""
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    # Hamming keeps edges that bilinear blurs, and has no bright rims around them as bicubic has
    return image.resize(size, Image.Resampling.HAMMING if factor > 1 else Image.Resampling.LANCZOS)


def _clean(text: str) -> str:
    """One line of characters that can be drawn one by one: no control characters, joiners or variation selectors."""
    kept = []
    for char in unicodedata.normalize("NFC", text[:MAX_TEXT]):
        category = unicodedata.category(char)
        if category == "Cs":
            kept.append("\N{REPLACEMENT CHARACTER}")
        elif category != "Cf" and not "\ufe00" <= char <= "\ufe0f":
            kept.append(" " if category[0] in "ZC" and category != "Co" else char)
    return " ".join("".join(kept).split())


def _paragraph(text: str, most: int, style: Style, width: int) -> Image.Image:
    """Text of at most so many lines as an image; each run of characters in the first font that has them."""
    lines = _wrap(text, width, most, style)
    canvas = Image.new("RGB", (width, len(lines) * style.leading), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        left = 0.0
        for font, chars in groupby(line, key=lambda char: _font(char, style.size, style.bold)):
            run = "".join(chars)
            draw.text((left, style.size + number * style.leading), run, fill=style.color, font=font, anchor="ls")
            left += font.getlength(run)
    return canvas


def _wrap(text: str, width: float, most: int, style: Style) -> list[str]:
    """Wrap text to a width in pixels; what does not fit into `most` lines becomes an ellipsis."""
    lines: list[str] = []
    while text:
        fit = _fit(text, width, style)
        if fit == len(text):
            return [*lines, text]
        if len(lines) == most - 1:
            cut = _fit(text, width - _advance("\N{HORIZONTAL ELLIPSIS}", style), style)
            return [*lines, text[:cut].rstrip() + "\N{HORIZONTAL ELLIPSIS}"]
        cut = text.rfind(" ", 0, fit + 1)
        cut = cut if cut > 0 else fit
        lines.append(text[:cut].rstrip())
        text = text[cut:].lstrip()
    return lines


def _fit(text: str, width: float, style: Style) -> int:
    """How many characters fit, at least one."""
    for count, char in enumerate(text):
        width -= _advance(char, style)
        if width < 0:
            return max(count, 1)
    return len(text)


@lru_cache(maxsize=65536)
def _advance(char: str, style: Style) -> float:
    return _font(char, style.size, style.bold).getlength(char)


@lru_cache(maxsize=65536)
def _font(char: str, size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """The first font that has the character; the primary font, which draws a box, if none has."""
    primary = _primary(size, bold)
    fallback = (font for name in FALLBACK_FONTS if (font := _load(name, size)))
    return next((font for font in chain([primary], fallback) if _has(font, char)), primary)


@lru_cache
def _primary(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    for name in BOLD_FONTS if bold else PRIMARY_FONTS:
        if font := _load(name, size):
            return font
    built_in = ImageFont.load_default(size)
    assert isinstance(built_in, ImageFont.FreeTypeFont)  # true if a size is given
    return built_in


@lru_cache
def _load(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    """A font of the system, or None."""
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


def _has(font: ImageFont.FreeTypeFont, char: str) -> bool:
    """Whether the font has a character; FreeType draws the same box for all that it lacks."""
    found, unknown = font.getmask(char), font.getmask("\U0010fffe")
    return char == " " or (found.size, bytes(found)) != (unknown.size, bytes(unknown))
