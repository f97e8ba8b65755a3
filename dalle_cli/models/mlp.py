"""The paper's MLP, which keeps what it computed before the GELU and not what came after."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def gelu_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """layer(gelu(x)): (..., H) -> (..., C); the GELU is computed again in the backward pass, which costs little."""
    if not torch.is_grad_enabled():
        return cast(Tensor, layer(F.gelu(x)))
    y: Tensor = _GeluLinear.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return y


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_weight = rows.mT @ F.gelu(x).to(rows.dtype).flatten(0, -2)
        grad_x = (rows @ weight.to(rows.dtype)).view(x.shape).to(x.dtype)
        grad_x = torch.ops.aten.gelu_backward(grad_x, x)
        wide = torch.promote_types(rows.dtype, weight.dtype)
        return grad_x, grad_weight.to(weight.dtype), rows.sum(0, dtype=wide)
