"""Pictures as colored characters: each cell of the terminal shows two pixels, one above the other."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dalle_cli.errors import DalleError

Picture = NDArray[np.uint8]

UPPER_HALF = "\N{UPPER HALF BLOCK}"
RESET = "\x1b[0m"
GAP = 1  # cells between pictures
NARROWEST, WIDEST = 16, 64  # cells of a picture: fewer show nothing, more do not fit a screen's height
LEVELS = (0, 95, 135, 175, 215, 255)  # of the 256-color palette's 6 x 6 x 6 cube


def render(pictures: Sequence[Picture], columns: int = 80, per_row: int | None = None, truecolor: bool = True) -> str:
    """Half-block preview of pictures, (3, H, W) or (H, W, 3) uint8, at most `columns` cells wide; ends in a newline.

    Without `truecolor` the colors are the nearest ones of the 256-color palette.

    Raises: DalleError where there is no picture.
    """
    if not len(pictures):
        raise DalleError("expected at least one picture to draw, found none; select more rows")
    count = max(
        1, min(len(pictures), per_row or max(1, (columns + GAP) // (NARROWEST + GAP)), (columns + GAP) // (1 + GAP))
    )
    width = max(1, min(WIDEST, (columns + GAP) // count - GAP))
    rows = []
    for start in range(0, len(pictures), count):
        grids = [_grid(picture, width) for picture in pictures[start : start + count]]
        height = max(len(grid) for grid in grids)
        lines = [[_line(grid, y, width, truecolor) for grid in grids] for y in range(0, height, 2)]
        rows.append("".join((" " * GAP).join(line) + "\n" for line in lines))
    return "\n".join(rows)


def _grid(picture: Picture, width: int) -> NDArray[np.uint8]:
    """Resized to so many cells, never enlarged: -> (2 x lines, at most width, 3)."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or 3 not in (picture.shape[0], picture.shape[2]):
        raise ValueError(f"expected a uint8 picture (3, H, W) or (H, W, 3), found {picture.dtype} {picture.shape}")
    pixels = np.ascontiguousarray(picture.transpose(1, 2, 0) if picture.shape[0] == 3 else picture)
    factor = min(1.0, width / max(pixels.shape[:2]))
    size = (max(1, round(pixels.shape[1] * factor)), max(1, round(pixels.shape[0] * factor)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX), dtype=np.uint8)


def _line(grid: NDArray[np.uint8], y: int, width: int, truecolor: bool) -> str:
    """Two rows of pixels as one line of cells, padded to the full width; a color is named only where it changes."""
    if y >= len(grid):
        return " " * width
    parts: list[str] = []
    last = ("", "")
    for x in range(grid.shape[1]):
        upper = _color(grid[y, x], 38, truecolor)
        lower = _color(grid[y + 1, x], 48, truecolor) if y + 1 < len(grid) else "49"
        change = ";".join(new for new, old in zip((upper, lower), last, strict=True) if new != old)
        parts.append(f"\x1b[{change}m{UPPER_HALF}" if change else UPPER_HALF)
        last = (upper, lower)
    return "".join(parts) + RESET + " " * (width - len(parts))


def _color(pixel: NDArray[np.uint8], ground: int, truecolor: bool) -> str:
    """Parameters of the escape sequence that sets the foreground (38) or background (48)."""
    if truecolor:
        return f"{ground};2;{pixel[0]};{pixel[1]};{pixel[2]}"
    values: list[int] = pixel.tolist()
    cube = [min(range(6), key=lambda level: abs(LEVELS[level] - value)) for value in values]
    gray = min(23, max(0, round((sum(values) / 3 - 8) / 10)))
    in_cube = math.dist([LEVELS[level] for level in cube], values)
    in_grays = math.dist([8 + 10 * gray] * 3, values)
    index = 232 + gray if in_grays < in_cube else 16 + 36 * cube[0] + 6 * cube[1] + cube[2]
    return f"{ground};5;{index}"
