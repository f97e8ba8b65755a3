"""Diffusion upsampler: a small image to a larger one, without attention or caption (Ramesh et al. 2022, sec. 2.1).

Shapes: B batch, S side of the larger image, s side of the small one, f = S / s; pixels are in [-1, 1]. The network is
convolutional, so it trains on crops and samples images of any size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_cli.errors import DalleError
from dalle_cli.models.unet import TimeEmbedding, UNet, UNetConfig


@dataclass(frozen=True)
class UpsamplerConfig(UNetConfig):
    """Sizes of an upsampler; the defaults are the paper's first, 64 to 256 (table 3).

    Raises: DalleError where sizes do not fit together.
    """

    image_size: int = 256
    low_size: int = 64
    width: int = 320
    attention: tuple[int, ...] = ()
    # Conditioning augmentation: in training the small image is noised up to this share of the timesteps, and the
    # network is given the level (Ho et al. 2021, arXiv 2106.15282, sec. 4.2); 0 = never
    low_noise: float = 0.0
    last: bool = False  # a second U-Net for the last step of sampling
    clamp: bool = True  # the enlarged small image is clamped to [-1, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low_size < 1 or self.image_size % self.low_size or self.image_size == self.low_size:
            found = f"{self.low_size} to {self.image_size}"
            raise DalleError(f"expected images to become a whole number of times as large, found {found}")
        if not 0 <= self.low_noise < 1:
            raise DalleError(f"expected low_noise in [0, 1), found {self.low_noise}")

    @property
    def factor(self) -> int:
        """How many times as large an image becomes: f."""
        return self.image_size // self.low_size


def resize(x: Tensor, factor: int) -> Tensor:
    """Bicubic enlargement, not clamped: (B, 3, s, s) -> (B, 3, f s, f s)."""
    return F.interpolate(x, scale_factor=float(factor), mode="bicubic", antialias=True)


def enlarge(low: Tensor, factor: int, clamp: bool = True) -> Tensor:
    """The small image, enlarged for the network's input: (B, 3, s, s) -> (B, 3, f s, f s), clamped to [-1, 1]."""
    return resize(low, factor).clamp(-1, 1) if clamp else resize(low, factor)


class Upsampler(nn.Module):
    """A U-Net over the noised large image, with the enlarged small image as further channels."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = UNet(config, in_channels=2 * config.channels)
        self.last = UNet(config, in_channels=2 * config.channels) if config.last else None
        self.low_level = TimeEmbedding(config.width, config.time_width) if config.low_noise else None

    def forward(
        self, x: Tensor, t: Tensor, enlarged: Tensor, level: Tensor | None = None, last: bool = False
    ) -> Tensor:
        """(B, 3, S, S) at timesteps (B,), (B, 3, S, S) -> (B, 3 or 6, S, S).

        `level` (B,) is the timestep that the small image was noised to, -1 (the default) for not at all. `last` says
        that this is the last step of sampling, for which there may be a U-Net of its own.
        """
        added = None
        if self.low_level is not None:
            level = torch.full_like(t, -1) if level is None else level
            added = self.low_level(level + 1)
        unet = self.last if last and self.last is not None else self.unet
        return unet(torch.cat([x, enlarged.to(x.dtype)], dim=1), t, added)  # type: ignore[no-any-return]
