"""Local files and files at URLs by the same functions; fsspec is imported only for a path with "://"."""

import errno
import os
import posixpath
import stat
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, cast

from dalle_cli.errors import DalleError


class File(NamedTuple):
    """A file below a folder; `name` is relative to the folder, with posix separators."""

    name: str
    path: str
    size: int


def is_remote(path: str) -> bool:
    """Whether a path is a URL for fsspec."""
    return "://" in path


def _remote(path: str, call: Callable[[Any, str], Any]) -> Any:
    """`call(file system, path in it)`; whatever a driver raises becomes an OSError, as for a local file."""
    import fsspec

    try:
        fs, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DalleError(f"expected a URL that fsspec can open, found {path} ({reason}); install its driver") from None
    try:
        return call(fs, inner)
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"cannot read {path}: {error or type(error).__name__}") from error


def kind(path: str) -> str:
    """ "file", "folder", or "" if there is neither."""
    if is_remote(path):
        return str(_remote(path, lambda fs, p: "file" if fs.isfile(p) else "folder" if fs.isdir(p) else ""))
    return "folder" if os.path.isdir(path) else "file" if os.path.isfile(path) else ""


def size(path: str) -> int:
    """The size of a file in bytes, -1 if the server does not say.

    Raises:
        OSError: no such file.
    """
    if not is_remote(path):
        return os.stat(path).st_size
    return _size(_remote(path, lambda fs, p: fs.info(p)))


def _size(info: dict[str, Any]) -> int:
    return -1 if info.get("size") is None else int(info["size"])


def open_binary(path: str) -> BinaryIO:
    """Open a seekable file for reading."""
    return cast(BinaryIO, _remote(path, lambda fs, p: fs.open(p, "rb")) if is_remote(path) else _open(path))


def _open(path: str, buffering: int = -1) -> Any:
    """Open a local file; of a pipe or a device, which may never end, an OSError."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "no file, but a pipe or a device", path)
    return open(path, "rb", buffering=buffering)


def read(path: str, start: int = 0, length: int = -1) -> bytes:
    """The bytes [start, start + length), or to the end if length is negative; fewer if the file ends before.

    Each read opens the file: that costs 10 us, and threads share no handles.
    """
    if is_remote(path):
        end = None if length < 0 else start + length
        return cast(bytes, _remote(path, lambda fs, p: fs.cat_file(p, start=start, end=end)))
    with _open(path, buffering=0) as file:
        if start:
            file.seek(start)
        return file.read(length) or b""


def join(folder: str, name: str) -> str:
    """The path of a name relative to a folder; an absolute name or a URL stays as it is."""
    if is_remote(name):
        return name
    return posixpath.join(folder, name) if is_remote(folder) else os.path.join(folder, name)


def parent(path: str) -> str:
    """The folder of a file."""
    return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(path)


def readers(source: str) -> int:
    """How many threads read small files: a request to an object store waits some 50 ms, a local file needs one."""
    return 16 if is_remote(source) else 1


def listing(folder: str, failed: Callable[[str, str], None]) -> list[File]:
    """All files below a folder, sorted by name, without hidden ones (".x", macOS "._x.png", __MACOSX).

    `failed(name, reason)` is called for each file or folder that cannot be listed.
    """
    found = _remote_listing(folder) if is_remote(folder) else _local_listing(folder, failed)
    return sorted(f for f in found if not any(p.startswith(".") or p == "__MACOSX" for p in f.name.split("/")))


def _remote_listing(folder: str) -> list[File]:
    def find(fs: Any, top: str) -> list[File]:
        infos = fs.find(top, detail=True).items()
        return [File(posixpath.relpath(path, top), fs.unstrip_protocol(path), _size(info)) for path, info in infos]

    return cast(list[File], _remote(folder, find))


def _local_listing(folder: str, failed: Callable[[str, str], None]) -> list[File]:
    def name_of(path: str) -> str:
        return os.path.relpath(path, folder).replace(os.sep, "/")

    def cannot_list(error: OSError) -> None:
        failed(name_of(str(error.filename)), f"unreadable folder: {error.strerror}")

    files = []
    seen = set()  # folders by inode, because links may form a circle
    for top, folders, names in os.walk(folder, onerror=cannot_list, followlinks=True):
        status = os.stat(top)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        for base in names:
            path = os.path.join(top, base)
            name = name_of(path) if top != folder else base
            try:
                status = os.stat(path)
                if stat.S_ISREG(status.st_mode):
                    files.append(File(name, path, status.st_size))
                else:
                    failed(name, "unreadable: no file, but a pipe or a device")
            except OSError as error:
                failed(name, f"unreadable: {error.strerror}")
    return files
