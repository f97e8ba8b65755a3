"""Bytes of a file, or of a part of it, mapped into memory: what readers of weights stand on. It needs torch."""

import io
import mmap
import os
import sys
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dalle_cli.artifacts.regular import open_regular
from dalle_cli.errors import DalleError

# A private mapping that reserves no memory: it may be larger than the machine's, and no write reaches the file.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
MAX_NUMBERS = 1 << 50  # in one tensor
MAX_DIMENSIONS = 32
LINE = 1 << 12  # the longest line of a pickle


class Region:
    """`size` bytes of the file at `path` from `start` on; `name` is what error messages call it."""

    def __init__(
        self, path: Path, name: str = "", start: int = 0, size: int | None = None, file: BinaryIO | None = None
    ):
        """`file` is the opened file, if it is open already.

        Raises:
            DalleError: the file cannot be read, or is empty.
        """
        self.path, self.name = path, name or path.name
        try:
            with open_regular(path) if file is None else nullcontext(file) as file:
                there = os.fstat(file.fileno()).st_size
                self.start, self.size = start, there - start if size is None else size
                if self.size <= 0 or self.start + self.size > there:
                    raise self.damaged(f"only {max(there - start, 0)} bytes")
                self.map = _map(file.fileno())
        except OSError as error:
            raise DalleError(f"expected a readable file, found {error.strerror}: {path}") from None
        self.view = memoryview(self.map)[self.start : self.start + self.size]

    def damaged(self, found: str) -> DalleError:
        """The error that this is not a whole checkpoint."""
        return DalleError(f"expected a whole checkpoint, found {found} in {self.name}; fetch it again")

    def tensor(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The numbers from byte `start` on as a tensor; nothing is read before its numbers are used."""
        if prod(shape) == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.map, dtype=dtype, count=prod(shape), offset=self.start + start).view(shape)

    def release(self) -> None:
        """Give back the memory of what was read; tensors stay valid and are read again when they are used."""
        if hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_DONTNEED)

    def check_shape(self, shape: tuple[int, ...], name: str) -> None:
        """Raises: DalleError unless these are the sizes of a tensor."""
        whole = all(type(n) is int and n >= 0 for n in shape)
        if not whole or len(shape) > MAX_DIMENSIONS or prod(n for n in shape if n) > MAX_NUMBERS:
            raise self.damaged(f"an impossible shape of {name[:60]!r}")


def _map(descriptor: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    return mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE)


class RegionFile(io.RawIOBase):
    """A region, or a part of it, as a file that can be read and searched, without a copy of it."""

    def __init__(self, region: Region, start: int = 0, size: int | None = None):
        self.view, self.at = region.view[start : None if size is None else start + size], 0

    def read(self, size: int | None = -1) -> bytes:
        end = len(self.view) if size is None or size < 0 else min(self.at + size, len(self.view))
        found, self.at = bytes(self.view[self.at : end]), max(self.at, end)
        return found

    def readline(self, size: int | None = -1) -> bytes:
        """As a file's, but no more than the longest line that a pickle of tensors has."""
        found = bytes(self.view[self.at : self.at + LINE])
        found = found[: found.find(b"\n") + 1 or LINE]
        self.at += len(found)
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, offset + (0, self.at, len(self.view))[whence])
        return self.at

    def tell(self) -> int:
        return self.at

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True
