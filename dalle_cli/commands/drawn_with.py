"""What codes are drawn with: what was said, and where nothing was, what the prior was made for."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dalle_cli.errors import DalleError

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact


@dataclass(frozen=True)
class Settings:
    """How to draw: all that a drawn grid is a function of, beside weights, prompt and candidate."""

    n: int
    temperature: float
    top_k: int
    top_p: float
    guidance: float
    seed: int
    guidance_from: float = 0.0
    guidance_to: float = 1.0
    sketch_guidance: float | None = None  # of a prior that sketches
    int8: bool = False  # the prior's matrices, by which the likelihoods change a little

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "guidance", "sketch_guidance"):
            if (value := getattr(self, name)) is not None and not math.isfinite(value):
                raise DalleError(f"expected a finite --{name.replace('_', '-')}, found {value}")
        if self.guidance_from > self.guidance_to:
            found = f"{self.guidance_from} and {self.guidance_to}"
            raise DalleError(f"expected --guidance-from no more than --guidance-to, found {found}; exchange them")

    def told(self) -> dict[str, Any]:
        """What a history says of them; of those that are seldom given, only where they are."""
        whole = (self.guidance_from, self.guidance_to) == (0, 1)
        silent = {"guidance_from": whole, "guidance_to": whole, "int8": not self.int8}
        silent["sketch_guidance"] = self.sketch_guidance is None
        return {k: v for k, v in asdict(self).items() if not silent.get(k)}


def made_for(prior: "Artifact", name: str, said: float | None) -> float:
    """A guidance or the temperature to draw with: what was said, else what the prior's training wrote down, else 1.

    Raises:
        DalleError: what was written down is none.
    """
    if said is not None:
        return said
    train = prior.config.get("train")
    found = train.get(name, 1.0) if isinstance(train, dict) else 1.0
    if isinstance(found, bool) or not isinstance(found, int | float) or not found >= 0:
        raise DalleError(
            f"expected train.{name} of at least 0 in {prior.path}, found {found!r}; give --{name.replace('_', '-')}"
        )
    return float(found)


def all_made_for(prior: "Artifact", said: Mapping[str, Any]) -> dict[str, float]:
    """What a prior over codes is drawn with, as `made_for` finds each.

    Raises:
        DalleError: what was written down is none, or a guidance of sketches is said of a prior that draws none.
    """
    names = ["guidance", "temperature"]
    if prior.fact("model", dict).get("sketch"):
        names.append("sketch_guidance")
    elif said.get("sketch_guidance") is not None:
        found = f"found none in {prior.path}"
        raise DalleError(f"expected a prior that sketches for --sketch-guidance, {found}; leave it out")
    return {name: made_for(prior, name, said.get(name)) for name in names}
