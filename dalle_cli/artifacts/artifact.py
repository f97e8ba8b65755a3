"""Read artifacts, one file or a folder of shards, by memory map."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dalle_cli.artifacts.container import MAX_SHARDS, SHARDS, Header, digest_bytes, read_header
from dalle_cli.artifacts.strings import Part, Strings
from dalle_cli.errors import DalleError

MAX_NUMBER = 1 << 31  # of sizes and counts in a header
F = TypeVar("F", str, int, dict[str, Any])


class ShardedRows:
    """The rows of one column over several shards; indexing copies the rows asked for.

    Index it along the rows by an int, a slice, or an array of ints or bools.
    """

    def __init__(self, parts: list[npt.NDArray[Any]]):
        self.parts = parts
        self.starts = np.array([0, *accumulate(len(p) for p in parts)])
        self.shape = (int(self.starts[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        whole: npt.NDArray[Any] = np.concatenate(self.parts)
        return whole if dtype is None else whole.astype(np.dtype(dtype), copy=False)

    def __getitem__(self, index: Any) -> npt.NDArray[Any]:
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        wanted = np.asarray(index)
        if wanted.ndim == 0:
            row: npt.NDArray[Any] = self[wanted[None]][0]
            return row
        if wanted.dtype == bool and wanted.shape == (len(self),):
            wanted = np.flatnonzero(wanted)
        if isinstance(index, tuple) or wanted.ndim > 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise IndexError(f"expected an int, a slice, or an array of ints or of {len(self)} bools, found {index!r}")
        if wanted.size and not (-len(self) <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(f"row out of {len(self)}")
        wanted = wanted.astype(np.int64) % max(len(self), 1)
        out = np.empty((len(wanted), *self.shape[1:]), dtype=self.dtype)
        shard = np.searchsorted(self.starts, wanted, side="right") - 1
        for i in np.unique(shard):
            here = shard == i
            out[here] = self.parts[i][wanted[here] - self.starts[i]]
        return out


def _strings(header: Header, name: str) -> Part:
    data, offsets = header.map(f"{name}.bytes"), header.map(f"{name}.offsets")
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(data) or np.any(offsets[1:] < offsets[:-1]):
        raise DalleError(f"expected a string column, found wrong offsets of {name} in {header.path}; make it again")
    return data, offsets


class Artifact:
    """An artifact opened for reading; `headers` has one entry per shard."""

    def __init__(self, path: Path, headers: list[Header]):
        self.path = path
        self.headers = headers
        self.kind = headers[0].kind
        self.config = {k: v for k, v in headers[0].config.items() if k != "shards"}
        self.history = headers[0].history

    def __len__(self) -> int:
        return sum(map(len, self.headers))

    def require(self, name: str, type_: type[F]) -> F:
        """The value of `name` in the config.

        Raises:
            DalleError: it is missing or of another type, as it may be in a file that another program wrote.
        """
        value = self.config.get(name)
        sane = not isinstance(value, int) or 0 <= value < MAX_NUMBER
        if not isinstance(value, type_) or isinstance(value, bool) or not sane:
            found = "nothing" if value is None else repr(value)[:200]
            raise DalleError(
                f"expected {name} ({type_.__name__}) in the header of {self.path}, found {found}; make it again"
            )
        return value

    def __contains__(self, name: str) -> bool:
        """Whether the artifact has this column, of numbers or of strings."""
        tensors = self.headers[0].tensors
        return name in tensors or f"{name}.offsets" in tensors

    @property
    def columns(self) -> list[str]:
        """The names of the columns of numbers."""
        stems = self.headers[0].table.strings
        return [n for n in self.headers[0].tensors if n.rpartition(".")[0] not in stems]

    def array(self, name: str) -> Any:
        """A column of numbers as a read-only memory map (one file) or as `ShardedRows` (shards)."""
        parts = [header.map(name) for header in self.headers]
        return parts[0] if len(parts) == 1 else ShardedRows(parts)

    def strings(self, name: str) -> Sequence[str]:
        """A column of strings, each decoded when it is read."""
        return Strings([_strings(header, name) for header in self.headers])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file; of a folder, SHA-256 of its shards' digests in order."""
        digests = [header.digest() for header in self.headers]
        return digests[0] if self.headers[0].path == self.path else digest_bytes("".join(digests).encode())


def _layout(header: Header) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype of each tensor, and its shape without the rows."""
    return {name: (info.dtype, info.shape[1:]) for name, info in header.tensors.items()}


def _open_shards(path: Path) -> list[Header]:
    files = sorted(path.glob(SHARDS))
    if not files:
        raise DalleError(f"expected an artifact, found a folder without shards (00000.safetensors ...): {path}")
    headers = [read_header(file) for file in files]
    first, total = headers[0], headers[0].config.get("shards", len(files))
    if type(total) is not int or not 1 <= total <= MAX_SHARDS:
        raise DalleError(f"expected a number of shards, found {total!r} in {files[0]}; make {path} again")
    if len(files) != total or files[-1].stem != f"{total - 1:05d}":
        raise DalleError(f"expected {total} shards, found {len(files)} in {path}; run the stage that writes it again")
    for header in headers[1:]:
        if (header.kind, header.config, header.history) != (first.kind, first.config, first.history):
            raise DalleError(f"expected shards of one run, found {header.path} from another; make {path} again")
        if _layout(header) != _layout(first):
            raise DalleError(f"expected equal columns in all shards, found others in {header.path}; make {path} again")
    return headers


def open_artifact(path: Path | str, *kinds: str) -> Artifact:
    """Open a file or a folder of shards of one of `kinds`, or of any kind if none is given.

    Raises:
        DalleError: no such file, not an artifact, broken, incomplete, or of another kind.
    """
    path = Path(path)
    headers = _open_shards(path) if path.is_dir() else [read_header(path, keep=True)]
    if kinds and headers[0].kind not in kinds:
        wanted = " or ".join(kinds)
        raise DalleError(f"expected {wanted}, found {headers[0].kind}: {path}; give the file that holds {wanted}")
    return Artifact(path, headers)


def history(stage: str, options: Mapping[str, Any], **inputs: Artifact | str) -> list[dict[str, Any]]:
    """The histories of the inputs, each stage once, then this stage with its options and its inputs' SHA-256.

    Give an input that is not an artifact (a data set, a tokenizer) by its digest. A history has no paths and no times:
    same work, same bytes.
    """
    merged: list[dict[str, Any]] = []
    for source in inputs.values():
        if isinstance(source, Artifact):
            merged += [entry for entry in source.history if entry not in merged]
    digests = {name: source.digest if isinstance(source, Artifact) else source for name, source in inputs.items()}
    return [*merged, {"stage": stage, "options": dict(options), "inputs": digests}]
