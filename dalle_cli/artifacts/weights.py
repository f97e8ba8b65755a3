"""Weights and checkpoints as artifacts. This module and `region` need torch, the others of the package do not."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_cli.artifacts.artifact import Artifact
from dalle_cli.artifacts.container import SCALE, TensorInfo, check_replaceable, metadata, replace_file
from dalle_cli.artifacts.region import Region
from dalle_cli.errors import DalleError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
BLOCK = 1 << 23  # bytes that are cast and written at once
ALIGN = 64  # bytes: tensors that begin at a multiple of it can be used where the file is mapped


def save_tensors(
    path: Path,
    kind: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    force: bool = False,
) -> Path:
    """Write a state dict (any dtype, bfloat16 too) as one artifact file, atomically.

    Raises:
        DalleError: there is something other than a `kind` at `path`, or the disk is full.
    """
    from safetensors.torch import save_file

    check_replaceable(path, kind, force)
    flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    replace_file(path, lambda part: save_file(flat, str(part), metadata=metadata(kind, config, history)))
    return path


def stream_tensors(
    path: Path,
    kind: str,
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], Tensor],
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    advance: Callable[[int], object] = lambda _: None,
) -> str:
    """Write tensors as one artifact file, holding one of them at a time: -> the SHA-256 of the file.

    `entries` has the dtype and the shape of each; `read` gives it, in any dtype. `advance` is told the bytes written.

    Raises:
        DalleError: a tensor has another shape, or numbers too large for its dtype.
    """
    sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in entries.items()}
    names = sorted(entries, key=lambda name: (sizes[name] % ALIGN != 0, -entries[name][0].itemsize, name))
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata(kind, config, history)}
    at = 0
    for name in names:
        dtype, shape = entries[name]
        offsets = [at, at := at + sizes[name]]
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": offsets}
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGN)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for block in (len(raw).to_bytes(8, "little"), raw):
            digest.update(block)
            file.write(block)
        for name in names:
            for tensor in _blocks(name, read(name), *entries[name]):
                data = tensor.view(torch.uint8).numpy().data
                digest.update(data)
                file.write(data)
                advance(len(data))
                del tensor, data  # before the next one takes memory
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _blocks(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """A tensor in its dtype, a few rows at a time, flat."""
    if tuple(tensor.shape) != shape:
        raise DalleError(
            f"expected {list(shape)} for {name}, found {list(tensor.shape)}; the file is of something else"
        )
    tensor = tensor.detach()
    if tensor.is_contiguous() or tensor.ndim == 0:
        tensor = tensor.reshape(-1)
    rows = max(1, BLOCK // max(1, dtype.itemsize * math.prod(tensor.shape[1:])))
    for at in range(0, len(tensor), rows):
        block = tensor[at : at + rows]
        cast = block.to(dtype).contiguous().view(-1)
        if dtype == torch.float16 and bool((cast.isinf() & ~block.reshape(-1).isinf()).any()):
            raise DalleError(f"expected numbers that float16 can hold, found larger ones in {name}; take bfloat16")
        if len(cast):
            yield cast


def stored_as(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors with floating-point ones cast to `dtype`, torch's name of it; "int8" converts matrices only."""
    if dtype == "int8":
        return _quantize(tensors)
    kind: torch.dtype = getattr(torch, dtype)
    return {name: t.to(kind) if t.is_floating_point() else t for name, t in tensors.items()}


