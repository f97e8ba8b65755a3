"""Restrict a categorical distribution to its likely values.

V vocabulary. What is cut gets -inf. Values tied with the last one kept are kept too, so a result never depends on the
order in which a sort met equals; with ties more than k values, or more mass than needed, may remain.
"""

import torch
from torch import Tensor


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest, and all that equal the k-th: (..., V) -> (..., V)."""
    if k >= logits.shape[-1]:
        return logits
    last = torch.topk(logits, k, dim=-1, sorted=True).values[..., -1:]
    return logits.masked_fill(logits < last, float("-inf"))


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest values that hold a mass of at least p in (0, 1], and ties: (..., V) -> (..., V)."""
    if p >= 1:
        return logits
    ordered = logits.sort(dim=-1, descending=True).values
    mass = torch.softmax(ordered, dim=-1)
    # a value is needed as long as those before it fall short of p, so the likeliest always is
    needed = (mass.cumsum(dim=-1) - mass) < p
    last = ordered.gather(-1, needed.sum(dim=-1, keepdim=True) - 1)
    return logits.masked_fill(logits < last, float("-inf"))
