"""The container: an ordinary safetensors file with one metadata key `dalle`, checked before any tensor is touched.

safetensors' own reader checks lengths, dtypes, shapes and offsets; this module checks the metadata and the columns.
"""

import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dalle_cli.artifacts import strict_json
from dalle_cli.artifacts.kinds import KINDS, VERSION, Kind
from dalle_cli.artifacts.regular import Identity, Kept, open_regular
from dalle_cli.artifacts.strings import Strings
from dalle_cli.errors import DalleError, one_line

MAX_NUMBERS = 1 << 50  # in a tensor, not counting dimensions of 0
MAX_DIMENSIONS = 32
MAX_HEADER = 8 << 20  # bytes; JSON takes some 25 times as many in memory
MAX_ROWS_HEADER = 1 << 20  # of the kinds with rows, which have few tensors
MAX_SHARDS = 99_999
SHARDS = "[0-9]" * 5 + ".safetensors"  # the names of shards in their folder
SCALE = ":scale"  # suffix of the tensor that holds the scale of each row of an 8-bit matrix
NUMPY = {"BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4"}
NUMPY |= {"F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8"}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: safetensors' name of its dtype, its shape, and the offset of its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Header:
    """The checked header of one file."""

    path: Path
    kind: str
    version: int
    config: dict[str, Any]
    history: list[dict[str, Any]]
    tensors: dict[str, TensorInfo]
    identity: Identity
    kept: Kept | None = field(default=None, compare=False, repr=False)

    @property
    def source(self) -> str:
        """A path of the file that was opened."""
        return str(self.path) if self.kept is None else self.kept.path

    @property
    def table(self) -> Kind:
        """What a file of this kind must hold."""
        return KINDS[self.kind]

    @property
    def n_parameters(self) -> int:
        """How many numbers all tensors hold, not counting the scales of 8-bit matrices."""
        return sum(math.prod(info.shape) for name, info in self.tensors.items() if not name.endswith(SCALE))

    def __len__(self) -> int:
        """The number of rows; 0 for weights."""
        return self.tensors[self.table.main].shape[0] if self.table.rows else 0

    def map(self, name: str) -> npt.NDArray[Any]:
        """The tensor as a read-only memory map.

        Raises:
            DalleError: numpy has no such dtype, for example BF16.
        """
        info = self.tensors[name]
        if info.dtype not in NUMPY:
            raise DalleError(f"expected a tensor that numpy can read, found {name} as {info.dtype} in {self.path}")
        if 0 in info.shape:
            return np.zeros(info.shape, dtype=NUMPY[info.dtype])
        with self.open() as file:
            return np.memmap(file, dtype=NUMPY[info.dtype], mode="r", offset=info.start, shape=info.shape)

    def open(self) -> BinaryIO:
        """The file whose header this is: the one that was kept open, or else the one at the path.

        Raises:
            DalleError: it was replaced or cut since.
        """
        try:
            file = open_regular(self.source)
        except FileNotFoundError:
            raise _changed(self.path) from None
        if Identity.of(os.fstat(file.fileno()))[:3] != self.identity[:3]:
            file.close()
            raise _changed(self.path)
        return file

    def digest(self) -> str:
        """SHA-256 of the file in hex.

        Raises:
            DalleError: it was changed since its header was read.
        """
        with self.open() as file:
            found = _digest(file)
            if Identity.of(os.fstat(file.fileno())) != self.identity:
                raise _changed(self.path)
        return found


def _changed(path: Path) -> DalleError:
    return DalleError(f"expected the file that was opened, found a changed one: {path}; run again when it is finished")


def _broken(path: Path, found: str) -> DalleError:
    return DalleError(f"expected a whole dalle artifact, found {found} in {path}; make it again")


