"""Exact nearest neighbours by blocked matrix products: keys stream through, the best few of each query are held.

Shapes: M queries, V views of a query, B keys at once, D features, K neighbours held, P pairs.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

QUERIES = 1024  # in one product


class Candidates(NamedTuple):
    """Pairs of a query and a key's row with their similarity, (P,) each; by query, the nearest first."""

    queries: Ints
    rows: Ints
    similarities: Floats


class Nearest:
    """The K rows most similar to each query; of equally similar ones those that came first.

    A query is several views of one thing, and as similar to a key as its most similar view: the largest inner product.
    """

    def __init__(self, queries: Tensor, most: int):
        """`queries` (M, V, D) float."""
        self.queries = queries
        self.rows = np.full((len(queries), most), -1, np.int64)
        self.similarities = np.full((len(queries), most), -np.inf, np.float32)

    def offer(self, keys: Tensor, rows: Ints) -> None:
        """Look at keys (B, D) of these rows (B,), which rise from call to call."""
        views = self.queries.shape[1]
        for start in range(0, len(self.queries), QUERIES):
            part = self.queries[start : start + QUERIES]
            products = (part.flatten(0, 1) @ keys.T).view(len(part), views, -1).amax(1)
            worst = torch.from_numpy(self.similarities[start : start + QUERIES, -1].copy()).to(products.device)
            better = (products > worst[:, None]).nonzero(as_tuple=True)
            if len(better[0]):
                query, key = (index.cpu().numpy() for index in better)
                self._take(start + query, rows[key], products[better].float().cpu().numpy())

    def _take(self, queries: Ints, rows: Ints, similarities: Floats) -> None:
        """Put what is better than the worst that is held in its place: (n,) each, by query."""
        most = self.rows.shape[1]
        changed = np.unique(queries)
        queries = np.concatenate([changed.repeat(most), queries])
        rows = np.concatenate([self.rows[changed].ravel(), rows])
        similarities = np.concatenate([self.similarities[changed].ravel(), similarities])
        order = np.lexsort((rows, -similarities, queries))
        queries, rows, similarities = queries[order], rows[order], similarities[order]
        rank = np.arange(len(queries)) - np.searchsorted(queries, queries)
        best = rank < most
        self.rows[queries[best], rank[best]] = rows[best]
        self.similarities[queries[best], rank[best]] = similarities[best]

    def found(self) -> Candidates:
        """All that are held."""
        queries, place = np.nonzero(self.rows >= 0)
        return Candidates(queries, self.rows[queries, place], self.similarities[queries, place])
