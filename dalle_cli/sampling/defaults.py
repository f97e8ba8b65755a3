"""Sampling defaults of weights: the table `sampling` in their header says how they are meant to be sampled.

An option that a user gives wins over its entry there; what has no entry has a default in the pipeline.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dalle_cli.artifacts import Artifact
from dalle_cli.diffusion.samplers import SAMPLERS, VARIANCES
from dalle_cli.diffusion.schedules import SPACINGS
from dalle_cli.errors import DalleError


class Rule(NamedTuple):
    """What an entry must be, in words, and the function that returns the value, or None for a wrong one."""

    expected: str
    read: Callable[[Any], Any]


def _whole(least: int) -> Rule:
    return Rule(f"a whole number of at least {least}", lambda x: x if type(x) is int and x >= least else None)


def _number(least: float, most: float = math.inf) -> Rule:
    expected = f"a number of at least {least}" if most == math.inf else f"a number in [{least}, {most}]"

    def read(x: object) -> float | None:
        if isinstance(x, bool) or not isinstance(x, int | float):
            return None
        return float(x) if math.isfinite(x) and least <= x <= most else None

    return Rule(expected, read)


def _among(known: Sequence[str]) -> Rule:
    return Rule(f"one of {', '.join(known)}", lambda x: x if x in known else None)


RULES = {
    "steps": _whole(1),
    "sampler": _among(SAMPLERS),
    "spacing": _among(SPACINGS),
    "variance": _among(VARIANCES),  # of ddpm
    "clip": _number(0),  # x_start is clipped to [-clip, clip]; 0 = not clipped
    "guidance": _number(0),
    "eta": _number(0, 1),
    "best_of": _whole(1),
    "low_noise": _number(0, 1),
    "temperature": _number(0),
    "top_k": _whole(0),
    "top_p": _number(0, 1),
    "sketch_guidance": _number(0),
}
_DIFFUSION = ("steps", "sampler", "spacing", "variance", "clip")
_CATEGORICAL = ("temperature", "top_k", "top_p")
NAMES = {
    "weights.prior.codes": ("guidance", "sketch_guidance", *_CATEGORICAL),
    "weights.prior.embeddings": ("guidance", *_DIFFUSION, "best_of", *_CATEGORICAL),
    "weights.decoder": ("guidance", *_DIFFUSION, "eta"),
    "weights.upsampler": (*_DIFFUSION, "eta", "low_noise"),
}


def sampling_defaults(weights: Artifact) -> dict[str, Any]:
    """The entries of the table `sampling` in a weights file's header; empty without one.

    Raises:
        DalleError: no table, an entry that weights of this kind do not have, or a wrong value.
    """
    return check_sampling_defaults(weights.kind, weights.config.get("sampling", {}), str(weights.path))


def check_sampling_defaults(kind: str, table: Any, where: str) -> dict[str, Any]:
    """The entries of a table for weights of this kind, with whole numbers as float where fractions are allowed.

    Raises:
        DalleError: no table, an entry that weights of this kind do not have, or a wrong value.
    """
    known = NAMES.get(kind, ())
    if not isinstance(table, dict):
        raise DalleError(f"expected a table sampling in the header of {where}, found {table!r}; make it again")
    found: dict[str, Any] = {}
    for name, value in table.items():
        if name not in known:
            names = ", ".join(known) or "nothing"
            raise DalleError(f"expected {names} in the table sampling of {where}, found {name!r}; make it again")
        found[name] = RULES[name].read(value)
        if found[name] is None:
            expected = RULES[name].expected
            raise DalleError(f"expected {expected} for sampling.{name} in {where}, found {value!r}; make it again")
    return found