def _read_json(path: Path, keep: bool) -> tuple[dict[str, Any], int, Identity, Kept | None]:
    """The header's JSON, the offset at which the tensors begin, and which file was read."""
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(path) as file:
            identity = Identity.of(os.fstat(file.fileno()))
            if identity.size < 8:
                raise _broken(path, f"only {identity.size} bytes")
            length = int.from_bytes(file.read(8), "little")
            if MAX_HEADER < length <= identity.size - 8:
                raise _broken(path, f"a header of {length:,} bytes, more than {MAX_HEADER:,},")
            with safe_open(path, framework="np"):  # tensors fit their dtypes and shapes, and fill the file exactly
                raw = file.read(length)
            if Identity.of(os.stat(path)) != identity:
                raise _changed(path)
            kept = Kept.of(file) if keep else None
    except FileNotFoundError:
        raise DalleError(f"expected an artifact, found no such file: {path}; check the path") from None
    except OSError as error:
        raise DalleError(f"expected a readable artifact, found {error.strerror}: {path}") from None
    except SafetensorError as error:
        reason = " ".join(str(error).split()).rpartition("header: ")[2][:100]
        found = f"{identity.size} bytes that are cut short or not safetensors ({reason})"
        raise _broken(path, found) from None
    return _parse_json(path, raw, "a header"), 8 + length, identity, kept


def _parse_json(path: Path, raw: bytes | str, what: str) -> dict[str, Any]:
    try:
        return strict_json.parse(raw)
    except ValueError as error:
        raise _broken(path, f"{what} that is not a JSON object ({one_line(str(error), 100)})") from None


def _tensor_info(path: Path, name: str, entry: dict[str, Any], base: int) -> TensorInfo:
    shape = tuple(entry["shape"])
    if (
        len(shape) > MAX_DIMENSIONS
        or max(shape, default=0) >= MAX_NUMBERS
        or math.prod(n for n in shape if n) >= MAX_NUMBERS
    ):
        raise _broken(path, f"an impossible shape of tensor {name[:60]!r}")
    return TensorInfo(entry["dtype"], shape, base + entry["data_offsets"][0])


def _check_columns(path: Path, kind: Kind, tensors: dict[str, TensorInfo]) -> None:
    """Check that the columns of the kind are there, have the right types, and have equally many rows."""
    for name, column in kind.columns.items():
        info = tensors.get(name)
        if info is None and not column.required:
            continue
        if info is None or info.dtype not in column.dtypes or len(info.shape) != column.ndim:
            found = "nothing" if info is None else f"{info.dtype} {list(info.shape)}"
            wanted = f"{' or '.join(column.dtypes)} of {column.ndim} dimensions"
            raise _broken(path, f"{found} where {kind.name}.{name} must be {wanted}")
        if 0 in info.shape[1:]:
            raise _broken(path, f"{list(info.shape)} where rows of {kind.name}.{name} cannot be empty")
        if column.channels not in (None, *info.shape[1:2]):
            raise _broken(path, f"{list(info.shape)} where {kind.name}.{name} has {column.channels} channels")
    rows = tensors[kind.main].shape[0]
    for name, info in tensors.items():
        stem, _, part = name.rpartition(".")
        if stem not in kind.strings:
            good = info.shape[:1] == (rows,)
        elif part == "bytes":
            good = info.dtype == "U8" and len(info.shape) == 1 and f"{stem}.offsets" in tensors
        else:
            good = (part, info.dtype, info.shape) == ("offsets", "I64", (rows + 1,)) and f"{stem}.bytes" in tensors
        if not good:
            raise _broken(path, f"a malformed column {name!r} of {info.dtype} {list(info.shape)} beside {rows} rows")
    for stem, required in kind.strings.items():
        if required and f"{stem}.offsets" not in tensors:
            raise _broken(path, f"no column {stem!r}")


