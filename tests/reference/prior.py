"""Float64 twin of the token prior: one position, one head, one key at a time, from the paper's description alone.

`weights` is the state dict; `sizes` a plain dict of the config's numbers.
"""

import math

import torch


def sees(kind, n_text, width, kernel, query, key):
    """Whether stream position `query` attends to `key` (position 0 is the start, 1..n_text the caption)."""
    return sees_after(n_text + 1, kind, width, kernel, query, key)


def sees_after(n_prefix, kind, width, kernel, query, key):
    """The same for a stream with so many positions before the codes."""
    if query < n_prefix:
        return key <= query
    if key < n_prefix:
        return True
    j, k = query - n_prefix, key - n_prefix
    if k > j:
        return False
    if kind == "full":
        return True
    if kind == "row":
        return any(k == j - back for back in range(width + 1))
    if kind == "column":
        return j % width == k % width
    half = (kernel - 1) // 2
    if kind == "window":
        (row, column), (other_row, other_column) = divmod(j, width), divmod(k, width)
        return abs(row - other_row) <= half and abs(column - other_column) <= half
    # all cells of the window, written out on one long line of rows
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
        return {"sparse": "conv", "window": "window"}[attention]
    return {2: "column"}.get((i - 1) % 4 + 1, "row")


def layer_norm(x, weights, name):
    centered = x - x.sum() / len(x)
    variance = (centered * centered).sum() / len(x)
    return centered / torch.sqrt(variance + 1e-5) * weights[name + ".weight"] + weights[name + ".bias"]


def unit(x):
    return x / torch.sqrt((x * x).sum() / len(x) + 1e-6)


def linear(x, weights, name):
    y = weights[name + ".weight"] @ x
    return y + weights[name + ".bias"] if name + ".bias" in weights else y


def gelu(x, activation="gelu"):
    if activation == "gelu_tanh":
        return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def embed(tokens, length, codes, weights, sizes):
    n_text, width = sizes["n_text"], sizes["grid"]
    stream = [weights["start"] + weights["text_position.weight"][0]] if sizes["start"] else []
    for t in range(n_text):
        x = weights["token.weight"][tokens[t]] if t < length else weights["pad.weight"][t]
        stream.append(x + weights["text_position.weight"][len(stream)])
    for r in range(width):
        for c in range(width):
            code = weights["code.weight"][codes[r][c]]
            if sizes["flat_position"]:
                stream.append(code + weights["code_position.weight"][width * r + c])
            else:
                stream.append(code + weights["row.weight"][r] + weights["column.weight"][c])
    return stream[:-1]


def prefix(sizes):
    """Positions before the codes."""
    return sizes["n_text"] + (1 if sizes["start"] else 0)


def apply_rotary(x, place, sizes):
    """Pairs (i, i + D/2) as complex numbers, turned by the row (first half of the pairs) or the column."""
    n_prefix, grid, n_pairs = prefix(sizes), sizes["grid"], len(x) // 2
    row = column = place
    if place >= n_prefix:
        row, column = (n_prefix + part for part in divmod(place - n_prefix, grid))
    out = [0.0] * len(x)
    n_rows = n_pairs // 2
    for i in range(n_pairs):
        at, n, index = (row, n_rows, i) if i < n_rows else (column, n_pairs - n_rows, i - n_rows)
        angle = at / 100 ** (index / n)
        pair = complex(x[i], x[i + n_pairs]) * complex(math.cos(angle), math.sin(angle))
        out[i], out[i + n_pairs] = pair.real, pair.imag
    return torch.tensor(out, dtype=x.dtype)


def attention(stream, kind, weights, name, sizes):
    n_head, width = sizes["n_head"], len(stream[0])
    d = width // n_head
    qkv = [linear(x, weights, name + ".qkv") for x in stream]
    out = []
    rule = (prefix(sizes), kind, sizes["grid"], sizes["conv_kernel"])
    for i in range(len(stream)):
        keys = [k for k in range(len(stream)) if sees_after(*rule, i, k)]
        heads = []
        for h in range(n_head):
            part = slice(h * d, (h + 1) * d)

            def query(p, part=part, h=h):
                x = qkv[p][:width][part]
                if sizes["block"] == "modern":
                    x = apply_rotary(unit(x), p, sizes) * weights[name + ".qk_scale"][h]
                return x

            def key(p, part=part):
                x = qkv[p][width : 2 * width][part]
                return apply_rotary(unit(x), p, sizes) if sizes["block"] == "modern" else x

            scores = torch.stack([query(i) @ key(k) for k in keys]) / math.sqrt(d)
            weight = torch.exp(scores - scores.max())
            weight = weight / weight.sum()
            heads.append(sum(w * qkv[k][2 * width :][part] for w, k in zip(weight, keys, strict=True)))
        out.append(linear(torch.cat(heads), weights, name + ".attention_out"))
    return out


def gated(hidden):
    a, b = hidden[: len(hidden) // 2], hidden[len(hidden) // 2 :]
    return a / (1 + torch.exp(-a)) * b


def prior(tokens, length, codes, weights, sizes):
    """Logits of one caption and one grid, given as lists: (T, n_text_vocab), (W*W, V)."""
    stream = embed(tokens, length, codes, weights, sizes)
    for i in range(1, sizes["n_layer"] + 1):
        name = f"blocks.{i - 1}"
        kind = kind_of_layer(i, sizes["n_layer"], sizes["attention"])
        modern = sizes["block"] == "modern"
        normed = [unit(x) if modern else layer_norm(x, weights, name + ".norm_1") for x in stream]
        added = attention(normed, kind, weights, name, sizes)
        if sizes["sandwich_norm"]:
            added = [layer_norm(y, weights, name + ".attention_norm") for y in added]
        stream = [x + y for x, y in zip(stream, added, strict=True)]
        for p, x in enumerate(stream):
            hidden = linear(unit(x) if modern else layer_norm(x, weights, name + ".norm_2"), weights, name + ".mlp_in")
            hidden = gated(hidden) if modern else gelu(hidden, sizes["activation"])
            y = linear(hidden, weights, name + ".mlp_out")
            stream[p] = x + (layer_norm(y, weights, name + ".mlp_norm") if sizes["sandwich_norm"] else y)
    for name in ("norm",) if sizes["final_norms"] == 1 else ("norm.0", "norm.1"):
        stream = [layer_norm(x, weights, name) for x in stream]
    text = [linear(x, weights, "text_head") for x in stream[: prefix(sizes) - 1]]
    image = [linear(x, weights, "image_head") for x in stream[prefix(sizes) - 1 :]]
    return torch.stack(text), torch.stack(image)


def nats(logits, target):
    return float((torch.logsumexp(logits, 0) - logits[target]).detach())
