"""The token prior as `train-prior` trains it, and the FLOPs of an update.

B batch, T caption positions, W side of the grid, C width, L = T + W*W positions.
"""

from collections.abc import Generator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.timing import Subject
from dalle_cli.devices import arithmetic
from dalle_cli.models.attention import Pattern
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.training.loop import Batch, Trainer
from dalle_cli.training.prior import PriorTrain
from dalle_cli.training.run import Run

N_BATCHES = 4


class Given:
    """A task that is given its batches: the model and its loss are all that an update asks for."""

    def __init__(self, model: Prior) -> None:
        self.model = model

    def batches(self, start: int) -> Generator[Batch]:
        """None of its own."""
        yield from ()

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """As PriorTask has it without caption dropout."""
        return self.model.loss(*batch)

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Nothing is held out."""
        return {}

    def sample_grid(self, model: nn.Module, device: torch.device, path: Path) -> None:
        """No picture."""


def batches(sizes: dict[str, int], batch: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Random captions that fill their positions, and codes: tokens (B, T) from 1 on, lengths (B,), codes (B, W, W)."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, (batch, *shape), generator=generator)

    n_text, grid = sizes["n_text"], sizes["grid"]
    return [
        (
            draw(1, sizes["n_text_vocab"], n_text),
            torch.full((batch,), n_text),
            draw(0, sizes["n_image_vocab"], grid, grid),
        )
        for _ in range(N_BATCHES)
    ]


def trainer_of(task: Any, options: Any, dtype: str = "bfloat16") -> Trainer:
    """The loop's own trainer, for its `update` alone: nothing is read or written."""
    return Trainer(task, options, Run(Path("unused.safetensors"), "", {}, []), arithmetic("cpu", dtype), 0)


def ours(sizes: dict[str, Any], batch: int, attention: str, compiled: bool = False) -> Subject:
    """An update with the paper's AdamW, clipping and average of the weights (one update in 25 takes part in it)."""
    model = Prior(PriorConfig(**sizes, attention=attention))
    trainer = trainer_of(Given(model), PriorTrain(batch_size=batch, compile=compiled))
    given = cycle(batches(sizes, batch))
    tokens = batch * (sizes["n_text"] + sizes["grid"] ** 2)
    count = sum(p.numel() for p in model.parameters())
    return Subject(lambda: trainer.update(next(given)), tokens, flops_of(model, batch), count)


def flops_of(model: Prior, batch: int) -> float:
    """FLOPs of an update of this model."""
    c = model.config
    block_matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim >= 2)
    return update_flops(
        batch,
        c.n_embd,
        block_matrices,
        [(c.n_text, c.n_text_vocab * c.n_embd), (c.grid**2, c.n_image_vocab * c.n_embd)],
        attended(model.patterns),
    )


def attended(patterns: Sequence[Pattern]) -> int:
    """Pairs of positions that attend to each other, one stream, all layers."""
    return sum(int(pattern.mask(torch.device("cpu")).sum()) for pattern in patterns)


def update_flops(batch: int, width: int, block_matrices: int, heads: Sequence[tuple[int, int]], pairs: int) -> float:
    """FLOPs of forward and backward: 6 for each matrix parameter and position it is used at, and attention's.

    `heads` are (positions, parameters); they cover the stream. A pair takes 2*C for its score and 2*C for its share of
    the sum, and three times as much with the backward pass. What is computed only to be masked counts for nothing.
    """
    length = sum(positions for positions, _ in heads)
    matrices = block_matrices * length + sum(positions * parameters for positions, parameters in heads)
    return float(batch) * (6 * matrices + 3 * 4 * width * pairs)
