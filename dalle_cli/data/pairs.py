"""Captions and latents joined by id: what a prior is trained on.

Shapes: B batch, T caption length, H W code grid, D embedding width. Both artifacts are memory maps; only a batch is
ever copied.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import numpy.typing as npt

from dalle_cli.artifacts import Artifact
from dalle_cli.data.split import split
from dalle_cli.errors import DalleError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def _rows_by_id(ids: Sequence[str], place: dict[str, int]) -> tuple[Ints, Ints]:
    """For each place its rows, as one array, and where each place's rows begin in it (n+1)."""
    places = np.array([place.get(name, -1) for name in ids], dtype=np.int64)
    known = np.flatnonzero(places >= 0)
    rows = known[np.argsort(places[known], kind="stable")]
    starts = np.zeros(len(place) + 1, dtype=np.int64)
    np.cumsum(np.bincount(places[known], minlength=len(place)), out=starts[1:])
    return rows, starts


def _of_places(table: tuple[Ints, Ints], places: Ints) -> tuple[Ints, Ints]:
    """What `_rows_by_id` gives, for these places alone."""
    rows, starts = table
    parts = [rows[starts[place] : starts[place + 1]] for place in places.tolist()]
    return np.concatenate([rows[:0], *parts]), np.cumsum([0, *map(len, parts)])


class Pairs:
    """The ids that have both a caption and a latent; each may have several of both, of which training draws one anew.

    Raises:
        DalleError: no id in common.
    """

    def __init__(self, captions: Artifact, latents: Artifact):
        self.captions, self.latents = captions, latents
        latent_ids = list(latents.strings("ids"))
        caption_ids = list(captions.strings("ids"))
        self.ids = sorted(set(latent_ids) & set(caption_ids))
        if not self.ids:
            example = f"{caption_ids[0]!r} and {latent_ids[0]!r}" if caption_ids and latent_ids else "none at all"
            raise DalleError(
                f"expected captions and {latents.kind} of the same pictures, found no id in common ({example}); "
                "make both from one data set"
            )
        self._sizes = {name: captions.fact(name, int) for name in ("n_text", "n_vocab")}
        _check(captions, captions.array("tokens")[:0], (self._sizes["n_text"],), self._sizes["n_vocab"])
        if latents.kind == "embeddings":
            self._check_widths()
        else:
            self._latent_sizes = {name: latents.fact(name, int) for name in ("grid", "n_vocab")}
            shape = (self._latent_sizes["grid"],) * 2
            _check(latents, latents.array("codes")[:0], shape, self._latent_sizes["n_vocab"])
        place = {name: i for i, name in enumerate(self.ids)}
        self._captions = _rows_by_id(caption_ids, place)
        self._latents = _rows_by_id(latent_ids, place)
        self.unmatched = len(set(latent_ids) ^ set(caption_ids))

    def __len__(self) -> int:
        return len(self.ids)

    def without(self, ids: frozenset[str]) -> "Pairs":
        """The pairs of all other ids."""
        if not ids:
            return self
        places = np.flatnonzero([name not in ids for name in self.ids])
        kept = copy(self)
        kept.ids = [self.ids[place] for place in places.tolist()]
        kept._captions, kept._latents = _of_places(self._captions, places), _of_places(self._latents, places)
        return kept

    def split(self, share: float) -> tuple[Ints, Ints]:
        """Places for training and for validation, by a hash of the id alone."""
        return split(self.ids, share)

    def draw(self, places: Ints, picks: npt.NDArray[np.float64]) -> tuple[Ints, Ints]:
        """A caption row and a latent row for each place; picks (B, 2) uniform in [0, 1) choose among several."""
        return _pick(self._captions, places, picks[:, 0]), _pick(self._latents, places, picks[:, 1])

    def tokens(self, rows: Ints) -> tuple[npt.NDArray[Any], Ints]:
        """Captions of these rows: tokens (B, T) int64 and lengths (B,) int64."""
        tokens = np.asarray(self.captions.array("tokens")[rows]).astype(np.int64)
        _check(self.captions, tokens, (self._sizes["n_text"],), self._sizes["n_vocab"])
        return tokens, np.asarray(self.captions.array("lengths")[rows]).astype(np.int64)

    def codes(self, rows: Ints) -> Ints:
        """Codes of these rows, (B, H, W) int64."""
        codes = np.asarray(self.latents.array("codes")[rows]).astype(np.int64)
        _check(self.latents, codes, (self._latent_sizes["grid"],) * 2, self._latent_sizes["n_vocab"])
        return codes

    @property
    def width(self) -> int:
        """Of the embeddings: D."""
        return int(self.latents.array("embeddings").shape[1])

    def embeddings(self, rows: Ints) -> Floats:
        """z_i of these rows, to length 1: (B, D) float32."""
        return _normalized(self.latents, rows)

    def text_embeddings(self, rows: Ints) -> Floats:
        """z_t of these captions, to length 1: (B, D) float32."""
        return _normalized(self.captions, rows)

    def _check_widths(self) -> None:
        """Raises: DalleError if captions have no embeddings, or those of another CLIP."""
        if "embeddings" not in self.captions:
            found = f"none in {self.captions.path}"
            raise DalleError(
                f"expected captions with embeddings of the CLIP that made the pictures' own, found {found}; "
                "make them again with `tokenize -m CLIP`"
            )
        mine, theirs = self.captions.fact("encoder", str), self.latents.fact("encoder", str)
        if mine != theirs or self.captions.array("embeddings").shape[1] != self.width:
            found = f"{mine[:12]} and {theirs[:12]}"
            raise DalleError(
                f"expected captions and pictures embedded by one CLIP, found {found} (sha256); make one of them again"
            )


def _normalized(source: Artifact, rows: Ints) -> Floats:
    """Raises: DalleError if an embedding is no number, or has no length."""
    z = np.asarray(source.array("embeddings")[rows]).astype(np.float32)
    length = np.linalg.norm(z, axis=-1, keepdims=True)
    if not (np.isfinite(length) & (length > 0)).all():
        raise DalleError(f"expected embeddings of finite length, found others in {source.path}; make it again")
    return np.asarray(z / length)


def _check(source: Artifact, rows: Ints, shape: tuple[int, ...], n_vocab: int) -> None:
    """Raises: DalleError if rows are not what the header says of them."""
    if rows.shape[1:] != shape or (rows.size and not 0 <= rows.min() <= rows.max() < n_vocab):
        found = f"{rows.shape[1:]} up to {rows.max(initial=0)}"
        raise DalleError(
            f"expected {source.kind} {shape} below {n_vocab}, found {found} in {source.path}; make it again"
        )


def _pick(table: tuple[Ints, Ints], places: Ints, uniform: npt.NDArray[np.float64]) -> Ints:
    rows, starts = table
    counts = starts[places + 1] - starts[places]
    return np.asarray(rows[starts[places] + (uniform * counts).astype(np.int64)])
