"""Pictures of a run within a page: as data URIs, as many as a page can carry, without loss where that fits."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dalle_cli.artifacts import Artifact
from dalle_cli.report.html import data_uri
from dalle_cli.report.scan import Item

SHEET_BYTES, DRAWN_BYTES, LOOSE_BYTES = 3_000_000, 4_000_000, 1_500_000  # of data URIs, of a page
MOST_SHEETS = 8  # of one training
MOST_PROMPTS, MOST_OF_A_PROMPT, MOST_PLAIN = 64, 6, 48  # pictures of one artifact
MOST_ROWS = 20_000  # of an artifact that are looked at for prompts
MOST_PIXELS = 50_000_000  # of a file
LARGEST_SHEET, LARGEST = (1800, 5000), (256, 256)  # wide, high
JPEG = {"format": "JPEG", "quality": 90, "subsampling": 0}  # optimized, Pillow fails at noise, which is large


@dataclass(frozen=True)
class Shown:
    """Pictures as data URIs, None where there was no room; whether they lost anything."""

    uris: list[str | None]
    lossy: bool

    @property
    def left_out(self) -> int:
        """How many there was no room for."""
        return self.uris.count(None)


def show(pictures: Sequence[Image.Image], most: int) -> Shown:
    """Data URIs of at most so many bytes together: all as PNG, else all as JPEG, else the first that fit."""
    whole: list[str | None] = []
    room = most
    for picture in pictures:
        whole.append(uri := data_uri(picture))
        room -= len(uri)
        if room < 0:
            break
    else:
        return Shown(whole, lossy=False)
    uris: list[str | None] = []
    room = most
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, **JPEG)  # type: ignore[arg-type]
        uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        room -= len(uri)
        uris.append(uri if room >= 0 else None)
    return Shown(uris, lossy=True)


def read(path: Path) -> Image.Image | str:
    """A picture file as RGB, reduced where it is very large; what is wrong with it instead, if anything is."""
    try:
        with Image.open(path) as file:
            if file.width * file.height > MOST_PIXELS:
                return f"{file.width} x {file.height} pixels are too many"
            picture = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "no picture that can be read"
    picture.thumbnail(LARGEST_SHEET, Image.Resampling.LANCZOS)
    return picture


def drawing(path: Path, most: int) -> str | None:
    """An SVG file as data URI, where no scripts run; None if it is too large."""
    data = path.read_bytes()
    uri = "data:image/svg+xml;base64," + base64.b64encode(data).decode()
    return uri if len(uri) <= most else None


def spread(paths: Sequence[Path], most: int = MOST_SHEETS) -> list[Path]:
    """The first, the last, and others evenly between."""
    if len(paths) <= most:
        return list(paths)
    return [paths[round(number * (len(paths) - 1) / (most - 1))] for number in range(most)]


@dataclass(frozen=True)
class Drawn:
    """One picture: its row in its artifact, the score CLIP gave it, if it did."""

    artifact: Artifact
    row: int
    score: float | None

    def picture(self) -> Image.Image:
        """RGB, reduced to a size that a page can carry many of."""
        pixels: Any = np.asarray(self.artifact.array("images")[self.row])
        picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        picture.thumbnail(LARGEST, Image.Resampling.LANCZOS)
        return picture


@dataclass(frozen=True)
class Set:
    """The pictures of an artifact by prompt, best first where they are scored; how many prompts and rows it has."""

    item: Item
    prompts: dict[str, list[Drawn]]
    n_prompts: int
    rows: int
    scores: list[float]
    source: Item | None  # of which these are the best
    each: int  # candidates of a prompt, at most


def sets(found: Sequence[tuple[Item, Artifact]]) -> list[Set]:
    """Each artifact of pictures; those of which the best were kept stand with the best."""
    by_digest = {item.digest: (item, artifact) for item, artifact in found if item.digest}
    made: list[Set] = []
    used = set()
    for item, artifact in found:
        inputs = artifact.history[-1]["inputs"] if artifact.history else {}
        source = by_digest.get(inputs.get("images", "")) if "score" in artifact else None
        if source:
            used.add(source[0].name)
        made.append(_set(item, artifact, source))
    return [one for one in made if one.item.name not in used and one.rows]


def _set(item: Item, artifact: Artifact, source: tuple[Item, Artifact] | None) -> Set:
    groups = _groups(artifact)
    scores = artifact.array("score") if "score" in artifact else None
    candidates = _groups(source[1]) if source else {}
    ids = artifact.strings("ids")
    prompts = {}
    for text in list(groups)[: MOST_PROMPTS if "text" in artifact else MOST_PLAIN]:
        rows = groups[text]
        drawn = [Drawn(artifact, row, None if scores is None else float(scores[row])) for row in rows]
        if source:
            own = {ids[row] for row in rows}
            theirs = source[1].strings("ids")
            drawn += [Drawn(source[1], row, None) for row in candidates.get(text, []) if theirs[row] not in own]
        prompts[text] = drawn[:MOST_OF_A_PROMPT]
    of = candidates or groups
    told = [] if scores is None else [float(score) for score in scores[:MOST_ROWS]]
    each = max((len(rows) for rows in of.values()), default=0)
    return Set(item, prompts, len(groups), len(artifact), told, source[0] if source else None, each)


def _groups(artifact: Artifact) -> dict[str, list[int]]:
    """Rows by prompt, in the order in which prompts first come; by id where there is no text."""
    texts = artifact.strings("text" if "text" in artifact else "ids")
    groups: dict[str, list[int]] = {}
    for row in range(min(len(artifact), MOST_ROWS)):
        groups.setdefault(texts[row], []).append(row)
    return groups
