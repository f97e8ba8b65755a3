"""Token prior: a causal transformer over caption tokens, then image codes (Ramesh et al. 2021, sec. 2.2 and app. B).

B batch, T caption positions (`n_text`), W side of the code grid, L = T + W*W positions of the stream, C width,
V image vocabulary, P prompts, K candidates of each prompt (rows of a cache: prompts first).

Position 0 holds the start-of-text embedding, 1..T the caption, T+1.. the codes but the last. Position p predicts
caption token p where p < T and code p - T from there on: the first code comes from the caption's last position, which
carries text position T like any caption position, by the image head, in training and in sampling alike.

Published priors differ in parts, each of which is an option. Without a start all positions move up by one, and the
first caption token is not predicted. S = 1 + T positions of start and caption, or T; L = S + W*W - 1.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from dalle_cli.errors import DalleError
from dalle_cli.models.attention import Pattern, layer_kinds, rotary_angles
from dalle_cli.models.blocks import StackedBlock, init_transformer, prefill
from dalle_cli.models.cache import Cache, Prompt
from dalle_cli.models.kernels import (
    apply_rotary,
    gelu_linear,
    head_logits,
    head_loss,
    rms_norm,
    sparse_attention,
    swiglu,
)
from dalle_cli.models.sketch import Hint, Sketch

CHOICES = {"block": ("paper", "modern"), "activation": ("gelu", "gelu_tanh"), "final_norms": (1, 2)}
Sketches = tuple[Tensor, Tensor]  # images (B, 3, s, s), and which rows follow them (B,) bool


@dataclass(frozen=True)
class PriorConfig:
    """Sizes of the prior; the defaults are the paper's, 12 billion parameters.

    Raises: DalleError where sizes do not fit together.
    """

    n_layer: int = 64
    n_head: int = 62
    n_embd: int = 3968
    n_text_vocab: int = 16384
    n_text: int = 256
    n_image_vocab: int = 8192
    grid: int = 32
    attention: str = "sparse"  # or "full", or "window": sparse with the last layer's window cut at the grid's edges
    block: str = "paper"  # or "modern"
    activation: str = "gelu"  # or "gelu_tanh", its approximation; of the paper's block
    sandwich_norm: bool = False  # also normalize what the paper's block adds (CogView, Ding et al. 2021, sec. 2.4)
    final_norms: int = 1  # before the heads, or 2
    start: bool = True  # a start-of-text embedding at position 0
    flat_position: bool = False  # an embedding for each position of the grid, instead of row and column
    conv_kernel: int = 11  # side of the last layer's window; odd
    # of the embeddings and each residual branch
    dropout: float = field(default=0.0, metadata={"warm_start": "free"})
    text_weight: float = 1 / 8  # weight of the text loss; the image loss has the rest
    # s: side of a small image, sampled for the caption first, that the codes follow; 0 = none
    sketch: int = field(default=0, metadata={"warm_start": "added"})
    sketch_width: int = field(default=384, metadata={"warm_start": "added"})  # of its layers

    def __post_init__(self) -> None:
        sizes = ("n_layer", "n_head", "n_embd", "n_text_vocab", "n_text", "n_image_vocab", "grid")
        for name in sizes:
            if getattr(self, name) < 1:
                raise DalleError(f"expected prior.{name} >= 1, found {getattr(self, name)}; correct the recipe")
        if self.n_embd % self.n_head:
            found = f"{self.n_embd} and {self.n_head}"
            raise DalleError(f"expected prior.n_embd a multiple of prior.n_head, found {found}; correct the recipe")
        if self.conv_kernel < 1 or self.conv_kernel % 2 == 0:
            raise DalleError(f"expected prior.conv_kernel odd, found {self.conv_kernel}; correct the recipe")
        for name in ("dropout", "text_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise DalleError(f"expected prior.{name} in [0, 1], found {getattr(self, name)}; correct the recipe")
        if self.sketch < 0 or (self.sketch and self.grid % self.sketch):
            raise DalleError(f"expected prior.sketch to divide the grid of {self.grid}, found {self.sketch}; change it")
        if self.sketch_width < 5:
            raise DalleError(f"expected prior.sketch_width of at least 5, found {self.sketch_width}; raise it")
        layer_kinds(1, self.attention)  # refuses an unknown kind
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                found = " or ".join(map(json.dumps, known)) + f", found {json.dumps(getattr(self, name))}"
                raise DalleError(f"expected prior.{name} {found}; correct the recipe")
        if self.block == "modern" and (self.sandwich_norm or self.activation != "gelu"):
            raise DalleError('expected prior.block "paper" for sandwich_norm and activation, found "modern"; change it')
        if self.block == "modern" and self.n_embd // self.n_head % 4:
            found = f"{self.n_embd} / {self.n_head}"
            raise DalleError(
                f"expected heads as wide as a multiple of 4 for rotary angles, found {found}; correct the recipe"
            )

    @property
    def n_prefix(self) -> int:
        """Positions before the codes: those of the caption, and the start, if there is one."""
        return self.n_text + self.start


class Attend(Protocol):
    """Attention between the projections: three times (B, N, L, D) -> (B, N, L, D)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor: ...


