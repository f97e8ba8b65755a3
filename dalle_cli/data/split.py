"""Which images are held out for validation: a hash of the id alone decides, so every stage holds out the same."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def held_out(name: str, share: float) -> bool:
    """Whether the sample with this id belongs to the held-out `share` in [0, 1]."""
    digest = hashlib.sha256(name.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split(ids: Sequence[str], share: float) -> tuple[Ints, Ints]:
    """Rows for training and for validation, each in order: (n_train,), (n_validation,) int64."""
    out = np.array([held_out(name, share) for name in ids], dtype=bool)
    return np.flatnonzero(~out), np.flatnonzero(out)
