"""Float64 twin of the token prior: one position, one head, one key at a time, from the paper's description alone.

`weights` is the state dict; `sizes` a plain dict of the config's numbers.
"""

import math

import torch


def sees(kind, n_text, width, kernel, query, key):
    """Whether stream position `query` attends to `key` (position 0 is the start, 1..n_text the caption)."""
    if query <= n_text:
        return key <= query
    if key <= n_text:
        return True
    j, k = query - n_text - 1, key - n_text - 1
    if k > j:
        return False
    if kind == "full":
        return True
    if kind == "row":
        return any(k == j - back for back in range(width + 1))
    if kind == "column":
        return j % width == k % width
    # all cells of the window, written out on one long line of rows
    half = (kernel - 1) // 2
    cells = []
    for down in range(-half, half + 1):
        for right in range(-half, half + 1):
            cells.append(j + down * width + right)
    return k in cells


def kind_of_layer(i, n_layer, attention):
    """`i` counts from 1."""
    if attention == "full":
        return "full"
    if i == n_layer:
        return "conv"
    return {2: "column"}.get((i - 1) % 4 + 1, "row")


def layer_norm(x, weights, name):
    centered = x - x.sum() / len(x)
    variance = (centered * centered).sum() / len(x)
    return centered / torch.sqrt(variance + 1e-5) * weights[name + ".weight"] + weights[name + ".bias"]


def linear(x, weights, name):
    return weights[name + ".weight"] @ x + weights[name + ".bias"]


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def embed(tokens, length, codes, weights, sizes):
    n_text, width = sizes["n_text"], sizes["grid"]
    stream = [weights["start"] + weights["text_position.weight"][0]]
    for t in range(n_text):
        x = weights["token.weight"][tokens[t]] if t < length else weights["pad.weight"][t]
        stream.append(x + weights["text_position.weight"][t + 1])
    for r in range(width):
        for c in range(width):
            code = weights["code.weight"][codes[r][c]]
            stream.append(code + weights["row.weight"][r] + weights["column.weight"][c])
    return stream[:-1]


def attention(stream, kind, weights, name, sizes):
    n_head, width = sizes["n_head"], len(stream[0])
    d = width // n_head
    qkv = [linear(x, weights, name + ".qkv") for x in stream]
    out = []
    for i in range(len(stream)):
        keys = [k for k in range(len(stream)) if sees(kind, sizes["n_text"], sizes["grid"], sizes["conv_kernel"], i, k)]
        heads = []
        for h in range(n_head):
            part = slice(h * d, (h + 1) * d)
            scores = torch.stack([qkv[i][:width][part] @ qkv[k][width : 2 * width][part] for k in keys]) / math.sqrt(d)
            weight = torch.exp(scores - scores.max())
            weight = weight / weight.sum()
            heads.append(sum(w * qkv[k][2 * width :][part] for w, k in zip(weight, keys, strict=True)))
        out.append(linear(torch.cat(heads), weights, name + ".attention_out"))
    return out


def prior(tokens, length, codes, weights, sizes):
    """Logits of one caption and one grid, given as lists: (T, n_text_vocab), (W*W, V)."""
    stream = embed(tokens, length, codes, weights, sizes)
    for i in range(1, sizes["n_layer"] + 1):
        name = f"blocks.{i - 1}"
        kind = kind_of_layer(i, sizes["n_layer"], sizes["attention"])
        normed = [layer_norm(x, weights, name + ".norm_1") for x in stream]
        stream = [x + y for x, y in zip(stream, attention(normed, kind, weights, name, sizes), strict=True)]
        for p, x in enumerate(stream):
            hidden = gelu(linear(layer_norm(x, weights, name + ".norm_2"), weights, name + ".mlp_in"))
            stream[p] = x + linear(hidden, weights, name + ".mlp_out")
    stream = [layer_norm(x, weights, "norm") for x in stream]
    text = [linear(x, weights, "text_head") for x in stream[: sizes["n_text"]]]
    image = [linear(x, weights, "image_head") for x in stream[sizes["n_text"] :]]
    return torch.stack(text), torch.stack(image)


def nats(logits, target):
    return float((torch.logsumexp(logits, 0) - logits[target]).detach())
