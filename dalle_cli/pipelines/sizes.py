"""The numbers in a weights file's header, checked before a model of these sizes is built."""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from dalle_cli.artifacts import Artifact
from dalle_cli.errors import DalleError

# The largest that a name may stand for. Widths are bounded by the tensors: each is a side of one.
MOST = {
    "image_size": 1 << 13, "low_size": 1 << 13, "patch_size": 1 << 10, "sketch": 1 << 10, "grid": 1 << 10,
    "n_text": (1 << 16) - 1, "n_timestep": 1 << 16, "conv_kernel": 1 << 10, "fsq_levels": 1 << 16,
    "multipliers": 1 << 8, "attention": 1 << 13,
}  # fmt: skip
# Sizes that repeat a part of a model. Each repetition has its own tensors, so no size exceeds the number of tensors.
DEPTHS = ("n_layer", "n_blk_per_group", "vision_layers", "text_layers", "depth")
DEEPEST = 1 << 10
LONGEST = 64  # entries of a list
ELSE = 1 << 16  # of other names, where the file holds fewer numbers


def check_sizes(weights: Artifact) -> None:
    """Check each number of the model's sizes against what the file holds.

    Raises:
        DalleError: a number that no model of these tensors has.
    """
    stored = weights.headers[0].tensors
    n_tensors, largest = len(stored), max((prod(info.shape) for info in stored.values()), default=0)
    for name, value in _numbers(weights.require("model", dict)):
        if name in DEPTHS:
            if value > min(n_tensors, DEEPEST):
                raise _refused(weights, f"{name} {value} beside {n_tensors} tensors")
        elif not -1 <= value <= MOST.get(name, max(largest, ELSE)):
            raise _refused(weights, f"{name} {value}")


def _numbers(sizes: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The integers of a table and of its lists; a list that is too long counts as its length."""
    for name, value in sizes.items():
        values = value if isinstance(value, list) else [value]
        if len(values) > LONGEST:
            yield name, 1 << 62
        yield from ((name, number) for number in values if isinstance(number, int) and not isinstance(number, bool))


def _refused(weights: Artifact, found: str) -> DalleError:
    return DalleError(
        f"expected the weights that the header describes, found {found[:200]} in {weights.path}; make it again"
    )
