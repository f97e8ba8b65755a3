"""MOVQ: an autoencoder whose decoder is normalized by the latents (Zheng et al. 2022, arXiv 2209.09002).

Kandinsky's diffusion decoder samples latents, which a MOVQ decodes to images. In between they are not quantized, so
there is no codebook here.

Shapes: B batch, C channels, Z channels of the latents, h w their sides; pixels are S x S in [-1, 1], S = h * reduction.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_cli.models.dvae import full_precision
from dalle_cli.models.pixels import check_sides
from dalle_cli.models.vqgan import VQGANConfig, group_norm, vqgan_decoder, vqgan_encoder


@dataclass(frozen=True)
class MOVQConfig:
    """Sizes of a MOVQ; the defaults are Kandinsky 2.2's.

    Raises: DalleError where a value cannot be built.
    """

    kind: str = "movq"
    image_size: int = 512
    width: int = 128  # channels at the full size
    multipliers: tuple[int, ...] = (1, 2, 2, 4)  # of the width, at the full size, at half of it, ...
    depth: int = 2  # residual blocks at each size; the decoder has one more
    attention: tuple[int, ...] = (64,)  # sides at which blocks attend
    n_latent: int = 4  # Z

    def __post_init__(self) -> None:
        for name in ("multipliers", "attention"):  # TOML and JSON have lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self.blocks  # noqa: B018  # checks them

    @property
    def blocks(self) -> VQGANConfig:
        """The sizes of the residual blocks, which are a VQGAN's."""
        return VQGANConfig(
            image_size=self.image_size, width=self.width, multipliers=self.multipliers, depth=self.depth,
            attention=self.attention, n_latent=self.n_latent, n_embd=self.n_latent,
        )  # fmt: skip

    @property
    def reduction(self) -> int:
        """Pixels per latent position, along one side."""
        return self.blocks.reduction


class SpatialNorm(nn.Module):
    """Group norm, scaled and shifted at each position by the latents there (sec. 3.2)."""

    def __init__(self, width: int, n_latent: int) -> None:
        super().__init__()
        self.norm = group_norm(width)
        self.scale, self.shift = (nn.Conv2d(n_latent, width, 1) for _ in range(2))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """(B, C, H, W), (B, Z, h, w) -> (B, C, H, W)."""
        z = F.interpolate(z, size=x.shape[2:], mode="nearest")
        return torch.addcmul(self.shift(z), self.norm(x), self.scale(z))


class MOVQ(nn.Module):
    """Encoder and decoder between pixels and latents; channels_last."""

    def __init__(self, config: MOVQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = vqgan_encoder(config.blocks)
        self.quant_conv, self.post_quant_conv = (nn.Conv2d(config.n_latent, config.n_latent, 1) for _ in range(2))
        self.decoder = vqgan_decoder(config.blocks, lambda width: SpatialNorm(width, config.n_latent))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> latents (B, Z, h, w) float32.

        Raises: DalleError where the sides do not divide into latents.
        """
        check_sides(images, self.config.reduction)
        return full_precision(self.quant_conv(self.encoder(images.contiguous(memory_format=torch.channels_last))))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, Z, h, w) -> (B, 3, S, S) float32, in [-1, 1] but for what overshoots."""
        z = z.contiguous(memory_format=torch.channels_last)
        x, layers = self.post_quant_conv(z), dict(self.decoder.named_children())
        x = layers["conv_in"](x)
        for block in (*layers["mid"].children(), *layers["up"].children()):
            x = block(x, z)
        return full_precision(layers["conv_out"](F.silu(layers["norm_out"](x, z))))
