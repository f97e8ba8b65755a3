"""String columns as Arrow stores them: all bytes in one tensor, the offset of each string in another."""

import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, overload

import numpy as np
import numpy.typing as npt

Part = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]  # bytes (n_bytes,), offsets (n + 1,)


class Strings(Sequence[str]):
    """UTF-8 strings over one part or, of shards, several; each string is decoded when it is read."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = parts
        self.starts = [0, *accumulate(len(offsets) - 1 for _, offsets in parts)]

    @classmethod
    def pack(cls, strings: Sequence[str]) -> "Strings":
        """A column of one part; a lone surrogate, which UTF-8 cannot hold, becomes "?"."""
        encoded = [s.encode("utf-8", "replace") for s in strings]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(e) for e in encoded], out=offsets[1:])
        return cls([(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets)])

    def __len__(self) -> int:
        return self.starts[-1]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: Any) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= i < len(self):
            raise IndexError(index)
        part = bisect.bisect_right(self.starts, i) - 1
        (data, offsets), i = self.parts[part], i - self.starts[part]
        return data[offsets[i] : offsets[i + 1]].tobytes().decode("utf-8", "replace")
