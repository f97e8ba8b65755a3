"""Encoder-decoder prior over codes: the architecture of DALL-E mini (Dayma et al. 2021), a BART (Lewis et al. 2019).

The encoder reads the caption in both directions; the decoder predicts codes one after another and attends to the
encoder's states. Blocks have the norms of Normformer (Shleifer et al. 2021, sec. 2) and a gated MLP (Shazeer 2020).

B batch, T caption positions (`n_text`), W side of the code grid, C width, N heads, D their width, H width of the MLP,
V image vocabulary, P prompts, K candidates of each prompt (rows of a cache: prompts first).

Decoder position 0 holds the start embedding, position p > 0 code p - 1; position p predicts code p.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_cli.errors import DalleError
from dalle_cli.models.attention import Pattern
from dalle_cli.models.blocks import StackedBlock, init_transformer
from dalle_cli.models.cache import Cache, Prompt
from dalle_cli.models.kernels import attention, causal_attention, head_logits
from dalle_cli.models.prior import Attend, Prior, Sketches

EPS = 1e-5


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Sizes of the prior; the defaults are DALL-E mini's.

    Raises: DalleError where sizes do not fit together.
    """

    kind: str = "encoder_decoder"
    n_layer: int = 12  # of the encoder, and of the decoder
    n_head: int = 16
    n_embd: int = 1024
    n_hid: int = 2730
    n_text_vocab: int = 50264
    n_text: int = 64
    n_image_vocab: int = 16384
    grid: int = 16
    null: tuple[int, ...] = (0, 2)  # tokens of the null caption: BOS, EOS
    sketch: ClassVar[int] = 0  # this prior samples none

    def __post_init__(self) -> None:
        object.__setattr__(self, "null", tuple(self.null))  # TOML and JSON have lists
        for name in ("n_layer", "n_head", "n_embd", "n_hid", "n_text_vocab", "n_text", "n_image_vocab", "grid"):
            if getattr(self, name) < 1:
                raise DalleError(f"expected {name} of at least 1, found {getattr(self, name)}; correct it")
        if self.n_embd % self.n_head:
            found = f"{self.n_embd} and {self.n_head}"
            raise DalleError(f"expected n_embd a multiple of n_head, found {found}; correct one of them")
        if not 1 <= len(self.null) <= self.n_text or not 0 <= min(self.null) <= max(self.null) < self.n_text_vocab:
            raise DalleError(f"expected 1 to {self.n_text} tokens of the null caption, found {self.null}; correct them")

    @property
    def n_prefix(self) -> int:
        """Positions that every code sees before the codes: those of the caption, and the start."""
        return self.n_text + 1


class BiasNorm(nn.Module):
    """A layer norm with a bias and no scale, which the matrix behind it has anyway: (..., C) -> same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis."""
        return F.layer_norm(x, x.shape[-1:], None, None, EPS) + self.bias


