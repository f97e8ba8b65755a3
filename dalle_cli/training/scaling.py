"""Training in float16: a gradient scale for each residual block (Ramesh et al. 2021, sec. 2.4, app. D and fig. 4).

The size of activation gradients varies from block to block by more than the range of float16, so one scale of the loss
does not fit all blocks. Here the gradient that enters a block is multiplied by the block's own scale, and the gradients
of all its inputs are divided by it. Only the products inside blocks are in float16; weights, their gradients, the
residual path and everything outside the blocks (embeddings, logits, loss) are float32.

In the paper a block is half of a transformer's layer; here it is a `StackedBlock`. The paper's number of replicas, M,
is 1: each replica's loss is its own mean.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dalle_cli.errors import DalleError
from dalle_cli.training.blocks import blocks, wrap_forward
from dalle_cli.training.shards import local

INITIAL, MIN, MAX = 13.0, 7.0, 24.0  # log2 of a scale: initially, and its bounds
RISE = 1 / 1000  # added to log2 of a scale after an update with finite gradients
FALL = 0.5  # subtracted from it after any other update
WINDOW = 125  # updates between two falls of one scale
MAX_LOST = 125  # updates in a row without finite gradients, at the smallest scale


class _Enter(torch.autograd.Function):
    """An input of a block, for the block and for the path around it; divides the block's gradient by its scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(scale)
        return x.view_as(x), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, scaled: Tensor, around: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        total = scaled / scale
        # where the block overflowed, earlier layers still get the gradient of the path around it
        return torch.where(torch.isfinite(total), total, around), None


class _Leave(torch.autograd.Function):
    """A block's output in float32; multiplies the gradient by the scale, in float32, before it becomes float16."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, around: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype, ctx.same = y.dtype, y.shape == around.shape
        return y.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (scale,) = ctx.saved_tensors
        return (grad * scale).to(ctx.dtype), grad if ctx.same else None, None


def _unscaled(argument: Any, scale: Tensor) -> Any:
    """A further argument of a block, such as a U-Net's time embedding; its gradient is divided by the block's scale.

    There is no path around the block for it: where the block overflowed, its gradient is 0.
    """
    if not isinstance(argument, Tensor) or not argument.is_floating_point():
        return argument
    return _Enter.apply(argument, scale)[0]  # type: ignore[no-untyped-call]


class BlockScales:
    """The scales of a model's blocks. Call `attach` once, and `unscale` between backward pass and optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks = blocks(model)
        first = next(model.parameters())
        n = len(self.blocks)
        self.log2 = torch.full((n,), INITIAL, device=first.device, dtype=torch.float32)
        self.since = [WINDOW] * n  # updates since a scale fell
        self.lost = [0] * n  # updates in a row without finite gradients

    def attach(self, dtype: torch.dtype = torch.float16) -> None:
        """Let the blocks compute in `dtype` and scale their gradients from now on."""
        for index, block in enumerate(self.blocks.values()):
            wrap_forward(block, self._scaled(index, dtype))

    def _scaled(self, index: int, dtype: torch.dtype) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
            def scaled(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                scale = self.log2[index].exp2()
                inner, around = _Enter.apply(x, scale)  # type: ignore[no-untyped-call]
                args = tuple(_unscaled(a, scale) for a in args)
                kwargs = {name: _unscaled(a, scale) for name, a in kwargs.items()}
                with torch.autocast(x.device.type, dtype):
                    y = forward(inner, *args, **kwargs)
                out: Tensor = _Leave.apply(y, around, scale)  # type: ignore[no-untyped-call]
                return out

            return scaled

        return wrap

    @torch.no_grad()
    def unscale(self, agreed: Callable[[Tensor], Tensor] = lambda flags: flags) -> None:
        """Divide weight gradients by their block's scale, drop those of blocks that overflowed, and adapt the scales.

        A block whose gradients are dropped is not updated this time. Where each process holds a shard of the gradients,
        `agreed` turns the flags of blocks that overflowed here, (n,) bool, into those of all processes.

        Raises:
            DalleError: a block has had no finite gradients for long.
        """
        own = [[local(p.grad) for p in block.parameters() if p.grad is not None] for block in self.blocks.values()]
        grads = [[grad for grad in block if grad.numel()] for block in own]  # a process's shard may be empty
        largest = [torch.stack(torch._foreach_norm(g, math.inf)).sum() if g else self.log2.new_zeros(()) for g in grads]
        finite = (~agreed(~torch.isfinite(torch.stack(largest)))).tolist()  # the one wait for the device
        scales = self.log2.exp2()
        moves = []
        for index, (good, block) in enumerate(zip(finite, self.blocks.values(), strict=True)):
            if good and grads[index]:
                torch._foreach_div_(grads[index], scales[index])
            elif not good:
                block.zero_grad(set_to_none=True)
            moves.append(self._move(index, good))
        self.log2 = (self.log2 + self.log2.new_tensor(moves)).clamp(MIN, MAX)
        self._check()

    def _move(self, index: int, good: bool) -> float:
        """The change of a scale's logarithm after an update."""
        self.since[index] += 1
        self.lost[index] = 0 if good else self.lost[index] + 1
        if good:
            return RISE
        if self.since[index] < WINDOW:
            return 0.0
        self.since[index] = 0
        return -FALL

    def _check(self) -> None:
        if max(self.lost) <= MAX_LOST:
            return
        for name, lost, log2 in zip(self.blocks, self.lost, self.log2.tolist(), strict=True):
            if lost > MAX_LOST and log2 <= MIN:
                raise DalleError(
                    f"expected finite gradients in {name}, found none for {lost} updates at its smallest scale; "
                    "lower lr, or compute in --dtype float32"
                )

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: logarithms (n,) float32, and counts of updates (2, n) int64."""
        return {"log2": self.log2, "counts": torch.tensor([self.since, self.lost])}

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`; with an empty state the scales keep their initial values."""
        if state:
            self.log2 = state["log2"].to(self.log2.device)
            self.since, self.lost = state["counts"].tolist()