def _parse_metadata(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    text = header.get("__metadata__", {}).get("dalle")
    if text is None:
        raise DalleError(f"expected an artifact that dalle wrote, found a plain safetensors file: {path}")
    meta = _parse_json(path, text, "metadata")
    kind, version = meta.get("kind"), meta.get("version")
    config, history = meta.get("config", {}), meta.get("history", [])
    tables = isinstance(config, dict) and isinstance(history, list) and all(map(_is_entry, history))
    if not (isinstance(kind, str) and type(version) is int and version >= 0 and tables):
        raise _broken(path, "malformed metadata")
    if version > VERSION:
        raise DalleError(f"expected artifact version {VERSION} or older, found {version}: {path}; upgrade dalle-cli")
    if kind not in KINDS:
        raise DalleError(f"expected a known kind, found {kind[:60]!r}: {path}; upgrade dalle-cli")
    return {"kind": kind, "version": version, "config": config, "history": history}


def _is_entry(value: object) -> bool:
    """Whether this is an entry of a history: {"stage", "options", "inputs"}."""
    if not isinstance(value, dict) or not isinstance(value.get("stage"), str):
        return False
    options, inputs = value.get("options"), value.get("inputs")
    return isinstance(options, dict) and isinstance(inputs, dict) and all(isinstance(v, str) for v in inputs.values())


def read_header(path: Path, keep: bool = False) -> Header:
    """Read and check a file's header without reading any tensor; `keep` it open, as long as the header is used.

    Raises:
        DalleError: no such file, not an artifact, truncated, inconsistent offsets, dtypes or shapes, unknown kind.
    """
    header, base, identity, kept = _read_json(path, keep)
    meta = _parse_metadata(path, header)
    tensors = {n: _tensor_info(path, n, entry, base) for n, entry in header.items() if n != "__metadata__"}
    if KINDS[meta["kind"]].rows:
        if base > MAX_ROWS_HEADER:
            raise _broken(path, f"a header of {base:,} bytes, more than {MAX_ROWS_HEADER:,} of {meta['kind']},")
        _check_columns(path, KINDS[meta["kind"]], tensors)
    return Header(path=path, tensors=tensors, identity=identity, kept=kept, **meta)


def metadata(kind: str, config: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The one metadata key, as sorted JSON, so that equal artifacts have equal bytes."""
    meta = {"kind": kind, "version": VERSION, "config": dict(config), "history": list(history)}
    return {"dalle": json.dumps(meta, sort_keys=True, ensure_ascii=False, separators=(",", ":"))}


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a temporary file beside `path`, fsync it and rename it: a reader sees all of the new file or none of it.

    Raises:
        DalleError: the disk is full, or the folder cannot be written.
    """
    from safetensors import SafetensorError

    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        mode = part.stat().st_mode  # from the umask; safetensors' own writer gives access to the owner alone
        write(part)
        part.chmod(mode)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DalleError(f"expected to write {path}, found {reason}; nothing was changed") from None
    finally:
        with suppress(OSError):  # the folder could not be made, or the name is too long
            part.unlink()


def check_replaceable(path: Path, kind: str, force: bool = False) -> None:
    """Refuse to replace anything but an artifact of the same kind, unless forced; never replace a folder by a file.

    Raises:
        DalleError: there is something else at `path`.
    """
    if path.is_dir():
        raise DalleError(f"expected to write the file {path}, found a folder there; choose another -o")
    if force or not path.exists():
        return
    try:
        found = read_header(path).kind
    except DalleError:
        found = "something else"
    if found != kind:
        raise DalleError(f"expected to write {kind} to {path}, found {found} there; choose another -o or give --force")


def write_artifact(
    path: Path,
    kind: str,
    tensors: Mapping[str, Any],
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    force: bool = False,
) -> Path:
    """Write columns (arrays, and `Strings` or lists of str for string columns) as one artifact file, atomically.

    Raises:
        DalleError: there is something other than a `kind` at `path`, or the disk is full.
    """
    from safetensors.numpy import save_file

    check_replaceable(path, kind, force)
    flat: dict[str, npt.NDArray[Any]] = {}
    for name, value in tensors.items():
        if isinstance(value, (Strings, list, tuple)):
            flat[f"{name}.bytes"], flat[f"{name}.offsets"] = Strings.pack(value).parts[0]
        else:
            flat[name] = value
    flat = {name: np.ascontiguousarray(value) for name, value in flat.items()}
    replace_file(path, lambda part: save_file(flat, str(part), metadata=metadata(kind, config, history)))
    return path


def digest_bytes(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file in hex, read in blocks.

    Raises:
        OSError: no such file, or no access.
        DalleError: it is something else than a file.
    """
    with open_regular(path) as file:
        return _digest(file)


def _digest(file: BinaryIO) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 18))
    while size := file.readinto(block):  # type: ignore[attr-defined]  # an unbuffered file has it
        digest.update(block[:size])
    return digest.hexdigest()
