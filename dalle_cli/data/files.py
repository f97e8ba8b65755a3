"""Files here or at a URL, by one set of functions; fsspec is imported only for a path that holds "://"."""

import importlib
import os
import posixpath
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, cast

from dalle_cli.errors import DalleError


class File(NamedTuple):
    """A file found below a folder; `name` is relative to it, with posix separators."""

    name: str
    path: str
    size: int


def is_remote(path: str) -> bool:
    """Whether a path is a URL for fsspec."""
    return "://" in path


def _remote(path: str) -> tuple[Any, str]:
    try:
        fsspec = importlib.import_module("fsspec")
    except ImportError:
        raise DalleError(
            f"expected fsspec to read {path}, found it is not installed; run pip install 'dalle-cli[remote]'"
        ) from None
    try:
        fs, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DalleError(f"expected a URL that fsspec can open, found {path} ({reason}); install its driver") from None
    return fs, inner


def _tried(path: str, call: Callable[[], Any]) -> Any:
    """A remote driver raises whatever its client library does; here it becomes an OSError, as for a local file."""
    try:
        return call()
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"cannot read {path}: {error or type(error).__name__}") from error


def kind(path: str) -> str:
    """ "file", "folder", or "" where there is neither."""
    if is_remote(path):
        fs, inner = _remote(path)
        if _tried(path, lambda: fs.isfile(inner)):
            return "file"
        return "folder" if _tried(path, lambda: fs.isdir(inner)) else ""
    return "folder" if os.path.isdir(path) else "file" if os.path.exists(path) else ""


def size(path: str) -> int:
    """Bytes in a file, -1 where the server does not say.

    Raises:
        OSError: No such file.
    """
    if not is_remote(path):
        return os.stat(path).st_size
    fs, inner = _remote(path)
    value = _tried(path, lambda: fs.info(inner)).get("size")
    return -1 if value is None else int(value)


def open_binary(path: str) -> BinaryIO:
    """A seekable file."""
    if is_remote(path):
        fs, inner = _remote(path)
        return cast(BinaryIO, _tried(path, lambda: fs.open(inner, "rb")))
    return open(path, "rb")


def read(path: str, start: int = 0, length: int = -1) -> bytes:
    """The bytes [start, start + length), to the end where length is negative; fewer where the file ends before.

    A file is opened for each read: that costs 10 us and leaves no handle to share between threads or to run out of.
    """
    if is_remote(path):
        fs, inner = _remote(path)
        end = None if length < 0 else start + length
        return cast(bytes, _tried(path, lambda: fs.cat_file(inner, start=start, end=end)))
    with open(path, "rb", buffering=0) as file:
        if start:
            file.seek(start)
        return file.read(length) or b""


def join(folder: str, name: str) -> str:
    """A name relative to a folder -> a path; an absolute name or a URL stays as it is."""
    if is_remote(name):
        return name
    return posixpath.join(folder, name) if is_remote(folder) else os.path.join(folder, name)


def parent(path: str) -> str:
    """The folder that a file lies in."""
    return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(path)


def listing(folder: str, failed: Callable[[str, str], None]) -> list[File]:
    """All files below a folder, sorted by name; hidden ones (".x", macOS "._x.png", __MACOSX) are left out.

    `failed(name, reason)` is told of what cannot be listed.
    """
    found = _remote_listing(folder) if is_remote(folder) else _local_listing(folder, failed)
    return sorted(f for f in found if not any(p.startswith(".") or p == "__MACOSX" for p in f.name.split("/")))


def _remote_listing(folder: str) -> list[File]:
    fs, inner = _remote(folder)
    infos = _tried(folder, lambda: fs.find(inner, detail=True))
    files = []
    for path, info in infos.items():
        name = posixpath.relpath(path, inner)
        files.append(File(name, fs.unstrip_protocol(path), -1 if info.get("size") is None else int(info["size"])))
    return files


def _local_listing(folder: str, failed: Callable[[str, str], None]) -> list[File]:
    def name_of(path: str) -> str:
        return os.path.relpath(path, folder).replace(os.sep, "/")

    def cannot_list(error: OSError) -> None:
        failed(name_of(str(error.filename)), f"unreadable folder: {error.strerror}")

    files = []
    seen = set()  # folders by inode, as links may lead round in a circle
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
                files.append(File(name, path, os.stat(path).st_size))
            except OSError as error:
                failed(name, f"unreadable: {error.strerror}")
    return files
