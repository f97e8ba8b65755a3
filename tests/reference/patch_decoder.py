"""The patch transformer in float64, position by position and head by head; nothing is shared with the package."""

import math

import numpy as np

from reference.unet import linear, silu

EPSILON = 1e-6
SLOWEST = 100.0


def rms(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON)


def patches(x, side):
    """(B, 3, S, S) -> (B, P, 3 side^2): channel by channel, each patch's rows one after the other."""
    n, _, size, _ = x.shape
    out = [
        [x[b, :, i : i + side, j : j + side].reshape(-1) for i in range(0, size, side) for j in range(0, size, side)]
        for b in range(n)
    ]
    return np.array(out)


def image(rows, side):
    """The inverse of `patches`."""
    grid = math.isqrt(rows.shape[1])
    out = np.zeros((len(rows), 3, grid * side, grid * side))
    for p in range(grid * grid):
        i, j = p // grid * side, p % grid * side
        out[:, :, i : i + side, j : j + side] = rows[:, p].reshape(-1, 3, side, side)
    return out


def places(n_context, grid):
    """Row and column of each position: the context lies on a diagonal before the grid."""
    line = [(p, p) for p in range(n_context)]
    return line + [(n_context + p // grid, n_context + p % grid) for p in range(grid * grid)]


def rotated(x, place):
    """(D,) at a place: pairs (k, k + D/2), the first half of them turned by the row, the others by the column."""
    half = len(x) // 2
    rows = half // 2
    out = np.empty_like(x)
    for k in range(half):
        axis, i, n = (place[0], k, rows) if k < rows else (place[1], k - rows, half - rows)
        angle = axis * SLOWEST ** (-i / max(n, 1))
        a, b = x[k], x[k + half]
        out[k], out[k + half] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return out


def attended(q, k, v, scale, where):
    """(L, D) each of one head: every query sees every key."""
    q = np.array([rotated(row, place) for row, place in zip(rms(q), where, strict=True)]) * scale
    k = np.array([rotated(row, place) for row, place in zip(rms(k), where, strict=True)])
    scores = q @ k.T / math.sqrt(q.shape[1])
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ v


def block(state, name, x, modulation, n_head, where):
    """(L, C), (6, C) -> (L, C)."""
    s1, b1, g1, s2, b2, g2 = modulation + state[f"{name}.table"]
    width = x.shape[1] // n_head
    qkv = (rms(x) * (1 + s1) + b1) @ state[f"{name}.qkv.weight"].T
    q, k, v = np.split(qkv, 3, axis=1)
    heads = [slice(h * width, (h + 1) * width) for h in range(n_head)]
    scales = state[f"{name}.qk_scale"]
    out = [attended(q[:, part], k[:, part], v[:, part], scales[h], where) for h, part in enumerate(heads)]
    x = x + (1 + g1) * (np.concatenate(out, axis=1) @ state[f"{name}.attention_out.weight"].T)
    a, b = np.split((rms(x) * (1 + s2) + b2) @ state[f"{name}.mlp_in.weight"].T, 2, axis=1)
    return x + (1 + g2) * ((silu(a) * b) @ state[f"{name}.mlp_out.weight"].T)


def timestep(state, t, width):
    rates = np.exp(-math.log(10_000) / (width // 2) * np.arange(width // 2))
    features = np.concatenate([np.cos(t * rates), np.sin(t * rates)])
    return linear(state, "time.linear_2", silu(linear(state, "time.linear_1", features)))


def forward(state, x, t, added, context, side, n_layer, n_head):
    """(B, 3, S, S), (B,), (B, C), (B, N, C) -> (B, 3, S, S)."""
    where, out = places(context.shape[1], x.shape[2] // side), []
    for b, rows in enumerate(patches(x, side)):
        stream = np.concatenate([context[b], linear(state, "patch_in", rows) + state["position.weight"]])
        time = timestep(state, t[b], stream.shape[1]) + added[b]
        modulation = linear(state, "modulation", silu(time)).reshape(8, -1)
        for i in range(n_layer):
            stream = block(state, f"blocks.{i}", stream, modulation[:6], n_head, where)
        y = rms(stream[context.shape[1] :]) * (1 + modulation[6]) + modulation[7]
        out.append(linear(state, "patch_out", y))
    return image(np.array(out), side)
