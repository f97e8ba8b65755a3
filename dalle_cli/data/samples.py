"""What every kind of data set is indexed into."""

import posixpath
from dataclasses import dataclass
from typing import NamedTuple

from dalle_cli.data import captions
from dalle_cli.data.filters import Filters
from dalle_cli.data.images import SUFFIXES
from dalle_cli.data.skips import SkipLog


class Sample(NamedTuple):
    """One picture: bytes [offset, offset + size) of the file at `path`, to its end where size is -1."""

    id: str
    path: str
    offset: int
    size: int
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """How an index is to be made, and where to count what is left out of it."""

    need_captions: bool
    all_lines: bool  # of a .txt: every line an alternative, or the first one only
    filters: Filters
    skipped: SkipLog

    def text(self, data: bytes) -> tuple[str, ...]:
        """The content of a .txt file -> the captions that pass the filters."""
        return self.filters.captions(captions.from_text(data, self.all_lines))

    def value(self, value: object) -> tuple[str, ...]:
        """A value from a manifest or JSON -> the captions that pass the filters."""
        return self.filters.captions(captions.from_value(value))


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its suffix."""
    return name.lower().endswith(SUFFIXES)


def id_of(name: str) -> str:
    """A path -> an id: without suffix, with posix separators, never absolute and never climbing out of its folder."""
    parts = posixpath.splitext(name.replace("\\", "/"))[0].split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def is_utf8(name: str) -> bool:
    """Whether a name can be written down: one from a file system or a tar may hold bytes that are no UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def unique(samples: list[Sample], skipped: SkipLog) -> list[Sample]:
    """Sort by id; of several files with one id (a.jpg, a.png) the first by name stays, the others are counted."""
    kept: list[Sample] = []
    for sample in sorted(samples, key=lambda s: (s.id, s.path, s.offset)):
        if not is_utf8(sample.id):
            skipped.add(sample.id, "file name is not UTF-8")
        elif kept and kept[-1].id == sample.id:
            skipped.add(sample.path.replace("\\", "/").rpartition("/")[2], f"duplicate id: {sample.id}")
        else:
            kept.append(sample)
    return kept
