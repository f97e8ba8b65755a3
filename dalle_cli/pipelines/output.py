"""Write images: an image grid as PNG, an artifact of images."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle_cli.artifacts import write_artifact
from dalle_cli.artifacts.container import check_replaceable, replace_file
from dalle_cli.errors import DalleError
from dalle_cli.pipelines.ranking import Ranked
from dalle_cli.viz.grid import image_grid
from dalle_cli.viz.terminal import render


def check_png(path: Path, force: bool) -> None:
    """Raises: DalleError if anything but a PNG lies at `path`."""
    if path.is_dir() or (path.exists() and not force and not _is_png(path)):
        raise DalleError(f"expected to write a PNG to {path}, found something else there; choose another -o or --force")


def _is_png(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"\x89PNG"


def check_outputs(grid: Path, images: Path | None, force: bool, sources: Sequence[str] = ()) -> None:
    """Check, before hours of work, that a grid and an artifact of images can be written.

    Raises:
        DalleError: something else lies there, or a source would be overwritten.
    """
    for source in sources:
        if grid.is_file() and Path(source).is_file() and grid.samefile(source):
            raise DalleError(f"expected -o, found that {grid} would be written over itself; choose another")
    check_png(grid, force)
    if images is not None:
        check_replaceable(images, "images", force)


def write_grid(
    path: Path, images: Sequence[Any], texts: Sequence[str], scores: Sequence[float] | None = None, *,
    columns: int = 0, title: str | None = None, force: bool = False,
) -> Path:  # fmt: skip
    """Write images (3, S, S) uint8 as an image grid, PNG, with a caption below each and a row for each prompt.

    Raises:
        DalleError: something that is not a PNG lies there.
    """
    check_png(path, force)
    several = len(set(texts)) < len(texts)
    groups = [list(texts).index(text) for text in texts] if several else None  # unless there is one image of each
    grid = image_grid(list(images), list(texts), scores, columns=columns or None, title=title, groups=groups)
    replace_file(path, lambda part: grid.save(part, format="PNG"))
    return path


def write_ranked(path: Path, ranked: Sequence[Ranked], history: list[dict[str, Any]], force: bool = False) -> None:
    """Write ranked candidates as an artifact of images with their scores."""
    score = np.array([one.score for one in ranked], dtype=np.float32)
    columns = {"ids": [one.candidate.id for one in ranked], "text": [one.candidate.text for one in ranked]}
    images = np.stack([one.image for one in ranked])
    write_artifact(path, "images", {"images": images, "score": score, **columns}, {}, history, force)


def write_labelled(
    path: Path, images: Sequence[Any], labels: Sequence[str], history: list[dict[str, Any]], force: bool = False
) -> None:
    """Write images (3, S, S) uint8, each with a label, as an artifact of images."""
    columns = {"images": np.stack(list(images)), "ids": [f"{i:05d}" for i in range(len(labels))], "text": list(labels)}
    write_artifact(path, "images", columns, {}, history, force)


def terminal_preview(images: Sequence[Any], columns: int) -> str:
    """Images as colored characters, as wide as the terminal."""
    truecolor = os.environ.get("COLORTERM", "") in ("truecolor", "24bit")
    return render(images, shutil.get_terminal_size().columns, columns or None, truecolor)
