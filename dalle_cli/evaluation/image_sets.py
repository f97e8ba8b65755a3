"""The two sides that are compared, generated and real: an `images` artifact or a data set each.

Shapes: N rows, S side in pixels.
"""

import bisect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dalle_cli.artifacts import Artifact, open_artifact
from dalle_cli.artifacts.container import SHARDS
from dalle_cli.data.datasets import open_dataset
from dalle_cli.data.loader import Pictures
from dalle_cli.data.skips import BadSample, SkipLog
from dalle_cli.errors import DalleError

GENERATED, REFERENCE = "generated", "reference"


class Stored:
    """The pictures of an `images` artifact, as a data set gives its own.

    A shard is mapped for each picture anew: what was once looked at through a map counts as held while the map lives.
    """

    def __init__(self, artifact: Artifact):
        self.ids: Sequence[str] = artifact.strings("ids")
        self.skipped = SkipLog()
        self._shards = artifact.headers
        self._starts = [0, *accumulate(map(len, artifact.headers))]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, i: int) -> Image.Image:
        """Picture i in mode RGB."""
        shard = bisect.bisect_right(self._starts, i) - 1
        pixels = self._shards[shard].map("images")[i - self._starts[shard]]
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


@dataclass(frozen=True)
class Side:
    """One side: its pictures, the rows of them that are looked at, and the captions of each picture, by id."""

    name: str
    pictures: Pictures
    rows: npt.NDArray[np.int64]
    captions: Mapping[str, tuple[str, ...]]
    source: Artifact | str  # or a data set's digest

    @property
    def digest(self) -> str:
        """Of the artifact, or of the data set."""
        return self.source.digest if isinstance(self.source, Artifact) else self.source

    def size(self) -> int:
        """The shorter side of the first picture that can be read, in pixels.

        Raises:
            DalleError: none can be read.
        """
        for row in self.rows.tolist():
            with suppress(BadSample):
                return min(self.pictures.read(row).size)
        raise DalleError(f"expected {self.name} pictures, found none that can be read; check them")


def open_side(name: str, source: str, limit: int | None = None) -> Side:
    """Open what a path names; of more than `limit` pictures so many, evenly spread.

    Raises:
        DalleError: nothing there, or neither pictures nor a data set.
    """
    artifact = stored_images(source)
    if artifact is not None:  # whose length is its rows
        stored = Stored(artifact)
        texts = artifact.strings("text") if "text" in artifact else None
        known = {} if texts is None else {own: (text,) for own, text in zip(stored.ids, texts, strict=True)}
        return Side(name, stored, _rows(len(stored), limit), known, artifact)
    data = open_dataset(source, need_captions=False)
    captions: dict[str, tuple[str, ...]] = {}
    with suppress(DalleError):  # a data set without captions
        told = open_dataset(source, need_captions=True, all_lines=True)
        captions = dict(zip(told.ids, told.captions, strict=True))
    return Side(name, data, _rows(len(data), limit), captions, data.digest)


def open_pictures(source: str) -> tuple[Pictures, str]:
    """The pictures of a data set or of an `images` artifact, and the digest of it.

    Raises:
        DalleError: nothing there, or neither of them.
    """
    artifact = stored_images(source)
    if artifact is not None:
        return Stored(artifact), artifact.digest
    data = open_dataset(source, need_captions=False)
    return data, data.digest


def stored_images(source: str) -> Artifact | None:
    """The `images` artifact that a path names; None where it names something that can only be a data set.

    Raises:
        DalleError: another artifact.
    """
    path = Path(source)
    if path.suffix == ".safetensors" or (path.is_dir() and any(path.glob(SHARDS))):
        return open_artifact(path, "images")
    return None


def _rows(n: int, limit: int | None) -> npt.NDArray[np.int64]:
    return np.arange(n) if limit is None or limit >= n else np.arange(limit) * n // limit
