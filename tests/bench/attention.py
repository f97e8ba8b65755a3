"""One layer's attention by itself, forward and backward: does it cost what it attends to?"""

import torch

from bench.timing import Subject
from dalle_cli.models.attention import Pattern
from dalle_cli.models.kernels import sparse_attention

HEADS, WIDTH = 8, 64


def layer(kind: str, grid: int, n_text: int, batch: int) -> Subject:
    """Attention between the projections, in bfloat16, over `n_text` tokens and a grid; FLOPs of pairs that attend."""
    pattern = Pattern(kind, n_text, grid)
    length = n_text + grid**2
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, length, 3, HEADS, WIDTH, generator=generator).bfloat16().requires_grad_()
    grad = torch.randn(batch, HEADS, length, WIDTH, generator=generator).bfloat16()

    def update() -> None:
        qkv.grad = None
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        sparse_attention(q, k, v, pattern).backward(grad)  # type: ignore[no-untyped-call]

    pairs = int(pattern.mask(torch.device("cpu")).sum())
    return Subject(update, batch * length, 12.0 * batch * HEADS * WIDTH * pairs)
