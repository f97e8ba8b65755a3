"""Attention patterns against pictures drawn by hand: a 4 x 4 grid, 6 caption positions (as in the paper's fig. 11)."""

import pytest
import torch
from torch.nn import functional as F

from dalle_cli.errors import DalleError
from dalle_cli.models import attention
from dalle_cli.models.attention import KINDS, Pattern, layer_kinds
from dalle_cli.models.cache import LayerCache, StaticLayerCache
from dalle_cli.models.kernels import sparse_attention
from reference import prior as reference

CPU = torch.device("cpu")
N_TEXT, GRID = 6, 4

# rows: code that looks, 0..14 (code 15 is never read); columns: code looked at
ROW = """
#..............
##.............
###............
####...........
#####..........
.#####.........
..#####........
...#####.......
....#####......
.....#####.....
......#####....
.......#####...
........#####..
.........#####.
..........#####
"""
COLUMN = """
#..............
.#.............
..#............
...#...........
#...#..........
.#...#.........
..#...#........
...#...#.......
#...#...#......
.#...#...#.....
..#...#...#....
...#...#...#...
#...#...#...#..
.#...#...#...#.
..#...#...#...#
"""
# 3 x 3: the one before, and the three above, which for the first and last of a row wrap into the rows beside
CONV = """
#..............
##.............
.##............
#.##...........
##.##..........
###.##.........
.###.##........
..###.##.......
...###.##......
....###.##.....
.....###.##....
......###.##...
.......###.##..
........###.##.
.........###.##
"""
# 3 x 3 and cut at the edges
WINDOW = """
#..............
##.............
.##............
..##...........
##..#..........
###.##.........
.###.##........
..##..##.......
....##..#......
....###.##.....
.....###.##....
......##..##...
........##..#..
........###.##.
.........###.##
"""
PICTURES = {"row": ROW, "column": COLUMN, "conv": CONV, "window": WINDOW}
TEXT = """
#......
##.....
###....
####...
#####..
######.
#######
"""


def read(picture):
    return torch.tensor([[cell == "#" for cell in line] for line in picture.split()])


@pytest.mark.parametrize("kind", PICTURES)
def test_mask_is_the_drawn_one(kind):
    mask = Pattern(kind, N_TEXT, GRID, 3).mask(CPU)
    assert mask.shape == (22, 22)
    assert torch.equal(mask[7:, 7:], read(PICTURES[kind]))
    assert mask[7:, :7].all(), "every code sees the whole caption and its start"
    assert torch.equal(mask[:7, :7], read(TEXT))
    assert not mask[:7, 7:].any()


@pytest.mark.parametrize(
    ("kind", "query", "picture"),
    [
        ("row", 9, "....|.###|##..|...."),  # crosses the row's boundary, back to the code right above
        ("column", 14, "..#.|..#.|..#.|..#."),
        ("conv", 9, "....|###.|##..|...."),
        ("conv", 8, "...#|##.#|#...|...."),  # first of its row: up-left and left are the ends of the rows above
        ("conv", 11, "....|..##|#.##|...."),  # last of its row: up-right is the first of its own row
        ("window", 8, "....|##..|#...|...."),
        ("window", 11, "....|..##|..##|...."),
    ],
)
def test_one_query_as_a_picture_of_the_grid(kind, query, picture):
    seen = Pattern(kind, N_TEXT, GRID, 3).codes_mask(CPU)[query].view(GRID, GRID)
    assert torch.equal(seen, read(picture.replace("|", "\n")))


def test_conv_window_covers_the_kernel():
    seen = Pattern("conv", 1, 32, 11).codes_mask(CPU)[32 * 16 + 16]
    assert seen.sum() == 5 * 11 + 6
    assert seen.view(32, 32)[11:16, 11:22].all()


@pytest.mark.parametrize(("grid", "kernel"), [(1, 3), (2, 3), (3, 7), (4, 3), (4, 11), (5, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_mask_matches_reference(kind, grid, kernel):
    mask = Pattern(kind, 2, grid, kernel).mask(CPU)
    n = 2 + grid**2
    expected = [[reference.sees(kind, 2, grid, kernel, q, k) for k in range(n)] for q in range(n)]
    assert torch.equal(mask, torch.tensor(expected))


def test_patterns_differ():
    masks = [Pattern(kind, N_TEXT, GRID, 3).mask(CPU) for kind in KINDS]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_layers_of_the_paper():
    kinds = layer_kinds(64, "sparse")
    assert kinds[:9] == ["row", "column", "row", "row", "row", "column", "row", "row", "row"]
    assert kinds[-1] == "conv"
    assert (kinds.count("column"), kinds.count("row")) == (16, 47)
    assert kinds == [reference.kind_of_layer(i, 64, "sparse") for i in range(1, 65)]
    assert layer_kinds(3, "full") == ["full"] * 3
    assert layer_kinds(24, "window") == [*layer_kinds(24, "sparse")[:-1], "window"]
    with pytest.raises(DalleError, match="dense"):
        layer_kinds(3, "dense")


def test_mask_made_while_sampling_can_train():
    pattern = Pattern("row", 3, 3, 3)
    with torch.inference_mode():
        pattern.mask(CPU)
    q = torch.randn(1, 1, 12, 4, requires_grad=True)
    sparse_attention(q, q, q, pattern).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize(("grid", "kernel"), [(4, 3), (3, 7), (6, 5)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("made", [LayerCache, StaticLayerCache])
def test_cache_equals_masked_attention(monkeypatch, made, kind, grid, kernel, candidates):
    monkeypatch.setattr(attention, "BLOCK", 5)  # so that codes see several blocks of a full cache, and a part of one
    generator = torch.Generator().manual_seed(0)
    pattern = Pattern(kind, 3, grid, kernel)
    prompts, n = 2, 3 + grid**2
    q, k, v = torch.randn(3, prompts * candidates, 2, n, 5, generator=generator, dtype=torch.double)
    k[:, :, :4] = k[::candidates, :, :4].repeat_interleave(candidates, 0)
    v[:, :, :4] = v[::candidates, :, :4].repeat_interleave(candidates, 0)
    mask = torch.tensor([[reference.sees(kind, 3, grid, kernel, i, j) for j in range(n)] for i in range(n)])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(sparse_attention(q, k, v, pattern), expected, rtol=0, atol=1e-12)
    cache = made(pattern, k[::candidates, :, :4], v[::candidates, :, :4], candidates)
    for _ in range(2):  # the second time over what the first has left in the buffers
        for j in range(grid**2 - 1):
            at = slice(4 + j, 5 + j)
            y = cache.attend(j if made is LayerCache else torch.tensor(j), q[:, :, at], k[:, :, at], v[:, :, at])
            torch.testing.assert_close(y, expected[:, :, at], rtol=0, atol=1e-12)


def test_cache_is_as_small_as_the_pattern():
    slots = {kind: Pattern(kind, 256, 32, 11).n_slots for kind in KINDS}
    assert slots == {"full": 1023, "row": 33, "column": 1024, "conv": 5 * 32 + 5 + 1, "window": 6 * 32}
