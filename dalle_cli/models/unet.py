"""U-Net that predicts the noise in an image (Dhariwal & Nichol 2021, "ADM"; Nichol et al. 2022, "GLIDE").

Blocks compute what those of `diffusers` do in the layout of published unCLIP weights (tests/importing/test_unets.py).

Shapes: B batch, C channels, H W pixels, E width of the timestep's embedding, T context tokens, K their width,
N heads, D their width.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_cli.errors import DalleError
from dalle_cli.models import kernels
from dalle_cli.models.blocks import StackedBlock

EPS = 1e-5
MAX_PERIOD = 10_000.0  # of the sinusoids of a timestep, as in all papers


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net, and the diffusion that it denoises; the defaults are the decoder's (2022, table 3).

    Raises: DalleError where sizes do not fit together.
    """

    image_size: int = 64
    width: int = 512  # channels at the full size
    multipliers: tuple[int, ...] = (1, 2, 3, 4)  # of the width, at the full size, at half of it, ...
    depth: int = 3  # residual blocks at each size
    attention: tuple[int, ...] = (32, 16, 8)  # sides at which blocks attend
    head_width: int = 64
    groups: int = 32  # of channels, for group norm
    dropout: float = field(default=0.1, metadata={"warm_start": "free"})
    scale_shift: bool = True  # the timestep scales and shifts (AdaGN); else only shifts
    resample_blocks: bool = True  # resize within residual blocks; else by a convolution between them
    schedule: str = "cosine"
    betas: tuple[float, ...] = (1e-4, 0.02)  # of schedule "linear": the first and the last of 1000 timesteps
    n_timestep: int = 1000
    prediction: str = "epsilon"
    learned_variance: bool = True
    zero_snr: bool = False
    channels: int = 3  # of the images; 4 where they are latents of another model

    def __post_init__(self) -> None:
        for name in ("multipliers", "attention", "betas"):  # TOML and JSON only know lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("image_size", "width", "depth", "head_width", "groups", "n_timestep", "channels"):
            if getattr(self, name) < 1:
                raise DalleError(f"expected {name} of at least 1, found {getattr(self, name)}; raise it")
        if not self.multipliers or min(self.multipliers) < 1:
            raise DalleError(f"expected multipliers of 1 or more, found {self.multipliers}; one for each size")
        if not 0 <= self.dropout < 1:
            raise DalleError(f"expected dropout in [0, 1), found {self.dropout}")
        self._check_sizes()

    def _check_sizes(self) -> None:
        self.check_side(self.image_size)
        if self.width % self.groups:
            raise DalleError(f"expected groups to divide width {self.width}, found {self.groups}; change one of them")
        if self.width % 2:
            raise DalleError(f"expected an even width, found {self.width}; change it")
        for side in self.attention:
            if side not in self.sides:
                known = ", ".join(map(str, self.sides))
                raise DalleError(f"expected attention at sides among {known}, found {side}; change one of them")
        if self.attention and any(width % self.head_width for width in self.widths):
            found = f"{self.head_width}"
            raise DalleError(f"expected head_width to divide the widths {self.widths}, found {found}; change it")

    def check_side(self, side: int) -> None:
        """Raises: DalleError if images of this side cannot be halved once between all sizes."""
        halved = 2 ** (len(self.multipliers) - 1)
        if side % halved:
            raise DalleError(f"expected images whose side {halved} divides, found {side}; take fewer multipliers")

    @property
    def widths(self) -> list[int]:
        """Channels at each size."""
        return [self.width * m for m in self.multipliers]

    @property
    def sides(self) -> list[int]:
        """Image side at each size, the full size first."""
        return [self.image_size >> level for level in range(len(self.multipliers))]

    @property
    def time_width(self) -> int:
        """E."""
        return 4 * self.width

    @property
    def out_channels(self) -> int:
        """Channels of what is predicted, and as many again for a learned variance."""
        return 2 * self.channels if self.learned_variance else self.channels


def sinusoids(t: Tensor, width: int) -> Tensor:
    """Features of timesteps, which may be fractions (Vaswani et al. 2017, sec. 3.5): (B,) -> (B, width).

    Cosines, then sines, of wavelengths from 2 pi to MAX_PERIOD times that, in 32 bits or more.
    """
    half = width // 2
    t = t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t.float()
    rates = torch.exp(-math.log(MAX_PERIOD) / half * torch.arange(half, device=t.device, dtype=t.dtype))
    angles = t[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """Embedding of a timestep or a noise level, an input of all blocks."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, E)."""
        features = sinusoids(t, self.width).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(features)))  # type: ignore[no-any-return]


class UNetAttention(nn.Module):
    """Self-attention over pixels and cross-attention to context tokens, in one softmax; residual."""

    def __init__(self, width: int, head_width: int, groups: int, context: int) -> None:
        """`context` is K; 0 where there is none."""
        super().__init__()
        self.n_head = width // head_width
        self.norm = nn.GroupNorm(groups, width, eps=EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.context_kv = nn.Linear(context, 2 * width) if context else None
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, L, parts * C) -> parts times (B, N, L, D)."""
        return x.view(*x.shape[:2], parts, self.n_head, -1).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x: Tensor, context: Tensor | None, visible: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B, T, K) -> (B, C, H, W); `visible` (B, T) bool are the tokens to attend to, None is all."""
        pixels = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)
        q, k, v = self._heads(self.qkv(pixels), 3)
        if self.context_kv is not None:
            assert context is not None
            more_k, more_v = self._heads(self.context_kv(context), 2)
            k, v = torch.cat([more_k, k], dim=2), torch.cat([more_v, v], dim=2)
        keys = None if visible is None else F.pad(visible, (0, pixels.shape[1]), value=True)
        h = self.out(kernels.attention(q, k, v, keys).transpose(1, 2).flatten(2))
        y: Tensor = x + h.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
        return y