def _quantize(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point tensors of two or more dimensions as int8, each with `NAME:scale` (rows,) float32.

    Each row is scaled so that its largest absolute value is 127. Other tensors stay as they are.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.ndim < 2:
            stored[name] = tensor
            continue
        rows = tensor.detach().float().flatten(1)
        scale = rows.abs().amax(1) / 127
        stored[name] = (rows / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8).view(tensor.shape)
        stored[name + SCALE] = scale
    return stored


def _dequantize(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_quantize` in float32, up to rounding."""
    whole = {name: t for name, t in tensors.items() if not name.endswith(SCALE)}
    for name in tensors.keys() - whole.keys():
        rows = whole[name.removesuffix(SCALE)]
        scale = tensors[name].float()
        whole[name.removesuffix(SCALE)] = rows.float() * scale.view(-1, *[1] * (rows.ndim - 1))
    return whole


def load_tensors(artifact: Artifact, device: str = "cpu") -> dict[str, Tensor]:
    """Every tensor of a one-file artifact, on `device`; 8-bit matrices become float32.

    Raises:
        DalleError: a scale does not fit its 8-bit matrix, a dtype is unknown, or the file was changed.
    """
    from safetensors.torch import load_file

    _check_dtypes(artifact)
    _check_scales(artifact)
    with artifact.headers[0].open():
        tensors = load_file(str(artifact.headers[0].path), device=device)
    artifact.headers[0].open().close()  # still the same file
    return _dequantize(tensors)


def _check_dtypes(artifact: Artifact) -> None:
    for name, info in artifact.headers[0].tensors.items():
        if info.dtype not in DTYPES:
            wanted, found = ", ".join(DTYPES), f"{name[:60]!r} of {info.dtype} in {artifact.path}"
            raise DalleError(f"expected tensors of {wanted}, found {found}; convert it")


def _check_scales(artifact: Artifact) -> None:
    stored = artifact.headers[0].tensors
    for name in stored:
        if not name.endswith(SCALE):
            continue
        scaled = stored.get(name.removesuffix(SCALE))
        if scaled is None or scaled.dtype != "I8" or stored[name].shape != scaled.shape[:1]:
            found = f"none for {name}" if scaled is None else f"{scaled.dtype} of {list(scaled.shape)} for {name}"
            raise DalleError(f"expected an 8-bit matrix beside its scales, found {found} in {artifact.path}")


def load_into(
    module: torch.nn.Module, artifact: Artifact, device: str | torch.device = "cpu", narrow: Collection[str] = ()
) -> None:
    """Give a module the weights of an artifact, one tensor at a time, whatever device the module is on.

    Tensors take the module's dtypes and strides; those named in `narrow` stay as they are stored. A tensor that needs
    neither a cast nor a copy is used where the file is mapped: it takes no memory that the system could not free.

    Raises:
        DalleError: a tensor is missing, unknown, or of another shape.
    """
    check_fit(module, artifact)
    _check_scales(artifact)
    stored = artifact.headers[0].tensors
    with artifact.headers[0].open() as file:
        region = Region(artifact.headers[0].path, file=file)

        def read(info: TensorInfo) -> Tensor:
            """A tensor: mapped if it is aligned as torch's own are, else read."""
            dtype = DTYPES[info.dtype]
            if info.start % ALIGN == 0:
                return region.tensor(info.start, dtype, info.shape)
            tensor = torch.empty(info.shape, dtype=dtype)
            file.seek(info.start)
            content: Any = tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
            left = memoryview(content)
            while left:
                if not (n := file.readinto(left)):  # type: ignore[attr-defined]  # an unbuffered file has it
                    raise DalleError(f"expected a whole file, found one that was cut: {artifact.path}; run again")
                left = left[n:]
            return tensor

        tensors = {}
        for name, own in module.state_dict().items():
            tensor = read(stored[name])
            if name + SCALE in stored:
                tensor = tensor.float() * read(stored[name + SCALE]).float().view(-1, *[1] * (tensor.ndim - 1))
            dtype = tensor.dtype if name in narrow else own.dtype
            if tensor.stride() == own.stride():
                tensors[name] = tensor.to(device, dtype)
            else:
                tensors[name] = torch.empty_strided(own.shape, own.stride(), dtype=dtype, device=device).copy_(tensor)
            if tensors[name] is not tensor:
                region.release()  # what was mapped for the copy
    module.load_state_dict(tensors, assign=True)


def check_fit(module: torch.nn.Module, artifact: Artifact) -> None:
    """Compare names and shapes with the header only; the module may be on the meta device.

    Raises:
        DalleError: a tensor is missing, unknown, or of another shape.
    """
    _check_dtypes(artifact)
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    stored = {name: info.shape for name, info in artifact.headers[0].tensors.items() if not name.endswith(SCALE)}
    for name in sorted(own.keys() | stored.keys()):
        wanted, shape = own.get(name), stored.get(name)
        if wanted != shape:
            found = "nothing" if shape is None else list(shape)
            due = "no such tensor" if wanted is None else list(wanted)
            where = f"{found} for {name[:60]} instead of {due} in {artifact.path}"
            raise DalleError(f"expected the weights that the header describes, found {where}")
