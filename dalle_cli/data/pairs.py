"""Captions and latents joined by id: what a prior is trained on, and what a decoder is conditioned on.

Shapes: B batch, T caption length, H W code grid, D embedding width. Both artifacts are memory maps; only a batch is
copied.
"""

import math
from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any

import numpy as np
import numpy.typing as npt

from dalle_cli.artifacts import Artifact
from dalle_cli.data.order import split
from dalle_cli.errors import DalleError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
MAX_VOCABULARY = 1 << 20
BLOCK = 1 << 26  # bytes of a column that are checked at once
Uniform = npt.NDArray[np.float64]


class RowsById:
    """The rows of each id in an artifact. Ids are addressed by their place in `names`; an id may have several rows."""

    def __init__(self, ids: Sequence[str], names: Sequence[str]):
        place = {name: i for i, name in enumerate(names)}
        places = np.array([place.get(name, -1) for name in ids], dtype=np.int64)
        known = np.flatnonzero(places >= 0)
        self.rows = known[np.argsort(places[known], kind="stable")]  # of place 0, of place 1, ...
        self.counts = np.bincount(places[known], minlength=len(place))
        self.starts = np.cumsum(self.counts) - self.counts

    def at(self, places: Ints) -> "RowsById":
        """The same rows for a subset of the places, renumbered from 0."""
        subset = copy(self)
        subset.counts, subset.starts = self.counts[places], self.starts[places]
        return subset

    def pick(self, places: Ints, uniform: Uniform) -> Ints:
        """One row for each place; a number in [0, 1) chooses among several: (B,), (B,) -> (B,)."""
        return np.asarray(self.rows[self.starts[places] + (uniform * self.counts[places]).astype(np.int64)])


class Pairs:
    """The ids that have both a caption and a latent. Each may have several of both.

    Raises:
        DalleError: no id in common, or columns that do not fit the header.
    """

    def __init__(self, captions: Artifact, latents: Artifact):
        self.captions, self.latents = captions, latents
        latent_ids, caption_ids = list(latents.strings("ids")), list(captions.strings("ids"))
        self.ids = sorted(set(latent_ids) & set(caption_ids))
        if not self.ids:
            example = f"{caption_ids[0]!r} and {latent_ids[0]!r}" if caption_ids and latent_ids else "none at all"
            raise DalleError(
                f"expected captions and {latents.kind} of the same images, found no id in common ({example}); "
                "make both from one data set"
            )
        self._caption_sizes = (captions.require("n_text", int),), vocabulary(captions)
        _check_captions(captions, *self._caption_sizes)
        if latents.kind == "embeddings":
            self._check_encoder()
        else:
            self._code_sizes = (latents.require("grid", int),) * 2, vocabulary(latents)
            _check_column(latents, "codes", *self._code_sizes)
        self._captions, self._latents = RowsById(caption_ids, self.ids), RowsById(latent_ids, self.ids)
        self.normalized = True
        self.unmatched = len(set(latent_ids) ^ set(caption_ids))

    def __len__(self) -> int:
        return len(self.ids)

    def exclude(self, ids: frozenset[str]) -> "Pairs":
        """The pairs of all other ids."""
        places = np.flatnonzero([name not in ids for name in self.ids])
        kept = copy(self)
        kept.ids = [self.ids[place] for place in places.tolist()]
        kept._captions, kept._latents = self._captions.at(places), self._latents.at(places)
        return kept

    def split(self, share: float) -> tuple[Ints, Ints]:
        """Places for training and for validation, by a hash of the id alone."""
        return split(self.ids, share)

    def draw(self, places: Ints, uniform: Uniform | None = None) -> tuple[Ints, Ints]:
        """A caption row and a latent row for each place: the first of several, or as (B, 2) in [0, 1) choose."""
        uniform = np.zeros((len(places), 2)) if uniform is None else uniform
        return self._captions.pick(places, uniform[:, 0]), self._latents.pick(places, uniform[:, 1])

    def tokens(self, rows: Ints) -> tuple[npt.NDArray[Any], Ints]:
        """Captions of these rows: tokens (B, T) int64 and lengths (B,) int64."""
        tokens = np.asarray(self.captions.array("tokens")[rows]).astype(np.int64)
        return tokens, np.asarray(self.captions.array("lengths")[rows]).astype(np.int64)

    def codes(self, rows: Ints) -> Ints:
        """Codes of these rows: (B, H, W) int64."""
        return np.asarray(self.latents.array("codes")[rows]).astype(np.int64)

    @property
    def width(self) -> int:
        """The embeddings' width: D."""
        return int(self.latents.array("embeddings").shape[1])

    def unnormalized(self) -> "Pairs":
        """The same pairs, with z_i as long as they are stored."""
        kept = copy(self)
        kept.normalized = False
        return kept

    def embeddings(self, rows: Ints) -> Floats:
        """z_i of these rows, normalized to length 1 if `normalized`: (B, D) float32."""
        return _embeddings(self.latents, rows, self.normalized)

    def text_embeddings(self, rows: Ints) -> Floats:
        """z_t of these captions, normalized to length 1: (B, D) float32."""
        return _embeddings(self.captions, rows, True)

    def _check_encoder(self) -> None:
        """Raises: DalleError if captions have no embeddings, or those of another CLIP."""
        if "embeddings" not in self.captions:
            raise DalleError(
                "expected captions with embeddings of the CLIP that embedded the images, found none in "
                f"{self.captions.path}; make them again with `tokenize -m CLIP`"
            )
        mine, theirs = self.captions.require("encoder", str), self.latents.require("encoder", str)
        if mine != theirs or self.captions.array("embeddings").shape[1] != self.width:
            raise DalleError(
                f"expected captions and images embedded by one CLIP, found {mine[:12]} and {theirs[:12]} (sha256); "
                "make one of them again"
            )


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
        self.n_vocab = 0 if captions is None else vocabulary(captions)
        if captions is not None:
            _check_captions(captions, (self.n_text,), self.n_vocab)

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

    def of(self, ids: Sequence[str], picks: Uniform) -> tuple[Floats, Ints, Ints]:
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
        return embeddings, tokens, lengths


