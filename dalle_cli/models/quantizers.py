"""Quantizers of a grid of features: relaxed Gumbel, vector quantization, finite scalar quantization.

Shapes: B batch, V vocabulary, D feature channels, H W code grid, N = B * H * W positions.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DISTANCE_ROWS = 16_384  # rows of the (N, V) distance matrix in memory at once
USAGE_DECAY = 0.99
DEAD_SHARE = 0.03  # a code is dead below this part of its fair share of the positions
FSQ_EPS = 1e-3


class Quantized(NamedTuple):
    """Decoder input (B, D, H, W), codes (B, H, W) int64, KL in nats per code, codebook loss; the last two scalars."""

    vectors: Tensor
    codes: Tensor
    kl: Tensor
    codebook: Tensor


def categorical_kl(logits: Tensor) -> Tensor:
    """KL of softmax(logits) against uniform, averaged over batch and grid; (B, V, H, W) -> () nats per code."""
    log_q = logits.permute(0, 2, 3, 1).log_softmax(-1)
    return (log_q.exp() * log_q).sum(-1).mean() + math.log(logits.shape[1])


def gumbel_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Sample standard Gumbel noise in the shape and on the device of `like`, from the generator alone."""
    uniform = torch.rand(like.shape, dtype=like.dtype, device=generator.device, generator=generator)
    tiny = torch.finfo(like.dtype).tiny
    # equal to one call of exponential_, which takes twice as long on CPU
    waits = uniform.clamp_min_(tiny).log_().neg_().clamp_min_(tiny)
    return waits.log_().neg_().to(like.device)


