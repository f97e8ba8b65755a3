"""Autoregressive prior: a causal transformer over the principal components of a CLIP image embedding (2022, sec. 2.2).

B batch, P captions, K candidates of each, T caption positions (`n_text`), D embedding width, M components, V buckets of
each, C width, L = T + 1 + M positions of the stream.

In order: caption tokens, the caption's CLIP embedding z_t, the quantized dot product z_i . z_t, then the buckets of the
components by falling eigenvalue, without the last. The dot product's position predicts the first bucket, and each
bucket's position the next one.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from dalle_cli.errors import DalleError
from dalle_cli.models.attention import Pattern
from dalle_cli.models.cache import Cache, Prompt
from dalle_cli.models.embeddings import Captions, EmbeddingTransformer, Principal, residual_blocks
from dalle_cli.models.kernels import head_logits, head_loss
from dalle_cli.models.prior import PriorConfig


@dataclass(frozen=True)
class AutoregressivePriorConfig:
    """Sizes of the autoregressive prior; the defaults are the paper's, those of the transformer from memory.

    Raises: DalleError where the numbers do not fit each other.
    """

    kind: str = "autoregressive"
    n_layer: int = 24
    n_head: int = 32
    n_embd: int = 2048
    n_text_vocab: int = 49408
    n_text: int = 77
    n_embedding: int = 1024  # width of CLIP's embeddings
    n_component: int = 319  # principal components that are sampled; the others keep their mean
    n_bucket: int = 1024  # of each component, between its extremes in the training data
    n_dot: int = 64  # of the dot product, each with equally many training images; not given in the paper
    block: str = "paper"  # or "modern", as of the token prior
    dropout: float = field(default=0.0, metadata={"warm_start": "free"})

    def __post_init__(self) -> None:
        if self.kind != "autoregressive":
            raise DalleError(f'expected kind "autoregressive" of this prior, found {self.kind!r}; leave it out')
        for name in ("n_text_vocab", "n_text", "n_embedding", "n_component"):
            if getattr(self, name) < 1:
                raise DalleError(f"expected {name} of at least 1, found {getattr(self, name)}; correct the recipe")
        for name in ("n_bucket", "n_dot"):
            if getattr(self, name) < 2:
                raise DalleError(f"expected {name} of at least 2, found {getattr(self, name)}; correct the recipe")
        if self.n_component > self.n_embedding:
            found = f"{self.n_component} of {self.n_embedding}"
            raise DalleError(f"expected n_component no more than n_embedding, found {found}; lower it, or 0 measures")
        assert self.blocks

    @cached_property
    def blocks(self) -> PriorConfig:
        """The sizes of the residual blocks, which check themselves."""
        return PriorConfig(self.n_layer, self.n_head, self.n_embd, block=self.block, dropout=self.dropout)

    @property
    def n_positions(self) -> int:
        """Positions of the stream: L."""
        return self.n_text + 1 + self.n_component


class AutoregressivePrior(EmbeddingTransformer):
    """Predict each bucket from the caption, z_t, the dot product and the buckets before it."""

    config: AutoregressivePriorConfig
    low: Tensor  # (M,) the smallest coordinate of each component in the training data
    high: Tensor  # (M,) the largest
    edges: Tensor  # (n_dot - 1,) between the buckets of the dot product, rising

    def __init__(self, config: AutoregressivePriorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.n_embd
        self.principal = Principal(config.n_embedding)
        self.register_buffer("low", torch.full((config.n_component,), -1.0))
        self.register_buffer("high", torch.ones(config.n_component))
        self.register_buffer("edges", torch.linspace(-1, 1, config.n_dot + 1)[1:-1])
        self.captions = Captions(config.n_text_vocab, config.n_text, config.n_embedding, width)
        self.dot = nn.Embedding(config.n_dot + 1, width)  # and one of null captions
        self.bucket = nn.Embedding(config.n_bucket, width)
        self.position = nn.Embedding(config.n_positions, width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = residual_blocks(config.blocks)
        self.lasts = [None] * config.n_layer
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.n_bucket)
        self.initialize()

    def quantize(self, z: Tensor) -> Tensor:
        """The bucket of each component, those beyond the training range in the outermost: (B, D) -> (B, M) int64."""
        share = (self.principal.project(z, self.config.n_component) - self.low) / self._range
        return (share * self.config.n_bucket).floor().clamp(0, self.config.n_bucket - 1).long()

    def dequantize(self, buckets: Tensor) -> Tensor:
        """The embedding of the buckets' middles, to length 1: (B, M) int64 -> (B, D)."""
        return self.principal.rebuild(self.low + (buckets + 0.5) / self.config.n_bucket * self._range)

    def quantize_dot(self, dots: Tensor) -> Tensor:
        """The bucket of dot products z_i . z_t: (B,) -> (B,) int64, rising with them."""
        return torch.bucketize(dots, self.edges, right=True)

    @property
    def _range(self) -> Tensor:
        return (self.high - self.low).clamp(min=torch.finfo(self.low.dtype).tiny)

    def forward(self, tokens: Tensor, lengths: Tensor, z_t: Tensor, dots: Tensor, buckets: Tensor) -> Tensor:
        """Logits of every bucket: (B, T), (B,) int64, (B, D), (B,), (B, M) int64 -> (B, M, V), 32 bits or more.

        Raises: DalleError where the shapes are not the model's.
        """
        return head_logits(self.head, self._read(tokens, lengths, z_t, dots, buckets))

    def loss(
        self, tokens: Tensor, lengths: Tensor, z_t: Tensor, dots: Tensor, buckets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy in nats a bucket; arguments as `forward`."""
        x = self._read(tokens, lengths, z_t, dots, buckets)
        return head_loss(self.head, x.flatten(0, 1), buckets.flatten()) / buckets.numel(), {}

    def _read(self, tokens: Tensor, lengths: Tensor, z_t: Tensor, dots: Tensor, buckets: Tensor) -> Tensor:
        """Hidden states before the head: (B, M, C)."""
        captions = self.captions(tokens, lengths, z_t)
        own = torch.cat([self._dot(dots, lengths)[:, None], self.bucket(buckets[:, :-1])], dim=1)
        y: Tensor = self.norm(self.transform(captions, own)[:, captions.shape[1] :])
        return y

    def _dot(self, dots: Tensor, lengths: Tensor) -> Tensor:
        """Embed quantized dot products; a null caption has an embedding of its own: (B,), (B,) -> (B, C)."""
        y: Tensor = self.dot(torch.where(lengths > 0, dots, self.config.n_dot))
        return y

    def cache(self, prompt: Prompt, candidates: int = 1) -> Cache:
        """Buffers to sample `candidates` embeddings for each caption of a prompt."""
        side = math.isqrt(self.config.n_component) + 1  # of a square grid that holds dot product and buckets
        pattern = Pattern("full", self.config.n_text, side)
        positions = self.position.weight[self.config.n_text + 1 :]
        return Cache(prompt, [pattern] * self.config.n_layer, candidates, positions)

    def start(self, dots: Tensor, lengths: Tensor, cache: Cache) -> Tensor:
        """Logits of the first bucket after the dot products: (P*K,), (P*K,) int64 -> (P*K, V)."""
        return self._advance(self._dot(dots, lengths), cache)

    def step(self, buckets: Tensor, cache: Cache) -> Tensor:
        """Logits of the next bucket after those at the cache's position: (P*K,) -> (P*K, V)."""
        return self._advance(self.bucket(buckets), cache)

    def _advance(self, own: Tensor, cache: Cache) -> Tensor:
        x = self.dropout((own + cache.row(cache.positions))[:, None])
        here = cache.row(self.rotary(x.device).transpose(0, 1), self.config.n_text + 1).transpose(0, 1)
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x = block(x, partial(layer.attend, cache.position), here)
        cache.position = cache.position + 1
        return head_logits(self.head, self.norm(x[:, 0]))

    @torch.no_grad()
    def measure(self, z: Tensor) -> None:
        """Widen the range of each component to include embeddings (n, D); call `forget` before the first."""
        coordinates = self.principal.project(z, self.config.n_component)
        self.low.copy_(torch.minimum(self.low, coordinates.amin(0)))
        self.high.copy_(torch.maximum(self.high, coordinates.amax(0)))

    @torch.no_grad()
    def forget(self) -> None:
        """Reset the ranges to empty."""
        self.low.fill_(math.inf)
        self.high.fill_(-math.inf)

    @torch.no_grad()
    def measure_dots(self, dots: Tensor) -> None:
        """Set the edges so that each bucket holds equally many of these dot products (n,)."""
        shares = torch.arange(1, self.config.n_dot, dtype=torch.float64) / self.config.n_dot
        self.edges.copy_(torch.quantile(dots.double(), shares))

    def flops(self) -> float:
        """Floating-point operations of forward and backward for one pair."""
        length, width = self.config.n_positions, self.config.n_embd
        inner = sum(p.numel() for block in self.blocks for p in block.parameters() if p.ndim == 2)
        heads = width * (self.config.n_component * self.config.n_bucket + self.config.n_embedding)
        attended = self.config.n_layer * length * (length + 1) // 2
        return 6.0 * (inner * length + heads + 2 * width * attended)