def _resized(x: Tensor, change: str) -> Tensor:
    """Halve the size by average pooling, or double it by nearest neighbor."""
    if change == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class UNetBlock(StackedBlock):
    """Residual block of two convolutions with the timestep added in between, then optional attention."""

    def __init__(
        self, config: UNetConfig, n_in: int, n_out: int, context: int = 0, attends: bool = False, change: str = ""
    ) -> None:
        """With `change` "down" or "up" the image is resized before the first convolution."""
        super().__init__()
        self.change, self.scale_shift = change, config.scale_shift
        self.norm1 = nn.GroupNorm(config.groups, n_in, eps=EPS)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.time = nn.Linear(config.time_width, 2 * n_out if config.scale_shift else n_out)
        self.norm2 = nn.GroupNorm(config.groups, n_out, eps=EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.attention = UNetAttention(n_out, config.head_width, config.groups, context) if attends else None
        nn.init.zeros_(self.conv2.weight)  # each block starts as its shortcut
        assert self.conv2.bias is not None
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None, visible: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B, E), (B, T, K), (B, T) -> (B, C', H', W')."""
        h = F.silu(self.norm1(x))
        if self.change:
            h, x = _resized(h, self.change), _resized(x, self.change)
        h = self.conv1(h)
        shift = self.time(F.silu(time))[:, :, None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + shift)
        h = self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))
        return h if self.attention is None else self.attention(h, context, visible)  # type: ignore[no-any-return]


class Resample(StackedBlock):
    """A convolution that halves the size, or follows on doubling it."""

    def __init__(self, width: int, change: str) -> None:
        super().__init__()
        self.change = change
        self.conv = nn.Conv2d(width, width, 3, stride=2 if change == "down" else 1, padding=1)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None, visible: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H', W')."""
        return self.conv(x if self.change == "down" else _resized(x, "up"))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Blocks down to the smallest size and up again, with a skip connection from each down block.

    Weights and activations are channels_last, which is faster for convolutions.
    """

    def __init__(self, config: UNetConfig, in_channels: int = 3, context: int = 0) -> None:
        """`context` is K; 0 without cross-attention."""
        super().__init__()
        self.config = config
        self.time_embedding = TimeEmbedding(config.width, config.time_width)
        self.conv_in = nn.Conv2d(in_channels, config.width, 3, padding=1)
        attends = [side in config.attention for side in config.sides]
        self.down, skips = self._build_down(attends, context)
        last = config.widths[-1]
        anywhere = bool(config.attention)  # attention anywhere: at the smallest size, too
        self.middle = nn.ModuleList(UNetBlock(config, last, last, context, attend) for attend in (anywhere, False))
        self.up = self._build_up(attends, context, skips)
        self.norm_out = nn.GroupNorm(config.groups, config.widths[0], eps=EPS)
        self.conv_out = nn.Conv2d(config.widths[0], config.out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        assert self.conv_out.bias is not None
        nn.init.zeros_(self.conv_out.bias)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _resample(self, width: int, change: str) -> nn.Module:
        c = self.config
        return UNetBlock(c, width, width, change=change) if c.resample_blocks else Resample(width, change)

    def _build_down(self, attends: list[bool], context: int) -> tuple[nn.ModuleList, list[int]]:
        """The down blocks, and the channels of all skip connections."""
        c, blocks, width = self.config, nn.ModuleList(), self.config.width
        skips = [width]
        for level, wide in enumerate(c.widths):
            for _ in range(c.depth):
                blocks.append(UNetBlock(c, width, wide, context, attends[level]))
                width = wide
                skips.append(width)
            if level + 1 < len(c.widths):
                blocks.append(self._resample(width, "down"))
                skips.append(width)
        return blocks, skips

    def _build_up(self, attends: list[bool], context: int, skips: list[int]) -> nn.ModuleList:
        c, blocks, width, skips = self.config, nn.ModuleList(), self.config.widths[-1], skips[:]
        for level in reversed(range(len(c.widths))):
            for _ in range(c.depth + 1):
                blocks.append(UNetBlock(c, width + skips.pop(), c.widths[level], context, attends[level]))
                width = c.widths[level]
            if level:
                blocks.append(self._resample(width, "up"))
        return blocks

    def forward(
        self, x: Tensor, t: Tensor, added: Tensor | None = None, context: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, C, H, W), (B,) timesteps, (B, E) added to the timestep's embedding, (B, T, K) -> (B, 3 or 6, H, W).

        Blocks attend to the context tokens that are `visible` (B, T) bool; None is all.
        """
        time = self.time_embedding(t)
        if added is not None:
            time = time + added
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for block in self.down:
            x = block(x, time, context, visible)
            skips.append(x)
        for block in self.middle:
            x = block(x, time, context, visible)
        for block in self.up:
            skip = None if getattr(block, "change", "") else skips.pop()
            x = block(x if skip is None else torch.cat([x, skip], dim=1), time, context, visible)
        with torch.autocast(x.device.type, enabled=False):  # the prediction needs more digits than bfloat16 has
            y: Tensor = self.conv_out(F.silu(self.norm_out(x.to(self.conv_out.weight.dtype))))
        return y
