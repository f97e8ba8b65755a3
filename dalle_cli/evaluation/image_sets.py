"""The two sets of images that are compared, generated and reference: an `images` artifact or a data set each.

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
from dalle_cli.data.loader import ImageSource
from dalle_cli.data.skips import BadSample, SkipLog
from dalle_cli.errors import DalleError

GENERATED, REFERENCE = "generated", "reference"


class StoredImages:
    """The images of an artifact, read like those of a data set."""

    def __init__(self, artifact: Artifact):
        self.artifact = artifact
        self.ids: Sequence[str] = artifact.strings("ids")
        self.skipped = SkipLog()
        self._shards = artifact.headers
        self._starts = [0, *accumulate(map(len, artifact.headers))]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, i: int) -> Image.Image:
        """Image i in mode RGB. The shard is mapped anew each time: pages of a live map would count as memory held."""
        shard = bisect.bisect_right(self._starts, i) - 1
        pixels = self._shards[shard].map("images")[i - self._starts[shard]]
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


@dataclass(frozen=True)
class ImageSet:
    """The images of one set, the rows that are used, and the captions of each image by id."""

    name: str
    images: ImageSource
    rows: npt.NDArray[np.int64]
    captions: Mapping[str, tuple[str, ...]]
    source: Artifact | str  # or the digest of a data set

    @property
    def digest(self) -> str:
        """Of the artifact, or of the data set."""
        return self.source.digest if isinstance(self.source, Artifact) else self.source

    def size(self) -> int:
        """As `first_side`, of the rows that are used."""
        return first_side(self.images, self.rows.tolist(), self.name)


def open_image_set(name: str, source: str, limit: int | None = None) -> ImageSet:
    """Open the images of a path, or `limit` of them, evenly spread.

    Raises:
        DalleError: nothing there, or neither images nor a data set.
    """
    images, digest = open_images(source)
    captions: dict[str, tuple[str, ...]] = {}
    if isinstance(images, StoredImages):
        artifact = images.artifact
        if "text" in artifact:
            captions = {own: (text,) for own, text in zip(images.ids, artifact.strings("text"), strict=True)}
        return ImageSet(name, images, spread(len(images), limit), captions, artifact)
    with suppress(DalleError):  # a data set without captions
        captioned = open_dataset(source, need_captions=True, all_lines=True)
        captions = dict(zip(captioned.ids, captioned.captions, strict=True))
    return ImageSet(name, images, spread(len(images), limit), captions, digest)


def first_side(images: ImageSource, rows: Sequence[int], name: str) -> int:
    """The shorter side of the first image that can be read, in pixels. Raises: DalleError if none can."""
    for row in rows:
        with suppress(BadSample):
            return min(images.read(row).size)
    raise DalleError(f"expected {name} images, found none of {len(rows):,} that can be read; check them")


def open_images(source: str) -> tuple[ImageSource, str]:
    """The images of a data set or of an `images` artifact, and its digest.

    Raises:
        DalleError: nothing there, or neither of them.
    """
    path = Path(source)
    if path.suffix == ".safetensors" or (path.is_dir() and any(path.glob(SHARDS))):
        artifact = open_artifact(path, "images")
        return StoredImages(artifact), artifact.digest
    data = open_dataset(source, need_captions=False)
    return data, data.digest


def spread(n: int, limit: int | None) -> npt.NDArray[np.int64]:
    """All rows of n, or `limit` of them, evenly spread."""
    return np.arange(n) if limit is None or limit >= n else np.arange(limit) * n // limit
