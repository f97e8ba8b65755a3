"""Training in float16: a gradient scale for each residual block (Ramesh et al. 2021, sec. 2.4, app. D and fig. 4).

Gradients of activations shrink or grow from block to block by more than float16 has room for, so that no one scale of
the loss fits all of them. Here the gradient that comes into a block is multiplied by the block's own scale, and what
goes out of it divided again. Weights, their gradients, and everything outside of the blocks (embeddings, the sum that
runs past the blocks, logits, loss) are float32; only inside the blocks are products in float16.

In the paper a block is half of a transformer's layer; here it is what the model calls a block. M, the paper's number of
replicas, is 1: each replica's loss is a mean of its own.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dalle_cli.errors import DalleError
from dalle_cli.training.blocks import blocks, surround
from dalle_cli.training.shards import local

FIRST, LEAST, MOST = 13.0, 7.0, 24.0  # log2 of a scale at the beginning and of its bounds
RISE = 1 / 1000  # added to log2 of a scale after an update of finite gradients
FALL = 0.5  # taken from it after one that was not
WINDOW = 125  # updates between two falls of one scale
GIVE_UP = 125  # updates in a row without a finite gradient at the least scale


class _Enter(torch.autograd.Function):
    """A block's input, to the block and past it: scales the block's gradient down and filters it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(scale)
        return x.view_as(x), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, scaled: Tensor, past: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        total = scaled / scale
        # where the block overflowed, blocks before it still get what runs past it, and keep their own scales
        return torch.where(torch.isfinite(total), total, past), None


class _Leave(torch.autograd.Function):
    """A block's output in float32; scales the gradient up, in float32, before the block casts it to float16."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, past: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype, ctx.same = y.dtype, y.shape == past.shape
        return y.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (scale,) = ctx.saved_tensors
        return (grad * scale).to(ctx.dtype), grad if ctx.same else None, None


class BlockScales:
    """The scales of a model's blocks. `attach` once; after each backward pass `unscale`, before the optimiser."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks = blocks(model)
        first = next(model.parameters())
        n = len(self.blocks)
        self.log2 = torch.full((n,), FIRST, device=first.device, dtype=torch.float32)
        self.since = [WINDOW] * n  # updates since a scale fell
        self.lost = [0] * n  # updates in a row without a finite gradient

    def attach(self, dtype: torch.dtype = torch.float16) -> None:
        """From now on the blocks compute in `dtype` and scale their gradients."""
        for index, block in enumerate(self.blocks.values()):
            surround(block, self._around(index, dtype))

    def _around(self, index: int, dtype: torch.dtype) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
            def around(x: Tensor, *args: Any, **named: Any) -> Tensor:
                scale = self.log2[index].exp2()
                inner, past = _Enter.apply(x, scale)  # type: ignore[no-untyped-call]
                with torch.autocast(x.device.type, dtype):
                    y = forward(inner, *args, **named)
                out: Tensor = _Leave.apply(y, past, scale)  # type: ignore[no-untyped-call]
                return out

            return around

        return wrap

    @torch.no_grad()
    def unscale(self, agreed: Callable[[Tensor], Tensor] = lambda flags: flags) -> None:
        """Divide the blocks' gradients by their scales, drop those of blocks that overflowed, and move the scales.

        A block whose gradients are dropped is not updated this time. `agreed` makes the flags of blocks that overflowed
        here, (n,) bool, those of all processes, where each has but a piece of the gradients.

        Raises:
            DalleError: a block has had no finite gradient for long.
        """
        told = [[local(p.grad) for p in block.parameters() if p.grad is not None] for block in self.blocks.values()]
        grads = [[grad for grad in block if grad.numel()] for block in told]  # a process may have no piece of a weight
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
        self.log2 = (self.log2 + self.log2.new_tensor(moves)).clamp(LEAST, MOST)
        self._check()

    def _move(self, index: int, good: bool) -> float:
        """What is added to a scale's logarithm."""
        self.since[index] += 1
        self.lost[index] = 0 if good else self.lost[index] + 1
        if good:
            return RISE
        if self.since[index] < WINDOW:
            return 0.0
        self.since[index] = 0
        return -FALL

    def _check(self) -> None:
        if max(self.lost) <= GIVE_UP:
            return
        for name, lost, log2 in zip(self.blocks, self.lost, self.log2.tolist(), strict=True):
            if lost > GIVE_UP and log2 <= LEAST:
                raise DalleError(
                    f"expected finite gradients in {name}, found none for {lost} updates at its least scale; "
                    "lower lr, or compute in --dtype float32"
                )

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the logarithms (n,) float32, and counts of updates (2, n) int64."""
        return {"log2": self.log2, "counts": torch.tensor([self.since, self.lost])}

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`; scales start anew where a checkpoint has none."""
        if state:
            self.log2 = state["log2"].to(self.log2.device)
            self.since, self.lost = state["counts"].tolist()
