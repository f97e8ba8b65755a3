"""String columns as Arrow stores them: all bytes in one tensor, the offset of each string in another."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt


class StringColumn(Sequence[str]):
    """A sequence of strings indexed by int or slice; a subclass implements `row`."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = int(index)
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self.row(i % len(self))

    @abstractmethod
    def row(self, i: int) -> str:
        """The string at `i`, with 0 <= i < length."""


class Strings(StringColumn):
    """N UTF-8 strings over `data` (n_bytes,) uint8 and `offsets` (N+1,) int64, each decoded when it is read."""

    def __init__(self, data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]):
        self.data = data
        self.offsets = offsets

    @classmethod
    def pack(cls, strings: Sequence[str]) -> "Strings":
        """A column of these strings; a lone surrogate, which UTF-8 cannot hold, becomes "?"."""
        if isinstance(strings, Strings):
            return strings
        encoded = [s.encode("utf-8", "replace") for s in strings]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(e) for e in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, i: int) -> str:
        """The string at `i`, decoded."""
        return self.data[self.offsets[i] : self.offsets[i + 1]].tobytes().decode("utf-8", "replace")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Strings):
            return np.array_equal(self.offsets, other.offsets) and np.array_equal(self.data, other.data)
        return list(self) == other if isinstance(other, list) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def take(self, rows: Sequence[int] | npt.NDArray[Any]) -> "Strings":
        """The strings of these rows as a new column."""
        return Strings.pack([self[int(i)] for i in rows])
