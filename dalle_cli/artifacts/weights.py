"""Weights and checkpoints as artifacts. The only module of this room that needs torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_cli.artifacts.artifact import Artifact
from dalle_cli.artifacts.container import check_replaceable, metadata, replace_file
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


def load_tensors(artifact: Artifact, device: str = "cpu") -> dict[str, Tensor]:
    """Every tensor of a one-file artifact, on `device`.

    Raises:
        DalleError: the safetensors library does not agree that it is whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(artifact.headers[0].path), device=device)
    except SafetensorError as error:
        raise DalleError(f"expected whole tensors, found {error} in {artifact.path}; make it again") from None


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
    own, stored = module.state_dict(), artifact.headers[0].tensors
    for name in sorted(own.keys() ^ stored.keys()):
        found = f"{name} {'missing' if name in own else 'that is unknown'}"
        raise DalleError(f"expected the weights that the header tells of, found {found} in {artifact.path}")
    for name, info in stored.items():
        if info.shape != tuple(own[name].shape):
            found = f"{name} of {list(info.shape)} where {list(own[name].shape)} is due"
            raise DalleError(f"expected the weights that the header tells of, found {found} in {artifact.path}")
