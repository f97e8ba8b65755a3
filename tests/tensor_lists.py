"""Published tensor lists (tests/importing/keys), and an importer's map applied without its frame."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dalle_cli.importing.publication import From, Shape, Shapes

KEYS = Path(__file__).parent / "importing" / "keys"


def published_shapes(name: str) -> dict[str, Shape]:
    """Names and shapes of every tensor of a published file."""
    rows = (line.split("\t") for line in (KEYS / f"{name}.tsv").read_text().splitlines())
    return {name: tuple(json.loads(shape)) for name, shape in rows}


def n_parameters(shapes: Shapes) -> int:
    """How many numbers these tensors hold."""
    return sum(math.prod(shape) for shape in shapes.values())


def applied(origins: Mapping[str, From], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors made of a publisher's."""
    return {name: origin.build(*(tensors[n] for n in origin.names)) for name, origin in origins.items()}


def check_covers(model: nn.Module, origins: Mapping[str, From], *files: Shapes) -> None:
    """A map makes exactly the model's tensors, of the model's shapes, and uses every tensor of the files.

    The model may be on the meta device, where the builders are run, too.
    """
    shapes = {name: shape for file in files for name, shape in file.items()}
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    made = {name: tuple(tensor.shape) for name, tensor in applied(origins, meta).items()}
    assert made == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name for origin in origins.values() for name in origin.names} == shapes.keys()
