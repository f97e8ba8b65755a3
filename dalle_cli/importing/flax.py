"""flax's msgpack files: tables of arrays within tables, of which only the places of the arrays are read."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from dalle_cli.artifacts.region import Region
from dalle_cli.importing.publication import Shape

MAX_DEPTH = 32
MAX_VALUES = 1_000_000
MAX_TEXT = 1 << 12  # bytes of a name
CHUNKED = "__msgpack_chunked_array__"
NDARRAY = 1  # the extension type of arrays
DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
# first byte -> bytes of the length that follows it
TEXTS, BINARIES = {0xD9: 1, 0xDA: 2, 0xDB: 4}, {0xC4: 1, 0xC5: 2, 0xC6: 4}
LISTS, TABLES = {0xDC: 2, 0xDD: 4}, {0xDE: 2, 0xDF: 4}
EXTENSIONS, FIXED = {0xC7: 1, 0xC8: 2, 0xC9: 4}, {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
NUMBERS = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}


@dataclass(frozen=True)
class ArrayPlace:
    """Where the numbers of an array are in the file."""

    start: int
    dtype: torch.dtype
    shape: Shape


class Walker:
    """Reads msgpack values one after the other and remembers where the numbers of arrays are.

    It makes nothing of a length that the file claims before it has checked that so many bytes are there.
    """

    def __init__(self, region: Region, at: int = 0, end: int | None = None):
        self.region, self.at, self.end = region, at, region.size if end is None else end
        self.values = 0

    def take(self, size: int) -> int:
        """The place of the next `size` bytes, which are stepped over."""
        start = self.at
        if size > self.end - start:
            raise self.region.damaged(f"{self.end - start:,} bytes where {size:,} should follow")
        self.at += size
        return start

    def number(self, size: int, signed: bool = False) -> int:
        """The next integer of so many bytes."""
        start = self.take(size)
        return int.from_bytes(self.region.view[start : start + size], "big", signed=signed)

    def value(self, depth: int = 0) -> Any:
        """The next value: a dict, a list, a text, a number, an `ArrayPlace`, or None for what cannot be a tensor."""
        self.values += 1
        if depth > MAX_DEPTH or self.values > MAX_VALUES:
            raise self.region.damaged("too many values, or too many in each other,")
        first = self.number(1)
        if first < 0x80 or first >= 0xE0:
            return first if first < 0x80 else first - 0x100
        if first in TABLES or first < 0x90:
            return self._table(self.number(TABLES[first]) if first in TABLES else first & 15, depth)
        if first in LISTS or first < 0xA0:
            size = self.number(LISTS[first]) if first in LISTS else first & 15
            return [self.value(depth + 1) for _ in range(size)]
        if first in TEXTS or first < 0xC0:
            return self._text(self.number(TEXTS[first]) if first in TEXTS else first & 31)
        if first in EXTENSIONS or first in FIXED:
            size = self.number(EXTENSIONS[first]) if first in EXTENSIONS else FIXED[first]
            return self._extension(self.number(1), size)
        if first in BINARIES:
            self.take(self.number(BINARIES[first]))
            return None
        if first in NUMBERS:
            return self._scalar(first)
        if first not in (0xC0, 0xC2, 0xC3):
            raise self.region.damaged(f"the byte {first:#x} where a value should begin")
        return {0xC0: None, 0xC2: False, 0xC3: True}[first]

    def _scalar(self, first: int) -> int | None:
        value = self.number(NUMBERS[first], signed=first >= 0xD0)
        return None if first < 0xCC else value

    def _text(self, size: int) -> str:
        if size > MAX_TEXT:
            raise self.region.damaged(f"a name of {size:,} bytes")
        start = self.take(size)
        try:
            return bytes(self.region.view[start : start + size]).decode()
        except UnicodeDecodeError:
            raise self.region.damaged("a name that is no text") from None

    def _table(self, size: int, depth: int) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for _ in range(size):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in table:
                raise self.region.damaged(f"a table with the key {str(key)[:60]!r} twice, or not as a text,")
            table[key] = self.value(depth + 1)
        return table

    def _extension(self, kind: int, size: int) -> ArrayPlace | None:
        """An array: its shape, the name of its dtype and its bytes, in msgpack again."""
        start = self.take(size)
        if kind != NDARRAY:
            return None
        inner = Walker(self.region, start, start + size)
        if inner.number(1) != 0x93:
            raise self.region.damaged("an array of another layout than flax's")
        shape, name = inner.value(MAX_DEPTH - 1), inner.value(MAX_DEPTH)
        first = inner.number(1)
        length = inner.number(BINARIES[first]) if first in BINARIES else -1
        dtype = DTYPES.get("bool" if name == "bool_" else name) if isinstance(name, str) else None
        if not isinstance(shape, list) or dtype is None:
            raise self.region.damaged(f"an array of {str(name)[:60]}")
        self.region.check_shape(tuple(shape), "an array")
        if length != prod(shape) * dtype.itemsize or inner.take(max(length, 0)) + length != inner.end:
            raise self.region.damaged(f"{length:,} bytes for an array of {shape} of {name}")
        return ArrayPlace(inner.at - length, dtype, tuple(shape))


class FlaxFile:
    """The arrays of a flax msgpack file by dotted names, each read when it is asked for."""

    def __init__(self, region: Region):
        """Raises: DalleError if the file is cut short, or is no table of arrays."""
        self.region = region
        walker = Walker(region)
        root = walker.value()
        if walker.at != region.size or not isinstance(root, dict):
            raise region.damaged("something else than one table")
        self.places: dict[str, list[ArrayPlace]] = {}
        self.shapes: dict[str, Shape] = {}
        self._index(root, "")
        if not self.places:
            raise region.damaged("no arrays")
        self.joined: tuple[str, Tensor] | None = None  # the last array that was joined from chunks

    def _index(self, table: dict[str, Any], prefix: str) -> None:
        for key, value in table.items():
            name = prefix + key
            if isinstance(value, dict) and CHUNKED in value:
                self._add(name, *self._chunks(name, value))
            elif isinstance(value, dict):
                self._index(value, name + ".")
            elif isinstance(value, ArrayPlace):
                self._add(name, [value], value.shape)

    def _add(self, name: str, places: list[ArrayPlace], shape: Shape) -> None:
        if name in self.places:
            raise self.region.damaged(f"two arrays of the name {name[:60]!r}")
        self.places[name], self.shapes[name] = places, shape

    def _chunks(self, name: str, table: dict[str, Any]) -> tuple[list[ArrayPlace], Shape]:
        """The pieces of an array of over 2**30 bytes, in order, and its shape."""
        listed = [table.get("shape"), table.get("chunks")]
        if not all(isinstance(part, dict) and list(part) == [str(i) for i in range(len(part))] for part in listed):
            raise self.region.damaged(f"chunks of {name[:60]!r} that are not numbered")
        shape, places = (tuple(part.values()) for part in listed)  # type: ignore[union-attr]
        self.region.check_shape(shape, name)
        arrays = [place for place in places if isinstance(place, ArrayPlace)]
        whole = len(arrays) == len(places) and sum(prod(place.shape) for place in arrays) == prod(shape)
        if not whole or len({place.dtype for place in arrays}) != 1:
            raise self.region.damaged(f"chunks of {name[:60]!r} that do not fill its shape")
        return arrays, shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of an array, known without reading it."""
        return self.places[name][0].dtype

    def read(self, name: str) -> Tensor:
        """One array: a view of the mapped file, or a copy if it is in chunks."""
        places = self.places[name]
        if len(places) == 1:
            return self.region.tensor(places[0].start, places[0].dtype, self.shapes[name])
        if self.joined is None or self.joined[0] != name:
            self.joined = None  # before the next one takes memory
            flat = torch.empty(prod(self.shapes[name]), dtype=places[0].dtype)
            at = 0
            for place in places:
                n = prod(place.shape)
                flat[at : at + n] = self.region.tensor(place.start, place.dtype, (n,))
                at += n
                self.region.release()
            self.joined = name, flat.view(self.shapes[name])
        return self.joined[1]

    def release(self) -> None:
        """Give back the memory of what was read; the array that was joined last stays for its next slice."""
        self.region.release()
