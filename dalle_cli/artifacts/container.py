"""The container: an ordinary safetensors file with one metadata key `dalle`, checked before any tensor is touched.

Only the header's JSON is read here, without torch, so `dalle info` answers at once whatever the file's size.
"""

import hashlib
import json
import math
import os
import struct
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dalle_cli.artifacts.kinds import KINDS, VERSION, Kind
from dalle_cli.artifacts.strings import Strings
from dalle_cli.errors import DalleError

MAX_HEADER = 100_000_000  # safetensors' own limit
MAX_BYTES = 1 << 62  # of a tensor; what a lying shape promises goes beyond every disk
MAX_DIMENSIONS = 32
SHARDS = "[0-9]" * 5 + ".safetensors"  # the names of shards in their folder
MAX_DEPTH = 32  # of tables within tables in the metadata
SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
SIZES |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}
NUMPY = {"BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4"}
NUMPY |= {"F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8"}


SCALE = ":scale"  # behind the name of a matrix in 8 bits: what each of its rows is times


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file: dtype by safetensors' name, shape, first and last byte from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    path: Path
    kind: str
    version: int
    config: dict[str, Any]
    history: list[dict[str, Any]]
    tensors: dict[str, TensorInfo]

    @property
    def table(self) -> Kind:
        """What a file of this kind has to hold."""
        return KINDS[self.kind]

    @property
    def n_parameters(self) -> int:
        """Numbers in all tensors; the scales of those in 8 bits do not count."""
        return sum(math.prod(info.shape) for name, info in self.tensors.items() if not name.endswith(SCALE))

    def __len__(self) -> int:
        """The number of rows; 0 for weights."""
        return self.tensors[self.table.main].shape[0] if self.table.rows else 0

    def map(self, name: str) -> npt.NDArray[Any]:
        """The tensor as a read-only memory map.

        Raises:
            DalleError: a dtype that numpy has not, such as BF16.
        """
        info = self.tensors[name]
        if info.dtype not in NUMPY:
            raise DalleError(f"expected a tensor that numpy can read, found {name} as {info.dtype} in {self.path}")
        if 0 in info.shape:
            return np.zeros(info.shape, dtype=NUMPY[info.dtype])
        return np.memmap(self.path, dtype=NUMPY[info.dtype], mode="r", offset=info.start, shape=info.shape)


def _broken(path: Path, found: str) -> DalleError:
    return DalleError(f"expected a whole dalle artifact, found {found} in {path}; make it again")


def _read_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header's JSON, the offset where tensors begin, the file's size."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _broken(path, f"only {size} bytes")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER or 8 + length > size:
                raise _broken(path, f"a header of {length} bytes in a file of {size} (not safetensors, or cut short)")
            raw = file.read(length)
    except FileNotFoundError:
        raise DalleError(f"expected an artifact, found no such file: {path}; check the path") from None
    except OSError as error:
        raise DalleError(f"expected a readable artifact, found {error.strerror}: {path}") from None
    return _parse_json(path, raw, "a header"), 8 + length, size


def _parse_json(path: Path, raw: bytes | str, what: str) -> dict[str, Any]:
    """A JSON object in which no key stands twice and all text is Unicode."""
    try:
        value = json.loads(raw, object_pairs_hook=_unique_keys)
        if isinstance(value, dict) and not _too_deep(value, MAX_DEPTH):
            json.dumps(value, ensure_ascii=False).encode()
            return value
    except (ValueError, RecursionError):  # a JSONDecodeError and a UnicodeEncodeError are ValueErrors
        pass
    raise _broken(path, f"{what} that is no JSON object")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key stands twice")
    return table


def _too_deep(value: object, left: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left == 0 or any(_too_deep(v, left - 1) for v in inner)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_BYTES


def _tensor_info(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        ok = isinstance(dtype, str) and dtype in SIZES and isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
        ok = ok and all(map(_is_size, (*shape, start, end))) and math.prod(n for n in shape if n) < MAX_BYTES
    except (TypeError, KeyError, ValueError):
        ok = False
    if not ok:
        raise _broken(path, f"a malformed entry for tensor {name!r}")
    if end - start != SIZES[dtype] * math.prod(shape):
        raise _broken(path, f"tensor {name!r} whose {end - start} bytes do not fit {dtype} {list(shape)}")
    return TensorInfo(dtype, tuple(shape), base + start, base + end)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], base: int, size: int) -> None:
    """Tensors must tile the file: no gap, no overlap, no byte beyond the end."""
    at = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != at:
            raise _broken(path, f"a gap or an overlap before tensor {name!r}")
        at = info.end
    if at != size:
        raise _broken(path, f"{size} bytes where the header promises {at} (cut short?)")


