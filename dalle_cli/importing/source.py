"""Sources of published weights: a file, a folder, a tar, or a hub repository."""

import hashlib
import json
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dalle_cli.artifacts.region import Region
from dalle_cli.errors import DalleError
from dalle_cli.hub import transfer
from dalle_cli.importing.publication import TensorFile
from dalle_cli.importing.readers import open_tensors

log = logging.getLogger("dalle_cli")

BLOCK = 1 << 24
LARGE = 10_000_000  # bytes of a file whose fetching is worth a message
MAX_FILES = 100_000
MAX_RATIO = 100  # by which a gzip archive may grow: weights hardly shrink
NAME = re.compile(r"(?!/)(?!.*(^|/)(\.|/|$))[^\\\0:]+")  # no hidden file, no "..", nothing absolute on any system


class OpenedSource:
    """The files of a source by their relative names; each is opened when it is asked for."""

    repository, revision = "", ""  # of a hub repository

    def __init__(self, name: str, files: Mapping[str, int]):
        self.name = name
        self.files: Mapping[str, int] = dict(files)
        self._tensors: dict[str, TensorFile] = {}
        self._digests: dict[str, str] = {}

    def region(self, name: str) -> Region:
        """The bytes of a file."""
        raise NotImplementedError  # each kind of source has its own

    def fetch(self, names: Sequence[str]) -> None:
        """Check that the files are there, and have them on this machine.

        Raises:
            DalleError: one of them is not there.
        """
        for name in names:
            if name not in self.files:
                found = ", ".join(sorted(self.files)[:4]) or "no files"
                raise DalleError(f"expected {name} in {self.name}, found {found}; fetch that file, too")

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of the files that have to be fetched first."""
        return []

    def data(self, name: str, most: int = 1 << 26) -> bytes:
        """A whole small file. Raises: DalleError if it is not there, or larger than `most` bytes."""
        self.fetch([name])
        if self.files[name] > most:
            raise DalleError(f"expected at most {most:,} bytes in {name} of {self.name}, found {self.files[name]:,}")
        return bytes(self.region(name).view) if self.files[name] else b""

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object. Raises: DalleError if it is no such thing."""
        try:
            value = json.loads(self.data(name))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise DalleError(f"expected a JSON object, found something else in {name} of {self.name}; fetch it again")
        return value

    def tensors(self, name: str) -> TensorFile:
        """The tensors of a file. Raises: DalleError if it is damaged, of an unknown format, or names foreign code."""
        if name not in self._tensors:
            self.fetch([name])
            self._tensors[name] = open_tensors(self.region(name))
        return self._tensors[name]

    def digest(self, name: str) -> str:
        """SHA-256 of a file in hex."""
        if name not in self._digests:
            self.fetch([name])
            digest = hashlib.sha256()
            if self.files[name]:
                region = self.region(name)
                for at in range(0, region.size, BLOCK):
                    digest.update(region.view[at : at + BLOCK])
                    region.release()
            self._digests[name] = digest.hexdigest()
        return self._digests[name]

    def origin(self, name: str) -> tuple[str, str]:
        """The hub repository and the commit that a file comes from; empty for local files."""
        return (self.repository, self.revision) if name in self.files else ("", "")


class FileSource(OpenedSource):
    """Files on this machine by their names in the source."""

    def __init__(self, name: str, paths: Mapping[str, Path]):
        super().__init__(name, {name: path.stat().st_size for name, path in sorted(paths.items())})
        self.paths = dict(paths)

    def region(self, name: str) -> Region:
        return Region(self.paths[name], f"{name} of {self.name}" if len(self.paths) > 1 else self.name)


class TarSource(OpenedSource):
    """The files of a tar that is not compressed, read where they are."""

    def __init__(self, path: Path):
        """Raises: DalleError if the archive is damaged, or has links, devices or names that lead out of it."""
        self.path = path
        with _one_line(path), tarfile.open(path, "r:") as tar:
            members = {name: (member.offset_data, member.size) for name, member in _members(path, tar)}
        top = _common_folder(members)
        self.places = {name[top:]: place for name, place in members.items()}
        super().__init__(str(path), {name: size for name, (_, size) in self.places.items()})

    def region(self, name: str) -> Region:
        start, size = self.places[name]
        return Region(self.path, f"{name} of {self.name}", start, size)


class HubSource(OpenedSource):
    """The files of a hub repository at one commit, each fetched when it is needed, and checked."""

    def __init__(self, model: str):
        """Raises: DalleError if there is no such repository, no access, or no connection and no copy."""
        self.snapshot = transfer.snapshot(model)
        sizes = self.snapshot.sizes
        super().__init__(str(self.snapshot.repository), {name: sizes[name] for name in sizes if NAME.fullmatch(name)})
        self.repository, self.revision = self.snapshot.repository.name, self.snapshot.commit
        self.paths: dict[str, Path] = {}

    def _path(self, name: str) -> Path:
        if name not in self.paths:
            self.paths[name] = transfer.get(self.snapshot, name)
            transfer.remember(self.snapshot)
        return self.paths[name]

    def missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if not (self.snapshot.folder / name).is_file()]

    def fetch(self, names: Sequence[str]) -> None:
        super().fetch(names)
        for name in names:
            if self.files[name] > LARGE and self.missing([name]):
                log.info("%s: fetching %s, %s", self.name, name, size_in_words(self.files[name]))
            self._path(name)

    def region(self, name: str) -> Region:
        return Region(self._path(name), f"{name} of {self.name}")

    def digest(self, name: str) -> str:
        self.fetch([name])
        return transfer.checked.get(self._path(name)) or super().digest(name)


