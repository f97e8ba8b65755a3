"""The best of several candidates by their scores.

Shapes: B candidates of a batch, S side of the images in pixels.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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
    """A candidate with its score, if there is one, its image (3, S, S), and its number among the candidates of all."""

    candidate: Candidate
    score: float | None
    image: Any
    row: int


class TopK:
    """The best `keep` candidates of each prompt so far (0: all), in the order of `best`; the others are dropped.

    Without scores they are the first.
    """

    def __init__(self, keep: int):
        self.keep, self.seen = keep, 0
        self.groups: dict[str, list[Ranked]] = {}

    def add(self, rows: Sequence[Candidate], scores: Any, images: Any) -> None:
        """Add a batch and drop what is not among the best: B candidates, (B,) scores or None, (B, 3, S, S)."""
        known = [None] * len(rows) if scores is None else scores.tolist()
        for row, score, image in zip(rows, known, images, strict=True):
            group = self.groups.setdefault(row.text, [])
            # after its equals, which came before
            at = len(group) if score is None else bisect_right([-(one.score or 0.0) for one in group], -score)
            if not self.keep or at < self.keep:
                group.insert(at, Ranked(row, score, image.copy(), self.seen))  # a view would hold the whole batch
                del group[self.keep or len(group) :]
            self.seen += 1

    def replace_images(self, images: Iterable[Any]) -> None:
        """Give the candidates other images, in the order of `ranked`."""
        new = iter(images)
        for text, group in self.groups.items():
            self.groups[text] = [replace(one, image=next(new)) for one in group]

    def ranked(self) -> list[Ranked]:
        """Prompts in order of appearance, best first."""
        return [ranked for group in self.groups.values() for ranked in group]

    def best(self) -> float | None:
        """The highest score of all, if there are any."""
        return max((one.score for one in self.ranked() if one.score is not None), default=None)
