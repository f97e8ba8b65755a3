"""Scores of pictures as `evaluate` makes them: time of a Frechet distance, and memory of a pass over many pictures.

B batch, N pictures of a side, S their side in pixels, D features.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from bench.timing import Subject
from dalle_cli.artifacts import ShardWriter
from dalle_cli.artifacts.weights import save_tensors
from dalle_cli.data.skips import SkipLog
from dalle_cli.devices import arithmetic
from dalle_cli.evaluation.cache import FeaturePass, collect
from dalle_cli.evaluation.features import load_features
from dalle_cli.evaluation.frechet import Moments, between
from dalle_cli.evaluation.image_metrics import Comparison, score
from dalle_cli.evaluation.image_sets import GENERATED, REFERENCE, ImageSet, open_image_set
from dalle_cli.evaluation.options import EvaluateOptions
from dalle_cli.evaluation.store import FeatureRows
from dalle_cli.models.clip import CLIP, CLIPConfig
from dalle_cli.models.inception import InceptionV3

# As in the small emoji recipe, but with half of the features, and hardly a text encoder.
CLIP_SIZES: dict[str, Any] = {
    **{"n_proj": 64, "image_size": 64, "patch_size": 8, "vision_width": 128, "vision_layers": 2, "vision_heads": 4},
    **{"n_text_vocab": 2, "n_text": 1, "text_width": 64, "text_layers": 1, "text_heads": 1},
}
BLOCK = 1024  # rows that `evaluate` takes in at a time
WORKERS = 2  # and threads that read pictures, as it has them unless told otherwise


class Made:
    """Images of 8 x 8 random colors, each made when it is read, by its number."""

    def __init__(self, n: int, size: int, seed: int) -> None:
        self.ids = [f"{i:06d}" for i in range(n)]
        self.skipped = SkipLog()
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return len(self.ids)

    def pixels(self, i: int) -> npt.NDArray[np.uint8]:
        """(S, S, 3)."""
        colors = np.random.default_rng([self.seed, i]).integers(0, 256, (8, 8, 3), np.uint8)
        return colors.repeat(self.size // 8, 0).repeat(self.size // 8, 1)

    def read(self, i: int) -> Image.Image:
        """The same as a picture."""
        return Image.fromarray(self.pixels(i))

    def side(self, name: str) -> ImageSet:
        """All of them as one side of a comparison, without captions."""
        return ImageSet(name, self, np.arange(len(self)), {}, f"made by seed {self.seed}")


def inception(path: Path) -> Path:
    """Write an Inception-v3 of random weights that neither fade nor blow up."""
    torch.manual_seed(0)
    network = InceptionV3()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


def ours(pictures: int, batch: int, size: int, width: int) -> Subject:
    """Features and moments of one side, in the pass that `evaluate` makes: read, looked at, kept on disk, taken in."""
    with tempfile.TemporaryDirectory() as folder:
        network = load_features(f"{inception(Path(folder) / 'random.pth')}:{width}", None, arithmetic("cpu", "float32"))
    side = Made(pictures, size, seed=0).side(REFERENCE)

    def run() -> Moments:
        with passing(network, size, batch) as way:
            found = collect(side, way)[network.name, 0.0]
            return Moments.of(FeatureRows(found).blocks(), width)

    return Subject(run, pictures, warmup=1)


@contextmanager
def passing(network: Any, size: int, batch: int) -> Iterator[FeaturePass]:
    """A pass that finds nothing kept, and leaves nothing behind."""
    with tempfile.TemporaryDirectory() as folder:
        machine = arithmetic("cpu", "float32")
        yield FeaturePass(Path(folder) / "made.features", [network], [0.0], size, machine, batch, WORKERS)


def features(rows: int, width: int) -> list[npt.NDArray[np.float32]]:
    """Features of two sides, (N, D) each, of which some depend on others, as those of a network do."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((width, width), np.float32) / width**0.5
    return [np.maximum(rng.standard_normal((rows, width), np.float32) @ mixed + 0.1 * side, 0) for side in range(2)]


def blocks(rows: npt.NDArray[np.float32], size: int = BLOCK) -> Iterator[npt.NDArray[np.float32]]:
    """Rows by the block."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def statistics(rows: int, width: int) -> Subject:
    """The distance of two sides whose features are there: moments of both, and what comes of them."""
    sides = features(rows, width)
    return Subject(lambda: between(*(Moments.of(blocks(side), width) for side in sides)), 2 * rows, warmup=1)


def memory(pictures: int, size: int = 64, batch: int = 64) -> Subject:
    """All that `evaluate` says without captions, once: so many drawn pictures from disk against as many real ones."""
    folder = tempfile.TemporaryDirectory()
    network = load_features(str(clip(Path(folder.name) / "clip.safetensors")), None, arithmetic("cpu", "float32"))
    drawn = store(Made(pictures, size, seed=1), Path(folder.name) / "drawn")

    def run() -> list[dict[str, Any]]:
        with folder, passing(network, size, batch) as way:
            sides = open_image_set(GENERATED, str(drawn)), Made(pictures, size, seed=0).side(REFERENCE)
            return score(Comparison(sides, network, None, way, EvaluateOptions()))[0]

    return Subject(run, 2 * pictures, warmup=0, once=True)


def clip(path: Path) -> Path:
    """Write a small CLIP of random weights."""
    torch.manual_seed(0)
    model = CLIP(CLIPConfig(**CLIP_SIZES))
    config = {"model": asdict(model.config), "train": {}, "tokenizer": ""}
    return save_tensors(path, "weights.clip", model.state_dict(), config, [])


def store(pictures: Made, folder: Path) -> Path:
    """Write pictures as `decode` does, a folder of shards, one after the other."""
    writer = ShardWriter(folder, "images", len(pictures), BLOCK, {"image_size": pictures.size}, [])
    for i in writer.missing():
        rows = range(*writer.bounds(i))
        images = np.stack([pictures.pixels(row).transpose(2, 0, 1) for row in rows])
        writer.write(i, {"images": images, "ids": [pictures.ids[row] for row in rows]})
    return folder
