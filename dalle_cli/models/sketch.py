"""Sketches: a diffusion model of s x s pixels, conditioned on a bag of words, whose images the token prior follows.

Not in the papers, but a small form of the cascade in the second one (sec. 2.1). The diffusion model trains on hundreds
of times as many pairs per second as the prior. B batch, T caption positions, s side of a sketch, W side of the code
grid, C width of the prior, H width of a hint.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_cli.models.blocks import StackedBlock

WORDS_LEFT_OUT = 0.1  # share of a caption's words, in training
DROPOUT = 0.1
N_LAYER = 4
N_WAVES = 32  # of the timestep's features
LONGEST_WAVE = 1000.0
FOLLOWING = 256  # width of the layer that adds hints to the prior's hidden states
WINDOW = 3  # side of the window of a hint: its cell and the cells around it


class Sketch(nn.Module):
    """Predict an image from words, a timestep and the noised image; also convert codes to such images."""

    colors: Tensor

    def __init__(self, n_vocab: int, n_codes: int, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.word = nn.Embedding(n_vocab, width // 5)
        self.words_in = nn.Linear(width // 5, width)
        self.words_out = nn.Linear(width, width)
        self.time = nn.Linear(2 * N_WAVES, width)
        self.picture_in = nn.Linear(3 * side**2, width)
        self.layers = nn.ModuleList(SketchLayer(width) for _ in range(N_LAYER))
        self.picture_out = nn.Linear(width, 3 * side**2)
        self.dropout = nn.Dropout(DROPOUT)
        self.register_buffer("colors", torch.zeros(n_codes, 3))  # mean color of each code, in [-1, 1]

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Words from N(0, 0.3), matrices from N(0, 1 / (3 inputs)); 0 for `outer` and biases."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name.endswith("outer.weight"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1)
            else:
                deviation = 0.3 if name == "word.weight" else (3 * parameter.shape[1]) ** -0.5
                parameter.normal_(0, deviation, generator=generator)

    def of(self, codes: Tensor) -> Tensor:
        """The sketch of codes: (B, W, W) int64 -> (B, 3, s, s), each cell the mean of its codes' colors."""
        return F.avg_pool2d(self.colors[codes].movedim(-1, 1), codes.shape[-1] // self.side)

    def read(self, tokens: Tensor, written: Tensor) -> Tensor:
        """Embed captions (B, T) int64 with (B, T) bool where there is a token -> (B, width); training drops some words.

        A caption without tokens is the null caption.
        """
        if self.training:
            written = written & (torch.rand(written.shape, device=written.device) >= WORDS_LEFT_OUT)
        counts = written.sum(1, keepdim=True).clamp(min=1).to(self.word.weight.dtype)
        words = (self.word(tokens) * written[..., None]).sum(1) / counts.sqrt()
        y: Tensor = self.words_out(self.dropout(F.silu(self.words_in(words))))
        return y

    def forward(self, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        """Predict x_start from x_t: (B, 3, s, s), timesteps (B,) out of 1000, words as `read` -> (B, 3, s, s)."""
        exact = torch.promote_types(x.dtype, torch.float32)  # bfloat16 cannot represent 999.5
        waves = torch.exp(torch.arange(N_WAVES, device=x.device, dtype=exact) * (-math.log(LONGEST_WAVE) / N_WAVES))
        rotary = t[:, None].to(waves.dtype) * waves * (math.pi / 2)
        y = self.picture_in(x.flatten(1)) + self.time(torch.cat([rotary.sin(), rotary.cos()], dim=-1)) + words
        for layer in self.layers:
            y = y + self.dropout(layer(y))
        x_start: Tensor = self.picture_out(F.silu(y))
        return x_start.view_as(x)


class SketchLayer(StackedBlock):
    """Norm and an MLP with SiLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) -> the same."""
        y: Tensor = self.outer(F.silu(self.inner(self.norm(x))))
        return y


class Hint(nn.Module):
    """Hints for each position from a sketch: the cell of the next code and the cells around it.

    A hint is added to the input, and to the hidden state before the head, there through an MLP that starts at 0.
    W*W - 1 positions have one; the first code is sampled without.
    """

    def __init__(self, width: int, side: int, grid: int) -> None:
        super().__init__()
        cells, self.grid, self.ratio = 3 * WINDOW**2, grid, grid // side
        self.ahead = nn.Linear(cells, width, bias=False)
        self.seen = nn.Linear(cells, FOLLOWING, bias=False)
        self.corner = nn.Parameter(torch.empty(self.ratio, self.ratio, FOLLOWING))  # position within a cell
        self.state = nn.Linear(width, FOLLOWING)
        self.outer = nn.Linear(FOLLOWING, width)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """`ahead` from N(0, 0.1), `seen` from N(0, 0.2), `state` from N(0, 1 / (3 inputs)); 0 elsewhere: no effect."""
        self.ahead.weight.normal_(0, 0.1, generator=generator)
        self.seen.weight.normal_(0, 0.2, generator=generator)
        self.state.weight.normal_(0, (3 * self.state.in_features) ** -0.5, generator=generator)
        for parameter in (self.corner, self.state.bias, self.outer.weight, self.outer.bias):
            parameter.zero_()

    def of(self, sketch: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, s, s) -> hints for the input (B, W*W - 1, C) and before the head (B, W*W - 1, H)."""
        side = sketch.shape[-1]
        cells = F.unfold(sketch.to(self.ahead.weight.dtype), WINDOW, padding=WINDOW // 2).mT
        cells = cells.reshape(len(sketch), side, side, -1)
        seen = self.seen(cells)[:, :, None, :, None] + self.corner[:, None]  # (B, s, r, s, r, H)
        ahead = self.ahead(cells).repeat_interleave(self.ratio, 1).repeat_interleave(self.ratio, 2)
        return ahead.flatten(1, 2)[:, 1:], seen.reshape(len(sketch), self.grid**2, -1)[:, 1:]

    def forward(self, state: Tensor, hints: Tensor) -> Tensor:
        """Hidden states with hints added: (..., C), (..., H) -> (..., C)."""
        y: Tensor = state + self.outer(F.silu(self.state(state) + hints))
        return y
