"""How well a prior foretells codes and captions, and whether it reads the captions at all.

B pairs of a batch, N all pairs, T caption positions, W side of the code grid, V vocabulary. All scores are in nats, so
less is better; what a fair draw among V costs is ln V.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.models.prior import Prior

LOGITS = 1 << 25  # logits at a time: 128 MiB of float32, about three pairs of the paper's model


class Mean(NamedTuple):
    """A mean and its standard error; None where there is nothing to average, or only one value."""

    value: float | None
    error: float | None


def mean(values: Tensor, counts: Tensor | None = None) -> Mean:
    """Of (N,) values, or sum of values over sum of (N,) counts; the error is over rows (a ratio's is linearized)."""
    values = values.double()
    counts = torch.ones_like(values) if counts is None else counts.double()
    n, total = len(values), float(counts.sum())
    if not total:
        return Mean(None, None)
    ratio = float(values.sum()) / total
    if n < 2:
        return Mean(ratio, None)
    spread = float((values - ratio * counts).square().sum()) / (n - 1)
    return Mean(ratio, math.sqrt(spread / n) / (total / n))


@dataclass(frozen=True)
class Trial:
    """B captions with their codes, and for each another caption: (B, T), (B,), (B, W, W), (B, T), (B,) int64."""

    tokens: Tensor
    lengths: Tensor
    codes: Tensor
    other_tokens: Tensor
    other_lengths: Tensor


def nats(prior: Prior, tokens: Tensor, lengths: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """-ln p of every token, 0 for pads, and of every code: (B, T), (B,), (B, W, W) -> (B, T), (B, W*W) float64.

    On the CPU; the logits of some pairs at a time, in at least 32 bits even under autocast, as in `Prior.loss`.

    Raises: DalleError where the shapes are not the model's.
    """
    config = prior.config
    at_once = max(1, LOGITS // (config.n_text * config.n_text_vocab + config.grid**2 * config.n_image_vocab))
    parts = [_nats(prior, *part) for part in _chunks(at_once, tokens, lengths, codes)]
    text, image = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return text, image


def _chunks(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(x, rows) for x in tensors), strict=True)


def _nats(prior: Prior, tokens: Tensor, lengths: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        text, image = prior(tokens, lengths, codes)
        of_text = F.cross_entropy(text.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)
        of_image = F.cross_entropy(image.flatten(0, 1), codes.flatten(), reduction="none").view(len(codes), -1)
        return of_text.cpu().double() * written(tokens, lengths).cpu(), of_image.cpu().double()


def written(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Whether a position holds a token, not a pad: (B, T), (B,) -> (B, T) bool."""
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]


def strangers(captions: Sequence[Hashable], seed: int) -> list[int] | None:
    """For each caption the number of another, drawn at random, that reads differently; None where all are alike.

    The captions stand on a circle, in an order that is a function of the seed, and each takes the next that differs.
    """
    if len(set(captions)) < 2:
        return None
    n = len(captions)
    circle = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    found = [-1] * n
    for k in range(2 * n - 1, -1, -1):  # twice round, backwards: what follows equals is known from the one behind
        here, after = circle[k % n], circle[(k + 1) % n]
        found[here] = after if captions[after] != captions[here] else found[after]
    return found


def smoothed_nats(targets: Tensor, counted: Tensor, counts: Tensor, own: bool) -> Tensor:
    """-ln (count + 1) / (all + V) of each target, 0 where not `counted`: (B, L) int64, (B, L) bool, (V,) -> (B, L).

    With `own` the counts hold the rows themselves, and each row's own are left out.
    """
    counts = counts.double()
    seen, total = counts[targets], counts.sum().expand(len(targets), 1)
    if own:
        mine = torch.zeros(len(targets), len(counts), dtype=torch.double)
        mine.scatter_add_(1, targets, counted.double())
        seen, total = seen - mine.gather(1, targets), total - counted.sum(1, keepdim=True)
    return ((total + len(counts)).log() - (seen + 1).log()) * counted


@dataclass
class Counts:
    """How often each code (V,) and each text token occurs, as a guess that knows no order and no caption.

    `own` says that the judged pairs themselves were counted.
    """

    image: Tensor
    text: Tensor
    own: bool = False

    @staticmethod
    def none(prior: Prior, own: bool = False) -> "Counts":
        """Nothing counted yet."""
        sizes = (prior.config.n_image_vocab, prior.config.n_text_vocab)
        image, text = (torch.zeros(size, dtype=torch.int64) for size in sizes)
        return Counts(image, text, own)

    def add(self, tokens: Tensor, lengths: Tensor, codes: Tensor) -> None:
        """Count B more: (B, T), (B,), (B, W, W) int64."""
        self.image += torch.bincount(codes.flatten(), minlength=len(self.image))
        self.text += torch.bincount(tokens[written(tokens, lengths)], minlength=len(self.text))


class Judge:
    """Scores of a prior on pairs, a batch at a time; of each pair some numbers are kept, and the sums by position."""

    def __init__(self, prior: Prior, counts: Counts, shuffle: bool = True) -> None:
        """`shuffle` False: there are no other captions to compare with."""
        self.prior, self.counts, self.shuffle = prior, counts, shuffle
        self.columns: list[Tensor] = []  # (B, 7) each
        self.by_position = torch.zeros(prior.config.grid**2, dtype=torch.double)
        self.null_by_position = torch.zeros_like(self.by_position)

    def add(self, trial: Trial) -> None:
        """Score B pairs with their own caption, without one (length 0), and with the other one.

        Raises: DalleError where the shapes are not the model's.
        """
        device = self.prior.start.device
        tokens, lengths, codes = (x.to(device) for x in (trial.tokens, trial.lengths, trial.codes))
        text, right = nats(self.prior, tokens, lengths, codes)
        null = nats(self.prior, tokens, torch.zeros_like(lengths), codes)[1]
        other = right
        if self.shuffle:
            other = nats(self.prior, trial.other_tokens.to(device), trial.other_lengths.to(device), codes)[1]
        counted, flat = written(trial.tokens, trial.lengths), trial.codes.flatten(1)
        guessed = smoothed_nats(flat, torch.ones_like(flat, dtype=torch.bool), self.counts.image, self.counts.own)
        guessed_text = smoothed_nats(trial.tokens, counted, self.counts.text, self.counts.own)
        self.by_position += right.sum(0)
        self.null_by_position += null.sum(0)
        sums = [x.sum(1) for x in (text, guessed_text, right, null, other, guessed)]
        self.columns.append(torch.stack([trial.lengths.double(), *sums], dim=1))

    def figures(self) -> dict[str, object]:
        """Means over all pairs, in nats per code and per token; `_error` is a standard error over pairs.

        `_uniform` is ln V, `_unigram` what the counts cost; a gain is how much dearer codes get without the caption
        (`null`), or with another pair's (`shuffled`); grids (W, W) are means by position.
        """
        grid = self.prior.config.grid
        n_tokens, text, guessed_text, right, null, other, guessed = torch.cat(self.columns).T
        pairs, n_codes = len(right), torch.full_like(right, grid**2)
        means = {
            "image_nats": mean(right, n_codes),
            "image_nats_unigram": mean(guessed, n_codes),
            "text_nats": mean(text, n_tokens),
            "text_nats_unigram": mean(guessed_text, n_tokens),
            "gain_over_null": mean(null - right, n_codes),
            "gain_over_shuffled": mean(other - right, n_codes) if self.shuffle else Mean(None, None),
        }
        told: dict[str, object] = {"pairs": pairs, "codes": pairs * grid**2, "tokens": int(n_tokens.sum())}
        for name, found in means.items():
            told |= {name: found.value, f"{name}_error": found.error}
        told["image_nats_uniform"] = math.log(self.prior.config.n_image_vocab)
        told["text_nats_uniform"] = math.log(self.prior.config.n_text_vocab)
        told["by_position"] = self.grid(self.by_position)
        return {**told, "gain_over_null_by_position": self.grid(self.null_by_position - self.by_position)}

    def grid(self, sums: Tensor) -> list[list[float]]:
        """Sums by position (W*W,) as means over pairs, line by line."""
        pairs = sum(map(len, self.columns))
        rows: list[list[float]] = (sums / pairs).view(self.prior.config.grid, -1).tolist()
        return rows
