"""Tensors in pieces, one for each process: cut, put together, written and read.

On disk they are safetensors files, one from each process, which any number of processes can read.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_cli.errors import DalleError


def local(tensor: Tensor) -> Tensor:
    """This process's piece of a tensor, which may be empty; any tensor that is not cut as it is."""
    piece = getattr(tensor, "to_local", None)
    return piece() if piece else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all processes' pieces."""
    put = getattr(tensor, "full_tensor", None)
    return put() if put else tensor


def cut(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's pieces of whole tensors, laid out as those of the same names; others stay as they are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    pieces = dict(tensors)
    for name, tensor in tensors.items():
        wanted = like.get(name)
        if isinstance(wanted, DTensor):
            # every process has read all of it: nothing is sent
            place = tensor.to(wanted.device)
            pieces[name] = distribute_tensor(place, wanted.device_mesh, wanted.placements, src_data_rank=None)
    return pieces


def together(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Tensors put together from all processes' pieces, one after another, on the CPU of those that keep them."""
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if keep:
            found[name] = value.cpu()
    return found


def save(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write each process's pieces to a file of its own in the folder; of what is not cut, one copy.

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
    """What lies in such a folder: pieces laid out as the tensors of the same names, any other tensor whole.

    Raises:
        DalleError: a file is missing or cut short.
    """
    checkpoint = _checkpoint()

    try:
        reader = checkpoint.HuggingFaceStorageReader(str(folder))
        stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty_like(like[name], dtype=told.properties.dtype)
            if name in like
            else torch.empty(told.size, dtype=told.properties.dtype)
            for name, told in stored.items()
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            checkpoint.load(tensors, storage_reader=reader)
    except AttributeError:
        raise DalleError(_old()) from None
    except Exception as error:
        if type(error).__name__ not in ("CheckpointException", "SafetensorError", "FileNotFoundError", "ValueError"):
            raise
        raise _failed("read", folder, error) from None
    except checkpoint.CheckpointException as error:  # which is no Exception
        raise _failed("read", folder, error) from None
    return tensors


def _checkpoint() -> Any:
    """Torch's module for checkpoints in pieces, imported where there are any: it takes a second."""
    from torch.distributed import checkpoint

    return checkpoint


def _failed(what: str, folder: Path, error: BaseException) -> DalleError:
    found = " ".join(str(error).split())[:200]
    return DalleError(f"expected to {what} the pieces of a checkpoint in {folder}, found {found}; mend that")


def _old() -> str:
    return f'expected torch 2.8 or newer for parallel = "shard", found {torch.__version__}; set it to "replicate"'
