"""FlexAttention's block masks say what the patterns say. Its kernels run on CUDA only; here the forward pass does."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask, flex_attention

from dalle_cli.models.attention import Pattern
from dalle_cli.models.block_attention import block_mask

CPU = torch.device("cpu")
KINDS = [("row", 1), ("column", 1), ("conv", 3), ("conv", 5), ("conv", 11)]


@pytest.mark.parametrize("grid", [2, 4, 5])
@pytest.mark.parametrize(("kind", "kernel"), KINDS)
def test_mask_is_the_patterns(kind, kernel, grid):
    pattern = Pattern(kind, 6, grid, kernel)
    length = 6 + grid**2
    blocks = block_mask(7, length, pattern.distances, CPU)
    assert torch.equal(create_mask(blocks.mask_mod, 1, 1, length, length, CPU)[0, 0], pattern.mask(CPU))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(("kind", "kernel"), KINDS[:3])
def test_forward_equals_dense_attention(kind, kernel):
    pattern = Pattern(kind, 6, 12, kernel)
    length = 6 + 144
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, length, 16, generator=generator) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=pattern.mask(CPU))
    with torch.no_grad():
        got = flex_attention(q, k, v, block_mask=block_mask(7, length, pattern.distances, CPU))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_long_streams_skip_blocks():
    """At 32x32 codes after 256 tokens, a row needs a fraction of the blocks that full causal attention does."""
    length = 256 + 1024
    share = [
        float((mask.kv_num_blocks + mask.full_kv_num_blocks).sum())
        for kind in ("row", "full")
        if (mask := block_mask(257, length, Pattern(kind, 256, 32, 11).distances, CPU)) is not None
    ]
    assert share[0] < 0.75 * share[1]