class EncoderBlock(StackedBlock):
    """Self-attention between two norms, then a gated MLP with a norm before and one within; residual."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        width, hidden = config.n_embd, config.n_hid
        self.n_head = config.n_head
        self.norm_1 = BiasNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.attention_norm = nn.LayerNorm(width, EPS)
        self.norm_2 = BiasNorm(width)
        self.mlp_in = nn.Linear(width, 2 * hidden, bias=False)  # the gate, and what it gates
        self.mlp_norm = BiasNorm(hidden)
        self.mlp_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(B, L, C) -> same; the caller passes attention, over the stream or over a cache."""
        return self.mlp(self.self_attention(x, attend))

    def self_attention(self, x: Tensor, attend: Attend) -> Tensor:
        """The first half."""
        q, k, v = self.heads(self.qkv(self.norm_1(x)), 3)
        h = self.attention_out(attend(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.attention_norm(h.to(x.dtype))  # packed matrices give fewer digits than a norm takes
        return y

    def mlp(self, x: Tensor) -> Tensor:
        """The last half."""
        gate, value = self.mlp_in(self.norm_2(x)).chunk(2, dim=-1)
        y: Tensor = x + self.mlp_out(self.mlp_norm(F.gelu(gate) * value))
        return y

    def heads(self, x: Tensor, parts: int) -> Tensor:
        """(B, L, parts C) -> (parts, B, N, L, D)."""
        return x.view(*x.shape[:2], parts, self.n_head, -1).permute(2, 0, 3, 1, 4)


class DecoderBlock(EncoderBlock):
    """The same with cross-attention to a caption's states between the halves."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__(config)
        width = config.n_embd
        self.cross_norm = BiasNorm(width)
        self.cross_q = nn.Linear(width, width, bias=False)
        self.cross_kv = nn.Linear(width, 2 * width, bias=False)
        self.cross_out = nn.Linear(width, width, bias=False)
        self.cross_out_norm = nn.LayerNorm(width, EPS)

    def forward(self, x: Tensor, attend: Attend, cross: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        """(B, L, C) -> same; `cross` is attention to the keys and values of `keys_values`, from queries alone."""
        x = self.self_attention(x, attend)
        (q,) = self.heads(self.cross_q(self.cross_norm(x)), 1)
        h = self.cross_out(cross(q).transpose(1, 2).flatten(2))
        return self.mlp(x + self.cross_out_norm(h.to(x.dtype)))

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Of a caption's states, once for all codes: (P, T, C) -> twice (P, N, T, D)."""
        keys, values = self.heads(self.cross_kv(states), 2)
        return keys.contiguous(), values.contiguous()


class EncoderDecoderPrior(nn.Module):
    """A prior over codes that takes the place of `Prior`; a caption of length 0 is the null caption."""

    hint = None  # of a sketch

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.n_embd
        self.token = nn.Embedding(config.n_text_vocab, width)
        self.text_position = nn.Embedding(config.n_text, width)
        self.text_embedding_norm = nn.LayerNorm(width, EPS)
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.n_layer))
        self.text_norm = BiasNorm(width)
        self.start = nn.Parameter(torch.empty(width))
        self.code = nn.Embedding(config.n_image_vocab, width)
        self.code_position = nn.Embedding(config.grid**2, width)
        self.code_embedding_norm = nn.LayerNorm(width, EPS)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.n_layer))
        self.norm = BiasNorm(width)
        self.image_head = nn.Linear(width, config.n_image_vocab, bias=False)
        self.patterns = [Pattern("full", 0, config.grid)] * config.n_layer  # only the start is before the codes
        init_transformer(self.named_parameters(), config.n_layer)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.code.weight.device

    def forward(
        self, tokens: Tensor, lengths: Tensor, codes: Tensor, sketches: Sketches | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits of no token, and of every code: (B, T), (B,), (B, W, W) int64 -> (B, 0, _), (B, W*W, V) float32.

        Raises: DalleError where the shapes are not the model's.
        """
        grid = self.config.grid
        if codes.shape[1:] != (grid, grid):
            found = " x ".join(map(str, codes.shape[1:]))
            raise DalleError(f"expected codes of {grid} x {grid}, found {found}; use codes of the prior's own dVAE")
        states, visible = self.encode(tokens, lengths)
        before = torch.cat([self.start.expand(len(codes), 1, -1), self.code(codes.flatten(1)[:, :-1])], dim=1)
        x = self.code_embedding_norm(before + self.code_position.weight)
        for block in self.blocks:
            assert isinstance(block, DecoderBlock)
            keys, values = block.keys_values(states)
            x = block(x, causal_attention, partial(attention, k=keys, v=values, visible=visible))
        text = x.new_zeros(len(codes), 0, self.config.n_text_vocab, dtype=torch.float32)
        return text, head_logits(self.image_head, self.norm(x))

    def encode(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """States of captions, and which of them are no pads: (B, T), (B,) int64 -> (B, T, C), (B, T) bool.

        Raises: DalleError where the captions' length is not the model's.
        """
        config = self.config
        if tokens.shape[1] != config.n_text:
            found = f"found {tokens.shape[1]}"
            raise DalleError(
                f"expected captions of {config.n_text} positions, {found}; tokenize with the prior's own length"
            )
        null = F.pad(tokens.new_tensor(config.null), (0, config.n_text - len(config.null)))
        tokens = torch.where((lengths == 0)[:, None], null, tokens)
        visible = self.written(torch.where(lengths == 0, len(config.null), lengths))
        x = self.text_embedding_norm(self.token(tokens) + self.text_position.weight)
        for block in self.encoder:
            x = block(x, partial(attention, visible=visible))
        return self.text_norm(x), visible

    def prefill(self, tokens: Tensor, lengths: Tensor) -> Prompt:
        """Compute what all codes of the captions need once: (P, T), (P,) int64 -> Prompt.

        Raises: DalleError where the captions' length is not the model's.
        """
        states, visible = self.encode(tokens, lengths)
        x = self.code_embedding_norm(self.start + self.code_position.weight[0]).expand(len(tokens), 1, -1)
        own: list[tuple[Tensor, Tensor]] = []
        cross = [block.keys_values(states) for block in self.blocks if isinstance(block, DecoderBlock)]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            own.append((k, v))
            return v  # the start attends to itself alone

        for block, (keys, values) in zip(self.blocks, cross, strict=True):
            x = block(x, attend, partial(attention, k=keys, v=values, visible=visible))
        logits = head_logits(self.image_head, self.norm(x[:, 0]))
        return Prompt(logits, *_columns(own), visible, *_columns(cross))

    def cache(self, prompt: Prompt, candidates: int = 1, static: bool = False) -> Cache:
        """Buffers to sample `candidates` grids for each caption of a prompt; `static` for a compiled `step`."""
        return Cache(prompt, self.patterns, candidates, self.code_position.weight[1:], static)

    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        """Logits of the next code after those at the cache's position, which advances: (P*K,) -> (P*K, V)."""
        x = self.code_embedding_norm(self.code(codes) + cache.row(cache.positions))[:, None]
        for block, layer, cross in zip(self.blocks, cache.layers, cache.cross, strict=True):
            x = block(x, partial(layer.attend, cache.position), cross.attend)
        cache.advance()
        return head_logits(self.image_head, self.norm(x[:, 0]))

    def written(self, lengths: Tensor) -> Tensor:
        """Whether a caption position holds a token, not a pad: (B,) -> (B, T) bool."""
        return torch.arange(self.config.n_text, device=lengths.device) < lengths[:, None]

    def predicted(self, lengths: Tensor) -> Tensor:
        """Whether a caption position holds a token that is predicted; here none: (B,) -> (B, T) bool."""
        return torch.zeros(len(lengths), self.config.n_text, dtype=torch.bool, device=lengths.device)


def _columns(pairs: list[tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return tuple(first for first, _ in pairs), tuple(second for _, second in pairs)


CodePrior = Prior | EncoderDecoderPrior  # the priors over codes: what sampling, scoring and packing take
