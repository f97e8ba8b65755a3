"""A file that is cut while it is mapped into memory ends the command in one line, not by a signal.

The system sends SIGBUS where a mapped file has no more bytes. Python's own handlers run only between instructions,
which that one never finishes; so this one is given to the C library directly. It ends the process.
"""

import mmap
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from dalle_cli.errors import one_line

_kept: list[Any] = []  # the C library holds no reference


def explain() -> None:
    """From now on, tell of such a file in one line and end the process with status 1. Linux and macOS."""
    if not hasattr(signal, "SIGBUS") or _kept:
        return
    import ctypes

    def end(number: int) -> None:
        try:
            found = next(_cut(), "one that was cut or cannot be read")
            message = f"expected a file that stays as it is while it is read, found {found}; run again with a whole one"
            os.write(2, f"dalle: error: {one_line(message)}\n".encode(errors="backslashreplace"))
        finally:
            os._exit(1)

    library = ctypes.CDLL(None)
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.signal.restype = ctypes.c_void_p
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    library.signal(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))
    _kept.append(handler)


def _cut() -> Iterator[str]:
    """Mapped files that are shorter than their mapping, where the system lists them."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        maps = [line.rstrip("\n").split(maxsplit=5) for line in file]
    programs = {name for _, mode, *_, name in (row for row in maps if len(row) == 6) if "x" in mode}  # and libraries
    for where, _, offset, _, _, path in (row for row in maps if len(row) == 6 and row[5] not in programs):
        begin, end = (int(address, 16) for address in where.split("-"))
        with suppress(OSError):  # one that is gone is whole, where it is mapped
            size = os.stat(path).st_size
            if int(offset, 16) + end - begin > -(-size // mmap.PAGESIZE) * mmap.PAGESIZE:
                yield f"{size:,} bytes left of {path}"
