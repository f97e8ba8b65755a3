"""Between stored pixels (uint8) and those the models see ([0, 1])."""

import torch
from torch import Tensor

from dalle_cli.errors import DalleError


def from_uint8(images: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 -> the same in [0, 1], float32."""
    return images.float() / 255


def to_uint8(images: Tensor) -> Tensor:
    """(B, 3, S, S) in [0, 1] -> the same as uint8, rounded. Contrast is never rescaled."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


def check_sides(images: Tensor, reduction: int) -> None:
    """Raises: DalleError unless images are (B, 3, S, S) whose sides divide into codes of `reduction` pixels."""
    if images.ndim != 4 or images.shape[1] != 3 or any(size % reduction for size in images.shape[2:]):
        raise DalleError(
            f"expected images (B, 3, S, S) with S divisible by {reduction}, found {tuple(images.shape)}; resize them"
        )
