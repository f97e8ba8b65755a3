"""What the training loop needs of a task, and what tasks share.

A task's batches are a function of (seed, update) alone.
"""

import hashlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dalle_cli.data import loader
from dalle_cli.data.augment import Augment, by_name
from dalle_cli.data.datasets import Dataset
from dalle_cli.data.order import Order, split
from dalle_cli.data.pairs import Ints, Pairs
from dalle_cli.training.config import ImageTrainConfig, TrainConfig

Batch = tuple[Tensor, ...]
M = TypeVar("M", bound=nn.Module)


class Task(Protocol):
    """What differs between models: data, loss, validation, and the image grid that shows the state of a run.

    A task may also be one that `Splits`, `ReadsShard`, `Counts` or `Costs`.
    """

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    def batches(self, start: int) -> Generator[Batch]:
        """Batches of update `start`, `start` + 1, ...: tensors on the CPU."""

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one update, and metrics to log, averaged over the updates between two log lines."""

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Metrics of the averaged weights on held-out data."""

    def samples(self, model: nn.Module, device: torch.device) -> Image.Image | None:
        """An image grid that shows the state of the run; None if there is nothing to show."""


@runtime_checkable
class Splits(Protocol):
    """A task whose batch can be computed in parts: its loss is a mean, not a comparison within the batch."""

    def split(self, batch: Batch, parts: int, step: int, generator: torch.Generator) -> list[Batch]:
        """Batches for `loss` whose losses and metrics average to those of the whole.

        If the loss is a mean over something of which the parts hold unequal numbers (caption tokens), each part carries
        its weight. Random numbers for the batch as a whole are drawn here.
        """


@runtime_checkable
class Counts(Protocol):
    """A task that names the unit of its rate. Others count images, the rows of a batch."""

    def units(self, batch: Batch) -> tuple[str, int]:
        """The unit's name in the plural, and how many a batch holds."""


@runtime_checkable
class Costs(Protocol):
    """A task that knows how much it computes."""

    def flops(self) -> float:
        """Floating-point operations of one update, forward and backward."""


def mix(*parts: int | str) -> int:
    """A seed from several numbers and names, well mixed, below 2**63."""
    data = b"".join(p.encode() if isinstance(p, str) else p.to_bytes(8, "little", signed=True) for p in parts)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def seeded(seed: int, build: Callable[[], M]) -> M:
    """A new model, whose initial weights are a function of the run's seed."""
    torch.manual_seed(mix(seed, -1))
    return build()


def int64(*arrays: NDArray[np.generic]) -> tuple[Tensor, ...]:
    """Tokens, lengths or codes, however they are stored, as int64 tensors."""
    return tuple(torch.from_numpy(array.astype(np.int64)) for array in arrays)


class EqualParts:
    """A task whose loss is a mean over the rows of a batch."""

    def split(self, batch: Batch, parts: int, step: int, generator: torch.Generator) -> list[Batch]:
        """Equal parts of every column."""
        return list(zip(*(column.chunk(parts) for column in batch), strict=True))


class ImageTask:
    """A task over a data set of images. Each of several processes reads its own part of every batch."""

    options: ImageTrainConfig
    validation_batch = 32

    def __init__(self, train: ImageTrainConfig, data: Dataset, seed: int, workers: int):
        self.options, self.data, self.seed, self.workers = train, data, seed, workers
        self.rank, self.world = 0, 1
        self.rows, held_out = split(data.ids, train.validation)
        self.held_out = held_out[: train.max_validation]

    def share(self, rank: int, world: int) -> None:
        """From now on `batches` gives the rank-th of `world` equal parts."""
        self.rank, self.world = rank, world

    @property
    def slots(self) -> range:
        """Which rows of a whole batch this process reads."""
        part = self.options.batch_size // self.world
        return range(self.rank * part, (self.rank + 1) * part)

    def augmentation(self) -> Augment:
        """The augmentation of the training images."""
        return by_name(self.options.augment, self.options.flip)

    def loaded(self, start: int, size: int) -> Generator[loader.Batch]:
        """Training images of a side, from update `start` on, in this process's part of each batch."""
        images = loader.Loader(
            self.data, size, self.augmentation(), len(self.slots), self.seed, self.workers, self.rows,
            rank=self.rank, world=self.world,
        )  # fmt: skip
        with closing(images.batches(start)) as batches:
            yield from batches

    def held_out_images(self, size: int, n: int | None = None) -> Iterator[tuple[Ints, Tensor]]:
        """The first n held-out images (default: all), center-cropped: their rows (b,), and (b, 3, S, S) uint8."""
        rows = self.held_out[:n].tolist()
        for found, images in loader.sequential(self.data, size, rows, self.validation_batch, self.workers):
            yield found, torch.from_numpy(images)


class PairTask:
    """A task over captions and latents joined by id. Each epoch picks one caption and one latent of each id anew."""

    validation_batch = 64

    def __init__(self, train: TrainConfig, pairs: Pairs, seed: int):
        self.pairs, self.seed = pairs, seed
        self.places, self.held_out = pairs.split(train.validation)
        self.order = Order(len(self.places), train.batch_size, seed)

    def batches(self, start: int) -> Generator[Batch]:
        """The batches from update `start` on, made while the model computes."""
        return loader.prefetch(self.batch, start)

    def batch(self, step: int) -> Batch:
        """The batch of one update."""
        raise NotImplementedError  # each task has its own

    def drawn(self, order: Order, stream: int, step: int) -> tuple[Ints, Ints, np.random.Generator]:
        """The caption rows and latent rows of an update, and the generator that chose among several."""
        _, rows = order.batch(step)
        rng = np.random.default_rng((self.seed, stream, step))
        return *self.pairs.draw(self.places[rows], rng.random((len(rows), 2))), rng

    def held_out_rows(self, n: int) -> Iterator[tuple[range, Ints, Ints]]:
        """The first n held-out ids, a batch at a time: numbers, first caption rows and first latent rows."""
        places = self.held_out[:n]
        for begin in range(0, len(places), self.validation_batch):
            part = places[begin : begin + self.validation_batch]
            yield range(begin, begin + len(part)), *self.pairs.draw(part)
