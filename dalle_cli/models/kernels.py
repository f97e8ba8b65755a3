"""The operations of the networks that have fast forms, each beside the plain formula that it equals.

Networks call the functions here. Each takes a fast form from `fast/` where there is one for the device and the mode,
else the plain formula. `FAST = False` selects the plain formulas everywhere; tests/models/test_kernels.py compares.

B batch, N heads, L queries, M keys, D width of a head, C = N D, V vocabulary.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_cli.models.attention import Pattern, as_bias, causal_bias
from dalle_cli.models.fast import block_attention, cpu_attention, fused, head
from dalle_cli.models.fast.packed import Int8Linear as Int8Linear
from dalle_cli.models.fast.packed import PackedConvolution as PackedConvolution
from dalle_cli.models.fast.packed import PackedLinear as PackedLinear
from dalle_cli.models.fast.packed import PackedPointwise as PackedPointwise
from dalle_cli.models.fast.packed import packs as packs

FAST = True
SHORT = 512  # keys; for more, the attention weights of all heads take too much memory to be kept for the backward pass
LOCAL_GAIN = 1.5  # local attention is faster if the stream is longer by this factor than the keys that a row needs


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Every query attends to every key: (B, N, L, D), twice (B, N, M, D) -> (B, N, L, D).

    Keys that are not `visible` (B, M) bool are left out.
    """
    if visible is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None])
    if _dense_is_fast(k):
        return cpu_attention.dense_attention(q, k, v, q.new_zeros(()))
    return F.scaled_dot_product_attention(q, k, v)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Every query attends to the keys up to its own; the L queries are the last L of M positions. Shapes as above.

    Keys that are not `visible` (B, M) bool are left out; the first must be.
    """
    if visible is not None:
        bias = _causal_bias(q, k) + as_bias(visible, q.dtype)[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    if _dense_is_fast(q):
        return cpu_attention.dense_attention(q, k, v, _causal_bias(q, k))
    if q.shape != k.shape:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_causal_bias(q, k))
    if FAST and q.is_cpu and torch.is_grad_enabled():
        return cpu_attention.chunked_causal_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def causal_attention_after_prefix(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None = None
) -> Tensor:
    """Causal attention behind a prefix whose keys and values (P, N, S, D) are shared by B / P consecutive rows each.

    (B, N, L, D), twice (B, N, M, D) -> (B, N, L, D). The prefix is not copied for each row. Keys of the prefix that are
    not `visible` (P, S) bool are left out.
    """
    n_rows, n_head, length, width = q.shape
    shared = (len(keys), n_rows // len(keys), n_head, length)

    def group(x: Tensor) -> Tensor:  # the rows of a prefix next to each other: (B, N, L, X) -> (P, N, B/P * L, X)
        return x.reshape(*shared, -1).transpose(1, 2).flatten(2, 3)

    def ungroup(x: Tensor) -> Tensor:
        return x.reshape(len(keys), n_head, shared[1], length, -1).transpose(1, 2).flatten(0, 1)

    q = q * width**-0.5
    own = group(q @ k.mT + _causal_bias(q, k))
    scores = group(q) @ keys.mT
    if visible is not None:
        scores = scores + as_bias(visible, scores.dtype)[:, None, None]
    weights = torch.softmax(torch.cat([scores, own], dim=-1), dim=-1)
    prefix, own = torch.split(weights, [keys.shape[-2], k.shape[-2]], dim=-1)
    return ungroup(prefix @ values) + ungroup(own) @ v


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """Attention over the token prior's stream under a pattern (2021, app. B.1): three times (B, N, L, D) -> same."""
    if pattern.kind == "full":
        return causal_attention(q, k, v)
    local = FAST and pattern.kind != "window"  # whose keys are not at the same distances from each code
    if local and q.device.type == "cpu":
        if pattern.kind == "column":
            return cpu_attention.column_attention(q, k, v, pattern.n_prefix, pattern.grid)
        if LOCAL_GAIN * pattern.n_local_keys < q.shape[-2]:
            return cpu_attention.local_attention(q, k, v, pattern.n_prefix, pattern.grid, pattern.distances)
    if local and q.device.type == "cuda" and block_attention.usable():
        return block_attention.block_attention(q, k, v, pattern.n_prefix, pattern.distances)
    if _dense_is_fast(q):
        return cpu_attention.dense_attention(q, k, v, pattern.bias(q.device, q.dtype))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=pattern.mask(q.device))


def gelu_linear(x: Tensor, layer: nn.Linear, approximate: str = "none") -> Tensor:
    """layer(gelu(x)): (..., H) -> (..., C); the fast form does not store gelu(x) for the backward pass.

    `approximate` is `F.gelu`'s: "none" or "tanh".
    """
    if FAST and torch.is_grad_enabled():
        return fused.gelu_linear(x, layer, approximate)
    return cast(Tensor, layer(F.gelu(x, approximate=approximate)))


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis (Zhang and Sennrich 2019), in autocast's dtype; without a gain."""
    if FAST:
        return fused.rms_norm(x)
    return F.rms_norm(x, x.shape[-1:], eps=fused.EPSILON).to(_autocast_dtype(x))


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b for the halves a, b of the last axis (Shazeer 2020): (..., 2 H) -> (..., H)."""
    if FAST:
        return fused.swiglu(x)
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


def apply_rotary(qkv: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized queries and keys with rotary positions, and values: (B, L, 3 C) -> three times (B, N, L, D).

    `rotary` (2, L, D) are cosines and sines from `rotary_angles` (Su et al. 2021).
    """
    if FAST:
        return fused.apply_rotary(qkv, rotary)
    cos, sin = rotary.to(qkv.dtype)
    q, k, v = qkv.view(*qkv.shape[:2], 3, -1, rotary.shape[-1]).permute(2, 0, 3, 1, 4)

    def rotate(x: Tensor) -> Tensor:
        x = F.rms_norm(x, x.shape[-1:], eps=fused.EPSILON)
        a, b = x.chunk(2, dim=-1)
        y: Tensor = x * cos + torch.cat([-b, a], dim=-1) * sin
        return y

    return rotate(q), rotate(k), v


def float32_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer in its weights' own precision even under autocast: (..., C), (V, C), (V,) -> (..., V)."""
    if FAST:  # the products of its backward pass are in autocast's precision
        return head.float32_linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(weight.dtype), weight, bias)


def head_logits(layer: nn.Module, x: Tensor) -> Tensor:
    """Logits in at least 32 bits, even where other products use 16 (2021, app. D): (..., C) -> (..., V).

    The logits of a packed head are rounded to its own precision first.
    """
    with torch.autocast(x.device.type, enabled=False):
        logits: Tensor = layer(x.to(layer.weight.dtype) if isinstance(layer, nn.Linear) else x)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def head_loss(layer: nn.Linear, x: Tensor, targets: Tensor) -> Tensor:
    """Sum of -ln p(target) over rows, in nats: (R, C), (R,) int64 -> (); the fast form never holds all logits."""
    if FAST:
        return head.head_loss(layer, x, targets)
    return F.cross_entropy(head_logits(layer, x), targets, reduction="sum")


def _dense_is_fast(x: Tensor) -> bool:
    """Whether a backward pass over few positions follows on CPU, where batched products beat the fused kernel."""
    return FAST and x.device.type == "cpu" and torch.is_grad_enabled() and x.shape[-2] <= SHORT


def _causal_bias(q: Tensor, k: Tensor) -> Tensor:
    return causal_bias(k.shape[-2], q.device, q.dtype)[-q.shape[-2] :]


def _autocast_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