class PriorBlock(StackedBlock):
    """The paper's pre-norm residual block; the caller passes attention, over the stream or over a cache."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.norm_1 = nn.LayerNorm(config.n_embd)
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.attention_out = nn.Linear(config.n_embd, config.n_embd)
        self.norm_2 = nn.LayerNorm(config.n_embd)
        self.mlp_in = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.mlp_out = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        sandwich = [nn.LayerNorm(config.n_embd) if config.sandwich_norm else nn.Identity() for _ in range(2)]
        self.attention_norm, self.mlp_norm = sandwich

    def forward(self, x: Tensor, attend: Attend, rotary: Tensor | None = None, last: int | None = None) -> Tensor:
        """(B, L, C) -> (B, L, C), or (B, last, C) for the last positions only, which attend to all."""
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        if last is not None:
            q, x = q[:, :, -last:], x[:, -last:]
        attended = self.attention_out(attend(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.attention_norm(self.dropout(attended))
        hidden = gelu_linear(self.mlp_in(self.norm_2(x)), self.mlp_out, self.approximate)
        y: Tensor = x + self.mlp_norm(self.dropout(hidden))
        return y


class ModernBlock(StackedBlock):
    """RMS norm, gated MLP (SwiGLU of about the same size), normalized queries and keys with rotary positions."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        width, hidden = config.n_embd, 32 * max(1, round(config.n_embd / 12))  # three matrices as large as two of 4 C
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.qk_scale = nn.Parameter(torch.ones(config.n_head))  # scales the scores of normalized queries and keys
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 2 * hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Attend, rotary: Tensor | None = None, last: int | None = None) -> Tensor:
        """(B, L, C) and rotary angles (2, L, D) -> (B, L, C), or (B, last, C) as in `PriorBlock`."""
        assert rotary is not None
        q, k, v = apply_rotary(self.qkv(rms_norm(x)), rotary)
        if last is not None:
            q, x = q[:, :, -last:], x[:, -last:]
        q = q * self.qk_scale.to(q.dtype)[:, None, None]
        x = x + self.dropout(self.attention_out(attend(q, k, v).transpose(1, 2).flatten(2)))
        y: Tensor = x + self.dropout(self.mlp_out(swiglu(self.mlp_in(rms_norm(x)))))
        return y


BLOCKS: dict[str, Callable[[PriorConfig], nn.Module]] = {"paper": PriorBlock, "modern": ModernBlock}


