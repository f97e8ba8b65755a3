"""Near-duplicates of two sets of images: candidates by nearest neighbors, then a similarity per pair.

Features of TEST are held in memory, TRAIN streams through, and each TEST image keeps its nearest few TRAIN rows.

Shapes: B batch, S side in pixels, M TEST images, V views, D features, K neighbors, P pairs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from dalle_cli import console
from dalle_cli.data.augment import Augment, Pixels, center
from dalle_cli.data.loader import ImageSource
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.evaluation import thumbnails
from dalle_cli.evaluation.features import load_features
from dalle_cli.evaluation.image_sets import first_side
from dalle_cli.models.pixels import from_uint8
from dalle_cli.viz.grid import image_grid

THRESHOLD = 0.95  # cosine; measured for pixels (docs/results.md), a first guess for networks
QUERIES, PAIRS = 1024, 64  # in one matrix product; compared at once
DIGITS = 4  # of a similarity; the rest depends on the batch size
GRID_PAIRS = 24
SIDE, GAP = 124, 8  # pixels of each image of a pair on the grid, and between the two
LARGEST = 299  # most pixels of an image for a network: those of Inception-v3


@dataclass(frozen=True)
class Matcher:
    """How images are compared: read at `size` S by an `Augment`, then turned into vectors of length 1.

    `keys` and `queries` map (B, 3, S, S) uint8 to (B, D) and (B, V, D); `similarity`, if any, maps two batches to (B,),
    and else the largest inner product of a query's views with a key is the similarity.
    """

    name: str
    size: int
    read: Augment
    keys: Callable[[Tensor], Tensor]
    queries: Callable[[Tensor], Tensor]
    similarity: Callable[[Tensor, Tensor], Tensor] | None
    device: torch.device

    def tensor(self, images: Pixels) -> Tensor:
        """Images on the device."""
        return torch.from_numpy(images).to(self.device)


def pixel_matcher(device: torch.device) -> Matcher:
    """Compare thumbnails of the whole images."""

    def thumbnail(image: Image.Image, size: int, _: object = None) -> Pixels:
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))

    parts = thumbnails.keys, thumbnails.queries, thumbnails.similarity
    return Matcher("pixels", thumbnails.SIDE, thumbnail, *parts, device)


def network_matcher(spec: str, test: ImageSource, machine: Arithmetic) -> Matcher:
    """Compare features of a network, of the square in the middle of each image, by cosine."""
    features = load_features(spec, None, machine)

    def keys(images: Tensor) -> Tensor:
        found = features(from_uint8(images)).features
        return F.normalize(torch.from_numpy(found).float().to(machine.device), dim=1)

    size = min(LARGEST, first_side(test, range(len(test)), "TEST"))
    return Matcher(features.name, size, center, keys, lambda images: keys(images)[:, None], None, machine.device)


class Nearest:
    """The K keys most similar to each query, the largest inner product over its views; of equals, the first ones."""

    def __init__(self, queries: Tensor, k: int):  # (M, V, D) float
        self.queries = queries
        self.rows = torch.full((len(queries), k), -1)
        self.similarities = queries.new_full((len(queries), k), -torch.inf)

    def offer(self, keys: Tensor, rows: npt.NDArray[np.int64]) -> None:
        """Look at keys (B, D) of these rows (B,), which rise from call to call."""
        k, numbers = self.rows.shape[1], torch.from_numpy(rows)
        for start in range(0, len(self.queries), QUERIES):
            part = self.queries[start : start + QUERIES]
            products = (part.flatten(0, 1) @ keys.T).view(len(part), part.shape[1], -1).amax(1)
            changed = (products.amax(1) > self.similarities[start : start + QUERIES, -1]).nonzero()[:, 0]
            where = changed + start
            both = torch.cat([self.similarities[where], products[changed]], 1)
            best, place = (x[:, :k] for x in both.sort(stable=True, dim=1, descending=True))
            self.similarities[where] = best
            known = torch.cat([self.rows[where.cpu()], numbers.expand(len(where), -1)], 1)
            self.rows[where.cpu()] = known.gather(1, place.cpu())


Read = Callable[..., Iterator[tuple[Any, Pixels]]]  # (images, rows=...) -> batches: `data.loader.sequential`


class Pair(NamedTuple):
    """A TEST image and a TRAIN image, by row, and how similar they are."""

    test: int
    train: int
    similarity: float


def find_pairs(train: ImageSource, test: ImageSource, matcher: Matcher, k: int, read: Read) -> list[Pair]:
    """Each TEST image with the `k` TRAIN images whose features are nearest, and how similar they are.

    `read` is `data.loader.sequential` with the matcher's size and `read`.

    Raises:
        DalleError: no image of one of the sets can be read.
    """
    rows, queries = zip(
        *((rows, matcher.queries(images)) for rows, images in _batches("TEST", test, matcher, read)), strict=True
    )
    nearest = Nearest(torch.cat(queries), k)
    for kept, images in _batches("TRAIN", train, matcher, read):
        nearest.offer(matcher.keys(images), kept)
    held = nearest.rows >= 0
    test_rows = np.concatenate(rows)[held.nonzero()[:, 0]].tolist()
    found = zip(test_rows, nearest.rows[held].tolist(), nearest.similarities.cpu()[held].tolist(), strict=True)
    pairs = [Pair(query, row, round(cosine, DIGITS)) for query, row, cosine in found]
    if not pairs:
        raise DalleError("expected finite features, found NaN; give --dtype float32 or other --features")
    return _compared(pairs, train, test, matcher, read) if matcher.similarity else pairs


def _batches(name: str, images: ImageSource, matcher: Matcher, read: Read) -> Iterator[tuple[Any, Tensor]]:
    """All images of a set in batches on the device: rows (B,), pixels. Raises: DalleError if none can be read."""
    count = 0
    with console.progress(f"features of {name}", len(images), unit="images") as advance:
        for rows, batch in read(images, rows=range(len(images))):
            yield rows, matcher.tensor(batch)
            count += len(rows)
            advance(len(rows))
    if not count:
        raise DalleError(f"expected images in {name}, found none of {len(images):,} that can be read; check them")


def _compared(pairs: Sequence[Pair], train: ImageSource, test: ImageSource, matcher: Matcher, read: Read) -> list[Pair]:
    """The same pairs with the matcher's own similarity."""
    assert matcher.similarity is not None
    out: list[Pair] = []
    with console.progress("compare", len(pairs), unit="pairs") as advance:
        for start in range(0, len(pairs), PAIRS):
            batch = pairs[start : start + PAIRS]
            a = _by_row(read(test, rows=sorted({pair.test for pair in batch})))
            b = _by_row(read(train, rows=sorted({pair.train for pair in batch})))
            readable = [pair for pair in batch if pair.test in a and pair.train in b]
            if readable:
                both = np.stack([a[p.test] for p in readable]), np.stack([b[p.train] for p in readable])
                values = matcher.similarity(*map(matcher.tensor, both)).tolist()
                out += [p._replace(similarity=round(value, DIGITS)) for p, value in zip(readable, values, strict=True)]
            advance(len(batch))
    return out


