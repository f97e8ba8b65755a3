"""Open what is named as a file: a pipe, a device or a folder of that name is an error at once, never a wait."""

import os
import stat
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dalle_cli.errors import DalleError

KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


class Identity(NamedTuple):
    """What tells whether a path still names the file that was opened, with the same bytes."""

    device: int
    inode: int
    size: int
    changed: int  # nanoseconds

    @classmethod
    def of(cls, found: os.stat_result) -> "Identity":
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def open_regular(path: Path | str) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Raises:
        OSError: no such file, or no access.
        DalleError: it is something else than a file.
    """
    _check(os.stat(path), path)  # first: opening a device may do something
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check(os.fstat(descriptor), path)
        return open(descriptor, "rb", buffering=0, closefd=True)
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path | str, most: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: no such file, or no access.
        DalleError: it is something else than a file, or larger than `most` bytes.
    """
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise DalleError(f"expected at most {most:,} bytes, found {size:,}: {path}; check the file")
        data = bytearray()
        while len(data) <= most and (block := file.read(min(1 << 20, most + 1 - len(data)))):
            data += block
    if len(data) > most:  # of /proc a file's size says nothing
        raise DalleError(f"expected at most {most:,} bytes, found more: {path}; check the file")
    return bytes(data)


def _check(found: os.stat_result, path: Path | str) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_, name in KINDS if is_(found.st_mode)), "something else")
        raise DalleError(f"expected a file, found {kind}: {path}; check the path")
