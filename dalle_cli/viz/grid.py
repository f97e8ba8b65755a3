"""Contact sheets: pictures in rows, with captions and scores, as one image.

Pictures are drawn as they are: their contrast and colors are never rescaled.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dalle_cli.errors import DalleError

Picture = NDArray[np.uint8]

BACKGROUND, INK, FAINT = (246, 246, 244), (38, 38, 38), (110, 110, 106)
MARGIN, GAP, UNDER = 24, 12, 7  # pixels: the sheet's edge, between cells, between a picture and its caption
LINE, TITLE_LINE = 16, 20  # pixels from one line of type to the next
CAPTION_LINES, HEADING_LINES = 3, 2
SHORTEST_CELL, LONGEST_CELL, WIDEST_SHEET = 112, 256, 1280
NARROWEST = 220  # pixels of type, where there is only one small picture
LONGEST_TEXT = 500  # characters looked at; no place for more

PRIMARY_FONTS = ("NotoSans-Regular.ttf", "DejaVuSans.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf")
BOLD_FONTS = ("NotoSans-Bold.ttf", "DejaVuSans-Bold.ttf", "LiberationSans-Bold.ttf", "Arial Bold.ttf", "arialbd.ttf")
FALLBACK_FONTS = (
    "DejaVuSans.ttf",
    "NanumGothic.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansKR-Regular.otf",
    "AppleSDGothicNeo.ttc",
    "malgun.ttf",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "NotoEmoji-Regular.ttf",
    "Symbola.ttf",
    "Apple Symbols.ttf",
    "seguisym.ttf",
)


@dataclass(frozen=True)
class Row:
    """Pictures side by side, by number, and the heading above them, if any."""

    members: tuple[int, ...]
    heading: str
    captioned: bool  # each picture has its own caption below
    first: bool  # of its block


@dataclass(frozen=True)
class Frame:
    """What all rows have in common: widths in pixels, and whether scores are written."""

    width: int
    columns: int
    side: int
    scored: bool


@dataclass(frozen=True)
class Place:
    """A row's lines of type and its vertical extent in pixels: heading, lower edge of the pictures, end of captions."""

    row: Row
    heading: list[str]
    captions: list[list[str]]
    top: int
    bottom: int
    end: int


def sheet(
    pictures: Sequence[Picture],
    captions: Sequence[str] | None = None,
    scores: Sequence[float] | None = None,
    columns: int | None = None,
    cell: int | None = None,
    title: str | None = None,
    groups: Sequence[int] | None = None,
) -> Image.Image:
    """Draw pictures, (3, H, W) or (H, W, 3) uint8, in rows; consecutive pictures of one group share rows of their own.

    `cell` is the side, in pixels, of the square that a picture fits into; without it small pictures are enlarged by a
    whole factor and large ones reduced. A caption shared by a whole row is written once above it.

    Raises: DalleError where there is no picture.
    """
    if not len(pictures):
        raise DalleError("expected at least one picture to draw, found none; select more rows")
    for name, values in (("captions", captions), ("scores", scores), ("groups", groups)):
        if values is not None and len(values) != len(pictures):
            raise ValueError(f"{len(pictures)} pictures but {len(values)} {name}")
    images = [_image(picture) for picture in pictures]
    side = cell or _side(max(max(image.size) for image in images))
    texts = [_clean(caption) for caption in captions] if captions is not None else [""] * len(images)
    blocks = _blocks(len(images), texts, groups)
    rows = _rows(blocks, texts, columns or _columns([len(block) for block in blocks], side))
    return _draw(rows, [_fit_square(image, side) for image in images], texts, scores, side, _clean(title or ""))


