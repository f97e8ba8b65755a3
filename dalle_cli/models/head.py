"""Matrices that keep 32 bits under autocast, and the cross-entropy of one without ever holding all of its logits.

R rows, C width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 1 << 21  # logits at a time: 8 MiB of float32, which stay in the processor's cache


def float32_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer in its weights' own precision even under autocast: (..., C), (V, C), (V,) -> (..., V).

    The products of its backward pass are in autocast's precision, as those of every other matrix are.
    """
    y: Tensor = _Float32Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


class _Float32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        low = _lowered(x)
        ctx.save_for_backward(x.to(low), weight)
        ctx.dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False), _quick_float32(x.is_cpu and low != weight.dtype):
            return F.linear(x.to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide = grad.flatten(0, -2)
        rows = wide.to(x.dtype)
        grad_x = (rows @ weight.to(x.dtype)).view(x.shape).to(ctx.dtype)
        grad_weight = (rows.mT @ x.reshape(len(rows), -1)).to(weight.dtype)
        return grad_x, grad_weight, wide.sum(0) if ctx.needs_input_grad[2] else None


def _lowered(x: Tensor) -> torch.dtype:
    """What matrices are multiplied in here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def head_logits(head: nn.Module, x: Tensor) -> Tensor:
    """Logits in at least 32 bits, even where the other matrix products run in 16 (2021, app. D).

    Those of a packed head have been rounded to its own precision.
    """
    with torch.autocast(x.device.type, enabled=False):
        logits: Tensor = head(x.to(head.weight.dtype) if isinstance(head, nn.Linear) else x)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def head_loss(head: nn.Linear, x: Tensor, targets: Tensor) -> Tensor:
    """Sum of -ln p(target) over rows: (R, C), (R,) int64 -> () in nats.

    Logits and probabilities are in the head's own dtype, a chunk of rows at a time; the products of the backward pass
    are in autocast's, as those of every other matrix are.
    """
    y: Tensor = _HeadLoss.apply(x, head.weight, head.bias, targets)  # type: ignore[no-untyped-call]
    return y


@contextmanager
def _quick_float32(on: bool) -> Iterator[None]:
    """On CPU, products of float32 matrices by oneDNN, twice as fast as torch's default library on some processors.

    Where the processor has bfloat16 products that add up in float32, they are those: the operands are rounded, as all
    matrices' are under autocast, and the results are not.
    """
    products = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9 and later
    if not on or products is None or torch.compiler.is_compiling():
        yield
        return
    kept, products.fp32_precision = products.fp32_precision, "bf16"
    try:
        yield
    finally:
        products.fp32_precision = kept


class _HeadLoss(torch.autograd.Function):
    """The gradients are made together with the loss, so that each chunk's logits are computed once and forgotten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        low = _lowered(x)
        with torch.autocast(x.device.type, enabled=False), _quick_float32(x.is_cpu and low != weight.dtype):
            total = weight.new_zeros(())
            if not any(ctx.needs_input_grad):
                for part, wanted in _chunks(CHUNK // len(weight), x, targets):
                    total += F.cross_entropy(F.linear(part.to(weight.dtype), weight, bias), wanted, reduction="sum")
                return total
            grads: list[Tensor] = []
            matrix, grad_weight, grad_bias = weight.to(low), torch.zeros_like(weight), torch.zeros_like(bias)
            for part, wanted in _chunks(4 * CHUNK // len(weight), x, targets):
                grad = torch.empty(len(part), len(weight), dtype=low, device=x.device)
                total += _row_gradients(part.to(weight.dtype), weight, bias, wanted, grad, grad_bias)
                grads.append(grad @ matrix)
                grad_weight += grad.mT @ part.to(low)
        ctx.save_for_backward(torch.cat(grads).to(x.dtype), grad_weight, grad_bias)
        ctx.spent = False
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("the gradients of head_loss were given away by an earlier backward pass")
        ctx.spent = True
        return (*(g.mul_(grad.to(g.dtype)) for g in ctx.saved_tensors), None)


def _chunks(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(x, max(1, rows)) for x in tensors), strict=True)


def _row_gradients(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, out: Tensor, grad_bias: Tensor) -> Tensor:
    """The loss of some rows; their logits' gradients, in `out`, of which those of the bias are added up."""
    total = weight.new_zeros(())
    for part, wanted, grad in _chunks(CHUNK // len(weight), x, targets[:, None], out):
        logits = F.linear(part, weight, bias)
        norm = logits.logsumexp(-1, keepdim=True)
        total += (norm - logits.gather(1, wanted)).sum()
        logits.sub_(norm).exp_().scatter_add_(1, wanted, logits.new_full((1, 1), -1).expand_as(wanted))
        grad_bias += logits.sum(0)
        grad.copy_(logits)
    return total
