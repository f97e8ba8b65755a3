"""The best of several candidates by their scores.

Shapes: B candidates of a batch, S side of the images in pixels.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dalle_cli.errors import DalleError
from dalle_cli.pipelines.prompts import Candidate


def check_keep(groups: Sequence[str], keep: int) -> None:
    """Raises: DalleError if a prompt has fewer images than `keep`."""
    fewest = min(Counter(groups).values(), default=0)
    if keep > fewest:
        raise DalleError(f"expected at least {keep} images per prompt to keep {keep}, found {fewest}; lower --keep")


def best(scores: Any, groups: Sequence[str], keep: int) -> Any:
    """Rows of the `keep` best of each group (0: all), best first, groups in order of appearance; ties by row."""
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    ranked = [sorted(rows, key=lambda r: (-float(scores[r]), r))[: keep or None] for rows in members.values()]
    return np.array([row for rows in ranked for row in rows], dtype=np.int64)


@dataclass(frozen=True)
class Ranked:
    """A candidate with its score and its image (3, S, S) uint8."""

    candidate: Candidate
    score: float
    image: Any


class TopK:
    """The best `keep` candidates of each prompt so far (0: all), in the order of `best`; the others are dropped."""

    def __init__(self, keep: int):
        self.keep, self.seen = keep, 0
        self.groups: dict[str, list[Ranked]] = {}

    def add(self, rows: Sequence[Candidate], scores: Any, images: Any) -> None:
        """Add a batch and drop what is not among the best: B candidates, (B,) scores, (B, 3, S, S) uint8."""
        for row, score, image in zip(rows, scores.tolist(), images, strict=True):
            group = self.groups.setdefault(row.text, [])
            at = bisect_right([-ranked.score for ranked in group], -score)  # after its equals, which came before
            if not self.keep or at < self.keep:
                group.insert(at, Ranked(row, score, image.copy()))  # a view would hold the whole batch
                del group[self.keep or len(group) :]
        self.seen += len(rows)

    def ranked(self) -> list[Ranked]:
        """Prompts in order of appearance, best first."""
        return [ranked for group in self.groups.values() for ranked in group[: self.keep or None]]

    def best(self) -> float:
        """The highest score of all."""
        return max(ranked.score for ranked in self.ranked())
