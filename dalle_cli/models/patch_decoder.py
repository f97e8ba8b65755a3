"""Patch transformer: a diffusion decoder without convolutions (Li & He 2025, "JiT", arXiv 2511.13720).

The image is cut into large patches, which join the caption's states and z_i in one attention. The network predicts the
image itself: with patches this large, predicting noise or velocity fails (sec. 3 there).

Shapes: B batch, S side in pixels, P patches, D width of an embedding z_i, T caption length, C width, L = 1 + T + P
positions; pixels are in [-1, 1].
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_cli.errors import DalleError
from dalle_cli.models import kernels
from dalle_cli.models.attention import rotary_angles
from dalle_cli.models.blocks import StackedBlock
from dalle_cli.models.decoder import Conditioning, TextEncoder
from dalle_cli.models.unet import TimeEmbedding


@dataclass(frozen=True)
class PatchDecoderConfig:
    """Sizes of a patch transformer, and the diffusion that it denoises.

    Raises: DalleError where sizes do not fit together.
    """

    kind: str = "patch"
    image_size: int = 64
    patch_size: int = 8
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_embedding: int = 1024  # D
    unit_variance: bool = True  # scale z_i to entries of unit variance; else use it unchanged
    n_text: int = 32  # T; 0 for a decoder without captions
    n_text_vocab: int = 16384
    text_layers: int = 4
    dropout: float = field(default=0.0, metadata={"warm_start": "free"})
    schedule: str = "flow"
    n_timestep: int = 1000
    prediction: str = "x_start"
    zero_snr: bool = False

    # what a patch transformer has no choice of
    sketch = 0
    learned_variance = False
    channels, captions, betas = 3, "tokens", (1e-4, 0.02)

    def __post_init__(self) -> None:
        if self.kind != "patch":
            raise DalleError(f'expected kind "patch" of this decoder, found {self.kind!r}; leave it out for a U-Net')
        for name in ("image_size", "patch_size", "n_layer", "n_head", "n_embd", "n_embedding", "n_timestep"):
            if getattr(self, name) < 1:
                raise DalleError(f"expected {name} of at least 1, found {getattr(self, name)}; raise it")
        if self.n_text < 0 or (self.n_text and min(self.n_text_vocab, self.text_layers) < 1):
            raise DalleError(f"expected captions of a vocabulary, found {self.n_text} tokens of {self.n_text_vocab}")
        if self.image_size % self.patch_size:
            found = f"{self.image_size} and {self.patch_size}"
            raise DalleError(f"expected patch_size to divide image_size, found {found}; change one of them")
        if self.n_embd % (4 * self.n_head):
            found = f"{self.n_embd} / {self.n_head}"
            raise DalleError(f"expected heads as wide as a multiple of 4 for rotary angles, found {found}; change them")

    @property
    def grid(self) -> int:
        """Patches in a row of the image."""
        return self.image_size // self.patch_size


def to_patches(x: Tensor, side: int) -> Tensor:
    """Cut images into square patches, in raster order: (B, 3, S, S) -> (B, P, 3 side^2)."""
    return F.pixel_unshuffle(x, side).flatten(2).transpose(1, 2)


def from_patches(patches: Tensor, side: int) -> Tensor:
    """The inverse of `to_patches`: (B, P, 3 side^2) -> (B, 3, S, S)."""
    grid = math.isqrt(patches.shape[1])
    return F.pixel_shuffle(patches.transpose(1, 2).reshape(len(patches), -1, grid, grid), side)


class PatchBlock(StackedBlock):
    """A residual block whose branches are shifted, scaled and gated by the timestep (Peebles & Xie 2023, AdaLN-Zero).

    One projection of the timestep serves all blocks, and each block adds a table of its own (Chen et al. 2023, PixArt).
    """

    def __init__(self, config: PatchDecoderConfig) -> None:
        super().__init__()
        width, hidden = config.n_embd, 32 * max(1, round(config.n_embd / 12))
        self.table = nn.Parameter(torch.zeros(6, width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.qk_scale = nn.Parameter(torch.ones(config.n_head))
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 2 * hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, modulation: Tensor, rotary: Tensor) -> Tensor:
        """(B, L, C), (B, 6, C), (2, L, C / n_head) -> (B, L, C)."""
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = (modulation + self.table)[:, :, None].unbind(1)
        h = kernels.rms_norm(x) * (1 + scale_1) + shift_1
        q, k, v = kernels.apply_rotary(self.qkv(h), rotary)
        attended = kernels.attention(q * self.qk_scale.to(q.dtype)[:, None, None], k, v)
        x = x + (1 + gate_1) * self.dropout(self.attention_out(attended.transpose(1, 2).flatten(2)))
        h = kernels.rms_norm(x) * (1 + scale_2) + shift_2
        y: Tensor = x + (1 + gate_2) * self.dropout(self.mlp_out(kernels.swiglu(self.mlp_in(h))))
        return y


class PatchDecoder(nn.Module):
    """A transformer over z_i, a caption's states and the patches of a noised image; predicts the image."""

    def __init__(self, config: PatchDecoderConfig) -> None:
        super().__init__()
        self.config = config
        width, pixels = config.n_embd, 3 * config.patch_size**2
        self.null_embedding = nn.Parameter(torch.randn(config.n_embedding))
        self.embedding_token = nn.Linear(config.n_embedding, width)
        sizes = (config.n_text, config.n_text_vocab, width, config.text_layers, config.n_head)
        self.text = TextEncoder(*sizes) if config.n_text else None
        self.time = TimeEmbedding(width // 2 * 2, width)
        self.modulation = nn.Linear(width, 8 * width)
        self.patch_in = nn.Linear(pixels, width)
        self.position = nn.Embedding(config.grid**2, width)
        self.blocks = nn.ModuleList(PatchBlock(config) for _ in range(config.n_layer))
        self.patch_out = nn.Linear(width, pixels)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Matrices from N(0, 0.02), where a branch ends divided by sqrt(2 n_layer); the output and modulation zero."""
        for name, parameter in self.blocks.named_parameters():
            if parameter.ndim == 2 and not name.endswith("table"):
                residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                parameter.normal_(0, 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)
        self.position.weight.normal_(0, 0.02)
        for layer in (self.modulation, self.patch_out):
            layer.weight.zero_()
            layer.bias.zero_()

    def condition(self, embeddings: Tensor, given: Tensor, tokens: Tensor, lengths: Tensor) -> Conditioning:
        """Conditioning from (B, D) z_i, (B,) bool that is false where z_i is null, (B, T) and (B,) int64 captions.

        A caption of length 0 is null. A decoder without captions ignores them.

        Raises: DalleError for embeddings or captions of another size.
        """
        c = self.config
        if embeddings.shape[1] != c.n_embedding:
            raise DalleError(f"expected embeddings of {c.n_embedding} numbers, found {embeddings.shape[1]}")
        if c.unit_variance:
            embeddings = F.normalize(embeddings, dim=1) * math.sqrt(c.n_embedding)
        z = torch.where(given[:, None], embeddings.to(self.null_embedding.dtype), self.null_embedding)
        token = self.embedding_token(z)
        context = token[:, None]
        if self.text is not None:
            context = torch.cat([context, self.text(tokens, lengths).to(context.dtype)], dim=1)
        return Conditioning(token, context)

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """(B, 3, S, S) at timesteps (B,) -> the predicted image (B, 3, S, S)."""
        c, n_context = self.config, conditioning.context.shape[1]
        patches = self.patch_in(to_patches(x, c.patch_size).to(self.patch_in.weight.dtype))
        patches = patches + self.position.weight
        stream = torch.cat([conditioning.context.to(patches.dtype), patches], dim=1)
        time = self.time(t) + conditioning.added
        modulation = self.modulation(F.silu(time)).unflatten(1, (8, -1))
        rotary = rotary_angles(n_context, c.grid, c.n_embd // c.n_head, x.device, whole=True)
        for block in self.blocks:
            stream = block(stream, modulation[:, :6], rotary)
        y = kernels.rms_norm(stream[:, n_context:]) * (1 + modulation[:, 6:7]) + modulation[:, 7:]
        return from_patches(kernels.float32_linear(y, self.patch_out.weight, self.patch_out.bias), c.patch_size)

    def denoise(
        self, x: Tensor, t: Tensor, embeddings: Tensor, given: Tensor, tokens: Tensor, lengths: Tensor
    ) -> Tensor:
        """`condition`, then `forward`."""
        return self(x, t, self.condition(embeddings, given, tokens, lengths))  # type: ignore[no-any-return]
