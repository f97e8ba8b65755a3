"""Autograd functions with backward passes written out, for operations that torch does not fuse on CPU.

Autograd over the plain formulas takes several times as long. B batch, L positions, N heads, D width of a head (even),
C = N D.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-6


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis (Zhang and Sennrich 2019), in autocast's dtype.

    There is no gain: the matrix that follows has one.
    """
    y: Tensor = _Norm.apply(x)  # type: ignore[no-untyped-call]
    return y


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b for the two halves a, b of the last axis (Shazeer 2020): (..., 2 H) -> (..., H)."""
    y: Tensor = _SwiGLU.apply(x)  # type: ignore[no-untyped-call]
    return y


def apply_rotary(qkv: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized queries and keys with rotary positions, and values: (B, L, 3 C) -> three times (B, N, L, D).

    `rotary` (2, L, C) are cosines and sines as `rotary_angles` gives them.
    """
    q, k, v = _ApplyRotary.apply(qkv, rotary[0].to(qkv.dtype), rotary[1].to(qkv.dtype), rotary.shape[-1])  # type: ignore[no-untyped-call]
    return q, k, v


def gelu_linear(x: Tensor, layer: nn.Linear, approximate: str = "none") -> Tensor:
    """layer(gelu(x)): (..., H) -> (..., C); stores x alone, and computes the GELU again in the backward pass."""
    y: Tensor = _GeluLinear.apply(x, layer.weight, layer.bias, approximate)  # type: ignore[no-untyped-call]
    return y


def _shrink(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return length.square_().div_(x.shape[-1]).add_(EPSILON).rsqrt_()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        kind = x.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        shrink = _shrink(x).to(x.dtype)
        y = (x * shrink).to(low)
        ctx.save_for_backward(y, shrink.to(low))
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _norm_backward(grad, *ctx.saved_tensors).to(ctx.dtype)


def _norm_backward(grad: Tensor, y: Tensor, shrink: Tensor) -> Tensor:
    along = (grad * y).mean(-1, keepdim=True)
    return (grad - y * along).mul_(shrink)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        gate = torch.sigmoid(a)
        silu = a * gate
        ctx.save_for_backward(gate, silu, b)
        return silu * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate, silu, b = ctx.saved_tensors
        out = torch.empty(*grad.shape[:-1], 2 * grad.shape[-1], dtype=grad.dtype, device=grad.device)
        to_a, to_b = out.chunk(2, dim=-1)
        torch.mul(grad, silu, out=to_b)
        slope = (silu - silu * gate).add_(gate)
        torch.mul(slope.mul_(grad), b, out=to_a)
        return out


class _ApplyRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        n_head = qkv.shape[-1] // 3 // width
        x = qkv.view(*qkv.shape[:2], 3, n_head, width)
        shrink = _shrink(x[:, :, :2]).to(x.dtype)
        y = x[:, :, :2] * shrink
        cos, sin = (t[:, None, None].expand(-1, 2, n_head, -1).contiguous() for t in (cos, sin))
        ctx.save_for_backward(y, shrink, cos, sin)
        q, k = _turn(y, cos, sin).permute(2, 0, 3, 1, 4)
        return q, k, x[:, :, 2].transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        y, shrink, cos, sin = ctx.saved_tensors
        out = torch.stack([g.transpose(1, 2) for g in grads], dim=2)
        out[:, :, :2] = _norm_backward(_turn(out[:, :, :2], cos, -sin), y, shrink)
        return out.flatten(2), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Dimensions i and i + D/2 turn together (Su et al. 2021): (..., D) -> (..., D)."""
    crossed = x.reshape(-1, x.shape[-1]) @ _crossed(x.shape[-1], x.dtype, x.device)
    return (x * cos).add_(crossed.view(x.shape).mul_(sin))


@lru_cache(maxsize=16)
def _crossed(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix that takes (a, b) to (-b, a): as a product it is faster than moving halves about."""
    with torch.inference_mode(False):
        half = torch.eye(width // 2, device=device)
        none = torch.zeros_like(half)
        return torch.cat([torch.cat([none, half], 1), torch.cat([-half, none], 1)]).to(dtype)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.approximate = approximate
        return F.linear(F.gelu(x, approximate=approximate), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_weight = rows.mT @ F.gelu(x, approximate=ctx.approximate).to(rows.dtype).flatten(0, -2)
        grad_x = (rows @ weight.to(rows.dtype)).view(x.shape).to(x.dtype)
        grad_x = torch.ops.aten.gelu_backward(grad_x, x, approximate=ctx.approximate)
        wide = torch.promote_types(rows.dtype, weight.dtype)
        return grad_x, grad_weight.to(weight.dtype), rows.sum(0, dtype=wide), None
