"""Diffusion upsampler: a small picture to a larger one, without attention or caption (Ramesh et al. 2022, sec. 2.1).

Shapes: B batch, S side of the larger picture, s side of the small one; pixels are in [-1, 1]. It is convolutions alone,
so that it is trained on crops and draws pictures of any size.
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
    # Share of the timesteps up to which the small picture is noised in training, told of it (Ho et al. 2021,
    # arXiv 2106.15282, sec. 4.2); 0 = never, and then nothing is told
    low_noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low_size < 1 or self.image_size % self.low_size or self.image_size == self.low_size:
            found = f"{self.low_size} to {self.image_size}"
            raise DalleError(f"expected pictures to become a whole number of times as large, found {found}")
        if not 0 <= self.low_noise < 1:
            raise DalleError(f"expected low_noise in [0, 1), found {self.low_noise}")

    @property
    def factor(self) -> int:
        """How many times as large a picture becomes."""
        return self.image_size // self.low_size


def enlarge(low: Tensor, factor: int) -> Tensor:
    """A small picture as it is laid beside the noised large one, bicubic: (B, 3, s, s) -> (B, 3, f s, f s)."""
    return F.interpolate(low, scale_factor=float(factor), mode="bicubic", antialias=True).clamp(-1, 1)


class Upsampler(nn.Module):
    """A U-Net that sees the small picture, enlarged, beside the noised large one."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = UNet(config, in_channels=6)
        self.low_level = TimeEmbedding(config.width, config.time_width) if config.low_noise else None

    def forward(self, x: Tensor, t: Tensor, enlarged: Tensor, level: Tensor | None = None) -> Tensor:
        """(B, 3, S, S) at timesteps (B,), (B, 3, S, S) -> (B, 3 or 6, S, S).

        `level` (B,) is the timestep that the small picture was noised to, -1 for not at all; without it, not at all.
        """
        added = None
        if self.low_level is not None:
            level = torch.full_like(t, -1) if level is None else level
            added = self.low_level(level + 1)
        return self.unet(torch.cat([x, enlarged.to(x.dtype)], dim=1), t, added)  # type: ignore[no-any-return]
