"""Blocks of the U-Net in float64, written with loops and explicit sums; nothing is shared with the package."""

import math

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def group_norm(state, name, x, groups):
    """(B, C, H, W): each sample's groups of neighboring channels to mean 0 and variance 1."""
    out = np.empty_like(x)
    size = x.shape[1] // groups
    for b in range(len(x)):
        for g in range(groups):
            part = x[b, g * size : (g + 1) * size]
            out[b, g * size : (g + 1) * size] = (part - part.mean()) / math.sqrt(part.var() + 1e-5)
    return out * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def conv(state, name, x, stride=1):
    weight = state[f"{name}.weight"]
    reach = weight.shape[-1] // 2
    padded = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    height, width = (-(-side // stride) for side in x.shape[2:])
    out = np.zeros((len(x), weight.shape[0], height, width))
    for i in range(weight.shape[-2]):
        for j in range(weight.shape[-1]):
            seen = padded[:, :, i : i + x.shape[2] : stride, j : j + x.shape[3] : stride]
            out += np.einsum("bchw,oc->bohw", seen, weight[:, :, i, j])
    return out + state[f"{name}.bias"][:, None, None]


def resized(x, change):
    if change == "down":
        return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    return x.repeat(2, axis=2).repeat(2, axis=3)


def attention(state, name, x, context, head_width, groups):
    """Query by query, head by head."""
    places = group_norm(state, f"{name}.norm", x, groups).reshape(*x.shape[:2], -1).transpose(0, 2, 1)
    width = x.shape[1]
    qkv = linear(state, f"{name}.qkv", places)
    told = linear(state, f"{name}.context_kv", context) if f"{name}.context_kv.weight" in state else None
    out = np.zeros_like(places)
    for b in range(len(x)):
        for start in range(0, width, head_width):
            head = slice(start, start + head_width)
            q, k, v = (qkv[b, :, part * width : (part + 1) * width][:, head] for part in range(3))
            if told is not None:
                k = np.concatenate([k, told[b, :, :width][:, head]])
                v = np.concatenate([v, told[b, :, width:][:, head]])
            for place, query in enumerate(q):
                scores = np.exp(k @ query / math.sqrt(head_width))
                out[b, place, head] = scores @ v / scores.sum()
    out = linear(state, f"{name}.out", out)
    return x + out.transpose(0, 2, 1).reshape(x.shape)


def block(state, name, x, time, context, config, change=""):
    h = silu(group_norm(state, f"{name}.norm1", x, config.groups))
    if change:
        h, x = resized(h, change), resized(x, change)
    h = conv(state, f"{name}.conv1", h)
    told = linear(state, f"{name}.time", silu(time))[:, :, None, None]
    width = h.shape[1]
    if config.scale_shift:
        h = group_norm(state, f"{name}.norm2", h, config.groups) * (1 + told[:, :width]) + told[:, width:]
    else:
        h = group_norm(state, f"{name}.norm2", h + told, config.groups)
    h = conv(state, f"{name}.conv2", silu(h))
    h = h + (conv(state, f"{name}.shortcut", x) if f"{name}.shortcut.weight" in state else x)
    if f"{name}.attention.qkv.weight" in state:
        h = attention(state, f"{name}.attention", h, context, config.head_width, config.groups)
    return h


def time_embedding(state, name, t, width):
    rates = [10_000 ** (-i / (width // 2)) for i in range(width // 2)]
    features = np.array([[math.cos(s * r) for r in rates] + [math.sin(s * r) for r in rates] for s in t])
    return linear(state, f"{name}.linear_2", silu(linear(state, f"{name}.linear_1", features)))


def unet(state, x, t, added, context, config):
    """The whole, level by level: (B, C, H, W), B numbers, (B, E), (B, T, K)."""
    time = time_embedding(state, "time_embedding", t, config.width) + added
    x = conv(state, "conv_in", x)
    made, number, levels = [x], 0, len(config.multipliers)

    def change(name, x, way):
        if config.resample_blocks:
            return block(state, name, x, time, context, config, way)
        return conv(state, f"{name}.conv", x, 2) if way == "down" else conv(state, f"{name}.conv", resized(x, "up"))

    for level in range(levels):
        for _ in range(config.depth):
            x = block(state, f"down.{number}", x, time, context, config)
            made.append(x)
            number += 1
        if level < levels - 1:
            x = change(f"down.{number}", x, "down")
            made.append(x)
            number += 1
    for n in range(2):
        x = block(state, f"middle.{n}", x, time, context, config)
    number = 0
    for level in reversed(range(levels)):
        for _ in range(config.depth + 1):
            x = block(state, f"up.{number}", np.concatenate([x, made.pop()], axis=1), time, context, config)
            number += 1
        if level:
            x = change(f"up.{number}", x, "up")
            number += 1
    assert not made
    return conv(state, "conv_out", silu(group_norm(state, "norm_out", x, config.groups)))
