"""The metrics of generated images against real ones.

A new metric is a function here, a row in METRICS, its name in `options.SCORES`, and its title and unit for tables and
charts in `viz.metric_charts.METRICS`.

Shapes: N M rows of the two sets, D features, k images to choose among.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from dalle_cli.artifacts import Artifact
from dalle_cli.errors import DalleError
from dalle_cli.evaluation import bootstrap, classes, kernel, manifold, retrieval
from dalle_cli.evaluation.cache import FeaturePass, caption_embeddings, collect
from dalle_cli.evaluation.feature_batch import Features
from dalle_cli.evaluation.features import ClipFeatures, check_at_least, check_enough, title
from dalle_cli.evaluation.frechet import Moments, between
from dalle_cli.evaluation.image_sets import GENERATED, REFERENCE, ImageSet
from dalle_cli.evaluation.options import SCORES, EvaluateOptions
from dalle_cli.evaluation.store import FeatureRows

MANIFOLD_ROWS = 10_000  # rows of each set, at most, for precision and recall, whose work is quadratic
CANDIDATES = 100  # images that retrieval chooses among

Metric = dict[str, Any]


class Unavailable(Exception):
    """A metric that these images or features cannot have; str() says why."""


class Comparison:
    """The features of both sets, and which rows of them belong together. `excluded` are ids that --exclude lists."""

    def __init__(
        self, sets: Sequence[ImageSet], features: Features, clip: ClipFeatures | None, run: FeaturePass,
        options: EvaluateOptions, excluded: frozenset[str] = frozenset(),
    ):  # fmt: skip
        self.features, self.clip, self.run, self.options, self.excluded = features, clip, run, options, excluded
        self.sets = dict(zip((GENERATED, REFERENCE), sets, strict=True))
        if "frechet" in (options.names or SCORES):  # before a long pass
            check_enough(features, **{one.name: len(one.rows) for one in sets})
        self.found = {name: collect(one, run) for name, one in self.sets.items()}
        self.manifolds: dict[float, tuple[Any, Any]] = {}  # precision and recall are computed together
        first = {name: found[features.name, run.radii[0]] for name, found in self.found.items()}
        ids = {name: list(artifact.strings("ids")) for name, artifact in first.items()}
        gone = self._gone(ids)
        self.kept = {
            name: np.array([i for i, own in enumerate(ids[name]) if own not in gone[name]], np.int64) for name in ids
        }
        self.used = {name: len(kept) for name, kept in self.kept.items()}
        self.ids = {name: [ids[name][i] for i in kept.tolist()] for name, kept in self.kept.items()}

    def _gone(self, ids: dict[str, list[str]]) -> dict[str, frozenset[str]]:
        """The ids excluded from each set; from the generated one also those of captions that no real image has left."""
        real, generated = self.sets[REFERENCE].captions, self.sets[GENERATED].captions
        lost = {text for own in ids[REFERENCE] if own in self.excluded for text in real.get(own, ())}
        lost -= {text for own in ids[REFERENCE] if own not in self.excluded for text in real.get(own, ())}
        orphans = {own for own in ids[GENERATED] if (texts := generated.get(own)) and texts[0] in lost}
        return {GENERATED: self.excluded | orphans, REFERENCE: self.excluded}

    def counts(self, name: str) -> dict[str, int]:
        """How many images of a set are used, excluded, and skipped as they cannot be read."""
        used, read = self.used[name], len(self.found[name][self.features.name, self.run.radii[0]])
        return {"images": used, "exclude": read - used, "skipped": len(self.sets[name].rows) - read}

    def rows(
        self, name: str, radius: float, column: str = "embeddings", network: Features | None = None
    ) -> FeatureRows:
        """The features of a set that are compared."""
        return FeatureRows(self.found[name][(network or self.features).name, radius], column, self.kept[name])

    def both(self, radius: float, fewest: int = 0, reason: str = "") -> tuple[FeatureRows, FeatureRows]:
        """The features of both sets; raises `DalleError` if one has too few rows."""
        check_at_least(fewest, reason, **self.used)
        return self.rows(GENERATED, radius), self.rows(REFERENCE, radius)

    def mean(self, values: npt.NDArray[Any], stream: int) -> Metric:
        """The mean of values with its interval."""
        return dict(bootstrap.of_mean(values, self.options.bootstrap, self.options.seed, stream))

    @cached_property
    def texts(self) -> list[str]:
        """The caption of each generated image, the first of several; "" without one."""
        captions = self.sets[GENERATED].captions
        return [captions.get(own, ("",))[0] for own in self.ids[GENERATED]]

    @cached_property
    def own(self) -> tuple[list[int], list[list[int]]]:
        """Generated rows with real counterparts, and those: the rows of the same id, else of the same caption."""
        captions = self.sets[REFERENCE].captions
        by_id: dict[str, list[int]] = {}
        by_text: dict[str, list[int]] = {}
        for row, own in enumerate(self.ids[REFERENCE]):
            by_id.setdefault(own, []).append(row)
            for text in filter(None, dict.fromkeys(captions.get(own, ()))):
                by_text.setdefault(text, []).append(row)
        found = {}
        for row, (own, text) in enumerate(zip(self.ids[GENERATED], self.texts, strict=True)):
            known = captions.get(own)  # an equal id means nothing where captions differ: both sets may be numbered
            same = by_id.get(own) if not text or not known or text in known else None
            if mine := same or by_text.get(text):
                found[row] = mine
        return list(found), list(found.values())

    @cached_property
    def captions(self) -> tuple[Artifact, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Embedded captions; the generated rows that have one, and which."""
        assert self.clip is not None
        texts = np.array(self.texts, object)
        rows = np.flatnonzero(texts != "")
        unique, own = np.unique(texts[rows], return_inverse=True)
        return caption_embeddings(unique.tolist(), self.clip, self.run), rows, own


