"""Sample from logits: guidance, temperature, truncation, and noise that depends on seed and candidate alone.

Shapes: B rows, V values, N positions of a sequence.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_cli.errors import DalleError

_LEVELS = 3  # uniform numbers per sampled value
_BRANCH = 32  # children of a node in the tree that `sample_categorical` descends


@dataclass(frozen=True)
class CategoricalOptions:
    """How the values of a sequence are sampled from their logits: codes, or buckets of an embedding's components.

    The logits are guided, null + guidance_scale * (conditional - null), divided by `temperature` (0: argmax), truncated
    to `top_k` and then to `top_p` (None or 0: not truncated). `guidance_span` is the part of the sequence that is
    guided, from one share of its positions to another; elsewhere the conditional logits are used.

    Raises:
        DalleError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0
    guidance_span: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            found = f"found {self.temperature}"
            raise DalleError(f"expected a temperature of 0 or more, {found}; 1 samples as the model was trained")
        if self.top_k is not None and self.top_k < 0:
            raise DalleError(f"expected top-k of 0 or more, found {self.top_k}; 0 keeps all values")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise DalleError(f"expected top-p in [0, 1], found {self.top_p}; 0 and 1 keep all values")
        begin, end = self.guidance_span
        if not 0 <= begin <= end <= 1:
            found = f"found {begin} to {end}"
            raise DalleError(f"expected guidance from a share of the sequence to a later one, {found}; 0 to 1 is all")

    def guided_positions(self, n_positions: int) -> range:
        """The guided ones of N positions; none at scale 1."""
        return guided_positions(self.guidance_span, n_positions) if self.guidance_scale != 1 else range(0)


def choose(options: CategoricalOptions, logits: Tensor, noise: Tensor, position: int, guided: range) -> Tensor:
    """Sample the values at one position: logits (B, V) and noise (B, 3) in [0, 1) -> (B,) int64.

    If any position is guided, logits are (2B, V), null rows last.
    """
    if guided:
        logits = guide(logits, options.guidance_scale) if position in guided else logits.chunk(2)[0]
    if options.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / options.temperature
    logits = top_k(logits, options.top_k) if options.top_k else logits
    return sample_categorical(top_p(logits, options.top_p) if options.top_p else logits, noise)


def guided_positions(span: tuple[float, float], n_positions: int) -> range:
    """The positions j with from <= j / n_positions < to, so that adjacent spans share no position."""
    begin, end = (math.ceil(round(share * n_positions, 6)) for share in span)  # 0.07 * 100 is a little above 7
    return range(begin, end)


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, null + scale * (conditional - null): (2B, V) -> (B, V), conditional rows first.

    At scale 1 it is the identity, (B, V) -> (B, V): no null rows are computed.
    """
    if scale == 1:
        return logits
    conditional, null = logits.chunk(2)
    return null + scale * (conditional - null)


def top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the k largest logits to -inf; values equal to the k-th stay, so k may be exceeded: (..., V)."""
    if k >= logits.shape[-1]:
        return logits
    last = torch.topk(logits, k, dim=-1, sorted=True).values[..., -1:]
    return logits.masked_fill(logits < last, float("-inf"))


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest values with a total probability of at least p in (0, 1], and ties: (..., V)."""
    if p >= 1:
        return logits
    ordered = logits.sort(dim=-1, descending=True).values
    mass = torch.softmax(ordered, dim=-1)
    # a value is needed as long as those before it fall short of p, so the likeliest always is
    needed = (mass.cumsum(dim=-1) - mass) < p
    last = ordered.gather(-1, needed.sum(dim=-1, keepdim=True) - 1)
    return logits.masked_fill(logits < last, float("-inf"))


def uniforms(seed: int, index: int, n_positions: int) -> Tensor:
    """The noise of one candidate, in [0, 1) in steps of 2**-24: (N, 3) float32.

    It is the SHAKE-256 stream of (seed, index): the same on every machine and device. The numbers of a position do not
    depend on N.
    """
    stream = hashlib.shake_256(f"{seed} {index}".encode()).digest(3 * _LEVELS * n_positions)
    high, middle, low = torch.frombuffer(bytearray(stream), dtype=torch.uint8).view(-1, _LEVELS, 3).long().unbind(-1)
    return (high << 16 | middle << 8 | low).float() / 2**24


def sample_categorical(logits: Tensor, noise: Tensor) -> Tensor:
    """Sample from the softmax of logits by inversion: (B, V), (B, 3) in [0, 1) -> (B,) int64.

    The values are leaves of a tree of depth 3, descended with one random number per level. Inverting one distribution
    over the whole vocabulary would be far more sensitive to rounding, which moves thousands of boundaries.
    """
    weights = torch.softmax(logits.float(), dim=-1)
    weights = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % _BRANCH**2))
    leaves = weights.view(len(weights), -1, _BRANCH, _BRANCH)
    twigs = leaves.sum(-1)
    rows = torch.arange(len(weights), device=weights.device)
    first = _invert(twigs.sum(-1), noise[:, 0])
    second = _invert(twigs[rows, first], noise[:, 1])
    third = _invert(leaves[rows, first, second], noise[:, 2])
    return (first * _BRANCH + second) * _BRANCH + third


def _invert(weights: Tensor, noise: Tensor) -> Tensor:
    """The first value whose cumulative share exceeds the noise, so never one of weight 0: (B, M), (B,) -> (B,)."""
    mass = weights.cumsum(dim=-1)
    # divided, the last share is 1 exactly; noise * total could be rounded up to the total
    return (mass / mass[:, -1:] <= noise[:, None]).sum(dim=-1)
