"""How well a prior predicts codes and captions, and whether it uses the captions at all.

Shapes: B pairs of a batch, N all pairs, T caption length, H W code grid, V vocabulary, L positions. Losses are in nats,
lower is better; a uniform guess among V costs ln V.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dalle_cli.models.bart import CodePrior
from dalle_cli.pipelines.scoring import nats, token_mask

Text = tuple[Tensor, Tensor]  # tokens (B, T) and lengths (B,)


class Mean(NamedTuple):
    """A mean and its standard error; None if there is nothing to average, or only one value."""

    value: float | None
    error: float | None

    def as_dict(self, name: str) -> dict[str, float | None]:
        """NAME and NAME_error, as JSON has them."""
        return {name: self.value, f"{name}_error": self.error}


def mean(values: Tensor, counts: Tensor | None = None) -> Mean:
    """The mean of (N,) values, or the ratio of their sum to that of (N,) counts, with its linearized error."""
    values = values.double()
    counts = torch.ones_like(values) if counts is None else counts.double()
    n, total = len(values), float(counts.sum())
    if not total:
        return Mean(None, None)
    ratio = float(values.sum()) / total
    if n < 2:
        return Mean(ratio, None)
    variance = float((values - ratio * counts).square().sum()) / (n - 1)
    return Mean(ratio, math.sqrt(variance / n) / (total / n))


def derangement(captions: Sequence[Hashable], seed: int) -> list[int] | None:
    """For each caption the number of a random other one that differs from it; None if all captions are equal.

    Captions stand in a random circle, and each takes the next that differs.
    """
    if len(set(captions)) < 2:
        return None
    n = len(captions)
    circle = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    found = [-1] * n
    for k in range(2 * n - 1, -1, -1):  # twice round, backwards: among equals, the next one's answer is known
        here, after = circle[k % n], circle[(k + 1) % n]
        found[here] = after if captions[after] != captions[here] else found[after]
    return found


def smoothed_nats(targets: Tensor, counted: Tensor, counts: Tensor, own: bool) -> Tensor:
    """-ln (count + 1) / (total + V) of each target, 0 where not `counted`: (B, L) int64, (B, L) bool, (V,) -> (B, L).

    With `own` the counts include these rows, and each row is scored by the counts of the others.
    """
    counts = counts.double()
    seen, total = counts[targets], counts.sum().expand(len(targets), 1)
    if own:
        mine = torch.zeros(len(targets), len(counts), dtype=torch.double)
        mine.scatter_add_(1, targets, counted.double())
        seen, total = seen - mine.gather(1, targets), total - counted.sum(1, keepdim=True)
    return ((total + len(counts)).log() - (seen + 1).log()) * counted


@dataclass
class Unigram:
    """Counts of codes (V,) and of text tokens: a baseline that knows no order and no caption.

    `own` says that the evaluated pairs themselves were counted.
    """

    image: Tensor
    text: Tensor
    own: bool = False

    @classmethod
    def empty(cls, prior: CodePrior, own: bool = False) -> "Unigram":
        """Nothing counted yet."""
        image, text = torch.zeros(prior.config.n_image_vocab).long(), torch.zeros(prior.config.n_text_vocab).long()
        return cls(image, text, own)

    def add(self, tokens: Tensor, lengths: Tensor, codes: Tensor) -> None:
        """Count B more pairs: (B, T), (B,), (B, H, W) int64."""
        self.image += torch.bincount(codes.flatten(), minlength=len(self.image))
        self.text += torch.bincount(tokens[token_mask(tokens, lengths)], minlength=len(self.text))


class PriorMetrics:
    """Metrics of a prior over pairs, added batch by batch; sums per pair and per position are kept."""

    def __init__(self, prior: CodePrior, unigram: Unigram) -> None:
        self.prior, self.unigram, self.shuffled = prior, unigram, True
        self.columns: list[Tensor] = []  # (B, 7) each
        self.by_position = torch.zeros(prior.config.grid**2, dtype=torch.double)
        self.null_by_position = torch.zeros_like(self.by_position)

    def add(self, text: Text, codes: Tensor, other: Text | None = None) -> None:
        """Score codes (B, H, W) with their own captions, without any (length 0), and with other ones, if there are.

        Raises:
            DalleError: the shapes are not the model's.
        """
        device, (tokens, lengths) = self.prior.device, text
        here, length, grids = (x.to(device) for x in (tokens, lengths, codes))
        text_nats, right = nats(self.prior, here, length, grids)
        null = nats(self.prior, here, torch.zeros_like(length), grids)[1]
        self.shuffled = other is not None
        wrong = right if other is None else nats(self.prior, other[0].to(device), other[1].to(device), grids)[1]
        mask, flat = self.prior.predicted(lengths), codes.flatten(1)
        unigram = smoothed_nats(flat, torch.ones_like(flat, dtype=torch.bool), self.unigram.image, self.unigram.own)
        text_unigram = smoothed_nats(tokens, mask, self.unigram.text, self.unigram.own)
        self.by_position += right.sum(0)
        self.null_by_position += null.sum(0)
        sums = [x.sum(1) for x in (text_nats, text_unigram, right, null, wrong, unigram)]
        self.columns.append(torch.stack([mask.sum(1).double(), *sums], dim=1))

    def metrics(self) -> dict[str, object]:
        """Means over all pairs, in nats per code and per token; `_error` is a standard error over pairs.

        `_uniform` is ln V, `_unigram` the loss of the counts. A gain is how much larger the loss of codes is without
        the caption (`null`), or with another pair's (`shuffled`). Grids (H, W) are means by position.
        """
        grid = self.prior.config.grid
        n_tokens, text, text_unigram, right, null, wrong, unigram = torch.cat(self.columns).T
        n_codes = torch.full_like(right, grid**2)
        means = {
            "image_nats": mean(right, n_codes),
            "image_nats_unigram": mean(unigram, n_codes),
            "text_nats": mean(text, n_tokens),
            "text_nats_unigram": mean(text_unigram, n_tokens),
            "gain_over_null": mean(null - right, n_codes),
            "gain_over_shuffled": mean(wrong - right, n_codes) if self.shuffled else Mean(None, None),
        }
        out: dict[str, object] = {"pairs": len(right), "codes": len(right) * grid**2, "tokens": int(n_tokens.sum())}
        for name, found in means.items():
            out |= found.as_dict(name)
        out["image_nats_uniform"] = math.log(self.prior.config.n_image_vocab)
        out["text_nats_uniform"] = math.log(self.prior.config.n_text_vocab)
        out["by_position"] = self.grid(self.by_position)
        return {**out, "gain_over_null_by_position": self.grid(self.null_by_position - self.by_position)}

    def grid(self, sums: Tensor) -> list[list[float]]:
        """Sums by position (H*W,) as means over pairs, row by row."""
        rows: list[list[float]] = (sums / sum(map(len, self.columns))).view(self.prior.config.grid, -1).tolist()
        return rows
