"""The index that every kind of data set is read into."""

import posixpath
import re
from dataclasses import dataclass
from typing import NamedTuple

from dalle_cli.data import captions
from dalle_cli.data.filters import Filters
from dalle_cli.data.images import SUFFIXES
from dalle_cli.data.skips import SkipLog

_SURROGATE = re.compile("[\ud800-\udfff]")


class Sample(NamedTuple):
    """One image: bytes [offset, offset + size) of the file at `path`, or to its end if size is -1."""

    id: str
    path: str
    offset: int
    size: int
    captions: tuple[str, ...]


@dataclass(frozen=True)
class IndexOptions:
    """How to make an index, and where to count the samples that are left out."""

    need_captions: bool
    all_lines: bool  # whether each line of a .txt is an alternative caption, or only the first line counts
    filters: Filters
    skipped: SkipLog

    def text(self, data: bytes) -> tuple[str, ...]:
        """The captions in a .txt file that pass the filters."""
        return self.filters.captions(captions.from_text(data, self.all_lines))

    def value(self, value: object) -> tuple[str, ...]:
        """The captions in a value from a manifest or JSON that pass the filters."""
        return self.filters.captions(captions.from_value(value))


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image."""
    return name.lower().endswith(SUFFIXES)


def id_of(name: str) -> str:
    """The id of a path: without suffix, with posix separators, never absolute, without ".."."""
    parts = posixpath.splitext(name.replace("\\", "/"))[0].split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def unique(samples: list[Sample], skipped: SkipLog) -> list[Sample]:
    """Sort by id; of several files with one id (a.jpg, a.png) keep the first by name and count the others."""
    kept: list[Sample] = []
    for sample in sorted(samples, key=lambda s: (s.id, s.path, s.offset)):
        if _SURROGATE.search(sample.id):  # bytes of a file name that are not UTF-8
            skipped.add(sample.id, "file name is not UTF-8")
        elif kept and kept[-1].id == sample.id:
            skipped.add(sample.path.replace("\\", "/").rpartition("/")[2], f"duplicate id: {sample.id}")
        else:
            kept.append(sample)
    return kept
