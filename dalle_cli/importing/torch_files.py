"""torch's own files: zip archives (also TorchScript's) and the older format of a few pickles in a row."""

import zipfile
import zlib
from struct import error as StructError

import torch
from torch import Tensor

from dalle_cli.artifacts.region import Region, RegionFile
from dalle_cli.errors import DalleError
from dalle_cli.importing.pickles import Interpreter, Storage, StoredTensor, named_tensors
from dalle_cli.importing.publication import Shapes

MAGIC = 0x1950A86A20F9469CFC6C  # the first of the older format's pickles
OLDER = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # as that pickle ends
PROTOCOL = 1001
MAX_PICKLE = 1 << 26  # bytes
BLOCK = 1 << 26


class TorchFile:
    """The tensors of a torch file, each read from its storage when it is asked for."""

    def __init__(self, region: Region, tensors: dict[str, StoredTensor], starts: dict[str, tuple[int, int | None]]):
        """`starts` has each storage's first byte in the region and its CRC-32, None where the file has none."""
        self.region, self.tensors, self.starts = region, tensors, starts
        self.checked: set[str] = set()
        self.shapes: Shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, known without reading it."""
        return self.tensors[name].storage.dtype

    def read(self, name: str) -> Tensor:
        """One tensor, a view of the mapped file. Raises: DalleError if its bytes have changed."""
        tensor = self.tensors[name]
        start, checksum = self.starts[tensor.storage.key]
        if checksum is not None and tensor.storage.key not in self.checked:
            self._check(start, tensor.storage, checksum)
        whole = self.region.tensor(start, tensor.storage.dtype, (tensor.storage.numel,))
        return whole.as_strided(tensor.shape, tensor.stride, tensor.offset)

    def _check(self, start: int, storage: Storage, checksum: int) -> None:
        end, found = start + storage.numel * storage.dtype.itemsize, 0
        for at in range(start, end, BLOCK):
            found = zlib.crc32(self.region.view[at : min(at + BLOCK, end)], found)
            self.region.release()
        if found != checksum:
            raise self.region.damaged(f"changed bytes in storage {storage.key[:20]!r}")
        self.checked.add(storage.key)

    def release(self) -> None:
        """Give back the memory of what was read."""
        self.region.release()


def open_zip(region: Region) -> TorchFile:
    """A zip archive of `torch.save` or of TorchScript.

    Raises:
        DalleError: it is cut short or changed, or holds no tensors, or something that runs programs.
    """
    try:
        members = {member.filename: member for member in zipfile.ZipFile(RegionFile(region)).infolist()}
    except (zipfile.BadZipFile, StructError, ValueError, NotImplementedError, OSError) as error:
        raise region.damaged(f"a zip archive that is cut short or changed ({str(error)[:60]})") from None
    folders = [name.removesuffix("data.pkl") for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise DalleError(f"expected a checkpoint of torch, found another zip archive in {region.name}; unpack it")
    folder = folders[0]
    start, size = _stored(region, members[f"{folder}data.pkl"])
    if size > MAX_PICKLE:
        raise region.damaged(f"a pickle of {size:,} bytes")
    if zlib.crc32(region.view[start : start + size]) != members[f"{folder}data.pkl"].CRC:
        raise region.damaged("a pickle of changed bytes")
    if order := members.get(f"{folder}byteorder"):
        first, length = _stored(region, order)
        if bytes(region.view[first : first + min(length, 16)]) != b"little":
            raise DalleError(f"expected little-endian numbers, found others in {region.name}; save it again")
    machine = Interpreter(region, RegionFile(region, start, size))
    tensors = named_tensors(region, machine.load())
    starts: dict[str, tuple[int, int | None]] = {}
    for storage in {tensor.storage for tensor in tensors.values()}:
        member = members.get(f"{folder}data/{storage.key}")
        if member is None:
            raise region.damaged(f"no storage {storage.key[:20]!r}")
        first, length = _stored(region, member)
        if length != storage.numel * storage.dtype.itemsize:
            raise region.damaged(f"{length:,} bytes for {storage.numel:,} numbers of {storage.dtype}")
        starts[storage.key] = first, member.CRC
    return TorchFile(region, tensors, starts)


def _stored(region: Region, member: zipfile.ZipInfo) -> tuple[int, int]:
    """The first byte and the size of a member, which must not be compressed."""
    at = member.header_offset
    head = bytes(region.view[at : at + 30]) if 0 <= at <= region.size - 30 else b""
    if head[:4] != b"PK\x03\x04" or member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise region.damaged(f"a member {member.filename[:60]!r} that is compressed or not there")
    start = at + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    if member.file_size != member.compress_size or start + member.file_size > region.size:
        raise region.damaged(f"a member {member.filename[:60]!r} that is cut short")
    return start, member.file_size


def open_older(region: Region) -> TorchFile:
    """A file of torch before 1.6: magic number, protocol, machine, the object, the storages' keys, the storages.

    Raises:
        DalleError: it is cut short, holds no tensors, or something that runs programs.
    """
    file = RegionFile(region)
    machine = Interpreter(region, file)
    magic, protocol, about = machine.load(), machine.load(), machine.load()
    if magic != MAGIC or protocol != PROTOCOL or not isinstance(about, dict) or about.get("little_endian") is not True:
        raise region.damaged("another format than torch's")
    tensors = named_tensors(region, machine.load())
    keys, starts = machine.load(), dict[str, tuple[int, int | None]]()
    for key in keys if isinstance(keys, list) else ():
        storage = machine.storages.get(key) if isinstance(key, str) else None
        length = file.read(8)
        if storage is None or len(length) < 8 or int.from_bytes(length, "little") != storage.numel:
            raise region.damaged("storages that are not the pickle's")
        starts[storage.key] = file.tell(), None
        if file.seek(storage.numel * storage.dtype.itemsize, 1) > region.size:
            raise region.damaged("a storage that is cut short")
    if missing := [t.storage.key for t in tensors.values() if t.storage.key not in starts]:
        raise region.damaged(f"no storage {missing[0][:20]!r}")
    return TorchFile(region, tensors, starts)
