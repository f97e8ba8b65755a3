"""Inpainting: keep some codes of an existing image and let the prior sample the others (2021, fig. 2).

Shapes: W side of the code grid.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from dalle_cli.artifacts import Artifact
from dalle_cli.data.augment import center
from dalle_cli.data.images import read_image
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.options import InpaintingOptions
from dalle_cli.pipelines.codec import Codec

WHITE = 128  # a mask's gray value, of 0 to 255, from which it counts as white


@dataclass(frozen=True)
class InpaintingMask:
    """Codes (W, W) int64 of an image, which of them to keep (W, W) bool, and options and inputs for the history."""

    codes: Any
    keep: Any
    options: dict[str, Any]
    inputs: dict[str, Artifact | str]

    def __str__(self) -> str:
        return f"{int(self.keep.sum())} of {self.keep.size} codes"


def read_mask(options: InpaintingOptions, codec: Codec) -> InpaintingMask | None:
    """Encode the image as `encode-images` does and find the codes to keep; None without an image.

    Raises:
        DalleError: an image or a mask that cannot be read, or more rows than the grid has.
    """
    options.check()
    if options.image is None:
        return None
    grid = codec.grid
    image, digest = read_image(options.image, "--image")
    codes = codec.encode(center(image, codec.size).transpose(2, 0, 1)[None].copy())[0].astype(np.int64)
    inputs: dict[str, Artifact | str] = {"dvae": codec.weights, "image": digest}
    if options.mask is not None:
        mask, mask_digest = read_image(options.mask, "--mask")
        return InpaintingMask(codes, ~white_cells(mask, grid), {}, {**inputs, "mask": mask_digest})
    rows = grid // 2 if options.keep_rows is None else options.keep_rows
    if not 0 <= rows <= grid:
        raise DalleError(f"expected --keep-rows from 0 to {grid}, found {rows}; the codes have {grid} rows")
    keep = np.repeat(np.arange(grid)[:, None] < rows, grid, axis=1)
    return InpaintingMask(codes, keep, {"keep_rows": rows}, inputs)


def repeat_options(options: InpaintingOptions, entry: dict[str, Any], source: object) -> InpaintingOptions:
    """The inpainting of `sample --from`: the rows recorded in `source`, and the same image and mask, given again.

    Raises:
        DalleError: the image or the mask is missing, or is another one.
    """
    for name in ("image", "mask"):
        expected, path = entry["inputs"].get(name), getattr(options, name)
        if expected is None and path is not None:
            raise DalleError(f"expected no --{name}, found {path}: {source} was sampled without one; leave it out")
        if expected is not None and path is None:
            raise DalleError(
                f"expected --{name} (sha256 {expected[:12]}), with which {source} was sampled, found none; give it"
            )
        if path is not None:
            bundles.check_digest(name, read_image(path, f"--{name}")[1], expected, source)
    rows = entry["options"].get("keep_rows")
    if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool)):
        raise DalleError(f"expected a number of kept rows in {source}, found {rows!r}; sample it again")
    return options if options.keep_rows is not None else replace(options, keep_rows=rows)


def white_cells(mask: Image.Image, grid: int) -> Any:
    """Which codes to sample: those with any white pixel in their patch, (W, W) bool.

    The central square of the mask is used, as of the image.
    """
    side = min(mask.size)
    left, top = ((length - side) // 2 for length in mask.size)
    white = np.asarray(mask.convert("L").crop((left, top, left + side, top + side))) >= WHITE
    cuts = [slice(i * side // grid, -(-(i + 1) * side // grid)) for i in range(grid)]
    rows = np.stack([white[cut].any(axis=0) for cut in cuts])
    return np.stack([rows[:, cut].any(axis=1) for cut in cuts], axis=1)
