"""Diffusion prior: a causal transformer that predicts a CLIP image embedding from a noised one (Ramesh et al. 2022).

B batch, P captions, T caption positions (`n_text`), D embedding width, C width, L = T + 4 positions of the stream, or
T + 3 without time.

In order (sec. 2.2): caption tokens, the caption's CLIP embedding z_t, the timestep, the noised z_i, and a learned query
whose output is the prediction: z_i itself, standardized by `principal`. Attention is causal, so the
keys and values of a caption and its z_t serve all timesteps. With `captions = "states"`, "caption tokens" are states
of CLIP's text tower; with `time = False`, the prior makes z_i of noise in one pass (ECLIPSE, Patel et al. 2023).
"""

from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_cli.errors import DalleError
from dalle_cli.models.cache import Prompt
from dalle_cli.models.embeddings import (
    Captions,
    CaptionStates,
    EmbeddingTransformer,
    MeanStd,
    Principal,
    residual_blocks,
)
from dalle_cli.models.kernels import causal_attention_after_prefix
from dalle_cli.models.prior import PriorConfig
from dalle_cli.models.unet import sinusoids

CAPTIONS = ("tokens", "states")


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
    captions: str = "tokens"  # or "states": of CLIP's frozen text tower
    text_width: int = 768  # of these states
    time: bool = True  # a position for the timestep; without one, a single pass makes z_i of noise
    normalized: bool = True  # z_i have length 1; else they keep the length that CLIP gives them

    def __post_init__(self) -> None:
        if self.kind != "diffusion":
            raise DalleError(f'expected kind "diffusion" of a diffusion prior, found {self.kind!r}; leave it out')
        for name in ("n_text_vocab", "n_text", "n_embedding", "text_width"):
            if getattr(self, name) < 1:
                raise DalleError(f"expected {name} of at least 1, found {getattr(self, name)}; correct the recipe")
        if self.n_timestep < 2:
            raise DalleError(f"expected n_timestep of at least 2, found {self.n_timestep}; 1000 is the paper's")
        if self.schedule not in ("cosine", "linear"):
            raise DalleError(f'expected schedule "cosine" or "linear", found {self.schedule!r}; correct the recipe')
        if self.captions not in CAPTIONS:
            raise DalleError(f"expected captions {' or '.join(CAPTIONS)}, found {self.captions!r}; correct the recipe")
        if self.blocks.n_embd % 2:
            raise DalleError(f"expected n_embd even, found {self.n_embd}; correct the recipe")

    @cached_property
    def blocks(self) -> PriorConfig:
        """The sizes of the residual blocks, which check themselves."""
        return PriorConfig(self.n_layer, self.n_head, self.n_embd, block=self.block, dropout=self.dropout)

    @property
    def n_own(self) -> int:
        """Positions after caption and z_t: timestep, noised z_i, query."""
        return 3 if self.time else 2

    @property
    def n_positions(self) -> int:
        """Positions of the stream: L."""
        return self.n_text + 1 + self.n_own


class DiffusionPrior(EmbeddingTransformer):
    """Predict z_i from a caption, its z_t, the timestep and a noised z_i."""

    config: DiffusionPriorConfig

    def __init__(self, config: DiffusionPriorConfig) -> None:
        super().__init__()
        self.config = config
        width, n_embedding = config.n_embd, config.n_embedding
        self.principal: Principal | MeanStd = (Principal if config.normalized else MeanStd)(n_embedding)
        self.captions = (
            Captions(config.n_text_vocab, config.n_text, n_embedding, width)
            if config.captions == "tokens"
            else CaptionStates(config.n_text, config.text_width, n_embedding, width)
        )
        if config.time:
            self.time_in = nn.Linear(width, width)
            self.time_out = nn.Linear(width, width)
        self.image_in = nn.Linear(config.n_embedding, width)
        self.query = nn.Parameter(torch.empty(width))
        self.position = nn.Embedding(config.n_positions, width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = residual_blocks(config.blocks)
        self.lasts = (*[None] * (config.n_layer - 1), 1)  # of the last block only the query's output is used
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, config.n_embedding)
        self.initialize()

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor, lengths: Tensor, z_t: Tensor) -> Tensor:
        """Predict the standardized z_i without noise: (B, D), (B,), (B, T), (B,), (B, D) -> (B, D).

        Timesteps may be fractions. A prior of states takes them, (B, T, text_width), in place of tokens.

        Raises: DalleError where the shapes are not the model's.
        """
        captions, visible = self.captions(tokens, lengths, z_t), self.captions.visible(lengths)
        return self._prediction(self.transform(captions, self._own(x, t), visible))

    def loss(
        self, x: Tensor, t: Tensor, tokens: Tensor, lengths: Tensor, z_t: Tensor, x_start: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the prediction of x_start (B, D) (sec. 2.2); the others as `forward`."""
        predicted = self(x, t, tokens, lengths, z_t)
        return F.mse_loss(predicted.to(x_start.dtype), x_start), {}

    def step(self, x: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """`forward` with captions from `prefill`, each for B / P consecutive rows: -> (B, D)."""
        n_own, seen = self.config.n_own, prompt.visible
        stream = self.dropout(self._own(x, t) + self.position.weight[-n_own:])
        rotary = self.rotary(stream.device)[:, -n_own:]
        for block, keys, values, last in zip(self.blocks, prompt.keys, prompt.values, self.lasts, strict=True):
            attend = partial(causal_attention_after_prefix, keys=keys, values=values, visible=seen)
            stream = block(stream, attend, rotary, last)
        return self._prediction(stream)

    def flops(self) -> float:
        """Floating-point operations of forward and backward for one pair."""
        c, length, width = self.config, self.config.n_positions, self.config.n_embd
        sizes = [sum(p.numel() for p in block.parameters() if p.ndim == 2) for block in self.blocks]
        everywhere = sum(sizes[:-1]) + 3 * width**2  # of the last block, queries, keys and values
        once = sizes[-1] - 3 * width**2 + 3 * width * c.n_embedding + (2 * width**2 if c.time else 0)
        once += c.n_text * c.text_width * width if c.captions == "states" else 0
        attended = (c.n_layer - 1) * length * (length + 1) // 2 + length
        return 6.0 * (everywhere * length + once + 2 * width * attended)

    def _own(self, x: Tensor, t: Tensor) -> Tensor:
        """Timestep if there is one, noised z_i and query, without their positions: (B, D), (B,) -> (B, 3 or 2, C)."""
        dtype = self.image_in.weight.dtype
        image = self.image_in(x.to(dtype))
        own = [image, self.query.to(image.dtype).expand_as(image)]
        if self.config.time:
            features = sinusoids(t, self.config.n_embd).to(dtype)
            own.insert(0, self.time_out(F.silu(self.time_in(features))))
        return torch.stack(own, dim=1)

    def _prediction(self, stream: Tensor) -> Tensor:
        """The output at the query, outside of autocast: (B, L, C) -> (B, D)."""
        with torch.autocast(stream.device.type, enabled=False):
            y: Tensor = self.out(self.norm(stream[:, -1].to(self.out.weight.dtype)))
        return y