def _check_columns(path: Path, kind: Kind, tensors: dict[str, TensorInfo]) -> None:
    """The columns of the kind are there, of the right type, and all of one length."""
    if not kind.rows:
        return
    for name, column in kind.columns.items():
        info = tensors.get(name)
        if info is None and not column.required:
            continue
        if info is None or info.dtype not in column.dtypes or len(info.shape) != column.ndim:
            found = "nothing" if info is None else f"{info.dtype} {list(info.shape)}"
            wanted = f"{' or '.join(column.dtypes)} of {column.ndim} dimensions"
            raise _broken(path, f"{found} where {kind.name}.{name} must be {wanted}")
        if column.channels not in (None, *info.shape[1:2]):
            raise _broken(path, f"{list(info.shape)} where {kind.name}.{name} has {column.channels} channels")
    rows = tensors[kind.main].shape[0]
    for name, info in tensors.items():
        stem, _, part = name.rpartition(".")
        if stem in kind.strings:
            twin = tensors.get(f"{stem}.{'offsets' if part == 'bytes' else 'bytes'}")
            expected = ("U8", 1, None) if part == "bytes" else ("I64", 1, rows + 1)
            ok = part in ("bytes", "offsets") and info.dtype == expected[0] and len(info.shape) == expected[1]
            if not ok or twin is None or (expected[2] is not None and info.shape[0] != expected[2]):
                raise _broken(path, f"a malformed string column {stem!r}")
        elif not info.shape or info.shape[0] != rows:
            raise _broken(path, f"column {name!r} of {list(info.shape)} beside {rows} rows")
    for stem, required in kind.strings.items():
        if required and f"{stem}.offsets" not in tensors:
            raise _broken(path, f"no column {stem!r}")


def _parse_metadata(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    metadata = header.get("__metadata__")
    text = metadata.get("dalle") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise DalleError(f"expected an artifact that dalle wrote, found a plain safetensors file: {path}")
    meta = _parse_json(path, text, "metadata")
    if not isinstance(meta.get("kind"), str):
        raise _broken(path, "metadata without a kind")
    version, config, history = meta.get("version"), meta.get("config", {}), meta.get("history", [])
    well = _is_size(version) and isinstance(config, dict) and isinstance(history, list)
    if not well or not isinstance(version, int) or not all(map(_is_entry, history)):
        raise _broken(path, "malformed metadata")
    if version > VERSION:
        raise DalleError(f"expected artifact version {VERSION} or older, found {version}: {path}; upgrade dalle-cli")
    if meta["kind"] not in KINDS:
        raise DalleError(f"expected a known kind, found {meta['kind']!r}: {path}; upgrade dalle-cli")
    return {"kind": meta["kind"], "version": version, "config": config, "history": history}


def _is_entry(value: object) -> bool:
    """Whether this is an entry of a history: {"stage", "options", "inputs"}."""
    if not isinstance(value, dict) or not isinstance(value.get("stage"), str):
        return False
    options, inputs = value.get("options"), value.get("inputs")
    return isinstance(options, dict) and isinstance(inputs, dict) and all(isinstance(v, str) for v in inputs.values())


def read_header(path: Path) -> Header:
    """Read and check a file's header; no tensor is touched.

    Raises:
        DalleError: no such file, not an artifact, cut short, offsets, dtypes or shapes that lie, an unknown kind.
    """
    header, base, size = _read_json(path)
    meta = _parse_metadata(path, header)
    tensors = {n: _tensor_info(path, n, entry, base) for n, entry in header.items() if n != "__metadata__"}
    _check_layout(path, tensors, base, size)
    _check_columns(path, KINDS[meta["kind"]], tensors)
    return Header(path=path, tensors=tensors, **meta)


def metadata(kind: str, config: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The one metadata key, as sorted JSON, so that the same artifact is the same bytes."""
    meta = {"kind": kind, "version": VERSION, "config": dict(config), "history": list(history)}
    return {"dalle": json.dumps(meta, sort_keys=True, ensure_ascii=False, separators=(",", ":"))}


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a temporary neighbour, fsync, rename: a reader sees all of the new file or none of it.

    Raises:
        DalleError: the disk is full, or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DalleError(f"expected to write {path}, found {error.strerror}; nothing was changed") from None
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # as the umask has it; safetensors' own writer leaves a file to its owner alone
        write(part)
        part.chmod(mode)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DalleError(f"expected to write {path}, found {reason}; nothing was changed") from None
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise DalleError(f"expected to write {path}, found {error}; nothing was changed") from None
    finally:
        part.unlink(missing_ok=True)


def check_replaceable(path: Path, kind: str, force: bool = False) -> None:
    """Refuse to replace anything that is not an artifact of the same kind, unless forced; never a folder by a file.

    Raises:
        DalleError: something else lies at `path`.
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
        DalleError: something that is not a `kind` lies there, or the disk is full.
    """
    from safetensors.numpy import save_file

    check_replaceable(path, kind, force)
    flat: dict[str, npt.NDArray[Any]] = {}
    for name, value in tensors.items():
        if isinstance(value, (Strings, list, tuple)):
            column = Strings.pack(value)
            flat[f"{name}.bytes"], flat[f"{name}.offsets"] = column.data, column.offsets
        else:
            flat[name] = value
    flat = {name: np.ascontiguousarray(value) for name, value in flat.items()}
    replace_file(path, lambda part: save_file(flat, str(part), metadata=metadata(kind, config, history)))
    return path


def digest_bytes(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, streamed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow(file)


def _slow(file: Any) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
