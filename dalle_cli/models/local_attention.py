"""Attention that costs what it attends to: text keys and a few rows or one column of codes, in one softmax.

B batch, N heads, D head width, X = 1 + T positions of start and caption, W side of the grid, L = X + W*W - 1.
Equal to dense attention under the pattern's mask (2021, app. B.1), at O(L (X + W)) instead of O(L^2).
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F


def local_attention(q: Tensor, k: Tensor, v: Tensor, n_prefix: int, grid: int, distances: tuple[int, ...]) -> Tensor:
    """Codes see the caption and the codes at some distances back in raster order: three times (B, N, L, D) -> same.

    `distances` are those j - k >= 0 that code j sees. Queries are taken row by row, with the keys of their own row and
    of as many rows before it as the longest distance reaches.
    """
    rows_back = -(-distances[-1] // grid)
    text, images = _split(q, k, v, n_prefix, grid)
    q, k, v = (x.view(*x.shape[:2], grid, grid, -1) for x in images)
    windows = [_window(x, rows_back) for x in (k, v)]
    bias = _window_bias(grid, rows_back, distances, q.device, q.dtype)
    return _join(text, _attend(q, windows[0], windows[1], text, bias, rows_back))


def column_attention(q: Tensor, k: Tensor, v: Tensor, n_prefix: int, grid: int) -> Tensor:
    """Codes see the caption and their own column, so far: three times (B, N, L, D) -> same."""
    text, images = _split(q, k, v, n_prefix, grid)
    q, k, v = (x.view(*x.shape[:2], grid, grid, -1).transpose(2, 3) for x in images)
    bias = _window_bias(grid, 0, tuple(range(grid)), q.device, q.dtype)
    return _join(text, _attend(q, k, v, text, bias, 0).transpose(2, 3))


def _split(q: Tensor, k: Tensor, v: Tensor, n_prefix: int, grid: int) -> tuple[list[Tensor], list[Tensor]]:
    """Caption and codes; the stream ends one code short of the grid, which a row of zeros makes up for."""
    missing = n_prefix + grid * grid - q.shape[2]
    text = [x[:, :, :n_prefix] for x in (q, k, v)]
    return text, [F.pad(x[:, :, n_prefix:], (0, 0, 0, missing)) for x in (q, k, v)]


def _join(text: list[Tensor], images: Tensor) -> Tensor:
    """Caption positions, causal among themselves, before the codes (B, N, W, W, D), the last of which is dropped."""
    prefix = F.scaled_dot_product_attention(text[0], text[1], text[2], is_causal=True)
    return torch.cat([prefix, images.flatten(2, 3)[:, :, :-1]], dim=2)


def _window(x: Tensor, rows_back: int) -> Tensor:
    """For each row, the rows before it and itself, zeros above the first: (B, N, W, W, D) -> (B, N, W, (R+1) W, D)."""
    grid = x.shape[2]
    padded = F.pad(x, (0, 0, 0, 0, rows_back, 0))
    return torch.cat([padded[:, :, i : i + grid] for i in range(rows_back + 1)], dim=3)


@lru_cache(maxsize=64)
def _window_bias(
    grid: int, rows_back: int, distances: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """0 where a place of a row sees a place of its window, -inf elsewhere: (W, (R+1) W)."""
    with torch.inference_mode(False):
        queries = torch.arange(grid, device=device)[:, None] + rows_back * grid
        back = queries - torch.arange((rows_back + 1) * grid, device=device)
        seen = torch.isin(back, torch.tensor(distances, device=device))
        return torch.zeros(back.shape, dtype=dtype, device=device).masked_fill(~seen, float("-inf"))


def _attend(q: Tensor, k: Tensor, v: Tensor, text: list[Tensor], bias: Tensor, rows_back: int) -> Tensor:
    """One softmax over the caption's keys and the window's: q (B, N, R, W, D), k and v (B, N, R, M, D) -> as q."""
    shape = q.shape
    n_text, scale = text[1].shape[2], shape[-1] ** -0.5
    text_k, text_v = (x.flatten(0, 1) for x in text[1:])
    every = q.reshape(shape[0] * shape[1], -1, shape[-1])
    lines = q.reshape(-1, *shape[3:])
    local = torch.baddbmm(bias, lines, k.reshape(-1, *k.shape[3:]).mT, alpha=scale).view(*shape[:4], -1)
    for row in range(min(rows_back, shape[2])):  # above the picture there is nothing to see
        local[:, :, row, :, : (rows_back - row) * shape[3]] = float("-inf")
    caption = torch.bmm(every * scale, text_k.mT).view(*shape[:4], n_text)
    weights = torch.cat([caption, local], dim=-1).softmax(-1).to(v.dtype)
    from_text = torch.bmm(weights[..., :n_text].reshape(every.shape[0], -1, n_text), text_v)
    from_codes = torch.bmm(weights[..., n_text:].reshape(lines.shape[0], shape[3], -1), v.reshape(-1, *v.shape[3:]))
    return from_text.view(shape) + from_codes.view(shape)
