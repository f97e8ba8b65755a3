"""torchmetrics' Frechet distance, its feature network given as a module: the very one that ours looks with.

B batch, N pictures, S their side in pixels, D features.
"""

import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.scores import Made, blocks, features, inception
from bench.timing import Subject
from dalle_cli.models.inception import InceptionV3


class Looking(nn.Module):
    """As its users give a network of their own: 8-bit pictures (B, 3, S, S) -> features (B, D)."""

    def __init__(self, network: InceptionV3) -> None:
        super().__init__()
        self.network, self.num_features = network.eval(), network.width

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, D) float32."""
        return self.network(images.float() / 255)  # type: ignore[no-any-return]


class Given(nn.Module):
    """Features that are there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, rows: Tensor) -> Tensor:
        """(B, D) -> the same."""
        return rows


def bare_fidelity() -> None:
    """Keep torchmetrics from running torch-fidelity's own __init__, which wants torchvision; nothing of it is used."""
    if "torch_fidelity" in sys.modules or (spec := find_spec("torch_fidelity")) is None:
        return
    package = ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["torch_fidelity"] = package


def metric(network: nn.Module) -> Any:
    """FrechetInceptionDistance over a network's features."""
    bare_fidelity()
    return import_module("torchmetrics.image.fid").FrechetInceptionDistance(feature=network)


def pictures(pictures: int, batch: int, size: int, width: int) -> Subject:
    """Features and moments of one side, looked at by the batch: pixels as they are made, without any file."""
    network = InceptionV3(width)
    with tempfile.TemporaryDirectory() as folder:
        network.load_state_dict(torch.load(inception(Path(folder) / "random.pth"), weights_only=True))
    made = Made(pictures, size, seed=0)

    def run() -> Any:
        found = metric(looking)
        for start in range(0, pictures, batch):
            rows = range(start, min(start + batch, pictures))
            found.update(torch.from_numpy(np.stack([made.pixels(row).transpose(2, 0, 1) for row in rows])), real=True)
        return found

    looking = Looking(network)
    return Subject(run, pictures, warmup=1)


def statistics(rows: int, width: int, block: int) -> Subject:
    """The distance of two sides whose features are there."""
    sides = features(rows, width)

    def run() -> Any:
        found = metric(Given(width))
        for side, real in zip(sides, (False, True), strict=True):
            for part in blocks(side, block):
                found.update(torch.from_numpy(part), real=real)
        return found.compute()

    return Subject(run, 2 * rows, warmup=1)
