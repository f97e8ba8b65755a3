"""Cross-entropy of a linear head over a large vocabulary, without ever holding all of its logits.

R rows, C width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 1 << 23  # logits at a time: 32 MiB of float32


def head_logits(head: nn.Linear, x: Tensor) -> Tensor:
    """Logits in at least 32 bits, even where the other matrix products run in 16 (2021, app. D)."""
    with torch.autocast(x.device.type, enabled=False):
        logits: Tensor = head(x.to(head.weight.dtype))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def head_loss(head: nn.Linear, x: Tensor, targets: Tensor) -> Tensor:
    """Sum of -ln p(target) over rows: (R, C), (R,) int64 -> () in nats.

    Logits and probabilities are in the head's own dtype, a chunk of rows at a time; the products of the backward pass
    are in autocast's, as those of every other matrix are.
    """
    y: Tensor = _HeadLoss.apply(x, head.weight, head.bias, targets)  # type: ignore[no-untyped-call]
    return y


class _HeadLoss(torch.autograd.Function):
    """The gradients are made together with the loss, so that each chunk's logits are computed once and forgotten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        kind = x.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        rows = max(1, CHUNK // weight.shape[0])
        parts = zip(torch.split(x, rows), torch.split(targets, rows), strict=True)
        with torch.autocast(kind, enabled=False):
            total = weight.new_zeros(())
            if not any(ctx.needs_input_grad):
                for part, wanted in parts:
                    logits = F.linear(part.to(weight.dtype), weight, bias)
                    total += F.cross_entropy(logits, wanted, reduction="sum")
                return total
            matrix, grad_weight, grad_bias = weight.to(low), torch.zeros_like(weight), torch.zeros_like(bias)
            grad_x = []
            for part, wanted in parts:
                logits = F.linear(part.to(weight.dtype), weight, bias)
                norm = logits.logsumexp(-1, keepdim=True)
                place = wanted[:, None]
                total += (norm - logits.gather(1, place)).sum()
                grad = logits.sub_(norm).exp_()
                grad.scatter_add_(1, place, grad.new_full((1, 1), -1).expand_as(place))
                grad_bias += grad.sum(0)
                grad = grad.to(low)
                grad_x.append(grad @ matrix)
                grad_weight += grad.mT @ part.to(low)
        ctx.save_for_backward(torch.cat(grad_x).to(x.dtype), grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*(g * grad.to(g.dtype) for g in ctx.saved_tensors), None)