def score(c: Comparison) -> tuple[list[Metric], dict[str, str]]:
    """The metrics at each radius of blur, and why a metric is left out.

    Raises:
        DalleError: too few images for the Frechet distance, or for a metric that was asked for by name.
    """
    out, left_out = [], {}
    for radius in c.run.radii:
        scores: Metric = {"blur": radius}
        for name in c.options.names or SCORES:
            try:
                scores[name] = METRICS[name](c, radius)
            except Unavailable as reason:
                if name in c.options.names:
                    said = f"expected what {name} needs, found {reason}; give it or correct --scores"
                    raise DalleError(said) from None
                left_out[name] = str(reason)
        out.append(scores)
    return out, left_out


def _frechet(c: Comparison, radius: float) -> Metric:
    check_enough(c.features, **c.used)
    both = c.both(radius)
    value = between(*(Moments.of(rows.blocks(), c.features.width) for rows in both))
    return {"name": title(c.features), **bootstrap.of_frechet(value, *both, c.options.bootstrap, c.options.seed)}


def _kernel(c: Comparison, radius: float) -> Metric:
    both = c.both(radius, kernel.FEWEST, "subsets of two")
    return {"name": title(c.features, "KID", "kernel distance"), **kernel.kernel_distance(*both, c.options.seed)}


def _manifold(c: Comparison, radius: float, number: int) -> Metric:
    """Precision (number 0) or recall (1)."""
    if radius not in c.manifolds:
        sets = c.both(radius, manifold.NEIGHBORS + 1, f"a row and its {manifold.NEIGHBORS} neighbors")
        most = min(MANIFOLD_ROWS, *map(len, sets))
        generated, real = (rows.sample(most, c.options.seed).astype(np.float64) for rows in sets)
        c.manifolds[radius] = manifold.precision_recall(generated, real)
    hits = c.manifolds[radius][number]
    name = f"{('precision', 'recall')[number]} ({c.features.name})"  # the published ones use features of VGG-16
    return {"name": name, **c.mean(hits, 2 + number), "images": len(hits)}


def _inception(c: Comparison, radius: float) -> Metric:
    if not c.features.classes:
        raise Unavailable(f"features without classes ({c.features.name})")
    rows = c.rows(GENERATED, radius, "logits")
    if len(rows) < classes.FEWEST:
        raise Unavailable(f"{len(rows)} generated images, where {classes.FEWEST} are the fewest")
    name = title(c.features, "Inception score", "Inception score, not the published network")
    return {"name": name, **classes.inception_score(rows.blocks(), c.options.bootstrap, c.options.seed)}


def _clip(c: Comparison, radius: float) -> Metric:
    if c.clip is None:
        raise Unavailable("no CLIP with its tokenizer (-m)")
    if not any(c.texts):
        raise Unavailable("generated images without captions")
    artifact, rows, own = c.captions
    all_rows = c.rows(GENERATED, radius, network=c.clip)
    images, captions = FeatureRows(all_rows.artifact, kept=all_rows.kept[rows]), FeatureRows(artifact)
    interval = c.mean(retrieval.cosines(images, captions, own), 4)
    other = retrieval.shuffled(own, c.options.seed)
    wrong = None if other is None else retrieval.clip_score(retrieval.cosines(images, captions, other).mean())
    scores = {name: retrieval.clip_score(value) for name, value in interval.items()}
    name = "CLIP score (100 x cosine, as torchmetrics)"
    return {"name": name, **scores, "shuffled": wrong, "images": len(rows), "features": c.clip.name}


def _retrieval(c: Comparison, radius: float) -> Metric:
    having, own = c.own
    if not having:
        raise Unavailable("no generated image with the id or the caption of a real one")
    generated, real = c.both(radius)
    spare = len(real) - max(map(len, own))
    k = c.options.candidates or min(CANDIDATES, spare + 1)
    if not 2 <= k <= spare + 1:
        raise Unavailable(f"{len(real)} real images to choose {k} among")
    generated = FeatureRows(generated.artifact, kept=generated.kept[having])
    ranks = retrieval.ranks(generated, real, own, k, c.options.seed)
    out: Metric = {f"r{n}": {**c.mean(ranks < n, 5), "chance": n / k} for n in (1, 5) if n < k}
    return {**out, "k": k, "images": len(having)}


METRICS: dict[str, Callable[[Comparison, float], Metric]] = {
    "frechet": _frechet,
    "kernel": _kernel,
    "precision": partial(_manifold, number=0),
    "recall": partial(_manifold, number=1),
    "inception": _inception,
    "clip": _clip,
    "retrieval": _retrieval,
}
