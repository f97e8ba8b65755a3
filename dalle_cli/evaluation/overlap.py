"""Near-duplicates between two sets of pictures: candidates by nearest neighbours in features, then pair by pair.

TRAIN streams through; of TEST the features are held, and of TRAIN the nearest few rows of each picture of TEST.

Shapes: B batch, S side in pixels, M pictures of TEST, V views, D features, P pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from dalle_cli import console
from dalle_cli.data.augment import Pixels, center
from dalle_cli.data.loader import Pictures, sequential
from dalle_cli.errors import DalleError
from dalle_cli.evaluation import similarity as likeness
from dalle_cli.evaluation.features import Features
from dalle_cli.evaluation.neighbors import Candidates, Ints, Nearest
from dalle_cli.models.pixels import from_uint8
from dalle_cli.viz.grid import sheet

PAIRS = 64  # compared at once
DIGITS = 4  # of a similarity: the rest depends on how many are computed at once
SHEET_PAIRS = 24
DRAWN, BETWEEN = 124, 8  # pixels: a picture of a pair, and what lies between the two
# From where on pictures count as one: measured (docs/results.md); of cosines, which differ by network, a first guess.
ALIKE, ALIKE_BY_NETWORK = 0.5, 0.95


class Eye(Protocol):
    """What pictures are looked at with."""

    name: str
    threshold: float
    size: int  # S that pictures are read at

    def read(self, image: Image.Image, size: int, rng: np.random.Generator, /) -> Pixels:
        """A picture as it is looked at, (S, S, 3) uint8; an `Augment` without chance."""
        ...

    def keys(self, images: Pixels) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, D) of length 1."""
        ...

    def queries(self, images: Pixels) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, V, D) of length 1."""
        ...


class PixelEye:
    """Small thumbnails, without any network."""

    name, threshold, size = "pixels", ALIKE, likeness.SIDE

    def __init__(self, device: torch.device):
        self.device = device

    def read(self, image: Image.Image, size: int, rng: np.random.Generator) -> Pixels:
        """The whole picture, squeezed."""
        return likeness.thumbnail(image, size)

    def pixels(self, images: Pixels) -> Tensor:
        """(B, 3, S, S) uint8 -> float32, 0 to 255."""
        return torch.from_numpy(images).to(self.device).float()

    def keys(self, images: Pixels) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, D)."""
        return likeness.signature(self.pixels(images))

    def queries(self, images: Pixels) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, V, D)."""
        return likeness.views(self.pixels(images))


class NetworkEye:
    """The features of a network; similarities are cosines."""

    threshold = ALIKE_BY_NETWORK

    def __init__(self, features: Features, size: int, device: torch.device):
        self.features, self.size, self.device, self.name = features, size, device, features.name

    def read(self, image: Image.Image, size: int, rng: np.random.Generator) -> Pixels:
        """The square in the middle."""
        return center(image, size, rng)

    def keys(self, images: Pixels) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, D)."""
        found = self.features(from_uint8(torch.from_numpy(images).to(self.device))).features
        return F.normalize(torch.from_numpy(found).float().to(self.device), dim=1)

    def queries(self, images: Pixels) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, 1, D)."""
        return self.keys(images)[:, None]


class Pair(NamedTuple):
    """A picture of TEST and one of TRAIN, by row, and how similar they are."""

    test: int
    train: int
    similarity: float


@dataclass(frozen=True)
class Reading:
    """How pictures are read."""

    batch_size: int
    workers: int


def _batches(label: str, pictures: Pictures, eye: Eye, how: Reading) -> Iterator[tuple[Ints, Pixels]]:
    with console.progress(label, len(pictures), unit="pictures") as advance:
        rows = range(len(pictures))
        for kept, images in sequential(pictures, eye.size, rows, how.batch_size, how.workers, eye.read):
            yield kept, images
            advance(len(kept))


def candidates(train: Pictures, test: Pictures, eye: Eye, most: int, how: Reading) -> Candidates:
    """For each picture of TEST the `most` of TRAIN whose features are nearest.

    Raises:
        DalleError: of one of them no picture can be read.
    """
    rows, queries = [], []
    for kept, images in _batches("features of TEST", test, eye, how):
        rows.append(kept)
        queries.append(eye.queries(images))
    if not rows:
        raise DalleError(f"expected pictures in TEST, found none of {len(test):,} that can be read; check them")
    nearest = Nearest(torch.cat(queries), most)
    for kept, images in _batches("features of TRAIN", train, eye, how):
        nearest.offer(eye.keys(images), kept)
    found = nearest.found()
    if not len(found.queries):
        raise DalleError(f"expected pictures in TRAIN, found none of {len(train):,} that can be read; check them")
    return found._replace(queries=np.concatenate(rows)[found.queries])


def compare(train: Pictures, test: Pictures, found: Candidates, eye: Eye, how: Reading) -> list[Pair]:
    """The candidates with their similarity: of a network the cosine, else what comparing each pair by pixels says."""
    if not isinstance(eye, PixelEye):
        rows = zip(found.queries.tolist(), found.rows.tolist(), found.similarities.tolist(), strict=True)
        return [Pair(query, row, round(cosine, DIGITS)) for query, row, cosine in rows]
    pairs: list[Pair] = []
    with console.progress("compare", len(found.queries), unit="pairs") as advance:
        for start in range(0, len(found.queries), PAIRS):
            lot = list(zip(found.queries[start:][:PAIRS].tolist(), found.rows[start:][:PAIRS].tolist(), strict=True))
            sides = [_thumbnails(p, sorted({pair[i] for pair in lot}), how) for i, p in enumerate((test, train))]
            both = [pair for pair in lot if pair[0] in sides[0] and pair[1] in sides[1]]  # the rest is gone by now
            if both:
                a, b = (np.stack([side[pair[i]] for pair in both]) for i, side in enumerate(sides))
                alike = likeness.likeness(eye.pixels(a), eye.pixels(b)).tolist()
                pairs += [Pair(*pair, round(value, DIGITS)) for pair, value in zip(both, alike, strict=True)]
            advance(len(lot))
    return pairs


def _thumbnails(pictures: Pictures, rows: Sequence[int], how: Reading) -> dict[int, Pixels]:
    read = sequential(
        pictures, likeness.SIDE, rows, PAIRS, how.workers, lambda image, n, _: likeness.thumbnail(image, n)
    )
    return {row: image for kept, images in read for row, image in zip(kept.tolist(), images, strict=True)}


@dataclass(frozen=True)
class Overlap:
    """Pairs of pictures of TEST and TRAIN, and from which similarity on they count as one."""

    train: Pictures
    test: Pictures
    pairs: Sequence[Pair]
    threshold: float

    @cached_property
    def _ordered(self) -> list[Pair]:
        return sorted(self.pairs, key=lambda pair: (-pair.similarity, pair.test, pair.train))

    @cached_property
    def closest(self) -> list[Pair]:
        """Of each picture of TEST the closest pair, the closest first."""
        first: dict[int, Pair] = {}
        for pair in self._ordered:
            first.setdefault(pair.test, pair)
        return list(first.values())

    @cached_property
    def alike(self) -> list[Pair]:
        """The pairs from the threshold on, the closest first."""
        return [pair for pair in self._ordered if pair.similarity >= self.threshold]

    def ids(self, of: str) -> list[str]:
        """The pictures of one side, "test" or "train", that have a counterpart on the other; sorted."""
        ids = (self.test if of == "test" else self.train).ids
        return sorted({ids[getattr(pair, of)] for pair in self.alike})

    def crowded(self, most: int) -> int:
        """Of how many pictures of TEST all candidates are counterparts, so that there may be more in TRAIN."""
        counts = np.bincount([pair.test for pair in self.alike])
        return int((counts >= most).sum()) if len(self.train) > most else 0

    def told(self) -> list[dict[str, Any]]:
        """The pairs from the threshold on, and of the other pictures of TEST the closest, by id; the closest first."""
        test, train = self.test.ids, self.train.ids
        shown = [*self.alike, *(pair for pair in self.closest if pair.similarity < self.threshold)]
        return [{"test": test[p.test], "train": train[p.train], "similarity": p.similarity} for p in shown]

    def around(self, most: int = SHEET_PAIRS) -> tuple[list[Pair], list[Pair]]:
        """Of the closest pairs the `most` next to the threshold, half of them from it on if there are so many."""
        above = [pair for pair in self.closest if pair.similarity >= self.threshold]
        below = self.closest[len(above) :][: max(most // 2, most - len(above))]
        return above[len(above) - min(len(above), most - len(below)) :], below

    def sheet(self) -> Image.Image:
        """The pairs around the threshold, of TEST on the left, of TRAIN on the right.

        Raises:
            DalleError: there is no pair.
        """
        above, below = self.around()
        pairs = [*above, *below]
        test, train = self.test, self.train
        pictures = [_side_by_side(test.read(pair.test), train.read(pair.train)) for pair in pairs]
        names = [f"{test.ids[pair.test]}, {train.ids[pair.train]}" for pair in pairs]
        scores = [pair.similarity for pair in pairs]
        groups = [0] * len(above) + [1] * len(below)
        counts = f"{len(above) or 'no'} pairs from the threshold {self.threshold:g} on, {len(below) or 'none'} below it"
        title = f"TEST beside TRAIN: {counts}"
        return sheet(pictures, names, scores, columns=4, title=title, groups=groups)


def _side_by_side(left: Image.Image, right: Image.Image) -> npt.NDArray[np.uint8]:
    canvas = Image.new("RGB", (2 * DRAWN + BETWEEN, DRAWN), (255, 255, 255))
    for at, image in ((0, left), (DRAWN + BETWEEN, right)):
        whole = ImageOps.contain(image, (DRAWN, DRAWN), Image.Resampling.HAMMING)
        canvas.paste(whole, (at + (DRAWN - whole.width) // 2, (DRAWN - whole.height) // 2))
    return np.asarray(canvas)
