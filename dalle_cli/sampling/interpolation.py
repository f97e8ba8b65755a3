"""Interpolation between vectors: slerp of embeddings and of noise, and text diffs (Ramesh et al. 2022, sec. 3).

Shapes: N points, D width of an embedding; a tensor of any shape (...) is treated as one vector.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dalle_cli.errors import DalleError

PARALLEL = 1e-9  # sine of an angle below which two directions span no plane
SAME = 1e-6  # embeddings whose difference is shorter than this differ by rounding alone


def slerp(a: Tensor, b: Tensor, shares: Sequence[float]) -> Tensor:
    """Spherical interpolation from a (share 0) to b (share 1): (...), (...), N shares -> (N, ...).

    The direction moves evenly along the great circle (Shoemake 1985) and the length changes linearly, so that a point
    between two noises is as long as they are. Opposite directions have many great circles: take the one through the
    axis on which a is smallest.

    Raises:
        DalleError: a vector of length 0, which has no direction.
    """
    first, second = a.double().flatten(), b.double().flatten()
    lengths = first.norm(), second.norm()
    if not min(lengths) > 0:
        raise DalleError("expected two vectors that have a direction, found one of length 0; take others")
    first, second = first / lengths[0], second / lengths[1]
    # from both chords, because the cosine loses the digits of an angle near 0 or 180 degrees
    angle = 2 * torch.atan2((first - second).norm(), (first + second).norm())
    aside = _across(second, first)
    if aside.norm() < PARALLEL:
        axis = torch.zeros_like(first)
        axis[first.abs().argmin()] = 1
        aside = _across(axis, first)
    aside = _across(aside / aside.norm(), first)  # again, because few of its digits may be left
    aside = aside / aside.norm()
    at = torch.tensor(list(shares), dtype=torch.double)[:, None]
    directions = torch.cos(at * angle) * first + torch.sin(at * angle) * aside
    points: Tensor = torch.lerp(lengths[0], lengths[1], at) * directions
    return points.to(a.dtype).view(-1, *a.shape)


def _across(v: Tensor, unit: Tensor) -> Tensor:
    """The component of v orthogonal to a unit vector."""
    return v - (v @ unit) * unit


def text_diff(z_from: Tensor, z_to: Tensor) -> Tensor:
    """z_d, the direction from one caption's embedding to another's: (D,), (D,) -> (D,) of length 1 (sec. 3.3).

    With a `z_from` of zeros there is no baseline, and z_d is the direction of z_to.

    Raises:
        DalleError: the embeddings are equal.
    """
    length = (z_to - z_from).norm()
    if not length > SAME:
        raise DalleError("expected two captions that the CLIP tells apart, found one embedding; say something else")
    direction: Tensor = (z_to - z_from) / length
    return direction


def between(n: int) -> list[float]:
    """n evenly spaced shares between 0 and 1, without both ends."""
    return [i / (n + 1) for i in range(1, n + 1)]


def rising(n: int, most: float) -> list[float]:
    """n evenly spaced shares from 0 to `most`; if n is 1, `most` alone."""
    return [most * i / (n - 1) for i in range(n)] if n > 1 else [most]
