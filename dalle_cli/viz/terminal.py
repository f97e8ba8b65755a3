"""Images as colored characters: each cell of the terminal shows two pixels, one above the other."""

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dalle_cli.errors import DalleError
from dalle_cli.viz.grid import Pixels, to_image

UPPER_HALF = "\N{UPPER HALF BLOCK}"
RESET = "\x1b[0m"
GAP = 1  # cells between images
NARROWEST, WIDEST = 16, 64  # cells of an image: fewer show nothing, more do not fit a screen's height
LEVELS = (0, 95, 135, 175, 215, 255)
# The 256-color palette from its color 16 on: a cube of 6 x 6 x 6, then grays.
PALETTE = np.array([*itertools.product(LEVELS, repeat=3), *([8 + 10 * gray] * 3 for gray in range(24))])


def render(images: Sequence[Pixels], columns: int = 80, per_row: int | None = None, truecolor: bool = True) -> str:
    """Draw images, each (3, H, W) or (H, W, 3) uint8, with half blocks, at most `columns` cells wide.

    Without `truecolor` each color becomes the nearest one of the 256-color palette.

    Raises:
        DalleError: there are no images.
    """
    if not len(images):
        raise DalleError("expected at least one image to show, found none; select more rows")
    per_row = per_row or (columns + GAP) // (NARROWEST + GAP)
    count = max(1, min(len(images), max(1, per_row), (columns + GAP) // (1 + GAP)))
    width = max(1, min(WIDEST, (columns + GAP) // count - GAP))
    rows = []
    for start in range(0, len(images), count):
        grids = [_resized(pixels, width) for pixels in images[start : start + count]]
        height = max(len(grid) for grid in grids)
        lines = [[_line(grid, y, width, truecolor) for grid in grids] for y in range(0, height, 2)]
        rows.append("".join((" " * GAP).join(line) + "\n" for line in lines))
    return "\n".join(rows)


def _resized(pixels: Pixels, width: int) -> Pixels:
    """Reduced to `width` cells, never enlarged: -> (2 x lines, at most width, 3)."""
    image = to_image(pixels)
    factor = min(1.0, width / max(image.size))
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return np.asarray(image.resize(size, Image.Resampling.BOX))


def _line(grid: Pixels, y: int, width: int, truecolor: bool) -> str:
    """Two rows of pixels as one line of cells, padded to the full width; a color is set only where it changes."""
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


def _color(pixel: Pixels, ground: int, truecolor: bool) -> str:
    """Parameters of the escape sequence that sets the foreground (38) or background (48)."""
    if truecolor:
        return f"{ground};2;{';'.join(map(str, pixel))}"
    return f"{ground};5;{16 + ((PALETTE - pixel) ** 2).sum(1).argmin()}"
