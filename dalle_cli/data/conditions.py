"""What a decoder is conditioned on beside an image: its embedding and, if there are any, its captions, by id.

Shapes: B batch, D embedding width, T caption length. Both artifacts are memory maps; only a batch is copied.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from dalle_cli.artifacts import Artifact
from dalle_cli.data.pairs import Floats, Ints, RowsById
from dalle_cli.errors import DalleError


class Conditions:
    """Rows of embeddings and of captions by id. An id may have several of both, of which one is picked."""

    def __init__(self, embeddings: Artifact, captions: Artifact | None = None):
        self.embeddings, self.captions = embeddings, captions
        self._table = embeddings.array("embeddings")
        ids = embeddings.strings("ids")
        self._places = {name: place for place, name in enumerate(dict.fromkeys(ids))}
        names = list(self._places)
        self._embedding_rows = RowsById(ids, names)
        self._caption_rows = RowsById([] if captions is None else captions.strings("ids"), names)
        self.n_text = 0 if captions is None else captions.require("n_text", int)
        self.n_vocab = 0 if captions is None else captions.require("n_vocab", int)
        if captions is not None and captions.array("tokens").shape[1:] != (self.n_text,):
            found = f"{captions.array('tokens').shape[1:]} in {captions.path}"
            raise DalleError(f"expected captions of {self.n_text} tokens, found {found}; make them again")

    @property
    def width(self) -> int:
        """The embeddings' width: D."""
        return int(self._table.shape[1])

    def missing(self, ids: Iterable[str]) -> frozenset[str]:
        """Those of these ids that have no embedding.

        Raises:
            DalleError: none of them has one.
        """
        ids = list(ids)
        gone = frozenset(ids).difference(self._places)
        if ids and len(gone) == len(set(ids)):
            known = next(iter(self._places), "none")
            raise DalleError(
                f"expected images with embeddings, found no id in common ({ids[0]!r} and {known!r}); "
                "make the embeddings from this data set"
            )
        return gone

    def of(self, ids: Sequence[str], picks: NDArray[np.float64]) -> tuple[Floats, Ints, Ints]:
        """Embeddings (B, D), tokens (B, T) and lengths (B,) of these ids; picks (B, 2) in [0, 1) choose among several.

        An id without a caption has length 0.
        """
        places = np.array([self._places[name] for name in ids], dtype=np.int64)
        embeddings = np.asarray(self._table[self._embedding_rows.pick(places, picks[:, 0])]).astype(np.float32)
        tokens = np.zeros((len(ids), self.n_text), dtype=np.int64)
        lengths = np.zeros(len(ids), dtype=np.int64)
        if self.captions is not None:
            captioned = np.flatnonzero(self._caption_rows.counts[places])
            rows = self._caption_rows.pick(places[captioned], picks[captioned, 1])
            tokens[captioned] = self.captions.array("tokens")[rows]
            lengths[captioned] = self.captions.array("lengths")[rows]
        if tokens.size and tokens.max() >= self.n_vocab:
            raise DalleError(f"expected tokens below {self.n_vocab}, found {tokens.max()}; make the captions again")
        return embeddings, tokens, lengths
