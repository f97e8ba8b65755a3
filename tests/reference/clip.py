"""Slow float64 twin of CLIP, position by position in numpy (Radford et al. 2021; sigmoid loss: arXiv 2303.15343).

`weights` maps the published names to arrays.
"""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = dict[str, Array]


def _norm(x: Array, weights: Weights, name: str) -> Array:
    centered = x - x.mean()
    scaled: Array = centered / math.sqrt((centered**2).mean() + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _linear(x: Array, weights: Weights, name: str) -> Array:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def _layer(rows: list[Array], weights: Weights, name: str, heads: int, causal: bool) -> list[Array]:
    normed = [_norm(row, weights, f"{name}.layer_norm1") for row in rows]
    q, k, v = ([_linear(row, weights, f"{name}.self_attn.{p}_proj") for row in normed] for p in "qkv")
    size = len(rows[0]) // heads
    after = []
    for i, row in enumerate(rows):
        seen = range(i + 1 if causal else len(rows))
        mixed = np.zeros_like(row)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = np.array([math.exp(q[i][part] @ k[j][part] / math.sqrt(size)) for j in seen])
            scores /= scores.sum()
            mixed[part] = sum(s * v[j][part] for s, j in zip(scores, seen, strict=True))
        after.append(row + _linear(mixed, weights, f"{name}.self_attn.out_proj"))
    done = []
    for row in after:
        h = _linear(_norm(row, weights, f"{name}.layer_norm2"), weights, f"{name}.mlp.fc1")
        h = h / (1 + np.exp(-1.702 * h))
        done.append(row + _linear(h, weights, f"{name}.mlp.fc2"))
    return done


def encode_text(tokens: list[int], weights: Weights, layers: int, heads: int) -> Array:
    """One caption without padding -> (D,)."""
    embeddings = "text_model.embeddings"
    rows = [
        weights[f"{embeddings}.token_embedding.weight"][token] + weights[f"{embeddings}.position_embedding.weight"][i]
        for i, token in enumerate(tokens)
    ]
    for n in range(layers):
        rows = _layer(rows, weights, f"text_model.encoder.layers.{n}", heads, causal=True)
    return weights["text_projection.weight"] @ _norm(rows[-1], weights, "text_model.final_layer_norm")


def encode_image(image: Array, weights: Weights, layers: int, heads: int) -> Array:
    """One picture (3, S, S) in [0, 1] of the model's size -> (D,)."""
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    image = np.stack([(plane - m) / s for plane, m, s in zip(image, mean, std, strict=True)])
    embeddings = "vision_model.embeddings"
    kernel = weights[f"{embeddings}.patch_embedding.weight"]
    patch = kernel.shape[-1]
    rows = [weights[f"{embeddings}.class_embedding"]]
    for y in range(0, image.shape[1], patch):
        for x in range(0, image.shape[2], patch):
            rows.append((kernel * image[:, y : y + patch, x : x + patch]).sum(axis=(1, 2, 3)))
    rows = [
        row + position for row, position in zip(rows, weights[f"{embeddings}.position_embedding.weight"], strict=True)
    ]
    rows = [_norm(row, weights, "vision_model.pre_layrnorm") for row in rows]
    for n in range(layers):
        rows = _layer(rows, weights, f"vision_model.encoder.layers.{n}", heads, causal=False)
    return weights["visual_projection.weight"] @ _norm(rows[0], weights, "vision_model.post_layernorm")


def cosine(a: Array, b: Array) -> float:
    """Cosine of the angle between two vectors."""
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def softmax_loss(images: Array, texts: Array, captions: list[object], scale: float) -> float:
    """Both directions' mean of -log of the chance given to a pair, averaged over all texts with the same caption."""
    total = 0.0
    for rows, columns in ((images, texts), (texts, images)):
        for i, row in enumerate(rows):
            logits = [scale * cosine(row, column) for column in columns]
            log_sum = math.log(sum(math.exp(x) for x in logits))
            same = [j for j, caption in enumerate(captions) if caption == captions[i]]
            total -= sum(logits[j] - log_sum for j in same) / len(same)
    return total / (2 * len(images))


def sigmoid_loss(images: Array, texts: Array, captions: list[object], scale: float, bias: float) -> float:
    """Equation 1: the sum over all image-text combinations, divided by the number of images."""
    total = 0.0
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            sign = 1 if captions[i] == captions[j] else -1
            total += math.log(1 + math.exp(-sign * (scale * cosine(image, text) + bias)))
    return total / len(images)
