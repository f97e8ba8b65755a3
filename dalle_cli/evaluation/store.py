"""Features on disk, read a block at a time.

Shapes: N rows, D features.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dalle_cli.artifacts import Artifact


class FeatureRows:
    """Rows of a column of an artifact: all, or those of the numbers `kept` (N,), in rising order."""

    def __init__(self, artifact: Artifact, column: str = "embeddings", kept: npt.NDArray[np.int64] | None = None):
        self.artifact, self.column = artifact, column
        self.kept = np.arange(len(artifact)) if kept is None else kept
        self.width = int(artifact.headers[0].tensors[column].shape[1])

    def __len__(self) -> int:
        return len(self.kept)

    def blocks(self) -> Iterator[npt.NDArray[Any]]:
        """All rows in order, one block (n, D) per shard; only one shard is mapped at a time."""
        first = 0
        for header in self.artifact.headers:
            low, high = np.searchsorted(self.kept, (first, first + len(header)))
            if high > low:
                yield header.map(self.column)[self.kept[low:high] - first]
            first += len(header)

    def take(self, numbers: npt.NDArray[np.int64] | Sequence[int]) -> npt.NDArray[np.float64]:
        """Rows by number, counted among those kept: (n, D)."""
        return np.asarray(self._whole[self.kept[np.asarray(numbers)]]).astype(np.float64)

    def sample(self, most: int, seed: int) -> npt.NDArray[Any]:
        """All rows, or a random `most` of them, in order: (n, D)."""
        numbers = np.arange(len(self))
        if len(self) > most:
            numbers = np.sort(np.random.default_rng([seed, len(self)]).choice(len(self), most, replace=False))
        return np.asarray(self._whole[self.kept[numbers]])

    @cached_property
    def _whole(self) -> Any:
        return self.artifact.array(self.column)  # mapped once, since `take` may be called for thousands of single rows
