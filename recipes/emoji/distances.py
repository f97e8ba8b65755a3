"""Which distance tells concepts best, on images that training may see: what `nearest.Space` was chosen by.

Shapes: N concepts, D features.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations

import numpy as np
from nearest import LEAST, Floats, Look, ranks
from prepare import STYLES
from withheld import AMONG, Entry, one_each

CONCEPTS = 400

Form = Callable[[Floats, Floats], Floats]  # features, and those of all images of the style -> features compared

FORMS: dict[str, Form] = {
    "as they are": lambda x, _: x,
    "centered": lambda x, own: x - own.mean(axis=0),
    "centered and scaled": lambda x, own: (x - own.mean(axis=0)) / (own.std(axis=0) + LEAST),
}


def triples(train: Sequence[Entry], seed: int) -> list[dict[str, Entry]]:
    """Concepts that training has in every style, a variant of each."""
    found: dict[str, dict[str, Entry]] = {}
    for entry in one_each(train, seed):
        found.setdefault(entry.base, {})[entry.style] = entry
    return [own for own in found.values() if len(own) == len(STYLES)][:CONCEPTS]


def compare(train: Sequence[Entry], look: Look, seed: int) -> Iterator[tuple[str, str, float, float]]:
    """Form, distance, R@1 and R@5 of finding a concept of one style among 100 of another, over all pairs of styles."""
    concepts = triples(train, seed)
    raw = {style: look([own[style].image for own in concepts]) for style in STYLES}
    for form, made in FORMS.items():
        found = {style: made(x, x) for style, x in raw.items()}
        for distance in ("cosine", "Euclid"):
            hits = np.concatenate([_ranks(found[a], found[b], distance, seed) for a, b in permutations(STYLES, 2)])
            yield form, distance, float((hits < 1).mean()), float((hits < 5).mean())


def _ranks(queries: Floats, truth: Floats, distance: str, seed: int) -> Floats:
    if distance == "cosine":
        queries, truth = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, truth))
    else:  # nearest by distance is largest by q . t - t . t / 2
        queries = np.concatenate([queries, np.ones((len(queries), 1))], axis=1)
        truth = np.concatenate([truth, -(truth**2).sum(axis=1, keepdims=True) / 2], axis=1)
    out = []
    for row in range(len(queries)):
        rest = np.delete(np.arange(len(truth)), row)
        some = np.random.default_rng([seed, row]).choice(rest, min(AMONG - 1, len(rest)), replace=False)
        out.append(ranks(queries[row : row + 1], truth[[row, *some]], [0]))
    return np.concatenate(out).astype(np.float64)
