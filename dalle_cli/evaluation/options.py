"""The options of `dalle evaluate`, which the Python API takes as one object."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from dalle_cli.errors import DalleError
from dalle_cli.options import BatchSize, Exclude, Limit, Model, Seed, Workers, opt

SCORES = ("frechet", "kernel", "precision", "recall", "inception", "clip", "retrieval")
FeaturesFile = Annotated[
    str | None,
    opt(
        "FILE[:OUTPUT]",
        "The network whose features are compared: a CLIP (that of -m if left out), Inception-v3 (.pth), or .onnx.",
    ),
]


@dataclass(frozen=True)
class EvaluateOptions:
    """What is computed and how; images, dVAEs and priors each take a part of these.

    Raises:
        DalleError: a metric that does not exist, or a blur radius that is no number from 0 up.
    """

    reference: Annotated[str | None, opt("DATASET", "Real images: a data set, or an images artifact.")] = None
    model: Model = None
    features: FeaturesFile = None
    blur: Annotated[str, opt("X,X", "Gaussian blur of both sets, radii in pixels (the paper: 0,1,2,4,8).")] = "0"
    scores: Annotated[str, opt("NAME,...", f"Which of {', '.join(SCORES)}; else all that are possible.")] = ""
    candidates: Annotated[
        int | None, opt("N", "Retrieval chooses among N real images (100).", "-k", "--candidates", min=2)
    ] = None
    bootstrap: Annotated[int, opt("N", "Bootstrap replicates of the intervals; 0 = no intervals.", min=0)] = 100
    size: Annotated[int | None, opt("N", "Resize images to this side; else that of the first image.", min=1)] = None
    exclude: Exclude = None
    limit: Limit = None
    plot: Annotated[Path | None, opt("FILE", "Plot metrics by blur, or a prior's loss by position, as PNG.")] = None
    grid: Annotated[Path | None, opt("FILE", "Of a dVAE: an image grid of its worst reconstructions, as PNG.")] = None
    everything: Annotated[bool, opt(None, "Of a prior: use all pairs, not only held-out ones.", "--everything")] = False
    batch_size: BatchSize = 64
    workers: Workers = 2
    seed: Seed = 0

    def __post_init__(self) -> None:
        if unknown := [name for name in self.names if name not in SCORES]:
            raise DalleError(f"expected scores of {', '.join(SCORES)}, found {unknown[0]!r}; correct --scores")
        _ = self.radii

    @property
    def names(self) -> list[str]:
        """The metrics asked for by name; empty for all that are possible."""
        return _split(self.scores)

    @property
    def radii(self) -> list[float]:
        """Radii of blur in pixels, each once."""
        try:
            radii = [float(word) for word in _split(self.blur)]
        except ValueError:
            radii = []
        if not radii or not all(math.isfinite(radius) and radius >= 0 for radius in radii):
            raise DalleError(f"expected radii of blur such as 0,1,2, found {self.blur!r}; correct --blur")
        return list(dict.fromkeys(radii))

    def check_for(self, subject: str, *taken: str) -> None:
        """Raises: DalleError for an option that was given and that `subject` has no use for."""
        special = ("reference", "features", "blur", "scores", "size", "candidates", "plot", "grid", "everything")
        default = replace(self, **{name: getattr(EvaluateOptions, name) for name in special})
        for name in special:
            if name not in taken and getattr(self, name) != getattr(default, name):
                raise DalleError(f"expected no --{name} for {subject}, found it; leave it out")


def _split(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