def _by_row(batches: Iterator[tuple[Any, Pixels]]) -> dict[int, Pixels]:
    return {row: image for rows, images in batches for row, image in zip(rows.tolist(), images, strict=True)}


@dataclass(frozen=True)
class Overlap:
    """Pairs of TEST and TRAIN images, and the similarity from which they count as near-duplicates."""

    train: ImageSource
    test: ImageSource
    pairs: Sequence[Pair]
    threshold: float

    @cached_property
    def _ordered(self) -> list[Pair]:
        return sorted(self.pairs, key=lambda pair: (-pair.similarity, pair.test, pair.train))

    @cached_property
    def closest(self) -> list[Pair]:
        """The closest pair of each TEST image, the closest first."""
        first: dict[int, Pair] = {}
        for pair in self._ordered:
            first.setdefault(pair.test, pair)
        return list(first.values())

    @cached_property
    def duplicates(self) -> list[Pair]:
        """The pairs of at least the threshold, the closest first."""
        return [pair for pair in self._ordered if pair.similarity >= self.threshold]

    def ids(self, of: str) -> list[str]:
        """The images of one set, "test" or "train", with a near-duplicate in the other; sorted."""
        ids = (self.test if of == "test" else self.train).ids
        return sorted({ids[getattr(pair, of)] for pair in self.duplicates})

    def crowded(self, k: int) -> int:
        """How many TEST images have near-duplicates in all `k` neighbors, so that TRAIN may hold more."""
        counts = np.bincount([pair.test for pair in self.duplicates])
        return int((counts >= k).sum()) if len(self.train) > k else 0

    def listed(self) -> list[dict[str, Any]]:
        """Near-duplicates, then the closest pair of each other TEST image, by id; the closest first."""
        pairs = [*self.duplicates, *(pair for pair in self.closest if pair.similarity < self.threshold)]
        test, train = self.test.ids, self.train.ids
        return [{"test": test[p.test], "train": train[p.train], "similarity": p.similarity} for p in pairs]

    def around(self, n: int = GRID_PAIRS) -> tuple[list[Pair], list[Pair]]:
        """Of the closest pairs the `n` next to the threshold, half of them above it if there are that many."""
        above = [pair for pair in self.closest if pair.similarity >= self.threshold]
        below = self.closest[len(above) :][: max(n // 2, n - len(above))]
        return above[len(above) - min(len(above), n - len(below)) :], below

    def grid(self) -> Image.Image:
        """An image grid of the pairs around the threshold, TEST on the left."""
        above, below = self.around()
        pairs, test, train = [*above, *below], self.test, self.train
        images = [_side_by_side(test.read(pair.test), train.read(pair.train)) for pair in pairs]
        names = [f"{test.ids[pair.test]}, {train.ids[pair.train]}" for pair in pairs]
        counts = f"{len(above) or 'no'} pairs from the threshold {self.threshold:g} on, {len(below) or 'none'} below it"
        return image_grid(
            images, names, [pair.similarity for pair in pairs], columns=4, title=f"TEST beside TRAIN: {counts}",
            groups=[0] * len(above) + [1] * len(below),
        )  # fmt: skip


def _side_by_side(left: Image.Image, right: Image.Image) -> npt.NDArray[np.uint8]:
    canvas = Image.new("RGB", (2 * SIDE + GAP, SIDE), (255, 255, 255))
    for at, image in ((0, left), (SIDE + GAP, right)):
        canvas.paste(ImageOps.pad(image, (SIDE, SIDE), Image.Resampling.HAMMING, (255, 255, 255)), (at, 0))
    return np.asarray(canvas)
