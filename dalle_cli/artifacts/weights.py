"""Weights and checkpoints as artifacts. The only module of this room that needs torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_cli.artifacts.artifact import Artifact
from dalle_cli.artifacts.container import SCALE, check_replaceable, metadata, replace_file
from dalle_cli.errors import DalleError


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
        DalleError: something that is not a `kind` lies there, or the disk is full.
    """
    from safetensors.torch import save_file

    check_replaceable(path, kind, force)
    flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    replace_file(path, lambda part: save_file(flat, str(part), metadata=metadata(kind, config, history)))
    return path


def stored_as(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors with all floating ones in `dtype`, by torch's name for it; in int8 matrices alone."""
    if dtype == "int8":
        return _in_eight_bits(tensors)
    kind: torch.dtype = getattr(torch, dtype)
    return {name: t.to(kind) if t.is_floating_point() else t for name, t in tensors.items()}


def _in_eight_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating tensors of rows (two dimensions or more) as int8, and beside each `NAME:scale` (rows,) float32.

    A row is scaled by its largest number, which is 127; what is no row of numbers stays as it is.
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


def _of_eight_bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_in_eight_bits`, but for the rounding, in float32."""
    whole = {name: t for name, t in tensors.items() if not name.endswith(SCALE)}
    for name in tensors.keys() - whole.keys():
        rows = whole[name.removesuffix(SCALE)]
        scale = tensors[name].float()
        whole[name.removesuffix(SCALE)] = rows.float() * scale.view(-1, *[1] * (rows.ndim - 1))
    return whole


def load_tensors(artifact: Artifact, device: str = "cpu") -> dict[str, Tensor]:
    """Every tensor of a one-file artifact, on `device`; what was stored in 8 bits in float32.

    Raises:
        DalleError: the safetensors library does not agree that it is whole, or scales do not fit what they scale.
    """
    _check_scales(artifact)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return _of_eight_bits(load_file(str(artifact.headers[0].path), device=device))
    except SafetensorError as error:
        raise DalleError(f"expected whole tensors, found {error} in {artifact.path}; make it again") from None


def _check_scales(artifact: Artifact) -> None:
    stored = artifact.headers[0].tensors
    for name in stored:
        if not name.endswith(SCALE):
            continue
        scaled = stored.get(name.removesuffix(SCALE))
        if scaled is None or scaled.dtype != "I8" or stored[name].shape != scaled.shape[:1]:
            found = f"none for {name}" if scaled is None else f"{scaled.dtype} of {list(scaled.shape)} for {name}"
            raise DalleError(f"expected rows of 8 bits beside their scales, found {found} in {artifact.path}")


def load_into(module: torch.nn.Module, artifact: Artifact) -> None:
    """Copy the weights into a module built from the artifact's config, whatever dtype they were stored in.

    Raises:
        DalleError: a tensor is missing, unknown, or of another shape.
    """
    check_fit(module, artifact)
    module.load_state_dict(load_tensors(artifact))


def check_fit(module: torch.nn.Module, artifact: Artifact) -> None:
    """Compare names and shapes by the header alone; the module may be on the meta device.

    Raises:
        DalleError: a tensor is missing, unknown, or of another shape.
    """
    own = module.state_dict()
    stored = {name: info for name, info in artifact.headers[0].tensors.items() if not name.endswith(SCALE)}
    for name in sorted(own.keys() ^ stored.keys()):
        found = f"{name} {'missing' if name in own else 'that is unknown'}"
        raise DalleError(f"expected the weights that the header tells of, found {found} in {artifact.path}")
    for name, info in stored.items():
        if info.shape != tuple(own[name].shape):
            found = f"{name} of {list(info.shape)} where {list(own[name].shape)} is due"
            raise DalleError(f"expected the weights that the header tells of, found {found} in {artifact.path}")
