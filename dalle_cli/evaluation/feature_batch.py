"""What a network makes of images, whichever network it is.

Shapes: B batch, S image side in pixels, D features, K classes.
"""

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

Floats = npt.NDArray[np.float32]


class FeatureBatch(NamedTuple):
    """Features (B, D) of images, and class logits (B, K) if the network has classes."""

    features: Floats
    logits: Floats | None

    @classmethod
    def empty(cls, network: "Features") -> "FeatureBatch":
        """The features of no images."""
        return cls(np.zeros((0, network.width), np.float32), np.zeros((0, network.classes), np.float32))


class Features(Protocol):
    """A network that computes features. Metrics carry its `name`, which holds no path."""

    name: str
    digest: str  # of its file
    width: int  # D
    classes: int  # K; 0 without classes

    def __call__(self, images: Tensor) -> FeatureBatch:
        """(B, 3, S, S) in [0, 1] -> features."""
        ...
