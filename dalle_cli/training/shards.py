"""Sharded tensors: split, gather, write and read them.

On disk they are safetensors files, one from each process, and any number of processes can read them.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dalle_cli.errors import DalleError


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, which may be empty; an unsharded tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor gathered from all processes' shards; an unsharded tensor as it is."""
    gather_all = getattr(tensor, "full_tensor", None)
    return gather_all() if gather_all else tensor


def distribute(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shard full tensors like the tensors of the same names in `like`; those without one stay full."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    found = dict(tensors)
    for name, tensor in tensors.items():
        wanted = like.get(name)
        if isinstance(wanted, DTensor):
            local = tensor.to(wanted.device)  # every process has read all of it: nothing is sent
            found[name] = distribute_tensor(local, wanted.device_mesh, wanted.placements, src_data_rank=None)
    return found


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Gather sharded tensors, one after another, into CPU memory; empty on processes whose `keep` is False."""
    found = {}
    for name, tensor in tensors.items():
        value = full_tensor(tensor)
        if keep:
            found[name] = value.cpu()
    return found


def save(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write each process's shards to its own file in the folder, and one copy of each unsharded tensor.

    Raises:
        DalleError: a torch without safetensors shards, or a full disk.
    """
    checkpoint = _checkpoint()
    try:
        writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        checkpoint.save(dict(tensors), storage_writer=writer)
    except AttributeError:
        raise DalleError(_old()) from None
    except checkpoint.CheckpointException as error:
        raise _failed("write", folder, error) from None


def load(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read such a folder: in the layout of the tensors in `like` of the same names, any other tensor whole.

    Raises:
        DalleError: a file is missing or truncated.
    """
    checkpoint = _checkpoint()
    try:
        reader = checkpoint.HuggingFaceStorageReader(str(folder))
        stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty_like(like[name], dtype=info.properties.dtype)
            if name in like
            else torch.empty(info.size, dtype=info.properties.dtype)
            for name, info in stored.items()
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            checkpoint.load(tensors, storage_reader=reader)
    except AttributeError:
        raise DalleError(_old()) from None
    except (checkpoint.CheckpointException, SafetensorError, FileNotFoundError, ValueError) as error:
        raise _failed("read", folder, error) from None
    return tensors


def _checkpoint() -> Any:
    """Torch's module for sharded checkpoints, imported only when needed: it takes a second."""
    from torch.distributed import checkpoint

    return checkpoint


def _failed(what: str, folder: Path, error: BaseException) -> DalleError:
    found = " ".join(str(error).split())[:200]
    return DalleError(f"expected to {what} the shards of a checkpoint in {folder}, found {found}; repair that")


def _old() -> str:
    return f'expected torch 2.8 or newer for parallel = "shard", found {torch.__version__}; set it to "replicate"'
