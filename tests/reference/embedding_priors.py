"""Float64 twins of the priors over embeddings: one row, one position, one key at a time, from the paper's description.

`weights` is the state dict; `sizes` a plain dict of the config's numbers. Blocks are the paper's.
"""

import math

import torch

from reference.prior import gelu, layer_norm, linear


def captioned(tokens, length, z_t, weights, sizes):
    """What stands before everything else: caption tokens or pads, then z_t; a caption of length 0 says nothing."""
    stream = []
    for place in range(sizes["n_text"]):
        if place < length:
            stream.append(weights["captions.token.weight"][tokens[place]])
        else:
            stream.append(weights["captions.pad.weight"][place])
    if length == 0:
        return [*stream, weights["captions.null"]]
    scaled = torch.stack([value * math.sqrt(len(z_t)) for value in z_t])
    return [*stream, linear(scaled, weights, "captions.z_in")]


def attended(stream, weights, name, n_head):
    """Each position sees itself and those before."""
    width = len(stream[0])
    d = width // n_head
    qkv = [linear(x, weights, name + ".qkv") for x in stream]
    out = []
    for i in range(len(stream)):
        heads = []
        for h in range(n_head):
            part = slice(h * d, (h + 1) * d)
            scores = [qkv[i][:width][part] @ qkv[k][width : 2 * width][part] / math.sqrt(d) for k in range(i + 1)]
            shares = [torch.exp(score - max(scores)) for score in scores]
            values = [share * qkv[k][2 * width :][part] for k, share in enumerate(shares)]
            heads.append(sum(values) / sum(shares))
        out.append(linear(torch.cat(heads), weights, name + ".attention_out"))
    return out


def transformed(stream, weights, sizes):
    stream = [x + weights["position.weight"][place] for place, x in enumerate(stream)]
    for layer in range(sizes["n_layer"]):
        name = f"blocks.{layer}"
        normed = [layer_norm(x, weights, name + ".norm_1") for x in stream]
        stream = [x + y for x, y in zip(stream, attended(normed, weights, name, sizes["n_head"]), strict=True)]
        for place, x in enumerate(stream):
            hidden = gelu(linear(layer_norm(x, weights, name + ".norm_2"), weights, name + ".mlp_in"))
            stream[place] = x + linear(hidden, weights, name + ".mlp_out")
    return [layer_norm(x, weights, "norm") for x in stream]


def timestep(t, weights, sizes):
    half = sizes["n_embd"] // 2
    angles = [t / 10_000 ** (i / half) for i in range(half)]
    features = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.double)
    hidden = linear(features, weights, "time_in")
    return linear(hidden / (1 + torch.exp(-hidden)), weights, "time_out")


def diffusion_prior(x, t, tokens, length, z_t, weights, sizes):
    """The prediction for one row: (D,)."""
    stream = captioned(tokens, length, z_t, weights, sizes)
    stream += [timestep(t, weights, sizes), linear(x, weights, "image_in"), weights["query"]]
    return linear(transformed(stream, weights, sizes)[-1], weights, "out")


def autoregressive_prior(tokens, length, z_t, dot, buckets, weights, sizes):
    """Logits of each bucket for one row: (M, V)."""
    stream = captioned(tokens, length, z_t, weights, sizes)
    first = len(stream)
    stream.append(weights["dot.weight"][sizes["n_dot"] if length == 0 else dot])
    stream += [weights["bucket.weight"][bucket] for bucket in buckets[:-1]]
    return torch.stack([linear(x, weights, "head") for x in transformed(stream, weights, sizes)[first:]])


def bucket(value, low, high, n):
    """The first of n equal parts of [low, high] whose upper end lies above the value; the last where none does."""
    for number in range(n):
        if value < low + (number + 1) * (high - low) / n:
            return number
    return n - 1