def _image(picture: Picture) -> Image.Image:
    """(3, H, W) or (H, W, 3) uint8 -> RGB."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or 3 not in (picture.shape[0], picture.shape[2]):
        raise ValueError(f"expected a uint8 picture (3, H, W) or (H, W, 3), found {picture.dtype} {picture.shape}")
    return Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0) if picture.shape[0] == 3 else picture))


def _side(longest: int) -> int:
    """A whole multiple of small pictures' size, so that all of their pixels are treated alike."""
    return min(longest * math.ceil(SHORTEST_CELL / longest), LONGEST_CELL)


def _columns(sizes: Sequence[int], side: int) -> int:
    """As many as fit, or fewer so that the rows of the largest block come out even and not wider than 3 to 2."""
    fit = max(1, (WIDEST_SHEET - 2 * MARGIN + GAP) // (side + GAP))
    largest = max(sizes)
    if largest <= min(fit, 8 if len(sizes) > 1 else 5):
        return largest
    at_most = min(fit, largest, math.ceil(math.sqrt(1.5 * largest)) if len(sizes) == 1 else 8)
    return math.ceil(largest / math.ceil(largest / at_most))


def _blocks(count: int, texts: Sequence[str], groups: Sequence[int] | None) -> list[list[int]]:
    """Pictures of one group, in order; without groups, equal captions in a row make one where all do."""
    if groups is not None:
        return [list(members) for _, members in groupby(range(count), key=lambda i: groups[i])]
    runs = [list(members) for _, members in groupby(range(count), key=lambda i: texts[i])]
    return runs if min(len(run) for run in runs) > 1 else [list(range(count))]


def _rows(blocks: Sequence[Sequence[int]], texts: Sequence[str], columns: int) -> list[Row]:
    """A caption is a heading where a whole block shares it (then once, above the block) or a whole row does."""
    rows = []
    for block in blocks:
        whole = _alike(block, texts)
        for start in range(0, len(block), columns):
            members = tuple(block[start : start + columns])
            shared = whole or _alike(members, texts)
            heading = texts[members[0]] if shared and not (whole and start) else ""
            rows.append(Row(members, heading, captioned=not shared, first=start == 0))
    return rows


def _alike(members: Sequence[int], texts: Sequence[str]) -> bool:
    return len(members) > 1 and len({texts[i] for i in members}) == 1


def _lay(
    rows: Sequence[Row], fitted: Sequence[Image.Image], texts: Sequence[str], frame: Frame, top: int
) -> list[Place]:
    """Places from the top down; the last one's `end` is where the sheet's margin begins."""
    places: list[Place] = []
    under = frame.width if frame.columns == 1 else frame.side  # beside a lone picture there is room for its caption
    for row in rows:
        heading = _wrap(row.heading, frame.width, HEADING_LINES, HEADING)
        captions = [_wrap(texts[i], under, CAPTION_LINES, BODY) if row.captioned else [] for i in row.members]
        if places:
            top = places[-1].end + (2 * GAP if row.first else GAP)
        height = max(fitted[i].height for i in row.members)
        bottom = top + (len(heading) * LINE + UNDER if heading else 0) + height
        lines = max(len(lines) for lines in captions) + frame.scored
        places.append(Place(row, heading, captions, top, bottom, bottom + (UNDER + lines * LINE if lines else 0)))
    return places


def _draw(
    rows: Sequence[Row],
    fitted: Sequence[Image.Image],
    texts: Sequence[str],
    scores: Sequence[float] | None,
    side: int,
    title: str,
) -> Image.Image:
    """Lay out, then draw: an image must know its height first."""
    columns = max(len(row.members) for row in rows)
    frame = Frame(max(columns * (side + GAP) - GAP, NARROWEST), columns, side, scores is not None)
    titled = _wrap(title, frame.width, HEADING_LINES, TITLE)
    places = _lay(rows, fitted, texts, frame, MARGIN + (len(titled) * TITLE_LINE + GAP if titled else 0))
    canvas = Image.new("RGB", (frame.width + 2 * MARGIN, places[-1].end + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    _write(draw, (MARGIN, MARGIN), titled, TITLE, TITLE_LINE)
    for place in places:
        _write(draw, (MARGIN, place.top), place.heading, HEADING)
        left = MARGIN
        for i, lines in zip(place.row.members, place.captions, strict=True):
            canvas.paste(fitted[i], (left, place.bottom - fitted[i].height))
            below = place.bottom + UNDER
            if scores is not None:
                _write(draw, (left, below), [_number(scores[i])], SCORE)
                below += LINE
            _write(draw, (left, below), lines, BODY)
            left += side + GAP
    return canvas


def _number(score: float) -> str:
    return f"{score:.3f}" if math.isfinite(score) else "\N{EN DASH}"


def _fit_square(image: Image.Image, side: int) -> Image.Image:
    """Enlarged or reduced to the square's size, keeping its proportions."""
    factor = side / max(image.size)
    if factor == 1:
        return image
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    # Hamming keeps edges where bilinear blurs, and unlike bicubic it draws no bright rims around them
    return image.resize(size, Image.Resampling.HAMMING if factor > 1 else Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Type:
    """A size, weight and color of type."""

    size: int
    color: tuple[int, int, int]
    bold: bool = False


TITLE, HEADING, BODY, SCORE = Type(15, INK, bold=True), Type(13, INK, bold=True), Type(12, INK), Type(11, FAINT)


def _clean(text: str) -> str:
    """One line of characters that can be drawn one after another: no control, joiner or variation characters."""
    kept = []
    for char in unicodedata.normalize("NFC", text[:LONGEST_TEXT]):
        kind = unicodedata.category(char)
        if kind == "Cs":
            kept.append("\N{REPLACEMENT CHARACTER}")
        elif kind != "Cf" and not "\ufe00" <= char <= "\ufe0f":
            kept.append(" " if kind[0] in "ZC" and kind != "Co" else char)
    return " ".join("".join(kept).split())


def _wrap(text: str, width: float, most: int, style: Type) -> list[str]:
    """At most so many lines of at most so many pixels; an ellipsis where something is left out."""
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


def _fit(text: str, width: float, style: Type) -> int:
    """How many characters fit, at least one."""
    for count, char in enumerate(text):
        width -= _advance(char, style)
        if width < 0:
            return max(count, 1)
    return len(text)


def _write(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], style: Type, leading: int = LINE
) -> None:
    """Left-aligned lines; each stretch of characters in the first font that has them."""
    x, y = corner
    baseline = y + style.size
    for number, line in enumerate(lines):
        at: float = x
        for font, chars in groupby(line, key=lambda char: _font(char, style.size, style.bold)):
            run = "".join(chars)
            draw.text((at, baseline + number * leading), run, fill=style.color, font=font, anchor="ls")
            at += font.getlength(run)


def _advance(char: str, style: Type) -> float:
    return _width(char, style.size, style.bold)


@lru_cache(maxsize=65536)
def _width(char: str, size: int, bold: bool) -> float:
    return _font(char, size, bold).getlength(char)


@lru_cache(maxsize=65536)
def _font(char: str, size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """The first font that has the character; where none does, the first font, which draws its box for the unknown."""
    primary = _primary(size, bold)
    if _has(primary, char):
        return primary
    for name in FALLBACK_FONTS:
        font = _load(name, size)
        if font is not None and _has(font, char):
            return font
    return primary


@lru_cache
def _primary(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    for name in BOLD_FONTS if bold else PRIMARY_FONTS:
        font = _load(name, size)
        if font is not None:
            return font
    built_in = ImageFont.load_default(size)
    assert isinstance(built_in, ImageFont.FreeTypeFont)  # whenever a size is given
    return built_in


@lru_cache
def _load(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    """Pillow looks in the system's font folders."""
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


def _has(font: ImageFont.FreeTypeFont, char: str) -> bool:
    """FreeType draws one and the same box for all characters that a font lacks."""
    found, unknown = font.getmask(char), font.getmask("\U0010fffe")
    return char == " " or (found.size, bytes(found)) != (unknown.size, bytes(unknown))
