"""Write rows as one file or as a folder of shards; a stage that was stopped writes only the missing shards."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dalle_cli.artifacts.container import MAX_SHARDS, SHARDS, check_replaceable, read_header, write_artifact
from dalle_cli.errors import DalleError


def _check_folder(out: Path, kind: str) -> None:
    """Raises: DalleError if `out` is a folder of something else or has a shard of another kind."""
    shards = sorted(out.glob(SHARDS))
    for path in shards:
        check_replaceable(path, kind)
    others = {} if shards or not out.is_dir() else set(out.iterdir()) - set(out.glob(f".{SHARDS}.*.part"))
    if others:
        found = min(others).name
        raise DalleError(f"expected to write {kind} to {out}, found {found} there; choose another -o or give --force")


class ShardWriter:
    """Writes `rows` rows to `out`: one file if `out` ends in `.safetensors`, else a folder of `0000i.safetensors`.

    Shard i covers the rows of `bounds(i)`; it holds fewer if some images cannot be read.

    Raises:
        DalleError: there is something else at `out`, or there would be too many shards.
    """

    def __init__(
        self,
        out: Path,
        kind: str,
        rows: int,
        shard_size: int,
        config: Mapping[str, Any],
        history: Sequence[Mapping[str, Any]],
        force: bool = False,
    ):
        self.out, self.kind, self.rows = out, kind, rows
        self.single = out.suffix == ".safetensors"
        self.size = max(rows, 1) if self.single else shard_size
        self.total = max(1, -(-rows // self.size))
        if self.total > MAX_SHARDS:
            raise DalleError(f"expected at most {MAX_SHARDS} shards, found {self.total}; raise --shard-size")
        if not self.single and out.is_file():
            raise DalleError(f"expected a folder for shards, found a file: {out}; choose another -o")
        if self.single:
            check_replaceable(out, kind, force)
        elif not force:
            _check_folder(out, kind)
        self.config = dict(config) if self.single else {**config, "shards": self.total}
        self.history = list(history)
        self.wrote = False  # whether any shard was written

    def path(self, i: int) -> Path:
        """The file of shard i."""
        return self.out if self.single else self.out / f"{i:05d}.safetensors"

    def bounds(self, i: int) -> tuple[int, int]:
        """The first row of shard i, and the row after its last."""
        return i * self.size, min((i + 1) * self.size, self.rows)

    def has(self, i: int) -> bool:
        """Whether shard i exists and was made from the same options and inputs."""
        try:
            header = read_header(self.path(i))
        except DalleError:
            return False
        return (header.kind, header.config, header.history) == (self.kind, self.config, self.history)

    def missing(self) -> Iterator[int]:
        """The shards to write; shards that were made from other options or inputs are removed first."""
        if not self.single and self.out.is_dir():
            for cut in self.out.glob(f".{SHARDS}.*.part"):
                cut.unlink()  # left by a run that was killed
            for stale in self.out.glob(SHARDS):
                if int(stale.stem) >= self.total or not self.has(int(stale.stem)):
                    stale.unlink()
        for i in range(self.total):
            if self.has(i):
                os.utime(self.path(i))  # up to date, as Make sees it
            else:
                yield i

    def write(self, i: int, tensors: Mapping[str, Any]) -> None:
        """Write shard i, atomically.

        Raises:
            DalleError: the disk is full, or the folder cannot be written.
        """
        write_artifact(self.path(i), self.kind, tensors, self.config, self.history, force=True)
        self.wrote = True
