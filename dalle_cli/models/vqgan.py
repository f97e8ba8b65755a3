"""VQGAN: a convolutional autoencoder with a grid of codes between its halves (Esser et al. 2021, arXiv 2012.09841).

It stands in the dVAE's place in DALL-E mini and minDALL-E (nearest codes, 16 pixels a code) and in ruDALL-E (Gumbel
codes, 8 pixels a code). Tensors have the names of the authors' package, taming-transformers. There is no training here.

Shapes: B batch, V vocabulary, D width of a code's vector, H W code grid, C channels; pixels are S x S in [0, 1],
S = H * reduction.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_cli.errors import DalleError
from dalle_cli.models import kernels
from dalle_cli.models.blocks import StackedBlock
from dalle_cli.models.dvae import full_precision, stack
from dalle_cli.models.pixels import check_sides
from dalle_cli.models.quantizers import nearest_codes

GROUPS = 32  # of channels, for group norm
EPS = 1e-6
CHOICES = {"quantizer": ("nearest", "gumbel"), "pixels": ("signed", "unit")}


@dataclass(frozen=True)
class VQGANConfig:
    """Sizes and choices of a VQGAN; the defaults are those of "vqgan_imagenet_f16_16384".

    Raises: DalleError where a value cannot be built.
    """

    kind: str = "vqgan"
    image_size: int = 256
    width: int = 128  # channels at the full size
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # of the width, at the full size, at half of it, ...
    depth: int = 2  # residual blocks at each size; the decoder has one more
    attention: tuple[int, ...] = (16,)  # sides at which blocks attend
    n_latent: int = 256  # channels between the networks and the codes' vectors
    n_embd: int = 256  # D
    n_vocab: int = 16384
    quantizer: str = "nearest"  # or "gumbel": the encoder gives logits
    pixels: str = "signed"  # the networks' pixels are in [-1, 1], or "unit": in [0, 1]
    encoder: bool = True  # published decoders may come without it

    def __post_init__(self) -> None:
        for name in ("multipliers", "attention"):  # TOML and JSON have lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("image_size", "width", "depth", "n_latent", "n_embd", "n_vocab"):
            if getattr(self, name) < 1:
                raise DalleError(f"expected {name} of at least 1, found {getattr(self, name)}; raise it")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise DalleError(f"expected {name} among {', '.join(choices)}, found {getattr(self, name)!r}; pick one")
        if not 1 <= len(self.multipliers) <= 8 or min(self.multipliers) < 1:
            raise DalleError(f"expected 1 to 8 multipliers of at least 1, found {self.multipliers}; correct them")
        if self.width % GROUPS:
            raise DalleError(f"expected a width divisible by {GROUPS}, found {self.width}; round it")
        if self.image_size % self.reduction:
            raise DalleError(f"expected image_size divisible by {self.reduction}, found {self.image_size}; change it")
        if not set(self.attention) <= set(self.sides):
            known = ", ".join(map(str, self.sides))
            raise DalleError(f"expected attention at sides among {known}, found {self.attention}; change it")

    @property
    def reduction(self) -> int:
        """Pixels per code, along one side."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def grid(self) -> int:
        """Codes along one side."""
        return self.image_size // self.reduction

    @property
    def sides(self) -> list[int]:
        """Side of the feature maps at each size, the full size first."""
        return [self.image_size >> level for level in range(len(self.multipliers))]

    @property
    def widths(self) -> list[int]:
        """Channels at each size."""
        return [self.width * m for m in self.multipliers]


def group_norm(width: int) -> nn.GroupNorm:
    """The normalization of every layer."""
    return nn.GroupNorm(GROUPS, width, eps=EPS)


Norm = Callable[[int], nn.Module]  # makes a layer's normalization from its width


def conv_3x3(n_in: int, n_out: int) -> nn.Conv2d:
    """A convolution that keeps the size."""
    return nn.Conv2d(n_in, n_out, 3, padding=1)


