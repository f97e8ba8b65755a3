"""What no model is shown: combinations withheld by a hash of their names, and those of the prompts of the sheets.

One in ten of (color, thing), of unordered pairs of things, of (worn, thing) and of (walker, walked) never occurs in a
scene to train on. A thing by itself in its own color always does.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import grammar
from grammar import Scene

SHEETS = Path(__file__).parent / "sheets"
ONE_IN = 10
Combination = tuple[str, str, str]


def combinations(scene: Scene, own: Callable[[str], str]) -> Iterator[Combination]:
    """What a scene combines; `own` gives the name of a thing's own color."""
    for item in scene.items:
        if item.color and item.color != own(item.thing):
            yield "color", item.color, item.thing
        if item.worn:
            yield "worn", item.worn, item.thing
    if len(scene.items) == 2:
        a, b = (item.thing for item in scene.items)
        yield "pair", min(a, b), max(a, b)
        if scene.relation == "walks":
            yield "walked", a, b


def by_hash(combination: Combination) -> bool:
    """Whether the names alone withhold it."""
    return int(hashlib.sha256("|".join(combination).encode()).hexdigest(), 16) % ONE_IN == 0


def prompts(name: str) -> tuple[str, ...]:
    """The prompts of a sheet."""
    lines = (SHEETS / f"{name}.txt").read_text("utf-8").splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))


@lru_cache(maxsize=1)
def listed() -> frozenset[Combination]:
    """The combinations of the sheets' prompts, whichever color is a thing's own."""
    found: set[Combination] = set()
    for path in sorted(SHEETS.glob("*.txt")):
        for prompt in prompts(path.stem):
            try:
                found.update(combinations(grammar.parse(prompt), lambda thing: ""))
            except ValueError:
                continue  # what fails is not of the grammar
    return frozenset(found)


@lru_cache(maxsize=1 << 17)
def is_withheld(combination: Combination) -> bool:
    """Whether no scene to train on may combine this."""
    return combination in listed() or by_hash(combination)


def withheld(scene: Scene, own: Callable[[str], str]) -> tuple[Combination, ...]:
    """What of a scene is withheld."""
    return tuple(c for c in combinations(scene, own) if is_withheld(c))
