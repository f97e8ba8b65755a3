"""The published dVAE written straight down from the paper (Ramesh et al. 2021, app. A), trained in bfloat16."""

import math
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.dvae import pictures
from bench.peers import count, step
from bench.timing import Subject

GROUPS, BLOCKS, N_INIT = 4, 2, 128
BETA = 6.6


def conv(n_in: int, n_out: int, kernel: int) -> nn.Conv2d:
    """A convolution that keeps the size."""
    return nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2)


class Block(nn.Module):
    """Four convolutions, added to the input."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        widths = [n_in, n_out // 4, n_out // 4, n_out // 4, n_out]
        self.identity = conv(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        layers = [(nn.ReLU(), conv(a, b, k)) for a, b, k in zip(widths[:-1], widths[1:], kernels, strict=True)]
        self.residual = nn.Sequential(*(part for pair in layers for part in pair))

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_in, H, W) -> (B, n_out, H, W)."""
        y: Tensor = self.identity(x) + self.residual(x) / (GROUPS * BLOCKS) ** 2
        return y


def encoder(n_hid: int, n_vocab: int) -> nn.Sequential:
    """Pixels (B, 3, S, S) -> logits (B, V, S/8, S/8)."""
    layers: list[nn.Module] = [conv(3, n_hid, 7)]
    width = n_hid
    for group in range(GROUPS):
        for _ in range(BLOCKS):
            layers.append(Block(width, n_hid * 2**group, (3, 3, 3, 1)))
            width = n_hid * 2**group
        if group < GROUPS - 1:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.ReLU(), conv(width, n_vocab, 1))


def decoder(n_hid: int, n_vocab: int) -> nn.Sequential:
    """One-hot or relaxed codes (B, V, S/8, S/8) -> mean and log scale (B, 6, S, S)."""
    layers: list[nn.Module] = [conv(n_vocab, N_INIT, 1)]
    width = N_INIT
    for group in reversed(range(GROUPS)):
        for _ in range(BLOCKS):
            layers.append(Block(width, n_hid * 2**group, (1, 3, 3, 3)))
            width = n_hid * 2**group
        if group > 0:
            layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
    return nn.Sequential(*layers, nn.ReLU(), conv(width, 6, 1))


class DVAE(nn.Module):
    """Encoder, relaxed codes, decoder."""

    def __init__(self, n_hid: int, n_vocab: int) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder(n_hid, n_vocab), decoder(n_hid, n_vocab)

    def forward(self, images: Tensor, temperature: float = 1.0) -> Tensor:
        """The bound, negated, per pixel value: (B, 3, S, S) in [0, 1] -> ()."""
        x = 0.1 + 0.8 * images
        logits = self.encoder(x).float()
        mean, log_scale = self.decoder(F.gumbel_softmax(logits, temperature, dim=1)).float().chunk(2, 1)
        nll = math.log(2) + log_scale + (x * (1 - x)).log() + (x.logit() - mean).abs() * (-log_scale).exp()
        log_q = logits.log_softmax(1)
        kl = (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum((1, 2, 3)).mean()
        bound: Tensor = nll.mean() + BETA * kl / images[0].numel()
        return bound


def plain(image_size: int, n_hid: int, n_vocab: int, batch: int) -> Subject:
    """An update with fused AdamW."""
    model = DVAE(n_hid, n_vocab)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)
    given = cycle(pictures(batch, image_size))

    def update() -> Tensor:
        return step(model, optimizer, lambda: model(next(given).float() / 255), "bfloat16", 0.0)

    return Subject(update, batch, parameters=count(model))
