"""Attention on CPU: local attention to the text and a few rows or one column of codes, and dense batched products.

B batch, N heads, D head width, X = 1 + T positions of start and caption, W side of the grid, L = X + W*W - 1.
Equal to dense attention under the pattern's mask (2021, app. B.1), at O(L (X + W)) instead of O(L^2).

Queries of one line of the grid, a row or a column, share their keys: the caption's, and M of their own line and of the
`back` lines before it. So each line is one small dense product over a window that was gathered for it, the caption is
one product for all lines, and the backward pass, written out, folds the windows' gradients back into lines. R = B N.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.models.attention import as_bias, causal_bias

BLOCK = 256  # queries that `chunked_causal_attention` takes at a time


def local_attention(q: Tensor, k: Tensor, v: Tensor, n_prefix: int, grid: int, distances: tuple[int, ...]) -> Tensor:
    """Codes attend to the caption and to codes at some distances back in raster order: (B, N, L, D) thrice -> same.

    `distances` are the allowed j - k >= 0 of code j and key k.
    """
    y: Tensor = _LineAttention.apply(q, k, v, n_prefix, grid, distances, False)  # type: ignore[no-untyped-call]
    return y


def column_attention(q: Tensor, k: Tensor, v: Tensor, n_prefix: int, grid: int) -> Tensor:
    """Codes attend to the caption and to their own column: three times (B, N, L, D) -> same."""
    y: Tensor = _LineAttention.apply(q, k, v, n_prefix, grid, tuple(range(grid)), True)  # type: ignore[no-untyped-call]
    return y


def dense_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Dense attention as batched products, (B, N, L, D), twice (B, N, M, D) and bias (L, M) or () -> (B, N, L, D).

    On CPU the fused kernel's backward is its slow half: for short streams this is several times as fast
    (docs/results.md), at the price of holding the (L, L) weights of every head.
    """
    y: Tensor = _Dense.apply(q, k, v, bias)  # type: ignore[no-untyped-call]
    return y