class VQGANBlock(StackedBlock):
    """Pre-activation residual block: (norm, SiLU, 3x3) twice, and a 1x1 convolution where the width changes."""

    def __init__(self, n_in: int, n_out: int, norm: Norm = group_norm) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(n_in), conv_3x3(n_in, n_out)
        self.norm2, self.conv2 = norm(n_out), conv_3x3(n_out, n_out)
        self.nin_shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else None

    def forward(self, x: Tensor, *z: Tensor) -> Tensor:
        """(B, n_in, H, W) -> (B, n_out, H, W); norms of more than x take it from `z`."""
        h = self.conv1(F.silu(self.norm1(x, *z)))
        h = self.conv2(F.silu(self.norm2(h, *z)))
        out: Tensor = (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h
        return out


class VQGANAttention(StackedBlock):
    """Every position attends to all, with one head as wide as the feature map; residual."""

    def __init__(self, width: int, norm: Norm = group_norm) -> None:
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor, *z: Tensor) -> Tensor:
        """(B, C, H, W) -> same."""
        h = self.norm(x, *z)
        q, k, v = (layer(h).permute(0, 2, 3, 1).flatten(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        h = kernels.attention(q, k, v).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
        out: Tensor = x + self.proj_out(h)
        return out


class VQGANResize(nn.Module):
    """Halve the side by a convolution with stride 2, or double it by repetition before one with stride 1."""

    def __init__(self, width: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(width, width, 3, stride=2) if down else conv_3x3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2) or (B, C, 2H, 2W)."""
        if self.down:  # the publisher pads only right and bottom
            return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]
        return self.conv(F.interpolate(x, scale_factor=2.0))  # type: ignore[no-any-return]


class VQGANLevel(nn.Module):
    """The blocks of one size, each followed by attention or none, then a change of the size."""

    def __init__(self, widths: list[int], attends: bool, resize: str = "", norm: Norm = group_norm) -> None:
        """`widths` are those before and after each block; `resize` is "downsample", "upsample", or "" for neither."""
        super().__init__()
        self.block = nn.ModuleList(VQGANBlock(*pair, norm) for pair in pairwise(widths))
        self.attn = nn.ModuleList(VQGANAttention(width, norm) for width in widths[1:] if attends)
        self.resize = resize
        if resize:
            self.add_module(resize, VQGANResize(widths[-1], resize == "downsample"))

    def forward(self, x: Tensor, *z: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        for j, block in enumerate(self.block):
            x = self.attn[j](block(x, *z), *z) if len(self.attn) else block(x, *z)
        return getattr(self, self.resize)(x) if self.resize else x


def middle(width: int, norm: Norm = group_norm) -> nn.Sequential:
    """Build the blocks at the smallest size."""
    first, second = (VQGANBlock(width, width, norm) for _ in range(2))
    return stack({"block_1": first, "attn_1": VQGANAttention(width, norm), "block_2": second})


def vqgan_encoder(config: VQGANConfig) -> nn.Sequential:
    """Build the encoder: pixels (B, 3, S, S) -> (B, n_latent, H, W)."""
    widths, down = [config.width, *config.widths], []
    for level, (n_in, n_out) in enumerate(pairwise(widths)):
        resize = "downsample" if level < len(config.widths) - 1 else ""
        down.append(VQGANLevel([n_in] + [n_out] * config.depth, config.sides[level] in config.attention, resize))
    head: dict[str, nn.Module] = {"conv_in": conv_3x3(3, config.width), "down": nn.Sequential(*down)}
    tail: dict[str, nn.Module] = {"norm_out": group_norm(widths[-1]), "silu": nn.SiLU()}
    return stack({**head, "mid": middle(widths[-1]), **tail, "conv_out": conv_3x3(widths[-1], config.n_latent)})


def vqgan_decoder(config: VQGANConfig, norm: Norm = group_norm) -> nn.Sequential:
    """Build the decoder: (B, n_latent, H, W) -> pixels (B, 3, S, S). Its levels are numbered from the full size."""
    widths, up = [*config.widths, config.widths[-1]], {}
    for level in reversed(range(len(config.widths))):
        blocks = [widths[level + 1]] + [widths[level]] * (config.depth + 1)
        attends, resize = config.sides[level] in config.attention, "upsample" if level else ""
        up[str(level)] = VQGANLevel(blocks, attends, resize, norm)
    head: dict[str, nn.Module] = {"conv_in": conv_3x3(config.n_latent, widths[-1]), "mid": middle(widths[-1], norm)}
    tail: dict[str, nn.Module] = {
        "norm_out": norm(widths[0]),
        "silu": nn.SiLU(),
        "conv_out": conv_3x3(widths[0], 3),
    }
    return stack({**head, "up": stack(up), **tail})


class NearestCodes(nn.Module):
    """A codebook; a code is the nearest of its vectors (sec. 3.1, eq. 2)."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.n_vocab, config.n_embd)

    def codes(self, features: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, H, W) int64."""
        return nearest_codes(features, self.embedding.weight)

    def vectors(self, codes: Tensor) -> Tensor:
        """(B, H, W) int64 -> (B, D, H, W)."""
        vectors: Tensor = self.embedding(codes)
        return vectors.permute(0, 3, 1, 2)


class GumbelCodes(nn.Module):
    """A codebook with logits; a code is the likeliest one, without noise."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.n_embd, config.n_vocab, 1) if config.encoder else None
        self.embed = nn.Embedding(config.n_vocab, config.n_embd)

    def codes(self, features: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, H, W) int64."""
        assert self.proj is not None
        codes: Tensor = self.proj(features).argmax(1)
        return codes

    def vectors(self, codes: Tensor) -> Tensor:
        """(B, H, W) int64 -> (B, D, H, W)."""
        vectors: Tensor = self.embed(codes)
        return vectors.permute(0, 3, 1, 2)


class VQGAN(nn.Module):
    """Encoder, codebook and decoder between pixels and a grid of codes; channels_last."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = vqgan_encoder(config) if config.encoder else None
        self.quant_conv = nn.Conv2d(config.n_latent, config.n_embd, 1) if config.encoder else None
        self.quantize = NearestCodes(config) if config.quantizer == "nearest" else GumbelCodes(config)
        self.post_quant_conv = nn.Conv2d(config.n_embd, config.n_latent, 1)
        self.decoder = vqgan_decoder(config)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Find the codes; (B, 3, S, S) in [0, 1] -> (B, H, W) int64.

        Raises: DalleError where the weights have no encoder, or the pixels do not divide into codes.
        """
        if self.encoder is None or self.quant_conv is None:
            raise DalleError(
                "expected a VQGAN with an encoder, found a decoder alone; its publication has no encoder, "
                "take another file of it"
            )
        check_sides(images, self.config.reduction)
        pixels = images if self.config.pixels == "unit" else 2 * images - 1
        features = self.quant_conv(self.encoder(pixels.contiguous(memory_format=torch.channels_last)))
        return self.quantize.codes(full_precision(features))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes to pixels; (B, H, W) int64 -> (B, 3, S, S) float32 in [0, 1]."""
        output = full_precision(self.decoder(self.post_quant_conv(self.quantize.vectors(codes))))
        return (output if self.config.pixels == "unit" else output / 2 + 0.5).clamp(0, 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode to codes and decode; (B, 3, S, S) in [0, 1] -> same."""
        return self.decode(self.encode(images))
