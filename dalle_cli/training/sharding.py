"""Fully sharded training: each process holds a shard of weights, gradients, moments and average (torch's FSDP2).

A checkpoint is one safetensors file per process, and any number of processes can read it.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_cli.errors import DalleError
from dalle_cli.training import shards
from dalle_cli.training.blocks import blocks
from dalle_cli.training.distributed import HasLoss, ProcessGroup, SingleProcess
from dalle_cli.training.run import Run

UNSHARDED = "loop/"  # prefix of a checkpoint's tensors that are never sharded
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class FullySharded(SingleProcess):
    """The weights of each block are gathered for its forward and backward pass, and freed again."""

    sharded = True

    def __init__(self, task: HasLoss, group: ProcessGroup, average: nn.Module, device: torch.device) -> None:
        """Shard a task's model, and the model that holds the average of its weights.

        Raises:
            DalleError: weights that FSDP2 cannot shard.
        """
        super().__init__(task, group)
        self.model: Any = task.model
        self.average = average
        _check(task.model)
        mesh = dist.device_mesh.init_device_mesh(device.type, (group.world,))
        for model in (task.model, average):
            _shard(model, mesh)

    def part(self, last: bool) -> AbstractContextManager[None]:
        self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def overflowed(self, flags: Tensor) -> Tensor:
        numbers = flags.to(torch.int32)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.bool()

    def write(self, run: Run, step: int, tensors: dict[str, Tensor], keep: int) -> None:
        folder = run.shards(step)
        self.group.first(lambda: run.clear(folder))
        shards.save(folder, {name: t for name, t in tensors.items() if not name.startswith(UNSHARDED)})
        small = {name: t for name, t in tensors.items() if name.startswith(UNSHARDED)}
        self.group.first(lambda: run.save_checkpoint(step, small, keep))  # comes last: it marks the checkpoint complete

    def read(self, run: Run, step: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = dict(self.model.named_parameters())
        like: dict[str, Tensor] = {f"model/{name}": p for name, p in weights.items()}
        like |= {f"ema/{name}": p for name, p in self.average.named_parameters()}
        like |= {f"optimizer/{name}:{key}": p for name, p in weights.items() for key in MOMENTS}
        if run.is_whole(tensors):
            return shards.distribute(tensors, like)
        return {**tensors, **shards.load(run.shards(step), like)}

    def weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return shards.gather(tensors, keep=self.group.rank == 0)


def _check(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0 or not parameter.is_contiguous():
            what = "a scalar" if parameter.ndim == 0 else "channels_last"
            raise DalleError(
                f'expected parallel = "replicate" for {type(model).__name__}, whose {name} is {what}, found "shard"'
            )


def _shard(model: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in blocks(model).values():
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "loss")  # tasks call it instead of forward
