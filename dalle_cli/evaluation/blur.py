"""Gaussian blur (Ramesh et al. 2021, fig. 9: both sets are blurred, since a dVAE drops fine detail).

Shapes: B batch, S side in pixels; pixels are in [0, 1].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

REACH = 4.0  # standard deviations at which the kernel is cut off


def gaussian_blur(images: Tensor, radius: float) -> Tensor:
    """(B, 3, S, S) float -> the same, blurred with this standard deviation in pixels; edge pixels are repeated."""
    if radius == 0:
        return images
    reach = math.ceil(REACH * radius)
    at = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-(at**2) / (2 * radius**2))
    kernel = (kernel / kernel.sum()).to(images)
    channels = images.shape[1]
    for across in ((1, -1), (-1, 1)):  # rows, then columns
        weight = kernel.view(1, 1, *across).expand(channels, 1, *(len(at) if n == -1 else 1 for n in across))
        pad = (reach, reach, 0, 0) if across[1] == -1 else (0, 0, reach, reach)
        images = F.conv2d(F.pad(images, pad, mode="replicate"), weight, groups=channels)
    return images
