"""Open a file of tensors of any format that publishers use; the format is told by its first bytes, not by its name."""

import json
from math import prod
from typing import Any

import torch
from torch import Tensor

from dalle_cli.artifacts.region import Region
from dalle_cli.errors import DalleError
from dalle_cli.importing import torch_files
from dalle_cli.importing.flax import FlaxFile
from dalle_cli.importing.publication import Shape, TensorFile

MAX_HEADER = 100_000_000  # safetensors' own bound
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Files that a download leaves in the place of a checkpoint.
MISTAKES = {
    b"<": "a web page", b"version https://git-lfs": "a pointer of Git LFS instead of the file itself",
    b"\x1f\x8b": "a gzip archive that is no tar",
}  # fmt: skip


class SafetensorsFile:
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, region: Region):
        """Raises: DalleError if the file is cut short, or its header makes no sense."""
        self.region = region
        length = int.from_bytes(region.view[:8], "little")
        if length > min(MAX_HEADER, region.size - 8):
            raise region.damaged("a header that is cut short")
        try:
            header = json.loads(bytes(region.view[8 : 8 + length]), object_pairs_hook=_unique)
            self.entries = [(name, *_entry(about)) for name, about in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise region.damaged("a header that makes no sense") from None
        self.shapes: dict[str, Shape] = {name: shape for name, _, shape, _ in self.entries}
        self.places = {name: (8 + length + start, dtype) for name, dtype, _, (start, _) in self.entries}
        self._check(region.size - 8 - length)

    def _check(self, size: int) -> None:
        """Check that the tensors fill the file, one after the other."""
        at = 0
        for name, dtype, shape, (start, end) in sorted(self.entries, key=lambda entry: entry[3]):
            self.region.check_shape(shape, name)
            if start != at or end - start != prod(shape) * dtype.itemsize:
                raise self.region.damaged(f"wrong offsets of {name[:60]!r}")
            at = end
        if at != size:
            raise self.region.damaged(f"{size:,} bytes of tensors instead of {at:,}")

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, known without reading it."""
        return self.places[name][1]

    def read(self, name: str) -> Tensor:
        """One tensor, a view of the mapped file."""
        start, dtype = self.places[name]
        return self.region.tensor(start, dtype, self.shapes[name])

    def release(self) -> None:
        """Give back the memory of what was read."""
        self.region.release()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(table := dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _entry(about: dict[str, Any]) -> tuple[torch.dtype, Shape, tuple[int, int]]:
    start, end = about["data_offsets"]
    if type(start) is not int or type(end) is not int:
        raise ValueError("offsets that are no integers")
    return DTYPES[about["dtype"]], tuple(about["shape"]), (start, end)


def open_tensors(region: Region) -> TensorFile:
    """The tensors of a file: safetensors, torch's zip archives and older files, TorchScript, flax's msgpack.

    Raises:
        DalleError: it is of another format, damaged, or names what runs programs.
    """
    head = bytes(region.view[:64])
    if head[:4] == b"PK\x03\x04":
        return torch_files.open_zip(region)
    if head[:1] == b"\x80" and torch_files.OLDER in head[:32]:
        return torch_files.open_older(region)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return SafetensorsFile(region)
    for start, what in MISTAKES.items():
        if head.startswith(start):
            raise DalleError(f"expected a checkpoint, found {what}: {region.name}; fetch it again")
    if 0x80 < head[0] < 0x90 or head[0] in (0xDE, 0xDF):
        return FlaxFile(region)
    raise DalleError(
        f"expected safetensors, a torch file or flax's msgpack, found another format in {region.name}; give another"
    )