def gumbel_softmax(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Relax a categorical, soft both ways; (B, V, H, W) -> same, sums to 1 over V; no generator: no noise."""
    scores = logits.permute(0, 2, 3, 1)  # softmax wants V last, where channels_last has it already
    if generator is not None:
        scores = scores + gumbel_noise(scores, generator)
    return (scores / temperature).softmax(-1).permute(0, 3, 1, 2)


def nearest_codes(features: Tensor, codebook: Tensor) -> Tensor:
    """The row of a codebook (V, D) nearest to each feature, by Euclidean distance; (B, D, H, W) -> (B, H, W) int64."""
    rows = features.detach().permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    book = codebook.detach()
    with torch.autocast(rows.device.type, enabled=False):
        half_norm = book.square().sum(1) / 2
        nearest = [(half_norm - chunk @ book.T).argmin(1) for chunk in torch.split(rows, DISTANCE_ROWS)]
    return torch.cat(nearest).view(features.shape[0], *features.shape[2:])


class GumbelQuantizer(nn.Module):
    """Gumbel-softmax relaxation of one code per position (Ramesh et al. 2021, sec. 2.1); features are logits."""

    def __init__(self, n_vocab: int) -> None:
        super().__init__()
        self.n_features = self.n_vocab = n_vocab

    def codes(self, features: Tensor) -> Tensor:
        """Take the argmax, without noise; (B, V, H, W) -> (B, H, W) int64."""
        return features.argmax(1)

    def forward(self, features: Tensor, temperature: float, generator: torch.Generator | None) -> Quantized:
        """Relax the logits; the KL comes from the logits, whatever the temperature."""
        relaxed = gumbel_softmax(features, temperature, generator)
        return Quantized(relaxed, self.codes(features), categorical_kl(features), features.new_zeros(()))


class VectorQuantizer(nn.Module):
    """Nearest vector of a codebook, straight-through (van den Oord et al. 2017, eq. 1 to 3).

    `usage` is a moving average of each code's share of the positions, 0 before the first update, and part of the
    state dict. Codes die when no feature is near them; `revive` moves dead codes onto features of a batch. It is a
    method of its own, so that between processes one can revive and broadcast `codebook` and `usage`.
    """

    usage: Tensor
    trained_buffers = ("usage",)  # changed by training, so processes average them

    def __init__(self, n_vocab: int, n_embd: int, commitment: float) -> None:
        super().__init__()
        self.n_vocab, self.n_features, self.commitment = n_vocab, n_embd, commitment
        self.codebook = nn.Parameter(torch.empty(n_vocab, n_embd).uniform_(-1 / n_vocab, 1 / n_vocab))
        self.register_buffer("usage", torch.zeros(n_vocab))

    def codes(self, features: Tensor) -> Tensor:
        """Find the nearest code by Euclidean distance; (B, D, H, W) -> (B, H, W) int64."""
        return nearest_codes(features, self.codebook)

    def vectors(self, codes: Tensor) -> Tensor:
        """Look codes up; (B, H, W) int64 -> (B, D, H, W)."""
        return F.embedding(codes, self.codebook).permute(0, 3, 1, 2)

    def forward(self, features: Tensor, temperature: float, generator: torch.Generator | None) -> Quantized:
        """Quantize straight-through; temperature and generator go unused; training mode counts usage."""
        codes = self.codes(features)
        nearest = self.vectors(codes)
        if self.training:
            share = torch.bincount(codes.flatten(), minlength=self.n_vocab) / codes.numel()
            self.usage.lerp_(share.to(self.usage.dtype), 1 - USAGE_DECAY)
        loss = F.mse_loss(nearest, features.detach()) + self.commitment * F.mse_loss(features, nearest.detach())
        passed = features + (nearest - features).detach()
        return Quantized(passed, codes, features.new_full((), math.log(self.n_vocab)), loss)

    @torch.no_grad()
    def revive(self, features: Tensor, generator: torch.Generator) -> int:
        """Move dead codes (in a new model, all) onto random features (B, D, H, W); returns how many moved."""
        dead = (self.usage < DEAD_SHARE / self.n_vocab).nonzero().flatten()
        rows = features.permute(0, 2, 3, 1).reshape(-1, self.n_features)
        order = torch.randperm(len(rows), generator=generator, device=generator.device).to(rows.device)
        chosen = order[torch.arange(len(dead), device=rows.device) % len(rows)]
        self.codebook[dead] = rows[chosen].to(self.codebook.dtype)
        self.usage[dead] = 1 / self.n_vocab  # a fair share, so that a moved code has time to be used
        return len(dead)


class FiniteScalarQuantizer(nn.Module):
    """Round each of a few bounded channels to its levels (Mentzer et al. 2023, arXiv 2309.15505, sec. 3 and app. A)."""

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.n_features, self.n_vocab = len(levels), math.prod(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def bound(self, features: Tensor) -> Tensor:
        """Squash features so that rounding channel i yields exactly levels[i] integers; 0 stays 0; same shape."""
        levels = self.levels.to(features.dtype).view(-1, 1, 1)
        half = (levels - 1) * (1 - FSQ_EPS) / 2
        offset = 0.5 * (levels % 2 == 0).to(features.dtype)  # even levels reach from -L/2 to L/2 - 1
        return (features + (offset / half).atanh()).tanh() * half - offset

    def _index(self, rounded: Tensor) -> Tensor:
        shifted = rounded.long() + (self.levels // 2).view(-1, 1, 1)
        return (shifted * self.basis.view(-1, 1, 1)).sum(1)

    def codes(self, features: Tensor) -> Tensor:
        """Round and number the levels, first channel fastest; (B, D, H, W) -> (B, H, W) int64."""
        return self._index(self.bound(features).round())

    def vectors(self, codes: Tensor) -> Tensor:
        """Undo the numbering; (B, H, W) int64 -> (B, D, H, W) float32 in [-1, 1]."""
        half = self.levels // 2
        digits = codes.unsqueeze(-1) // self.basis % self.levels
        return ((digits - half) / half).permute(0, 3, 1, 2)

    def forward(self, features: Tensor, temperature: float, generator: torch.Generator | None) -> Quantized:
        """Quantize straight-through; temperature and generator go unused, and there is no auxiliary loss."""
        bounded = self.bound(features)
        rounded = bounded.detach().round()
        passed = (bounded + (rounded - bounded).detach()) / (self.levels // 2).view(-1, 1, 1)
        kl = features.new_full((), math.log(self.n_vocab))
        return Quantized(passed, self._index(rounded), kl, features.new_zeros(()))
