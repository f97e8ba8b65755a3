"""All scores of generated pictures against real ones, at each radius of blur.

Shapes: N M rows of the two sides, D features, k pictures to choose among.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dalle_cli.artifacts import Artifact
from dalle_cli.errors import DalleError
from dalle_cli.evaluation import bootstrap, classes, kernel, manifold
from dalle_cli.evaluation import retrieval as matches
from dalle_cli.evaluation.cache import Pass, caption_embeddings, collect
from dalle_cli.evaluation.features import ClipFeatures, Features, title
from dalle_cli.evaluation.frechet import Moments, between
from dalle_cli.evaluation.image_sets import GENERATED, REFERENCE, Side
from dalle_cli.evaluation.store import Rows

MANIFOLD_ROWS = 10_000  # of each side, at most, for precision and recall, whose work grows with their square
CANDIDATES = 100  # pictures that retrieval chooses among
SCORES = ("frechet", "kernel", "precision", "recall", "inception", "clip", "retrieval")

Score = dict[str, Any]


class Missing(Exception):
    """A score that these pictures or features cannot have; str() says why."""


@dataclass(frozen=True)
class Settings:
    """What scores depend on besides pictures and features."""

    scores: Sequence[str]  # empty: all that can be had
    seed: int
    replicates: int
    candidates: int | None
    without: frozenset[str]

    def check(self) -> None:
        """Raises: DalleError for a score that there is not."""
        if unknown := [name for name in self.scores if name not in SCORES]:
            raise DalleError(f"expected scores of {', '.join(SCORES)}, found {unknown[0]!r}; mend --scores")


class Comparison:
    """Both sides' features, and what belongs together."""

    def __init__(self, sides: tuple[Side, Side], features: Features, clip: ClipFeatures | None, run: Pass, s: Settings):
        self.features, self.clip, self.run, self.settings = features, clip, run, s
        self.sides = dict(zip((GENERATED, REFERENCE), sides, strict=True))
        if "frechet" in (s.scores or SCORES):  # before a long pass
            _check_enough({side.name: len(side.rows) for side in sides}, features.width + 1, _covariance(features))
        self.found = {name: collect(side, run) for name, side in self.sides.items()}
        self.manifolds: dict[float, tuple[Any, Any]] = {}  # both of precision and recall come from one piece of work
        first = {name: found[features.name, run.radii[0]] for name, found in self.found.items()}
        ids = {name: list(artifact.strings("ids")) for name, artifact in first.items()}
        gone = self._gone(ids)
        self.kept = {
            name: np.array([i for i, own in enumerate(ids[name]) if own not in gone[name]], np.int64) for name in ids
        }
        self.ids = {name: [ids[name][i] for i in kept.tolist()] for name, kept in self.kept.items()}

    def _gone(self, ids: dict[str, list[str]]) -> dict[str, frozenset[str]]:
        """The ids that --without takes out of each side; of generated pictures also those of captions that are gone."""
        out = self.settings.without
        real, drawn = self.sides[REFERENCE].captions, self.sides[GENERATED].captions
        lost = {text for own in ids[REFERENCE] if own in out for text in real.get(own, ())}
        lost -= {text for own in ids[REFERENCE] if own not in out for text in real.get(own, ())}
        orphans = {own for own in ids[GENERATED] if (texts := drawn.get(own)) and texts[0] in lost}
        return {GENERATED: out | orphans, REFERENCE: out}

    def dropped(self, name: str) -> int:
        """How many pictures of a side --without took out."""
        return len(self.found[name][self.features.name, self.run.radii[0]]) - len(self.kept[name])

    def rows(self, name: str, radius: float, column: str = "embeddings", network: Features | None = None) -> Rows:
        """The features of a side that are compared."""
        artifact = self.found[name][(network or self.features).name, radius]
        return Rows(artifact, column, self.kept[name])

    @cached_property
    def texts(self) -> list[str]:
        """The caption of each generated picture, the first of several; "" without one."""
        captions = self.sides[GENERATED].captions
        return [captions.get(own, ("",))[0] for own in self.ids[GENERATED]]

    @cached_property
    def own(self) -> tuple[list[int], list[list[int]]]:
        """The generated rows that have real pictures of their own, and those: of the same id, else of the same text."""
        captions = self.sides[REFERENCE].captions
        by_id: dict[str, list[int]] = {}
        by_text: dict[str, list[int]] = {}
        for row, own in enumerate(self.ids[REFERENCE]):
            by_id.setdefault(own, []).append(row)
            for text in dict.fromkeys(captions.get(own, ())):
                by_text.setdefault(text, []).append(row)
        pairs = []
        for own, text in zip(self.ids[GENERATED], self.texts, strict=True):
            known = captions.get(own)  # the same id says nothing where captions differ: both sides may be numbered
            same = by_id.get(own, []) if not text or not known or text in known else []
            pairs.append(same or (by_text.get(text, []) if text else []))
        return [row for row, mine in enumerate(pairs) if mine], [mine for mine in pairs if mine]

    @cached_property
    def captions(self) -> tuple[Artifact, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Embedded captions; the generated rows that have one, and which."""
        assert self.clip is not None
        unique = sorted({text for text in self.texts if text})
        number = {text: i for i, text in enumerate(unique)}
        rows = np.array([i for i, text in enumerate(self.texts) if text], np.int64)
        own = np.array([number[text] for text in self.texts if text], np.int64)
        return caption_embeddings(unique, self.clip, self.run), rows, own


def score(c: Comparison) -> tuple[list[Score], dict[str, str]]:
    """The scores at each radius, and why a score is left out.

    Raises:
        DalleError: too few pictures for the Frechet distance, or for a score that was asked for by name.
    """
    out, left_out = [], {}
    for radius in c.run.radii:
        scores: Score = {"blur": radius}
        for name in c.settings.scores or SCORES:
            try:
                scores[name] = _MADE[name](c, radius)
            except Missing as reason:
                if name in c.settings.scores:
                    raise DalleError(f"expected what {name} needs, found {reason}; give it or mend --scores") from None
                left_out[name] = str(reason)
        out.append(scores)
    return out, left_out


def _both(c: Comparison, radius: float) -> tuple[Rows, Rows]:
    return c.rows(GENERATED, radius), c.rows(REFERENCE, radius)


def _need(c: Comparison, radius: float, fewest: int, what: str) -> tuple[Rows, Rows]:
    """Both sides' rows. Raises: DalleError if one has too few."""
    generated, real = _both(c, radius)
    _check_enough({GENERATED: len(generated), REFERENCE: len(real)}, fewest, what)
    return generated, real


def _check_enough(counts: Mapping[str, int], fewest: int, what: str) -> None:
    """Raises: DalleError if a side has too few pictures."""
    for name, count in counts.items():
        if count < fewest:
            raise DalleError(
                f"expected at least {fewest} pictures on each side for {what}, found {count} {name}; "
                "give more, features of fewer dimensions, or leave it out with --scores"
            )


def _covariance(features: Features) -> str:
    """What more pictures than features are needed for."""
    return f"the covariance of {features.width} features of {features.name}"


def _frechet(c: Comparison, radius: float) -> Score:
    width = c.features.width
    generated, real = _need(c, radius, width + 1, _covariance(c.features))
    value = between(Moments.of(generated.blocks(), width), Moments.of(real.blocks(), width))
    interval = bootstrap.of_frechet(value, generated, real, c.settings.replicates, c.settings.seed)
    return {"called": title(c.features), **interval}


def _kernel(c: Comparison, radius: float) -> Score:
    return kernel.kernel_distance(*_need(c, radius, kernel.FEWEST, "subsets of two"), c.settings.seed)


def _manifold(c: Comparison, radius: float) -> tuple[Any, Any]:
    if radius in c.manifolds:
        return c.manifolds[radius]
    fewest = manifold.NEIGHBORS + 1
    sides = _need(c, radius, fewest, f"a row and its {manifold.NEIGHBORS} neighbors")
    most = min(MANIFOLD_ROWS, *map(len, sides))
    generated, real = (rows.sample(most, c.settings.seed).astype(np.float64) for rows in sides)
    c.manifolds[radius] = manifold.precision_recall(generated, real)
    return c.manifolds[radius]


def _precision(c: Comparison, radius: float) -> Score:
    hits = _manifold(c, radius)[0]
    return {**bootstrap.of_mean(hits, c.settings.replicates, c.settings.seed, 2), "pictures": len(hits)}


def _recall(c: Comparison, radius: float) -> Score:
    hits = _manifold(c, radius)[1]
    return {**bootstrap.of_mean(hits, c.settings.replicates, c.settings.seed, 3), "pictures": len(hits)}


def _inception(c: Comparison, radius: float) -> Score:
    if not c.features.classes:
        raise Missing(f"features without classes ({c.features.name})")
    rows = c.rows(GENERATED, radius, "logits")
    if len(rows) < classes.FEWEST:
        raise Missing(f"{len(rows)} generated pictures, where {classes.FEWEST} are the fewest")
    return classes.inception_score(rows.blocks(), c.settings.replicates, c.settings.seed)


def _clip(c: Comparison, radius: float) -> Score:
    if c.clip is None:
        raise Missing("no CLIP with its tokenizer (-m)")
    if not any(c.texts):
        raise Missing("generated pictures without captions")
    artifact, rows, own = c.captions
    all_rows = c.rows(GENERATED, radius, network=c.clip)
    pictures, captions = Rows(all_rows.artifact, kept=all_rows.kept[rows]), Rows(artifact)
    cosines = 100 * matches.cosines(pictures, captions, own)
    out: Score = bootstrap.of_mean(cosines, c.settings.replicates, c.settings.seed, 4)
    other = matches.shuffled(own, c.settings.seed)
    wrong = None if other is None else float(100 * matches.cosines(pictures, captions, other).mean())
    return {**out, "shuffled": wrong, "pictures": len(rows), "features": c.clip.name}


def _retrieval(c: Comparison, radius: float) -> Score:
    having, own = c.own
    if not having:
        raise Missing("no generated picture with the id or the caption of a real one")
    generated, real = _both(c, radius)
    spare = len(real) - max(map(len, own))
    k = c.settings.candidates or min(CANDIDATES, spare + 1)
    if not 2 <= k <= spare + 1:
        raise Missing(f"{len(real)} real pictures to choose {k} among")
    generated = Rows(generated.artifact, kept=generated.kept[having])
    ranks = matches.ranks(generated, real, own, k, c.settings.seed)
    out = {
        f"r{n}": {**bootstrap.of_mean(ranks < n, c.settings.replicates, c.settings.seed, 5), "chance": n / k}
        for n in (1, 5)
        if n < k
    }
    return {**out, "k": k, "pictures": len(having)}


_MADE: dict[str, Callable[[Comparison, float], Score]] = {
    "frechet": _frechet, "kernel": _kernel, "precision": _precision, "recall": _recall,
    "inception": _inception, "clip": _clip, "retrieval": _retrieval,
}  # fmt: skip
