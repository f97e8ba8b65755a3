"""Features of a set of images, computed in one pass and stored as `embeddings` artifacts beside the output.

A pass reads each image once, blurs it with every radius, and runs every network. Features that are there already, of
the same images, networks and settings, are not computed again; a pass that was stopped computes the missing shards.

Shapes: B batch, S side in pixels, N rows, D features, K classes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle_cli import console
from dalle_cli.artifacts import Artifact, ShardWriter, digest_bytes, history, open_artifact
from dalle_cli.data.loader import sequential
from dalle_cli.devices import Arithmetic
from dalle_cli.evaluation.blur import gaussian_blur
from dalle_cli.evaluation.feature_batch import FeatureBatch, Features
from dalle_cli.evaluation.features import ClipFeatures
from dalle_cli.evaluation.image_sets import ImageSet
from dalle_cli.models.pixels import from_uint8
from dalle_cli.paths import skip_list

SHARD = 1024  # rows of each network and radius that are held in memory

Key = tuple[str, float]  # a network's name and a radius


@dataclass(frozen=True)
class FeaturePass:
    """How images are read, and where their features are stored."""

    folder: Path
    networks: Sequence[Features]
    radii: Sequence[float]
    size: int
    machine: Arithmetic
    batch_size: int
    workers: int

    def writer(self, images: ImageSet, network: Features, radius: float) -> ShardWriter:
        """The folder of shards of one set, network and radius."""
        n = len(images.rows)
        options = {"blur": radius, "size": self.size, "dtype": self.machine.name, "pictures": n}
        made = history(
            "evaluate", {"features": network.name, **options}, pictures=images.source, features=network.digest
        )
        folder = self.folder / f"{images.name}-{_file_name(network)}-blur-{radius:g}"
        return ShardWriter(folder, "embeddings", n, SHARD, _config(network), made)


def _config(network: Features) -> dict[str, Any]:
    return {"encoder": network.digest, "width": network.width}


def _file_name(network: Features) -> str:
    return re.sub(r"[^\w.-]", "_", network.name)


def collect(images: ImageSet, run: FeaturePass) -> dict[Key, Artifact]:
    """The features of a set by network and radius.

    Raises:
        DalleError: something else lies where they belong, or no image can be read.
    """
    writers = {(n.name, radius): run.writer(images, n, radius) for n in run.networks for radius in run.radii}
    missing = {key: set(writer.missing()) for key, writer in writers.items()}
    skips, some = skip_list(run.folder.with_name(f"{run.folder.stem}.{images.name}")), next(iter(writers.values()))
    if any(len(shards) < some.total for shards in missing.values()):
        images.images.skipped.load(skips)
    shards = {i: images.rows[slice(*some.bounds(i))].tolist() for i in sorted(set().union(*missing.values()))}
    with console.progress(
        f"features of {images.name} images", sum(map(len, shards.values())), unit="images"
    ) as advance:
        for i, rows in shards.items():
            keys = [key for key in writers if i in missing[key]]
            for key, columns in _shard(images, run, rows, keys, advance).items():
                writers[key].write(i, columns)
            images.images.skipped.write(skips)
    return {key: open_artifact(writer.out, "embeddings") for key, writer in writers.items()}


def _shard(
    images: ImageSet, run: FeaturePass, rows: list[int], keys: Sequence[Key], advance: console.Advance
) -> dict[Key, dict[str, Any]]:
    """The columns of one shard for each key."""
    networks = {network.name: network for network in run.networks}
    found: dict[Key, list[FeatureBatch]] = {key: [FeatureBatch.empty(networks[key[0]])] for key in keys}
    ids: list[str] = []
    for kept, batch in sequential(images.images, run.size, rows, run.batch_size, run.workers):
        pixels = from_uint8(torch.from_numpy(batch).to(run.machine.device))
        ids += [images.images.ids[row] for row in kept.tolist()]
        for radius in dict.fromkeys(radius for _, radius in keys):
            blurred = gaussian_blur(pixels, radius)
            for name in (name for name, other in keys if other == radius):
                found[name, radius].append(networks[name](blurred))
        advance(len(kept))
    columns: dict[Key, dict[str, Any]] = {}
    for key, parts in found.items():
        columns[key] = {"embeddings": np.concatenate([part.features for part in parts]), "ids": ids}
        if networks[key[0]].classes:
            columns[key]["logits"] = np.concatenate([part.logits for part in parts if part.logits is not None])
    return columns


def caption_embeddings(texts: Sequence[str], clip: ClipFeatures, run: FeaturePass) -> Artifact:
    """The embeddings of captions, in the order of `texts`; computed, or found as an earlier run left them.

    Raises:
        DalleError: the tokenizer is not beside the CLIP.
    """
    path = run.folder / f"captions-{_file_name(clip)}.safetensors"
    digest = digest_bytes("\0".join(texts).encode("utf-8", "replace"))
    made = history(
        "evaluate", {"features": clip.name, "dtype": run.machine.name}, captions=digest, features=clip.digest
    )
    writer = ShardWriter(path, "embeddings", len(texts), len(texts), _config(clip), made)
    for shard in writer.missing():
        parts = []
        with console.progress("captions", len(texts), unit="captions") as advance:
            for start in range(0, len(texts), run.batch_size):
                parts.append(clip.captions(texts[start : start + run.batch_size]))
                advance(len(parts[-1]))
        ids = [f"{i:06d}" for i in range(len(texts))]
        writer.write(shard, {"embeddings": np.concatenate(parts), "ids": ids, "text": list(texts)})
    return open_artifact(path, "embeddings")