class Prior(nn.Module):
    """Causal transformer over one stream of caption and codes; two heads, one for each vocabulary."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.n_embd
        self.token = nn.Embedding(config.n_text_vocab, width)
        self.pad = nn.Embedding(config.n_text, width)
        self.start = nn.Parameter(torch.empty(width)) if config.start else None
        self.text_position = nn.Embedding(config.n_prefix, width)
        self.code = nn.Embedding(config.n_image_vocab, width)
        if config.flat_position:
            self.code_position = nn.Embedding(config.grid**2, width)
        else:
            self.row = nn.Embedding(config.grid, width)
            self.column = nn.Embedding(config.grid, width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(BLOCKS[config.block](config) for _ in range(config.n_layer))
        norms = [nn.LayerNorm(width) for _ in range(config.final_norms)]
        self.norm = norms[0] if len(norms) == 1 else nn.Sequential(*norms)
        self.text_head = nn.Linear(width, config.n_text_vocab)
        self.image_head = nn.Linear(width, config.n_image_vocab)
        sizes = (config.n_text_vocab, config.n_image_vocab, config.sketch, config.sketch_width)
        self.sketch = Sketch(*sizes) if config.sketch else None
        self.hint = Hint(width, config.sketch, config.grid) if config.sketch else None
        kinds = layer_kinds(config.n_layer, config.attention)
        self.patterns = [Pattern(kind, config.n_text, config.grid, config.conv_kernel, config.start) for kind in kinds]
        self.initialize()

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Sample all weights, those of the sketch by its own rule."""
        own = (pair for pair in self.named_parameters() if not pair[0].startswith(("sketch.", "hint.")))
        init_transformer(own, self.config.n_layer, generator)
        for part in (self.sketch, self.hint):
            if part is not None:
                part.initialize(generator)

    def forward(
        self, tokens: Tensor, lengths: Tensor, codes: Tensor, sketches: Sketches | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits of tokens and codes: (B, T), (B,), (B, W, W) int64 -> (B, S - 1, n_text_vocab), (B, W*W, V) float32.

        Positions from a caption's length on hold the pad embedding of their position instead of a token. `sketches` are
        small images that the codes follow.

        Raises: DalleError where the shapes are not the model's.
        """
        x = self._read(tokens, lengths, codes, sketches)
        last = self.config.n_prefix - 1  # which predicts the first code
        return head_logits(self.text_head, x[:, :last]), head_logits(self.image_head, x[:, last:])

    def _read(self, tokens: Tensor, lengths: Tensor, codes: Tensor, sketches: Sketches | None = None) -> Tensor:
        """Hidden states before the heads: (B, L, C)."""
        grid = self.config.grid
        if codes.shape[1:] != (grid, grid):
            found = " x ".join(map(str, codes.shape[1:]))
            raise DalleError(f"expected codes of {grid} x {grid}, found {found}; use codes of the prior's own dVAE")
        images = self.code(codes.flatten(1)[:, :-1]) + self._code_positions()[:-1]
        hints = None if sketches is None else self._hints(*sketches)
        if hints is not None:
            images = images + hints[0]
        x = self.dropout(torch.cat([self._embed_text(tokens, lengths), images], dim=1))
        rotary = self._rotary(x)
        for block, pattern in zip(self.blocks, self.patterns, strict=True):
            x = block(x, partial(sparse_attention, pattern=pattern), rotary)
        y: Tensor = self.norm(x)
        if hints is not None and sketches is not None and self.hint is not None:
            first = self.config.n_prefix
            y = torch.cat([y[:, :first], self._with_hints(y[:, first:], hints[1], sketches[1][:, None, None])], dim=1)
        return y

    def _hints(self, sketch: Tensor, follows: Tensor) -> tuple[Tensor, Tensor]:
        """Hints of sketches for each position but the last: at the input, 0 where a row follows none, and at the head.

        Raises: DalleError where the model has no sketches.
        """
        if self.hint is None:
            raise DalleError("expected a prior that sketches, found one with sketch 0; train one with prior.sketch")
        ahead, late = self.hint.of(sketch)
        return ahead * follows[:, None, None], late

    def _with_hints(self, state: Tensor, hints: Tensor, follows: Tensor) -> Tensor:
        """Hidden states with the hints added, in the rows that follow a sketch."""
        assert self.hint is not None
        return torch.where(follows, self.hint(state, hints), state)

    @property
    def n_positions(self) -> int:
        """Positions of the stream: L."""
        return self.config.n_prefix + self.config.grid**2 - 1

    def flops(self) -> float:
        """Floating-point operations of forward and backward for one caption and image."""
        config = self.config
        inner = sum(p.numel() for block in self.blocks for p in block.parameters() if p.ndim == 2)
        heads = config.n_embd * ((config.n_prefix - 1) * config.n_text_vocab + config.grid**2 * config.n_image_vocab)
        attended = sum(int(pattern.mask(torch.device("cpu")).sum()) for pattern in self.patterns)
        return 6.0 * (inner * self.n_positions + heads + 2 * config.n_embd * attended)

    def loss(
        self,
        tokens: Tensor,
        lengths: Tensor,
        codes: Tensor,
        n_tokens: Tensor | None = None,
        read: Tensor | None = None,
        sketches: Sketches | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy by count of caption tokens (pads are no targets) and of codes, weighted (sec. 2.2).

        Shapes as `forward`; returns the loss and, detached, `text_nats` a token and `image_nats` a code. `n_tokens` ()
        replaces the batch's number of tokens as the divisor of the text loss, for one part of a batch. `read`, shaped
        as codes, replaces the codes at the input; the targets remain `codes`.
        `sketches` as in `forward`.
        """
        x = self._read(tokens, lengths, codes if read is None else read, sketches)
        last = self.config.n_prefix - 1
        first = self.config.n_text - last  # caption token that is predicted
        predicted = self.predicted(lengths)[:, first:]
        if n_tokens is None:
            n_tokens = predicted.sum().clamp(min=1)  # a batch may hold null captions only
        text = head_loss(self.text_head, x[:, :last][predicted], tokens[:, first:][predicted]) / n_tokens
        image = head_loss(self.image_head, x[:, last:].flatten(0, 1), codes.flatten()) / codes.numel()
        weight = self.config.text_weight
        parts = {"text_nats": text.detach(), "image_nats": image.detach()}
        return weight * text + (1 - weight) * image, parts

    def prefill(self, tokens: Tensor, lengths: Tensor) -> Prompt:
        """Compute the captions' keys and values once: (P, T), (P,) int64 -> Prompt.

        Raises: DalleError where the captions' length is not the model's.
        """
        x = self.dropout(self._embed_text(tokens, lengths))
        x, keys, values = prefill(self.blocks, x, self._rotary(x)[:, : x.shape[1]], [None] * self.config.n_layer)
        return Prompt(head_logits(self.image_head, self.norm(x[:, -1])), keys, values)

    def cache(self, prompt: Prompt, candidates: int = 1, static: bool = False) -> Cache:
        """Buffers to sample `candidates` grids for each caption of a prompt; `static` for a compiled `step`."""
        rotary = self._rotary(prompt.logits)[:, self.config.n_prefix :].transpose(0, 1)
        modern = self.config.block == "modern"
        hint_widths = None if self.hint is None else (self.hint.ahead.out_features, self.hint.seen.out_features)
        return Cache(
            prompt, self.patterns, candidates, self._code_positions(), static, rotary if modern else None, hint_widths
        )

    @torch.inference_mode()
    def show(self, sketch: Tensor, cache: Cache) -> None:
        """Let the first rows of a cache follow sketches (K, 3, s, s).

        Raises: DalleError where the model has no sketches.
        """
        follows = torch.ones(len(sketch), dtype=torch.bool, device=sketch.device)
        cache.show(*(x.transpose(0, 1) for x in self._hints(sketch, follows)))

    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        """Logits of the next code after those at the cache's position, which advances: (P*K,) -> (P*K, V)."""
        x = self.code(codes) + cache.row(cache.positions)
        hints = None if cache.hints is None else [cache.row(table)[0] for table in cache.hints]
        x = self.dropout((x if hints is None else x + hints[0])[:, None])
        rotary = None if cache.rotary is None else cache.row(cache.rotary).transpose(0, 1)
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x = block(x, partial(layer.attend, cache.position), rotary)
        cache.advance()
        y = self.norm(x[:, 0])
        if hints is not None:
            y = self._with_hints(y, hints[1], cache.follows)
        return head_logits(self.image_head, y)

    def written(self, lengths: Tensor) -> Tensor:
        """Whether a caption position holds a token, not a pad: (B,) -> (B, T) bool."""
        return torch.arange(self.config.n_text, device=lengths.device) < lengths[:, None]

    def predicted(self, lengths: Tensor) -> Tensor:
        """Whether a caption position holds a token that is predicted: without a start the first one is not."""
        positions = torch.arange(self.config.n_text, device=lengths.device)
        return self.written(lengths) & (positions >= self.config.n_text + 1 - self.config.n_prefix)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.code.weight.device

    def _embed_text(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Start, then tokens or pads, each with its text position: (B, T), (B,) -> (B, S, C)."""
        n_text = self.config.n_text
        if tokens.shape[1] != n_text:
            found = f"found {tokens.shape[1]}"
            raise DalleError(f"expected captions of {n_text} positions, {found}; tokenize with the prior's own length")
        x = torch.where(self.written(lengths)[..., None], self.token(tokens), self.pad.weight)
        if self.start is not None:
            x = torch.cat([self.start.expand(len(x), 1, -1), x], dim=1)
        return x + self.text_position.weight

    def _rotary(self, x: Tensor) -> Tensor:
        """Rotary angles of every position, (2, L, D)."""
        config = self.config
        return rotary_angles(config.n_prefix, config.grid, config.n_embd // config.n_head, x.device)

    def _code_positions(self) -> Tensor:
        """The embeddings of the grid's positions, or of row and column, added, in raster order: (W*W, C)."""
        if self.config.flat_position:
            return self.code_position.weight
        return (self.row.weight[:, None] + self.column.weight).flatten(0, 1)


def drop_captions(lengths: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Replace random captions by the null caption, of length 0, for guidance: (B,) int64 -> (B,) int64."""
    dropped = torch.rand(lengths.shape, generator=generator, device=generator.device) < probability
    return lengths.masked_fill(dropped.to(lengths.device), 0)


def disturb_codes(codes: Tensor, probability: float, n_vocab: int, generator: torch.Generator) -> Tensor:
    """Replace random codes by uniformly random ones: (B, W, W) int64 -> the same."""
    device = generator.device
    chosen = torch.rand(codes.shape, generator=generator, device=device) < probability
    others = torch.randint(n_vocab, codes.shape, generator=generator, device=device)
    return torch.where(chosen.to(codes.device), others.to(codes.device), codes)
