"""The mark of the blocks that a model stacks, and what transformers of such blocks share.

P prompts, S positions of start and caption, N heads, C width, D width of a head.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dalle_cli.models.kernels import causal_attention


class StackedBlock(nn.Module):
    """A block of a model's residual stack, called as `block(x, ...)` with x its residual input.

    Training treats these blocks one by one: it recomputes them, shards them, scales their gradients in float16, and
    gives their matrices to Muon. They do not contain one another.
    """


@torch.no_grad()
def init_transformer(
    parameters: Iterable[tuple[str, Tensor]], n_layer: int, generator: torch.Generator | None = None
) -> None:
    """Weights from N(0, 0.02), where a residual branch ends divided by sqrt(2 n_layer); norms 1, biases 0."""
    for name, parameter in parameters:
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name or name.endswith("qk_scale"):
            parameter.fill_(1)
        else:
            residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
            parameter.normal_(0, 0.02 / math.sqrt(2 * n_layer) if residual else 0.02, generator=generator)


def prefill(
    blocks: Iterable[nn.Module], x: Tensor, rotary: Tensor, lasts: Sequence[int | None], visible: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Run blocks causally over a caption (P, S, C) and return the output with each block's keys and values.

    `lasts` are the blocks' arguments `last`; positions that are not `visible` (P, S) bool are not attended to.
    """
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys.append(k.contiguous())
        values.append(v.contiguous())
        return causal_attention(q, k, v, visible)

    for block, last in zip(blocks, lasts, strict=True):
        x = block(x, attend, rotary, last)
    return x, tuple(keys), tuple(values)