def _embeddings(source: Artifact, rows: Ints, normalized: bool) -> Floats:
    """Raises: DalleError if an embedding is not finite, or has no length."""
    z = np.asarray(source.array("embeddings")[rows]).astype(np.float32)
    length = np.linalg.norm(z, axis=-1, keepdims=True)
    if not (np.isfinite(length) & (length > 0)).all():
        raise DalleError(f"expected embeddings of finite length, found others in {source.path}; make it again")
    return np.asarray(z / length) if normalized else z


def vocabulary(source: Artifact) -> int:
    """How many different tokens or codes an artifact's header says that there are.

    Raises:
        DalleError: the header has no such number, or one that no vocabulary has.
    """
    n = source.require("n_vocab", int)
    if not 1 <= n <= MAX_VOCABULARY:
        raise DalleError(f"expected n_vocab from 1 to {MAX_VOCABULARY}, found {n} in {source.path}; make it again")
    return n


def _check_captions(captions: Artifact, shape: tuple[int, ...], n_vocab: int) -> None:
    _check_column(captions, "tokens", shape, n_vocab)
    _check_column(captions, "lengths", (), shape[0] + 1)


def _check_column(source: Artifact, name: str, shape: tuple[int, ...], limit: int) -> None:
    """Read a whole column, before hours of training. It costs less than the file's digest, which is computed, too.

    Raises:
        DalleError: rows of another shape than the header says, or numbers that are not below `limit`.
    """
    column = source.array(name)
    if column.shape[1:] == shape:
        rows = max(1, BLOCK // max(1, column.dtype.itemsize * math.prod(shape)))
        blocks = (column[at : at + rows] for at in range(0, len(column), rows))
        if all(block.min() >= 0 and block.max() < limit for block in blocks):
            return
    raise DalleError(
        f"expected {name} {list(shape)} below {limit}, found {list(column.shape[1:])} or larger numbers in "
        f"{source.path}; make it again"
    )
