"""Other implementations of the same sizes, each with the training step that its own users write."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], dtype: str, clip: float
) -> Tensor:
    """An update, the matrix products in `dtype`; clip 0: none."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        value = loss()
    value.backward()  # type: ignore[no-untyped-call]
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()  # here, so that no gradients lie about during the next forward pass
    return value.detach()


def count(model: nn.Module) -> int:
    """Parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
