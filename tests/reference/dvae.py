"""Float64 twin of the dVAE, written from the paper with loops and matrix products; weights come as a plain dict."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def conv(x: Tensor, w: Tensor, b: Tensor, stride: int = 1) -> Tensor:
    """Sum over kernel offsets of a matrix product; zero padding that keeps the size for odd kernels."""
    k = w.shape[2]
    pad = (k - 1) // 2
    height, width = x.shape[2], x.shape[3]
    padded = x.new_zeros(x.shape[0], x.shape[1], height + 2 * pad, width + 2 * pad)
    padded[:, :, pad : pad + height, pad : pad + width] = x
    out = b.view(1, -1, 1, 1)
    for dy in range(k):
        for dx in range(k):
            rows = padded[:, :, dy : dy + height : stride, dx : dx + width : stride]
            out = out + torch.einsum("oc,bchw->bohw", w[:, :, dy, dx], rows)
    return out


def relu(x: Tensor) -> Tensor:
    """Zero the negative part."""
    return x * (x > 0)


def layer(x: Tensor, weights: Weights, name: str) -> Tensor:
    """Apply the convolution of this name."""
    return conv(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def bottleneck(x: Tensor, weights: Weights, prefix: str, gain: float) -> Tensor:
    """id(x) + gain * four ReLU-convolutions; works for encoder and decoder, which differ in kernels alone."""
    h = x
    for i in (1, 2, 3, 4):
        h = layer(relu(h), weights, f"{prefix}conv_{i}")
    identity = layer(x, weights, f"{prefix}id_path") if f"{prefix}id_path.weight" in weights else x
    return identity + gain * h


def max_pool(x: Tensor) -> Tensor:
    """Largest of each 2x2 pixels."""
    corners = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return torch.stack(corners).amax(0)


def upsample(x: Tensor) -> Tensor:
    """Each pixel becomes 2x2 equal ones."""
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def stack(
    x: Tensor, weights: Weights, half: str, n_groups: int, n_blocks: int, resize: Callable[[Tensor], Tensor]
) -> Tensor:
    """One half of the network: groups of blocks with `resize` between them."""
    h = layer(x, weights, f"{half}.input")
    for g in range(1, n_groups + 1):
        for b in range(1, n_blocks + 1):
            h = bottleneck(h, weights, f"{half}.group_{g}.block_{b}.", 1 / (n_groups * n_blocks) ** 2)
        if g < n_groups:
            h = resize(h)
    return layer(relu(h), weights, f"{half}.output")


def encoder(images: Tensor, weights: Weights, n_groups: int, n_blocks: int) -> Tensor:
    """Images in [0, 1] to logits."""
    return stack(0.1 + 0.8 * images, weights, "encoder", n_groups, n_blocks, max_pool)


def decoder(vectors: Tensor, weights: Weights, n_groups: int, n_blocks: int) -> Tensor:
    """One-hot or relaxed codes (B, V, H, W) to mu and ln b."""
    return stack(vectors, weights, "decoder", n_groups, n_blocks, upsample)


def nll(images: Tensor, output: Tensor) -> Tensor:
    """Mean over pixel values of -ln [ exp(-|logit x - mu| / b) / (2 b x (1 - x)) ]."""
    x = 0.1 + 0.8 * images
    mu, b = output[:, :3], output[:, 3:].exp()
    density = torch.exp(-(torch.log(x / (1 - x)) - mu).abs() / b) / (2 * b * x * (1 - x))
    return -density.log().mean()


def kl(logits: Tensor) -> Tensor:
    """Mean over batch and grid of sum_k q_k ln(V q_k)."""
    n_vocab = logits.shape[1]
    q = logits.exp() / logits.exp().sum(1, keepdim=True)
    return (q * torch.log(n_vocab * q)).sum(1).mean()


def relax(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Gumbel-softmax with given noise."""
    scores = ((logits + noise) / temperature).exp()
    return scores / scores.sum(1, keepdim=True)


def gumbel_loss(
    images: Tensor, noise: Tensor, weights: Weights, shape: tuple[int, int], temperature: float, beta: float
) -> Tensor:
    """Evidence lower bound, negated: per picture, then divided by its pixel values, then averaged over the batch."""
    n_groups, n_blocks = shape
    logits = encoder(images, weights, n_groups, n_blocks)
    output = decoder(relax(logits, noise, temperature), weights, n_groups, n_blocks)
    total = images.new_zeros(())
    for i in range(len(images)):
        values = images[i].numel()
        divergence = kl(logits[i : i + 1]) * logits[i, 0].numel()
        total = total + nll(images[i : i + 1], output[i : i + 1]) + beta * divergence / values
    return total / len(images)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """Normalise each group of channels by its own mean and variance (eps 1e-5)."""
    parts = []
    for part in torch.split(x, x.shape[1] // groups, 1):
        mean = part.mean((1, 2, 3), keepdim=True)
        variance = (part - mean).square().mean((1, 2, 3), keepdim=True)
        parts.append((part - mean) / (variance + 1e-5).sqrt())
    return torch.cat(parts, 1) * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def residual(x: Tensor, weights: Weights, groups: int) -> Tensor:
    """x + conv(silu(norm(conv(silu(norm(x))))))."""
    h = x
    for i in (1, 2):
        h = group_norm(h, weights[f"norm_{i}.weight"], weights[f"norm_{i}.bias"], groups)
        h = layer(h / (1 + torch.exp(-h)), weights, f"conv_{i}")
    return x + h


def fsq_levels(z: float, n: int) -> int:
    """Round one bounded value to one of n integers (FSQ, app. A): tanh, shifted by a half for even n."""
    half = (n - 1) * 0.999 / 2
    offset = 0.5 if n % 2 == 0 else 0.0
    return round(math.tanh(z + math.atanh(offset / half)) * half - offset)


def fsq_code(z: list[float], levels: tuple[int, ...]) -> int:
    """Number a vector, first channel fastest."""
    code, base = 0, 1
    for value, n in zip(z, levels, strict=True):
        code += (fsq_levels(value, n) + n // 2) * base
        base *= n
    return code


def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the closest row of the codebook (V, D) for each row of z (N, D)."""
    return torch.stack([(codebook - row).square().sum(1).argmin() for row in z])
