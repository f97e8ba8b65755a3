"""Linear layers that stay in float32 under autocast, and a cross-entropy that never holds all of its logits.

R rows, C width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

CPU_CHUNK = 1 << 21  # logits at a time: 8 MiB of float32, which fit the processor's cache
DEVICE_CHUNK = 1 << 25  # 128 MiB: an accelerator needs larger products to be busy
ONEDNN_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def float32_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer in its weights' own precision even under autocast: (..., C), (V, C), (V,) -> (..., V).

    The products of its backward pass are in autocast's precision, as those of all other layers are.
    """
    y: Tensor = _Float32Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


class _Float32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        low = _autocast_dtype(x)
        ctx.save_for_backward(x.to(low), weight)
        ctx.dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            return _linear(x.to(weight.dtype), weight, bias, low)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide = grad.flatten(0, -2)
        rows = wide.to(x.dtype)
        grad_x = (rows @ weight.to(x.dtype)).view(x.shape).to(ctx.dtype)
        grad_weight = (rows.mT @ x.reshape(len(rows), -1)).to(weight.dtype)
        return grad_x, grad_weight, wide.sum(0) if ctx.needs_input_grad[2] else None


def head_loss(head: nn.Linear, x: Tensor, targets: Tensor) -> Tensor:
    """Sum of -ln p(target) over rows: (R, C), (R,) int64 -> () in nats.

    Logits and probabilities are in the head's own dtype, a chunk of rows at a time. The products of the backward pass
    are in autocast's precision, as those of all other layers are.
    """
    y: Tensor = _HeadLoss.apply(x, head.weight, head.bias, targets)  # type: ignore[no-untyped-call]
    return y


class _HeadLoss(torch.autograd.Function):
    """Computes the gradients together with the loss, so that each chunk's logits are computed once and dropped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        low, total = _autocast_dtype(x), weight.new_zeros(())
        chunk = _chunk_rows(x.device, len(weight))
        with torch.autocast(x.device.type, enabled=False):
            if not any(ctx.needs_input_grad):
                for part, wanted in _chunks(chunk, x, targets):
                    logits = _linear(part.to(weight.dtype), weight, bias, low)
                    total += F.cross_entropy(logits, wanted, reduction="sum")
                return total
            grads: list[Tensor] = []
            matrix, grad_weight, grad_bias = weight.to(low), torch.zeros_like(weight), torch.zeros_like(bias)
            for part, wanted in _chunks(4 * chunk, x, targets):
                grad = torch.empty(len(part), len(weight), dtype=low, device=x.device)
                chunks = _chunks(chunk, part.to(weight.dtype), wanted[:, None], grad)
                total += sum(_logit_gradients(_linear(r, weight, bias, low), i, g, grad_bias) for r, i, g in chunks)
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


def _logit_gradients(logits: Tensor, targets: Tensor, out: Tensor, grad_bias: Tensor) -> Tensor:
    """The loss of some rows. Writes their logits' gradients to `out` and adds those of the bias; spends `logits`."""
    norm = logits.logsumexp(-1, keepdim=True)
    total = (norm - logits.gather(1, targets)).sum()
    logits.sub_(norm).exp_().scatter_add_(1, targets, logits.new_full((1, 1), -1).expand_as(targets))
    grad_bias += logits.sum(0)
    out.copy_(logits)
    return total


def _chunk_rows(device: torch.device, n_vocab: int) -> int:
    """How many rows' logits to hold at a time."""
    return (CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK) // n_vocab


def _chunks(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(x, max(1, rows)) for x in tensors), strict=True)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which other layers multiply matrices here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, low: torch.dtype) -> Tensor:
    """`F.linear` for no_grad code; under autocast on CPU by oneDNN, in float32 up to twice as fast as the default.

    oneDNN is called through the operator that torch.compile emits, which changes no process-wide setting.
    """
    lowered = low != weight.dtype == torch.float32
    if ONEDNN_LINEAR is None or not x.is_cpu or not lowered or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    y: Tensor = ONEDNN_LINEAR(x, weight, bias, "none", [], "")
    return y


def _linear_flops(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * x[:-1].numel() * weight.numel()


if ONEDNN_LINEAR is not None:  # torch's counter does not know the operator
    register_flop_formula(ONEDNN_LINEAR)(_linear_flops)
