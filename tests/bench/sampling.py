"""The token prior as `sample` draws from it.

B batch, T caption positions, W side of the grid.
"""

from typing import Any

import torch

from bench.prior import batches
from bench.timing import Subject
from dalle_cli.devices import DTYPES
from dalle_cli.models.packed import pack
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.sampling.autoregressive import sample_codes
from dalle_cli.sampling.categorical import CategoricalOptions


def ours(
    sizes: dict[str, Any],
    batch: int,
    attention: str,
    dtype: str = "bfloat16",
    guidance: float = 1.0,
    one_caption: bool = False,
    int8: bool = False,
    compiled: bool = False,
    block: str = "paper",
) -> Subject:
    """Draw `batch` grids, of as many captions or of one: captions are read and noise is drawn anew each time."""
    prior = Prior(PriorConfig(**sizes, attention=attention, block=block)).eval().requires_grad_(False)
    count = sum(p.numel() for p in prior.parameters())
    steps = sizes["grid"] ** 2
    read = matrix_bytes(prior, 1 if int8 else DTYPES[dtype].itemsize) * steps
    pack(prior, batch * (1 if guidance == 1 else 2), DTYPES[dtype], int8, plain=compiled)
    tokens, lengths, _ = batches(sizes, 1 if one_caption else batch)[0]

    def draw() -> torch.Tensor:
        return sample_codes(
            prior,
            tokens,
            lengths,
            range(batch),
            0,
            CategoricalOptions(guidance_scale=guidance),
            batch_size=batch,
            compiled=compiled,
        )

    return Subject(draw, batch * steps, read, count, warmup=0)  # a thousand steps, of which the first allocate


def matrix_bytes(prior: Prior, item: int) -> int:
    """Bytes of the matrices that a step reads: those of the blocks, and the head of codes."""
    matrices = [p for block in prior.blocks for p in block.parameters() if p.ndim == 2]
    return item * sum(p.numel() for p in [*matrices, prior.image_head.weight])
