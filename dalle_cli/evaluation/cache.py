"""Features of a set of images, computed in one pass and stored as `embeddings` artifacts beside the output.

A pass reads each image once, blurs it with every radius, and runs every network. Features that are there already, of
the same images, networks and settings, are not computed again; a pass that was stopped computes the missing shards.

Shapes: B batch, S side in pixels, N rows, D features, K classes.
"""

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
from dalle_cli.evaluation.features import ClipFeatures, FeatureBatch, Features
from dalle_cli.evaluation.image_sets import ImageSet
from dalle_cli.models.pixels import from_uint8

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
        folder = self.folder / f"{images.name}-{_plain(network.name)}-blur-{radius:g}"
        options = {"blur": radius, "size": self.size, "dtype": self.machine.name, "pictures": len(images.rows)}
        made = history(
            "evaluate", {"features": network.name, **options}, pictures=images.source, features=network.digest
        )
        config = {"encoder": network.digest, "width": network.width}
        return ShardWriter(folder, "embeddings", len(images.rows), SHARD, config, made)

    def skip_list(self, images: ImageSet) -> Path:
        """The list of images of a set that cannot be read, beside the output."""
        return self.folder.with_name(f"{self.folder.name.removesuffix('.features')}.{images.name}.skipped.jsonl")


def collect(images: ImageSet, run: FeaturePass) -> dict[Key, Artifact]:
    """The features of a set by network and radius.

    Raises:
        DalleError: something else lies where they belong, or no image can be read.
    """
    writers = {(n.name, r): run.writer(images, n, r) for n in run.networks for r in run.radii}
    skips = run.skip_list(images)
    if any(writer.has(i) for writer in writers.values() for i in range(writer.total)):
        images.images.skipped.load(skips)
    missing = {key: set(writer.missing()) for key, writer in writers.items()}
    shards, some = sorted(set().union(*missing.values())), next(iter(writers.values()))
    total = sum(len(range(*some.bounds(i))) for i in shards)
    with console.progress(f"features of {images.name} images", total, unit="images") as advance:
        for i in shards:
            keys = [key for key in writers if i in missing[key]]
            for key, columns in _shard(
                images, run, images.rows[slice(*some.bounds(i))].tolist(), keys, advance
            ).items():
                writers[key].write(i, columns)
            images.images.skipped.write(skips)
    return {key: open_artifact(writer.out, "embeddings") for key, writer in writers.items()}


def _shard(
    images: ImageSet, run: FeaturePass, rows: list[int], keys: Sequence[Key], advance: console.Advance
) -> dict[Key, dict[str, Any]]:
    """The columns of one shard for each key."""
    networks = {network.name: network for network in run.networks}
    found: dict[Key, list[FeatureBatch]] = {key: [] for key in keys}
    ids: list[str] = []
    for kept, batch in sequential(images.images, run.size, rows, run.batch_size, run.workers):
        pixels = from_uint8(torch.from_numpy(batch).to(run.machine.device))
        ids += [images.images.ids[row] for row in kept.tolist()]
        for radius in dict.fromkeys(r for _, r in keys):
            blurred = gaussian_blur(pixels, radius)
            for key in (key for key in keys if key[1] == radius):
                found[key].append(networks[key[0]](blurred))
        advance(len(kept))
    columns: dict[Key, dict[str, Any]] = {}
    for key, parts in found.items():
        network = networks[key[0]]
        features = [np.zeros((0, network.width), np.float32), *(part.features for part in parts)]
        columns[key] = {"embeddings": np.concatenate(features), "ids": ids}
        if network.classes:
            logits = [part.logits for part in parts if part.logits is not None]
            columns[key]["logits"] = np.concatenate([np.zeros((0, network.classes), np.float32), *logits])
    return columns


def caption_embeddings(texts: Sequence[str], clip: ClipFeatures, run: FeaturePass) -> Artifact:
    """The embeddings of captions, in the order of `texts`; computed, or found as an earlier run left them.

    Raises:
        DalleError: the tokenizer is not beside the CLIP.
    """
    path = run.folder / f"captions-{_plain(clip.name)}.safetensors"
    digest = digest_bytes("\0".join(texts).encode("utf-8", "replace"))
    options = {"features": clip.name, "dtype": run.machine.name}
    made = history("evaluate", options, captions=digest, features=clip.digest)
    config = {"encoder": clip.digest, "width": clip.width}
    writer = ShardWriter(path, "embeddings", len(texts), len(texts), config, made)
    for shard in writer.missing():
        with console.progress("captions", len(texts), unit="captions") as advance:
            parts = []
            for start in range(0, len(texts), run.batch_size):
                parts.append(clip.captions(texts[start : start + run.batch_size]))
                advance(len(parts[-1]))
        ids = [f"{i:06d}" for i in range(len(texts))]
        writer.write(shard, {"embeddings": np.concatenate(parts), "ids": ids, "text": list(texts)})
    return open_artifact(path, "embeddings")


def _plain(name: str) -> str:
    return "".join(char if char.isalnum() or char in "-._" else "_" for char in name)
