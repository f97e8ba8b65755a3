"""Batches of images, decoded and augmented ahead by threads (PIL and numpy release the interpreter's lock).

Shapes: B batch, S image side. Everything random is a function of (seed, position in the data), so neither the number of
workers nor the update at which a run resumes changes a batch.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dalle_cli.data.augment import Augment, Pixels, center
from dalle_cli.data.order import Order
from dalle_cli.data.skips import BadSample, SkipLog
from dalle_cli.errors import DalleError

READ_AHEAD = 2  # batches in preparation, besides the one in use
# The last word of a seed: SeedSequence pads with zeros, so (a, b), a permutation's, and (a, b, 0, 0) are the same.
_AUGMENT, _CROP = 1, 2

_Position = tuple[int, int, int]

T = TypeVar("T")


class ImageSource(Protocol):
    """What a loader needs of a data set."""

    ids: Sequence[str]
    skipped: SkipLog

    def __len__(self) -> int: ...

    def read(self, i: int) -> Image.Image:
        """Image i, or BadSample."""
        ...


@dataclass(frozen=True)
class Batch:
    """One update's images (B, 3, S, S) uint8, and the data set's row (B,) and the epoch (B,) of each, int64."""

    step: int
    images: Pixels
    rows: NDArray[np.int64]
    epochs: NDArray[np.int64]


def prefetch(make: Callable[[int], T], start: int) -> Generator[T]:
    """make(start), make(start + 1), ... without end, each made by a thread while the ones before are in use."""
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(make, start + i) for i in range(READ_AHEAD))
        for step in itertools.count(start + READ_AHEAD):
            ready = ahead.popleft().result()
            ahead.append(pool.submit(make, step))
            yield ready


class Loader:
    """Endless shuffled, augmented batches; `batch(step)` is a function of (seed, step) alone.

    A sample that cannot be read is counted, and replaced by the next row of the epoch's permutation. `rows` limits the
    loader to a part of the data set. Process `rank` of `world` gets its part of batches of `batch_size * world`.
    """

    def __init__(
        self,
        dataset: ImageSource,
        size: int,
        augment: Augment,
        batch_size: int,
        seed: int,
        workers: int = 0,
        rows: NDArray[np.int64] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.dataset, self.size, self.augment = dataset, size, augment
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self._rows = np.arange(len(dataset), dtype=np.int64) if rows is None else rows
        self._order = Order(len(self._rows), batch_size * world, seed)
        self._lock = threading.Lock()  # an Order caches permutations
        self._part = slice(rank * batch_size, (rank + 1) * batch_size)

    def batch(self, step: int) -> Batch:
        """The batch of one step, made in the calling thread."""
        return next(self._batches(range(step, step + 1), 0))

    def batches(self, start: int = 0) -> Generator[Batch]:
        """Batches from a step on, without end; closing the iterator stops the threads."""
        return self._batches(itertools.count(start), self.workers)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def _batches(self, steps: Iterable[int], workers: int) -> Generator[Batch]:
        numbers, ahead = itertools.tee(steps)
        made = _made(map(self._positions, ahead), self._load, self.size, workers)
        try:
            for step in numbers:
                images, rows = next(made)
                yield Batch(step, images, rows, np.array([p[0] for p in self._positions(step)], np.int64))
        finally:
            made.close()

    def _positions(self, step: int) -> list[_Position]:
        """Of each image of a step: its epoch, its slot in that epoch's permutation, and the slot's row."""
        with self._lock:
            epochs, places = self._order.batch(step)
        slots = np.arange(step * len(epochs), (step + 1) * len(epochs)) % self._order.n
        columns = (column[self._part].tolist() for column in (epochs, slots, self._rows[places]))
        return list(zip(*columns, strict=True))

    def _load(self, position: _Position) -> tuple[int, Pixels]:
        epoch, slot, row = position
        rng = np.random.default_rng([self.seed, epoch, slot, _AUGMENT])
        for k in range(1, self._order.n + 1):
            if (image := _read(self.dataset, row)) is not None:
                return row, self.augment(image, self.size, rng)
            with self._lock:
                permutation = self._order.permutation(epoch)
            row = int(self._rows[permutation[(slot + k) % self._order.n]])
        n = self._order.n
        raise DalleError(f"expected images, found none of {n:,} that can be read; see the list of skipped samples")


def sequential(
    dataset: ImageSource,
    size: int,
    rows: Sequence[int],
    batch_size: int,
    workers: int = 0,
    augment: Augment = center,
    seed: int = 0,
    draw: int = 0,
) -> Generator[tuple[NDArray[np.int64], Pixels]]:
    """Given rows in order: (readable rows (b,) int64, images (b, 3, S, S) uint8), b <= B.

    Samples that cannot be read are counted and left out; a batch without any is not yielded. A random `augment` is a
    function of (seed, row, draw): draws 0, 1, 2 ... of one row give different crops.
    """

    def load(row: int) -> tuple[int, Pixels] | None:
        image = _read(dataset, row)
        if image is None:
            return None
        return row, augment(image, size, np.random.default_rng([seed, row, draw, _CROP]))

    lots = (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
    made = _made(lots, load, size, workers)
    try:
        for images, kept in made:
            good = kept >= 0
            if good.any():
                yield (kept, images) if good.all() else (kept[good], images[good])
    finally:
        made.close()


def _read(dataset: ImageSource, row: int) -> Image.Image | None:
    try:
        return dataset.read(row)
    except BadSample as reason:
        dataset.skipped.add(dataset.ids[row], str(reason))
        return None


def _made(
    lots: Iterable[Sequence[T]], load: Callable[[T], tuple[int, Pixels] | None], size: int, workers: int
) -> Generator[tuple[Pixels, NDArray[np.int64]]]:
    """For each lot the images (B, 3, S, S) and rows (B,), -1 where `load` gave none; in order, some lots ahead.

    Without workers the calling thread loads one lot at a time.
    """
    stop = threading.Event()
    pending: deque[tuple[Pixels, NDArray[np.int64], list[Future[None]]]] = deque()
    pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="dalle-data")  # starts a thread when it has a task
    try:
        source = iter(lots)
        while True:
            for lot in itertools.islice(source, (READ_AHEAD if workers else 0) + 1 - len(pending)):
                images, rows = np.zeros((len(lot), 3, size, size), np.uint8), np.full(len(lot), -1, np.int64)
                part = -(-len(lot) // max(workers, 1))  # one task per worker: one per small image would cost as much
                cuts = [slice(i, i + part) for i in range(0, len(lot), part)]
                work = [partial(_fill, images[c], rows[c], lot[c], load, stop) for c in cuts]
                pending.append((images, rows, [pool.submit(task) for task in work] if workers else []))
                for task in () if workers else work:
                    task()
            if not pending:
                return
            images, rows, futures = pending.popleft()
            for future in futures:
                future.result()
            yield images, rows
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _fill(
    images: Pixels,
    rows: NDArray[np.int64],
    lot: Sequence[T],
    load: Callable[[T], tuple[int, Pixels] | None],
    stop: threading.Event,
) -> None:
    for j, item in enumerate(lot):
        if stop.is_set():
            return
        if (loaded := load(item)) is not None:
            rows[j] = loaded[0]
            images[j] = loaded[1].transpose(2, 0, 1)
