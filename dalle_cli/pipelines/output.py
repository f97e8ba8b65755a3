"""Write images: an image grid as PNG, an artifact of images."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dalle_cli.artifacts import Artifact, write_artifact
from dalle_cli.artifacts.container import check_replaceable, replace_file
from dalle_cli.artifacts.text import write_text
from dalle_cli.data.manifest import IN_FOLDER
from dalle_cli.errors import DalleError
from dalle_cli.pipelines.prompts import Progress, Quiet
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
    """Write ranked candidates as an artifact of images with their scores, if they have any."""
    known = [one.score for one in ranked if one.score is not None]
    scores = {"score": np.array(known, dtype=np.float32)} if known else {}
    columns = {"ids": [one.candidate.id for one in ranked], "text": [one.candidate.text for one in ranked]}
    images = np.stack([one.image for one in ranked])
    write_artifact(path, "images", {"images": images, **scores, **columns}, {}, history, force)


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


def export(images: Artifact, folder: Path, *, force: bool = False, progress: Progress = Quiet) -> int:
    """Write an artifact of images as PNG files with a manifest, which is a data set again; how many.

    Raises:
        DalleError: a folder with other files than an earlier export's.
    """
    if folder.exists() and not folder.is_dir():
        raise DalleError(f"expected a folder to write to, found a file: {folder}; choose another -o")
    manifest = folder / IN_FOLDER
    before = _earlier_export(manifest)
    if folder.is_dir() and any(folder.iterdir()) and not before and not force:
        raise DalleError(f"expected an empty folder or an earlier export, found {folder}; choose another or --force")
    ids = images.strings("ids")
    texts = images.strings("text") if "text" in images else None
    scores = images.array("score") if "score" in images else None
    lines = []
    with progress("export", len(images), unit="images") as advance:
        for row, pixels in enumerate(images.array("images")):
            name = f"{row:06d}.png"
            image = Image.fromarray(pixels.transpose(1, 2, 0).copy())
            replace_file(folder / name, lambda part, image=image: image.save(part, format="PNG"))  # type: ignore[misc]
            line: dict[str, object] = {"image": name, "id": ids[row]}
            line |= {} if texts is None else {"caption": texts[row]}
            line |= {} if scores is None else {"score": round(float(scores[row]), 6)}
            lines.append(json.dumps(line, ensure_ascii=False))
            advance()
    write_text(manifest, "".join(f"{line}\n" for line in lines))
    for name in before[len(lines) :]:
        (folder / name).unlink(missing_ok=True)  # of an earlier export with more images
    return len(lines)


def _earlier_export(manifest: Path) -> list[str]:
    """The images of an earlier export, in the order of its manifest; none if the manifest is another's."""
    try:
        rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
        names = [f"{row:06d}.png" for row in range(len(rows))]
        return names if all("id" in row and row["image"] == name for row, name in zip(rows, names, strict=True)) else []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
