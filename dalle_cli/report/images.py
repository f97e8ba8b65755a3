"""The images of a report as data URIs: image grids of training, samples by prompt, and image files.

A page has a budget of bytes for each of these. Images are PNG if all of them fit, else JPEG, else the first that fit.
"""

import base64
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dalle_cli.artifacts import Artifact
from dalle_cli.report.html import count, data_uri
from dalle_cli.report.scan import Item, RunFolder, Scan

GRID_BYTES, SAMPLE_BYTES, FILE_BYTES = 3_000_000, 4_000_000, 1_500_000  # of data URIs in a page
MOST_GRIDS = 8  # of one training
MOST_PROMPTS, MOST_OF_A_PROMPT, MOST_WITHOUT = 64, 6, 48  # images of one artifact; prompts, or images without prompts
MOST_ROWS = 20_000  # of an artifact to read prompts of
MOST_PIXELS = 50_000_000  # of a file
LARGEST_GRID, LARGEST = (1800, 5000), (256, 256)  # width, height
SMALL, SIDE, SMALL_SIDE = 64, 160, 96  # an image of up to SMALL pixels is enlarged by a whole factor; sides in the page
JPEG = {"format": "JPEG", "quality": 90, "subsampling": 0}  # Pillow's `optimize` fails with noise, which is large


Groups = dict[str, list[int]]  # rows by prompt


class Tile(NamedTuple):
    """An image of the page, with the sides that it has there."""

    uri: str
    caption: str
    width: int | None
    height: int | None
    score: float | None = None
    best: bool = False
    small: bool = False


class Strip(NamedTuple):
    """The images of a training or of an artifact, by prompt ("" where there are none)."""

    name: str
    note: str
    prompts: dict[str, list[Tile]]

    @property
    def tiles(self) -> list[Tile]:
        """All images."""
        return [tile for tiles in self.prompts.values() for tile in tiles]


def encode(images: Sequence[Image.Image], most: int) -> tuple[list[str | None], bool]:
    """Data URIs of at most `most` bytes together, None for images without room; whether they are JPEG."""
    for options in ({}, JPEG):
        uris: list[str | None] = []
        room = most
        for image in images:
            uri = data_uri(image, **options)
            room -= len(uri)
            uris.append(uri if room >= 0 else None)
            if room < 0 and not options:
                break
        else:
            return uris, bool(options)
    raise AssertionError("JPEG always returns")


def read(path: Path) -> Image.Image | str:
    """An image file as RGB, reduced where it is very large; or what is wrong with it."""
    try:
        with Image.open(path) as file:
            if file.width * file.height > MOST_PIXELS:
                return f"{file.width} x {file.height} pixels are too many"
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "no image that can be read"
    image.thumbnail(LARGEST_GRID, Image.Resampling.LANCZOS)
    return image


def spread(paths: Sequence[Path], most: int = MOST_GRIDS) -> list[Path]:
    """The first, the last, and others evenly between."""
    return [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)] if len(paths) > most else list(paths)