def chunked_causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as batched products, a block of queries at a time over the keys so far: (B, N, L, D) thrice."""
    y: Tensor = _Causal.apply(q, k, v)  # type: ignore[no-untyped-call]
    return y


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
        weights, y = _weigh(flat[0], flat[1], flat[2], bias)
        ctx.save_for_backward(*flat, weights, y)
        ctx.shapes = (q.shape, k.shape, v.shape)
        return y.view(q.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, y = ctx.saved_tensors
        grads = _weigh_backward(grad.reshape(y.shape), q, k, v, weights, y)
        return (*(x.view(shape) for x, shape in zip(grads, ctx.shapes, strict=True)), None)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
        bias = _tail_bias(q.shape[2], q.device, q.dtype)
        y, stored = torch.empty_like(flat[0]), []
        for start, end in _blocks(q.shape[2]):
            hidden = bias[BLOCK - (end - start) :, bias.shape[1] - end :]
            weights, part = _weigh(flat[0][:, start:end], flat[1][:, :end], flat[2][:, :end], hidden)
            y[:, start:end] = part
            stored.append(weights)
        ctx.save_for_backward(*flat, y, *stored)
        return y.view(q.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, *stored = ctx.saved_tensors
        flat = grad.reshape(y.shape)
        wide = torch.promote_types(k.dtype, torch.float32)  # what several blocks add up
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for (start, end), weights in zip(_blocks(grad.shape[2]), stored, strict=True):
            block = slice(start, end)
            parts = _weigh_backward(flat[:, block], q[:, block], k[:, :end], v[:, :end], weights, y[:, block])
            dq[:, block] = parts[0]
            dk[:, :end] += parts[1]
            dv[:, :end] += parts[2]
        return tuple(x.to(q.dtype).view(grad.shape) for x in (dq, dk, dv))


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


class _LineAttention(torch.autograd.Function):
    """Attention of the codes line by line, and of the caption's positions among themselves.

    A code's scores lie in one row: first the caption's keys, which one product gives for all codes, then those of the
    lines in its window, M of them, which one small product gives for each line.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, n_prefix: int, grid: int, distances: tuple[int, ...], columns: bool
    ) -> Tensor:
        back = 0 if columns else min(-(-distances[-1] // grid), grid - 1)
        ctx.sizes = n_prefix, grid, back, columns
        text = [x[:, :, :n_prefix].reshape(-1, n_prefix, x.shape[-1]) for x in (q, k, v)]
        text_weights, text_y = _weigh(text[0], text[1], text[2], causal_bias(n_prefix, q.device, q.dtype))
        lines = [_lines(x, n_prefix, grid, columns) for x in (q, k, v)]
        bias = _line_bias(grid, back, distances, q.device, q.dtype)
        scores = _scores(lines[0], text[1], lines[1], back, q.shape[-1] ** -0.5, bias)
        for line in range(back):  # above the image there are no keys
            scores[:, line, :, n_prefix : n_prefix + (back - line) * grid] = float("-inf")
        weights = scores.softmax(-1).to(v.dtype)
        y = _averages(weights, text[2], lines[2], back)
        ctx.save_for_backward(*text, text_weights, text_y, *lines, weights, y)
        out = q.new_empty(q.shape)
        out[:, :, :n_prefix] = text_y.view(*q.shape[:2], n_prefix, -1)
        _put(out, y, n_prefix, grid, columns)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        n_prefix, grid, back, columns = ctx.sizes
        saved = ctx.saved_tensors
        text, (text_weights, text_y), lines, (weights, y) = saved[:3], saved[3:5], saved[5:8], saved[8:]
        grad_text = grad[:, :, :n_prefix].reshape(text_y.shape)
        text_grads = _weigh_backward(grad_text, text[0], text[1], text[2], text_weights, text_y)
        grad_lines, scale = _lines(grad, n_prefix, grid, columns), grad.shape[-1] ** -0.5
        scores = _scores(grad_lines, text[2], lines[2], back, 1.0, None)
        scores = scores.sub_((grad_lines * y).sum(-1, keepdim=True)).mul_(weights)
        to_keys = _scatter(scores, lines[0], n_prefix, back, text_grads[1], scale)
        to_values = _scatter(weights, grad_lines, n_prefix, back, text_grads[2], 1.0)
        grads = []
        to_queries = _averages(scores, text[1], lines[1], back).mul_(scale)
        for of_text, of_lines in zip(text_grads, (to_queries, to_keys, to_values), strict=True):
            out = grad.new_empty(grad.shape)
            out[:, :, :n_prefix] = of_text.view(*grad.shape[:2], n_prefix, -1)
            _put(out, of_lines, n_prefix, grid, columns)
            grads.append(out)
        return (*grads, None, None, None, None)


def _scores(q: Tensor, text: Tensor, lines: Tensor, back: int, scale: float, bias: Tensor | None) -> Tensor:
    """Products of each code with the caption and its window: (R, W, W, D), (R, X, D) -> (R, W, W, X + M)."""
    windows = _windows(lines, back)
    n_text = text.shape[1]
    out = q.new_empty(*q.shape[:3], n_text + windows.shape[2])
    torch.mul(torch.bmm(q.flatten(1, 2), text.mT).view(*q.shape[:3], n_text), scale, out=out[..., :n_text])
    every, keys = q.flatten(0, 1), windows.flatten(0, 1).mT
    local = torch.bmm(every, keys) if bias is None else torch.baddbmm(bias, every, keys, alpha=scale)
    out[..., n_text:] = local.view(*q.shape[:3], -1)
    return out


def _averages(weights: Tensor, text: Tensor, lines: Tensor, back: int) -> Tensor:
    """Sums of the caption's vectors and the window's by weights (R, W, W, X + M): -> (R, W, W, D)."""
    n_text = text.shape[1]
    of_text = torch.bmm(weights[..., :n_text].flatten(1, 2), text).view(lines.shape)
    windows = _windows(lines, back).flatten(0, 1)
    return of_text.add_(torch.bmm(weights[..., n_text:].flatten(0, 1), windows).view(lines.shape))


def _scatter(weights: Tensor, q: Tensor, n_text: int, back: int, text: Tensor, scale: float) -> Tensor:
    """The transpose of `_averages`: adds what comes to the caption to `text`, gives what comes to the lines."""
    text.add_(torch.bmm(weights[..., :n_text].flatten(1, 2).mT, q.flatten(1, 2)), alpha=scale)
    to_windows = torch.bmm(weights[..., n_text:].flatten(0, 1).mT, q.flatten(0, 1))
    return _fold(to_windows.view(*q.shape[:2], -1, q.shape[-1]), back).mul_(scale)


def _weigh(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over all keys: q (R, Q, D), k and v (R, M, D), bias (Q, M) -> weights (R, Q, M) and (R, Q, D)."""
    weights = torch.baddbmm(bias, q, k.mT, alpha=q.shape[-1] ** -0.5).softmax(-1).to(v.dtype)
    return weights, torch.bmm(weights, v)


def _weigh_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the softmax's own needs no second pass: rows of `grad * y` sum to what it takes off."""
    scale = q.shape[-1] ** -0.5
    taken = (grad * y).sum(-1, keepdim=True)
    scores = torch.baddbmm(taken, grad, v.mT, beta=-1).mul_(weights)
    return torch.bmm(scores, k).mul_(scale), torch.bmm(scores.mT, q).mul_(scale), torch.bmm(weights.mT, grad)


def _lines(x: Tensor, n_prefix: int, grid: int, columns: bool) -> Tensor:
    """The codes by rows or by columns: (B, N, L, D) -> (B N, W, W, D), zero where the stream has no last code."""
    out = x.new_empty(*x.shape[:2], grid, grid, x.shape[-1])
    _raster(out, columns, x[:, :, n_prefix:], into_lines=True)
    (out.transpose(2, 3) if columns else out)[:, :, -1, -1] = 0
    return out.flatten(0, 1)


def _put(out: Tensor, lines: Tensor, n_prefix: int, grid: int, columns: bool) -> None:
    """The inverse of `_lines`, written into the stream `out`."""
    _raster(lines.view(*out.shape[:2], grid, grid, -1), columns, out[:, :, n_prefix:], into_lines=False)


def _raster(lines: Tensor, columns: bool, stream: Tensor, into_lines: bool) -> None:
    """Copy between lines (B, N, W, W, D) and the stream's codes (B, N, W*W - 1, D)."""
    grid = lines.shape[2]
    raster = lines.transpose(2, 3) if columns else lines
    whole = grid * (grid - 1)
    pairs = (
        (raster[:, :, :-1], stream[:, :, :whole].view(*stream.shape[:2], grid - 1, grid, stream.shape[-1])),
        (raster[:, :, -1, :-1], stream[:, :, whole:]),
    )
    for ours, theirs in pairs:
        (ours if into_lines else theirs).copy_(theirs if into_lines else ours)


def _windows(lines: Tensor, back: int) -> Tensor:
    """Each line after the `back` lines before it, zeros above the first: (R, W, W, D) -> (R, W, (back + 1) W, D)."""
    if not back:
        return lines
    grid = lines.shape[1]
    out = lines.new_empty(*lines.shape[:2], (back + 1) * grid, lines.shape[-1])
    for i in range(back + 1):
        ago, part = back - i, out[:, :, i * grid : (i + 1) * grid]
        part[:, ago:] = lines[:, : grid - ago]
        part[:, :ago] = 0
    return out


def _fold(windows: Tensor, back: int) -> Tensor:
    """The transpose of `_windows`: sums, (R, W, (back + 1) W, D) -> (R, W, W, D)."""
    grid = windows.shape[1]
    lines = windows[:, :, back * grid :].contiguous()
    for i in range(back):
        ago = back - i
        lines[:, : grid - ago] += windows[:, ago:, i * grid : (i + 1) * grid]
    return lines


@lru_cache(maxsize=64)
def _line_bias(grid: int, back: int, distances: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """0 where a code attends to a key of its window, -inf elsewhere: (W, M); ignores the image's upper edge."""
    with torch.inference_mode(False):
        queries = torch.arange(grid, device=device)[:, None] + back * grid
        ago = queries - torch.arange((back + 1) * grid, device=device)
        return as_bias(torch.isin(ago, torch.tensor(distances, device=device)), dtype)


@lru_cache(maxsize=64)
def _tail_bias(length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Causal bias of a stream's last queries: (BLOCK, BLOCK + length); shorter streams use its last columns."""
    with torch.inference_mode(False):
        return F.pad(causal_bias(BLOCK, device, dtype), (length, 0))
