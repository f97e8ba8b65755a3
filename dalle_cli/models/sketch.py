"""A sketch: the small picture that a caption's words alone stand for, and what it tells each place of the code grid.

Not in the papers. B batch, T caption positions, s side of a sketch, W side of the code grid, C width of the prior.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORDS_LEFT_OUT = 0.1  # share of a caption's words, in training
DROPOUT = 0.2
WINDOW = 3  # side of what a place sees of the sketch: its own cell and those around it


class Sketch(nn.Module):
    """Words, added without their order, and three layers: the mean of the pictures that a caption stands for."""

    def __init__(self, n_vocab: int, side: int, width: int) -> None:
        super().__init__()
        self.word = nn.Embedding(n_vocab, width // 3)
        self.layer_1 = nn.Linear(width // 3, width)
        self.layer_2 = nn.Linear(width, width)
        self.picture = nn.Linear(width, 3 * side**2)
        self.dropout = nn.Dropout(DROPOUT)
        self.side = side

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Words from N(0, 0.3), matrices from N(0, 1 / inputs), no biases."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0, 0.3 if name == "word.weight" else parameter.shape[1] ** -0.5, generator=generator)

    def forward(self, tokens: Tensor, written: Tensor) -> Tensor:
        """Captions (B, T) int64, and where they hold a token (B, T) bool -> pictures (B, 3, s, s), in [-1, 1] or so.

        Of a caption without tokens, which is the null one, it is the mean of all pictures.
        """
        if self.training:
            written = written & (torch.rand(written.shape, device=written.device) >= WORDS_LEFT_OUT)
        counts = written.sum(1, keepdim=True).clamp(min=1).to(self.word.weight.dtype)
        words = (self.word(tokens) * written[..., None]).sum(1) / counts.sqrt()
        x = self.dropout(F.silu(self.layer_1(words)))
        x = self.dropout(F.silu(self.layer_2(x)))
        y: Tensor = self.picture(x).unflatten(1, (3, self.side, self.side))
        return y


class Hint(nn.Linear):
    """What each place of the grid is told of a sketch: the cell that it lies in and those around it, as a vector.

    It begins as nothing, so that a prior may be given one at any time.
    """

    def __init__(self, width: int) -> None:
        super().__init__(3 * WINDOW**2, width, bias=False)

    def of(self, sketch: Tensor, grid: int) -> Tensor:
        """(B, 3, s, s) -> (B, W*W, C), in raster order."""
        side = sketch.shape[-1]
        cells = self(F.unfold(sketch, WINDOW, padding=WINDOW // 2).mT)
        wide = cells.unflatten(1, (side, side)).repeat_interleave(grid // side, 1).repeat_interleave(grid // side, 2)
        y: Tensor = wide.flatten(1, 2)
        return y
