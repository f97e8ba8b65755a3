"""String columns, stored as Arrow does: all bytes in one tensor, and where each string begins."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt


class StringColumn(Sequence[str]):
    """Rows by number, from the end too, and by slice; what a column is made of says which string is the i-th."""

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
        """The string at `i`, from 0 and below the length."""


class Strings(StringColumn):
    """N UTF-8 strings over `data` (n_bytes,) uint8 and `offsets` (N+1,) int64, decoded only when asked for."""

    def __init__(self, data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]):
        self.data = data
        self.offsets = offsets

    @classmethod
    def pack(cls, strings: Sequence[str]) -> "Strings":
        """A column of these strings; half a surrogate pair, which UTF-8 cannot hold, becomes "?"."""
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

    __hash__ = None  # type: ignore[assignment]  # a mutable view of a file is no key

    def take(self, rows: Sequence[int] | npt.NDArray[Any]) -> "Strings":
        """The strings of these rows, as a column of their own."""
        return Strings.pack([self[int(i)] for i in rows])
