"""Diffusion prior: a causal transformer that tells a CLIP image embedding from a noised one (Ramesh et al. 2022).

B batch, P captions, T caption positions (`n_text`), D embedding width, C width, L = T + 4 positions of the stream.

In order (sec. 2.2): caption tokens, the caption's CLIP embedding z_t, the timestep, the noised z_i, and a learned query
whose output is the prediction: z_i itself, standardized by `principal`. As no position sees what lies ahead, a caption
and its z_t are read once for all timesteps.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_cli.errors import DalleError
from dalle_cli.models.cache import Prompt
from dalle_cli.models.embeddings import Captions, Principal, after_prefix, causal, draw_weights, stack, stream_rotary
from dalle_cli.models.prior import PriorConfig

OWN = 3  # positions behind caption and z_t: timestep, noised z_i, query
LONGEST_WAVE = 10_000.0  # of the timestep's features


@dataclass(frozen=True)
class DiffusionPriorConfig:
    """Sizes of the diffusion prior; the defaults are the paper's, of which those of the transformer are from memory.

    Raises: DalleError where the numbers do not fit each other.
    """

    kind: str = "diffusion"
    n_layer: int = 24
    n_head: int = 32
    n_embd: int = 2048
    n_text_vocab: int = 49408
    n_text: int = 77
    n_embedding: int = 1024  # width of CLIP's embeddings
    block: str = "paper"  # or "modern", as of the token prior
    dropout: float = field(default=0.0, metadata={"warm_start": "free"})
    schedule: str = "cosine"  # of the noise; or "linear"
    n_timestep: int = 1000

    def __post_init__(self) -> None:
        if self.kind != "diffusion":
            raise DalleError(f'expected kind "diffusion" of a diffusion prior, found {self.kind!r}; leave it out')
        for name in ("n_text_vocab", "n_text", "n_embedding"):
            if getattr(self, name) < 1:
                raise DalleError(f"expected {name} of at least 1, found {getattr(self, name)}; correct the recipe")
        if self.n_timestep < 2:
            raise DalleError(f"expected n_timestep of at least 2, found {self.n_timestep}; 1000 is the paper's")
        if self.schedule not in ("cosine", "linear"):
            raise DalleError(f'expected schedule "cosine" or "linear", found {self.schedule!r}; correct the recipe')
        if self.blocks.n_embd % 2:
            raise DalleError(f"expected n_embd even, found {self.n_embd}; correct the recipe")

    @cached_property
    def blocks(self) -> PriorConfig:
        """The sizes of the residual blocks, which check themselves."""
        return PriorConfig(self.n_layer, self.n_head, self.n_embd, block=self.block, dropout=self.dropout)

    @property
    def n_positions(self) -> int:
        """Positions of the stream: L."""
        return self.n_text + 1 + OWN


class DiffusionPrior(nn.Module):
    """From caption, z_t, timestep and a noised z_i to z_i."""

    def __init__(self, config: DiffusionPriorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.n_embd
        self.principal = Principal(config.n_embedding)
        self.captions = Captions(config.n_text_vocab, config.n_text, config.n_embedding, width)
        self.time_in = nn.Linear(width, width)
        self.time_out = nn.Linear(width, width)
        self.image_in = nn.Linear(config.n_embedding, width)
        self.query = nn.Parameter(torch.empty(width))
        self.position = nn.Embedding(config.n_positions, width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = stack(config.blocks)
        self.lasts = (*[None] * (config.n_layer - 1), 1)  # of the last block nothing is read but the query
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, config.n_embedding)
        draw_weights(self, config.n_layer)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor, lengths: Tensor, z_t: Tensor) -> Tensor:
        """The z_i that a noised one is made of, standardized: (B, D), (B,), (B, T), (B,), (B, D) -> (B, D).

        Timesteps may be fractions.

        Raises: DalleError where the shapes are not the model's.
        """
        captions, own = self.captions(tokens, lengths, z_t), self._own(x, t)
        stream = self.dropout(torch.cat([captions, own], dim=1) + self.position.weight)
        places = stream_rotary(self.config.blocks, self.config.n_positions, stream.device)
        for block, last in zip(self.blocks, self.lasts, strict=True):
            stream = block(stream, causal, places, last)
        return self._answer(stream)

    def loss(
        self, x: Tensor, t: Tensor, tokens: Tensor, lengths: Tensor, z_t: Tensor, x_start: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the prediction of x_start (B, D) (sec. 2.2); the others as `forward`."""
        predicted = self(x, t, tokens, lengths, z_t)
        return F.mse_loss(predicted.to(x_start.dtype), x_start), {}

    def prefill(self, tokens: Tensor, lengths: Tensor, z_t: Tensor) -> Prompt:
        """Read captions once, for any number of timesteps: (P, T), (P,), (P, D) -> Prompt, which has no logits.

        Raises: DalleError where the shapes are not the model's.
        """
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys.append(k.contiguous())
            values.append(v.contiguous())
            return causal(q, k, v)

        captions = self.captions(tokens, lengths, z_t)
        stream = self.dropout(captions + self.position.weight[:-OWN])
        places = stream_rotary(self.config.blocks, self.config.n_positions, stream.device)[:, :-OWN]
        for block, last in zip(self.blocks, self.lasts, strict=True):
            stream = block(stream, attend, places, last)
        return Prompt(stream.new_zeros(len(stream), 0), tuple(keys), tuple(values))

    def step(self, x: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """`forward` behind captions that were read already, each for B / P rows one after another: -> (B, D)."""
        stream = self.dropout(self._own(x, t) + self.position.weight[-OWN:])
        places = stream_rotary(self.config.blocks, self.config.n_positions, stream.device)[:, -OWN:]
        for block, keys, values, last in zip(self.blocks, prompt.keys, prompt.values, self.lasts, strict=True):
            stream = block(stream, partial(after_prefix, keys=keys, values=values), places, last)
        return self._answer(stream)

    def flops(self) -> float:
        """Floating-point operations of forward and backward for one pair."""
        length, width = self.config.n_positions, self.config.n_embd
        sizes = [sum(p.numel() for p in block.parameters() if p.ndim == 2) for block in self.blocks]
        everywhere = sum(sizes[:-1]) + 3 * width**2  # of the last block, queries, keys and values
        once = sizes[-1] - 3 * width**2 + 3 * width * self.config.n_embedding + 2 * width**2
        attended = (self.config.n_layer - 1) * length * (length + 1) // 2 + length
        return 6.0 * (everywhere * length + once + 2 * width * attended)

    def _own(self, x: Tensor, t: Tensor) -> Tensor:
        """Timestep, noised z_i and query, without their positions: (B, D), (B,) -> (B, 3, C)."""
        weight = self.time_in.weight
        features = timestep_features(t, self.config.n_embd).to(weight.dtype)
        time = self.time_out(F.silu(self.time_in(features)))
        image = self.image_in(x.to(weight.dtype))
        return torch.stack([time, image, self.query.to(time.dtype).expand_as(time)], dim=1)

    def _answer(self, stream: Tensor) -> Tensor:
        """What the query has found, outside of autocast: (B, L, C) -> (B, D)."""
        with torch.autocast(stream.device.type, enabled=False):
            y: Tensor = self.out(self.norm(stream[:, -1].to(self.out.weight.dtype)))
        return y


def timestep_features(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines of a timestep, of wavelengths from 2 pi to 10,000 times that: (B,) -> (B, C).

    As in Vaswani et al. 2017, sec. 3.5, in the order of the authors' code for diffusion; in 32 bits or more.
    """
    t = t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t.float()
    half = width // 2
    waves = torch.exp(-math.log(LONGEST_WAVE) / half * torch.arange(half, dtype=t.dtype, device=t.device))
    angle = t[:, None] * waves
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
