"""Sparse patterns as block masks of FlexAttention, for CUDA; blocks that are masked out are not computed.

L positions of the stream, X = 1 + T of start and caption. FlexAttention has no backward pass on CPU, where
`cpu_attention` does this work.
"""

from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@cache
def usable() -> bool:
    """Whether FlexAttention can be compiled here: without Triton it would compute all blocks."""
    from torch.utils._triton import has_triton

    return has_triton()


def block_attention(q: Tensor, k: Tensor, v: Tensor, n_prefix: int, distances: tuple[int, ...]) -> Tensor:
    """Codes attend to the caption and codes at some distances back in raster order: (B, N, L, D) thrice -> same."""
    mask = block_mask(n_prefix, q.shape[2], distances, q.device)
    y: Tensor = _compiled()(q, k, v, block_mask=mask)
    return y


@lru_cache(maxsize=64)
def block_mask(n_prefix: int, length: int, distances: tuple[int, ...], device: torch.device) -> BlockMask:
    """The block mask of the stream."""
    table = torch.zeros(length, dtype=torch.bool, device=device)
    table[torch.tensor([d for d in distances if d < length], device=device)] = True

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = table[(query - key).clamp(min=0)]
        return (key <= query) & ((key < n_prefix) | near)

    return create_block_mask(visible, None, None, length, length, device=device.type)


@cache
def _compiled():  # type: ignore[no-untyped-def]
    return torch.compile(flex_attention, dynamic=False)
