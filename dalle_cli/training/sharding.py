"""Weights, gradients, moments and average cut into as many pieces as there are processes (torch's FSDP2).

Checkpoints are as many safetensors files, which any number of processes can read.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_cli.errors import DalleError
from dalle_cli.training import shards as pieces
from dalle_cli.training.blocks import blocks
from dalle_cli.training.distributed import Alone, Computes, Group
from dalle_cli.training.run import Run

SMALL = "loop/"  # names in a checkpoint of what is never cut
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class Shards(Alone):
    """Each block's weights are brought together when it is computed, forward and backward, and let go again."""

    cut = True

    def __init__(self, task: Computes, group: Group, average: nn.Module, device: torch.device) -> None:
        """Cut a task's model, and the model that holds the average of its weights.

        Raises:
            DalleError: weights that FSDP2 cannot cut.
        """
        super().__init__(task, group)
        self.model: Any = task.model
        self.average = average
        _check(task.model)
        mesh = dist.device_mesh.init_device_mesh(device.type, (group.world,))
        for model in (task.model, average):
            _cut(model, mesh)

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
        pieces.save(folder, {name: t for name, t in tensors.items() if not name.startswith(SMALL)})
        small = {name: t for name, t in tensors.items() if name.startswith(SMALL)}
        self.group.first(lambda: run.save_checkpoint(step, small, keep))  # the last: it says that all is there

    def read(self, run: Run, step: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = dict(self.model.named_parameters())
        like: dict[str, Tensor] = {f"model/{name}": p for name, p in weights.items()}
        like |= {f"ema/{name}": p for name, p in self.average.named_parameters()}
        like |= {f"optimizer/{name}:{key}": p for name, p in weights.items() for key in MOMENTS}
        if run.is_whole(tensors):
            return pieces.cut(tensors, like)
        return {**tensors, **pieces.load(run.shards(step), like)}

    def weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return pieces.together(tensors, keep=self.group.rank == 0)


def _check(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0 or not parameter.is_contiguous():
            what = "a single number" if parameter.ndim == 0 else "channels_last"
            raise DalleError(
                f'expected parallel = "replicate" for {type(model).__name__}, whose {name} is {what}, found "shard"'
            )


def _cut(model: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in blocks(model).values():
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "loss")  # which a task calls rather than forward
