"""Float64 twin of ECLIPSE's prior (Patel et al. 2023), by the names of its file: one caption, one pass, no timestep."""

import math

import torch

from reference.prior import gelu, layer_norm, linear


def prior(x, states, length, z_t, weights, n_head):
    """z_i for noise x (D,), states of a caption (T, D) and its z_t (D,)."""
    stream = [linear(row, weights, "encoder_hidden_states_proj") for row in states]
    stream += [linear(z_t, weights, "embedding_proj"), linear(x, weights, "proj_in"), weights["prd_embedding"][0, 0]]
    stream = [row + place for row, place in zip(stream, weights["positional_embedding"][0], strict=True)]
    seen = [i for i in range(len(stream)) if i < length or i >= len(states)]  # all but the caption's pads
    width = len(stream[0])
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("transformer_blocks."))
    for layer in range(layers):
        name = f"transformer_blocks.{layer}"
        normed = [layer_norm(row, weights, f"{name}.norm1") for row in stream]
        q, k, v = ([linear(row, weights, f"{name}.attn1.to_{part}") for row in normed] for part in "qkv")
        for i in range(len(stream)):
            heads, keys = [], [j for j in seen if j <= i]
            for part in torch.arange(width).chunk(n_head):
                scores = torch.stack([q[i][part] @ k[j][part] for j in keys]) / math.sqrt(width / n_head)
                shares = torch.exp(scores) / torch.exp(scores).sum()
                heads.append(sum(share * v[j][part] for share, j in zip(shares, keys, strict=True)))
            stream[i] = stream[i] + linear(torch.cat(heads), weights, f"{name}.attn1.to_out.0")
        for i, row in enumerate(stream):
            hidden = gelu(linear(layer_norm(row, weights, f"{name}.norm3"), weights, f"{name}.ff.net.0.proj"))
            stream[i] = row + linear(hidden, weights, f"{name}.ff.net.2")
    return linear(layer_norm(stream[-1], weights, "norm_out"), weights, "proj_to_clip_embeddings")