def grids(found: Scan) -> list[Strip]:
    """The image grids of each training, by update."""
    trainings = [training for training in found.trainings if training.grids]
    strips = [_grids(training, GRID_BYTES // len(trainings), found) for training in trainings]
    return [strip for strip in strips if strip.tiles]


def _grids(training: RunFolder, most: int, found: Scan) -> Strip:
    images = {path: read(path) for path in spread(training.grids)}
    for path, image in images.items():
        if isinstance(image, str):
            found.note(path, image)
    readable = [(path, image) for path, image in images.items() if isinstance(image, Image.Image)][::-1]
    uris, lossy = encode([image for _, image in readable], most)  # the last first: it matters most
    when = [f"after {count(int(p.stem), 'update')}" if p.stem.isdecimal() else p.stem for p, _ in readable]
    tiles = [Tile(uri, at, *image.size) for uri, at, (_, image) in zip(uris, when, readable, strict=True) if uri]
    n = len(training.grids)
    note = f"{len(tiles)} of {count(n, 'image grid')} shown. " if len(tiles) < n else ""
    return Strip(training.name, note + "Reduced to JPEG." * lossy, {"": tiles[::-1]})


def files(paths: Sequence[Path], found: Scan) -> dict[Path, Tile]:
    """Image files that can be read and fit; an SVG runs no scripts as a data URI."""
    tiles = {}
    most = FILE_BYTES // max(1, len(paths))
    for path in paths:
        image = read(path) if path.suffix.lower() != ".svg" else None
        if image is None:
            svg = "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
            uri = svg if len(svg) <= most else None
        else:
            uri = None if isinstance(image, str) else encode([image], most)[0][0]
        if uri:
            tiles[path] = Tile(uri, found.name(path), *(image.size if isinstance(image, Image.Image) else (None, None)))
        else:
            found.note(path, f"left out, {image if isinstance(image, str) else 'too large for the page'}")
    return tiles


class SampledImage(NamedTuple):
    """An image of an artifact: its row, its score by CLIP if it has one, and whether a rerank chose it."""

    artifact: Artifact
    row: int
    score: float | None = None
    best: bool = False

    def image(self) -> Image.Image:
        """The pixels, reduced where they are large."""
        pixels = np.asarray(self.artifact.array("images")[self.row])
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        image.thumbnail(LARGEST, Image.Resampling.LANCZOS)
        return image


def samples(found: Scan) -> list[Strip]:
    """The images of each artifact by prompt; the best of a rerank stand with other candidates."""
    by_digest = {item.digest: item for item, _ in found.of_kind("images") if item.digest}
    sets = []
    for item, artifact in found.of_kind("images"):
        inputs = artifact.history[-1]["inputs"] if artifact.history and "score" in artifact else {}
        sets.append((item, artifact, by_digest.get(inputs.get("images", ""))))
    origins = [origin.name for _, _, origin in sets if origin]
    sets = [one for one in sets if len(one[1]) and one[0].name not in origins]
    return [_samples(*one, SAMPLE_BYTES // len(sets), found) for one in sets]


def _samples(item: Item, artifact: Artifact, origin: Item | None, most: int, found: Scan) -> Strip:
    groups, source = _groups(artifact), origin.artifact if origin else None
    prompts = _candidates(artifact, groups, source)
    # The first image of each prompt before any second: where room is short, images are missing evenly.
    order = [(i, text) for i in range(MOST_OF_A_PROMPT) for text, ones in prompts.items() if i < len(ones)]
    images = [prompts[text][rank].image() for rank, text in order]
    uris, lossy = encode(images, most)
    if left_out := uris.count(None):
        found.notes.append(f"{item.name}: {count(left_out, 'image')} more than the page has room for")
    tiles: dict[str, list[Tile]] = {text: [] for text in prompts}
    for (rank, text), image, uri in zip(order, images, uris, strict=True):
        longest = max(image.size)
        factor = max(1, -(-SMALL_SIDE // longest)) if longest <= SMALL else min(1.0, SIDE / longest)
        one, sides = prompts[text][rank], [round(side * factor) for side in image.size]
        if uri:
            tiles[text].append(Tile(uri, text, sides[0], sides[1], one.score, one.best, longest <= SMALL))
    each = max(map(len, (_groups(source) if source is not None else groups).values()))
    note = _note(artifact, groups, prompts, f"The best by CLIP among {each} for each of " if origin else "")
    if origin and not all(one.best for ones in prompts.values() for one in ones):
        note += f"; beside it other candidates of {origin.label}, in order"
    return Strip(item.label, note + "; as JPEG" * lossy + ".", {text: ones for text, ones in tiles.items() if ones})


def _candidates(artifact: Artifact, groups: Groups, source: Artifact | None) -> dict[str, list[SampledImage]]:
    """The images to show of each prompt: those of `artifact`, then others of `source`."""
    scores = artifact.array("score") if "score" in artifact else None
    others, ids, prompts = {} if source is None else _groups(source), artifact.strings("ids"), {}
    for text in list(groups)[: MOST_PROMPTS if "text" in artifact else MOST_WITHOUT]:
        best = source is not None
        ones = [SampledImage(artifact, r, None if scores is None else float(scores[r]), best) for r in groups[text]]
        if source is not None:
            own, their = {ids[row] for row in groups[text]}, source.strings("ids")
            ones += [SampledImage(source, row) for row in others.get(text, []) if their[row] not in own]
        prompts[text] = ones[:MOST_OF_A_PROMPT]
    return prompts


def _note(artifact: Artifact, groups: Groups, prompts: dict[str, list[SampledImage]], best: str) -> str:
    n = count(len(groups), "prompt")
    note = f"{best}{n}, framed" if best else f"{count(len(artifact), 'image')} of {n}"
    if "score" in artifact:
        scores = [float(score) for score in artifact.array("score")[:MOST_ROWS]]
        note += f"; score (cosine): median {statistics.median(scores):.3f}"
        note += f", {min(scores):.3f} to {max(scores):.3f}" if len(scores) > 1 else ""
    return note + (f"; the first {len(prompts)} prompts are shown" if len(prompts) < len(groups) else "")


def _groups(artifact: Artifact) -> Groups:
    """Rows by prompt, in the order of the prompts' first rows; by id where there are no prompts."""
    texts = artifact.strings("text" if "text" in artifact else "ids")
    groups: Groups = {}
    for row in range(min(len(artifact), MOST_ROWS)):
        groups.setdefault(texts[row], []).append(row)
    return groups
