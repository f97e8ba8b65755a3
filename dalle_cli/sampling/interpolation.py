"""Ways between vectors: slerp of embeddings and of noise, and text diffs (Ramesh et al. 2022, sec. 3.2 and 3.3).

Shapes: N points of a way, D width of an embedding; (...) is any shape, of which all numbers make one vector.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dalle_cli.errors import DalleError

PARALLEL = 1e-9  # sine of an angle below which two directions say nothing of a plane between them
SAME = 1e-6  # length of the difference of two embeddings that differ by rounding alone


def slerp(a: Tensor, b: Tensor, shares: Sequence[float]) -> Tensor:
    """Points on the way from a to b at shares of it, 0 being a and 1 b: (...), (...), N shares -> (N, ...).

    The direction turns evenly along the great circle (Shoemake 1985) and the length changes evenly, so that what lies
    between two noises is as long as they are. Between opposite directions any great circle would do: it is the one
    by the axis that a has least of.

    Raises: DalleError for a vector of length 0, which has no direction.
    """
    first, second = a.double().flatten(), b.double().flatten()
    lengths = first.norm(), second.norm()
    if not min(lengths) > 0:
        raise DalleError("expected two vectors that have a direction, found one of length 0; take others")
    first, second = first / lengths[0], second / lengths[1]
    # by both chords, as the cosine alone knows few digits of an angle near 0 or 180 degrees
    angle = 2 * torch.atan2((first - second).norm(), (first + second).norm())
    aside = _across(second, first)
    if aside.norm() < PARALLEL:
        axis = torch.zeros_like(first)
        axis[first.abs().argmin()] = 1
        aside = _across(axis, first)
    aside = _across(aside / aside.norm(), first)  # once more, as there may be few digits left of it
    aside = aside / aside.norm()
    at = torch.tensor(list(shares), dtype=torch.double)[:, None]
    directions = torch.cos(at * angle) * first + torch.sin(at * angle) * aside
    points: Tensor = torch.lerp(lengths[0], lengths[1], at) * directions
    return points.to(a.dtype).view(-1, *a.shape)


def _across(v: Tensor, unit: Tensor) -> Tensor:
    """What v has at right angles to a unit vector."""
    return v - (v @ unit) * unit


def text_diff(z_from: Tensor, z_to: Tensor) -> Tensor:
    """z_d: where the embedding of one caption lies from that of another, (D,), (D,) -> (D,) of length 1 (sec. 3.3).

    A `z_from` of zeros is no baseline: then z_d is z_to.

    Raises: DalleError where they are the same.
    """
    length = (z_to - z_from).norm()
    if not length > SAME:
        raise DalleError("expected two captions that the CLIP tells apart, found one embedding; say something else")
    direction: Tensor = (z_to - z_from) / length
    return direction


def between(n: int) -> list[float]:
    """Shares of n points that cut a way into equal parts, its ends left out."""
    return [i / (n + 1) for i in range(1, n + 1)]


def rising(n: int, most: float) -> list[float]:
    """n shares from 0 up to the largest, or that alone."""
    return [most * i / (n - 1) for i in range(n)] if n > 1 else [most]
