"""Between stored pixels (uint8) and those the models see ([0, 1])."""

import torch
from torch import Tensor


def from_uint8(images: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 -> the same in [0, 1], float32."""
    return images.float() / 255


def to_uint8(images: Tensor) -> Tensor:
    """(B, 3, S, S) in [0, 1] -> the same as uint8, rounded. Contrast is never rescaled."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
