"""What a decoder is told beside a picture: embeddings, and captions where there are any, joined to it by id.

Shapes: B batch, D width of an embedding, T caption length. Both artifacts are memory maps; only a batch is copied.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dalle_cli.artifacts import Artifact
from dalle_cli.errors import DalleError

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


class Conditions:
    """Rows of embeddings and of captions by id; an id may have several of both, of which a pick chooses one."""

    def __init__(self, embeddings: Artifact, captions: Artifact | None = None):
        self.embeddings, self.captions = embeddings, captions
        self._table = embeddings.array("embeddings")
        self._embedding_rows = _rows_by_id(embeddings.strings("ids"))
        self._caption_rows = {} if captions is None else _rows_by_id(captions.strings("ids"))
        self.n_text = 0 if captions is None else captions.fact("n_text", int)
        self.n_vocab = 0 if captions is None else captions.fact("n_vocab", int)
        self._tokens: Any = None
        if captions is not None:
            self._tokens = captions.array("tokens")
            if self._tokens.shape[1:] != (self.n_text,):
                found = f"{self._tokens.shape[1:]} in {captions.path}"
                raise DalleError(f"expected captions of {self.n_text} tokens, found {found}; make them again")

    @property
    def width(self) -> int:
        """D."""
        return int(self._table.shape[1])

    def missing(self, ids: Iterable[str]) -> frozenset[str]:
        """Those of these ids that have no embedding.

        Raises:
            DalleError: all of them.
        """
        ids = list(ids)
        gone = frozenset(ids).difference(self._embedding_rows)
        if ids and len(gone) == len(set(ids)):
            known = next(iter(self._embedding_rows), "none")
            raise DalleError(
                f"expected pictures with embeddings, found no id in common ({ids[0]!r} and {known!r}); "
                "make the embeddings from this data set"
            )
        return gone

    def of(self, ids: Sequence[str], picks: NDArray[np.float64]) -> tuple[Floats, Ints, Ints]:
        """Embeddings (B, D), tokens (B, T) and lengths (B,) of these ids; picks (B, 2) in [0, 1) choose among several.

        Where there is no caption the length is 0.
        """
        rows = [_pick(self._embedding_rows[name], pick) for name, pick in zip(ids, picks[:, 0], strict=True)]
        embeddings = np.asarray(self._table[np.array(rows, dtype=np.int64)]).astype(np.float32)
        tokens = np.zeros((len(ids), self.n_text), dtype=np.int64)
        lengths = np.zeros(len(ids), dtype=np.int64)
        if self.captions is not None:
            told = [(i, name) for i, name in enumerate(ids) if name in self._caption_rows]
            places = np.array([i for i, _ in told], dtype=np.int64)
            chosen = np.array([_pick(self._caption_rows[name], picks[i, 1]) for i, name in told], dtype=np.int64)
            tokens[places] = self._tokens[chosen]
            lengths[places] = self.captions.array("lengths")[chosen]
        if tokens.size and tokens.max() >= self.n_vocab:
            raise DalleError(f"expected tokens below {self.n_vocab}, found {tokens.max()}; make the captions again")
        return embeddings, tokens, lengths

    def texts(self, ids: Sequence[str]) -> list[str]:
        """The first caption of each id; empty where there is none."""
        if self.captions is None:
            return ["" for _ in ids]
        written = self.captions.strings("text")
        return [written[self._caption_rows[name][0]] if name in self._caption_rows else "" for name in ids]


def _rows_by_id(ids: Iterable[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(ids):
        rows.setdefault(name, []).append(row)
    return rows


def _pick(rows: list[int], pick: float) -> int:
    return rows[int(pick * len(rows))]