class CombinedSource(OpenedSource):
    """Several sources as one, without what is in some folders: of files with the same name, the first counts.

    Files of further repositories are there as REPOSITORY/NAME, too.
    """

    def __init__(self, sources: Sequence[OpenedSource], without: tuple[str, ...] = ()):
        self.of: dict[str, tuple[OpenedSource, str]] = {}
        for source in sources:
            folder = "" if source is sources[0] else source.repository.split("/")[-1]
            for name in source.files:
                if not name.startswith(without or "\0"):
                    self.of.setdefault(name, (source, name))
                    self.of.setdefault(f"{folder}/{name}" if folder else name, (source, name))
        super().__init__(sources[0].name, {name: source.files[own] for name, (source, own) in self.of.items()})
        self.repository, self.revision = sources[0].repository, sources[0].revision

    def fetch(self, names: Sequence[str]) -> None:
        super().fetch(names)
        places = [self.of[name] for name in names]
        for source in dict.fromkeys(source for source, _ in places):
            source.fetch([own for of, own in places if of is source])

    def missing(self, names: Sequence[str]) -> list[str]:
        found = [(name, *self.of[name]) for name in names if name in self.of]
        return [name for name, source, own in found if source.missing([own])]

    def region(self, name: str) -> Region:
        source, own = self.of[name]
        return source.region(own)

    def digest(self, name: str) -> str:
        if name not in self.of:
            return super().digest(name)
        source, own = self.of[name]
        return source.digest(own)

    def origin(self, name: str) -> tuple[str, str]:
        source, own = self.of[name]
        return source.origin(own)


class _one_line:
    """An archive that cannot be read, as one line."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: object, __: object) -> None:
        if isinstance(error, (tarfile.TarError, EOFError, zlib.error, ValueError, OverflowError, MemoryError)) or (
            isinstance(error, OSError) and error.errno is None
        ):
            reason = str(error)[:80] or "its end missing"
            raise DalleError(f"expected a whole tar, found {reason} in {self.path}; fetch it again") from None


def _members(path: Path, tar: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The files of an archive by name. Raises: DalleError if one is a link, a device, or leads out of it."""
    seen: set[str] = set()
    for member in tar:
        name = member.name.removeprefix("./").rstrip("/")
        if member.isdir() and ".." not in name.split("/") and not name.startswith("/"):
            continue
        found = ""
        if not member.isreg() or member.issparse():
            found = "a link or a device"
        elif name.startswith("/") or ".." in name.split("/") or "\\" in name or ":" in name or not name:
            found = "a name that leads out of it"
        elif name in seen or len(seen) > MAX_FILES:
            found = "a file twice, or too many files"
        if found:
            raise DalleError(f"expected plain files in the tar {path}, found {found}: {member.name[:80]!r}")
        seen.add(name)
        if NAME.fullmatch(name):
            yield name, member


def _common_folder(names: Mapping[str, object]) -> int:
    """The length of the one folder that everything is in, 0 if there is none."""
    tops = {name.partition("/")[0] for name in names}
    return len(tops.pop()) + 1 if len(tops) == 1 and all("/" in name for name in names) else 0


def _unpacked(path: Path, folder: Path) -> FileSource:
    """The files of a tar.gz, copied into `folder` under numbers: no name of the archive becomes a path."""
    paths: dict[str, Path] = {}
    left = MAX_RATIO * path.stat().st_size + (1 << 20)
    folder.mkdir(parents=True, exist_ok=True)
    with _one_line(path), tarfile.open(path, "r|gz") as tar:
        for name, member in _members(path, tar):
            paths[name] = folder / f"{len(paths):05d}"
            stream = tar.extractfile(member)
            assert stream is not None  # a plain file
            with open(paths[name], "wb") as out:
                while block := stream.read(BLOCK):
                    left -= len(block)
                    if left < 0:
                        raise DalleError(f"expected weights, found an archive that grows {MAX_RATIO}-fold: {path}")
                    out.write(block)
    top = _common_folder(paths)
    return FileSource(str(path), {name[top:]: place for name, place in paths.items()})


def _folder(path: Path) -> FileSource:
    paths: dict[str, Path] = {}
    for folder, names, files in os.walk(path):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in files:
            place = Path(folder, name)
            relative = place.relative_to(path).as_posix()
            if NAME.fullmatch(relative) and place.is_file():
                paths[relative] = place
        if len(paths) > MAX_FILES:
            raise DalleError(f"expected a folder of weights, found more than {MAX_FILES:,} files in {path}")
    return FileSource(str(path), paths)


def size_in_words(n_bytes: int) -> str:
    """Bytes as a person reads them: 4.1 GB."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} bytes"


def open_source(where: str, scratch: Path) -> OpenedSource:
    """A local file, folder or tar, or hf://owner/repo[@revision]; a tar.gz is unpacked into `scratch`.

    Raises:
        DalleError: there is no such thing, or it cannot be read.
    """
    if where.startswith(transfer.SCHEME):
        return HubSource(where)
    path = Path(where)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise DalleError(
            f"expected a file, a folder, a tar or hf://owner/repo, found no such file: {where}; check the name"
        )
    with open(path, "rb") as file:
        head = file.read(512)
    if head[:2] == b"\x1f\x8b":
        return _unpacked(path, scratch)
    return TarSource(path) if head[257:262] == b"ustar" else FileSource(where, {path.name: path})
