"""Features of both sides, made in one pass over the pictures and kept as `embeddings` artifacts beside the output.

A pass reads each picture once, blurs it to every radius and shows it to every network. What is there already of the
same pictures, networks and settings is not made again; a pass that was stopped goes on with the missing shards.

Shapes: B batch, S side in pixels, N rows, D features, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle_cli import console
from dalle_cli.artifacts import Artifact, ShardWriter, digest_bytes, history, open_artifact, write_artifact
from dalle_cli.artifacts.container import read_header
from dalle_cli.data.loader import sequential
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.evaluation.blur import gaussian_blur
from dalle_cli.evaluation.features import ClipFeatures, Features
from dalle_cli.evaluation.image_sets import Side
from dalle_cli.models.pixels import from_uint8

SHARD = 1024  # rows; what a pass holds of each network and radius


@dataclass(frozen=True)
class Pass:
    """How pictures are read, and where features are kept."""

    folder: Path
    networks: Sequence[Features]
    radii: Sequence[float]
    size: int
    machine: Arithmetic
    batch_size: int
    workers: int

    def path(self, side: Side, network: Features, radius: float) -> Path:
        """The folder of shards of one side."""
        return self.folder / f"{side.name}-{_plain(network.name)}-blur-{radius:g}"


def skip_list(folder: Path, side: Side) -> Path:
    """Where the pictures of a side that cannot be read are listed: beside the output."""
    return folder.with_name(f"{folder.name.removesuffix('.features')}.{side.name}.skipped.jsonl")


def collect(side: Side, run: Pass) -> dict[tuple[str, float], Artifact]:
    """The features of a side by network's name and radius.

    Raises:
        DalleError: something else lies where they belong, or no picture can be read.
    """
    wanted = {(n.name, r): _writer(side, run, n, r) for n in run.networks for r in run.radii}
    skips = skip_list(run.folder, side)
    if any(writer.has(i) for writer in wanted.values() for i in range(writer.total)):
        side.pictures.skipped.load(skips)
    missing = {key: set(writer.missing()) for key, writer in wanted.items()}
    some = next(iter(wanted.values()))
    shards = sorted(set().union(*missing.values()))
    rows = sum(len(range(*some.bounds(i))) for i in shards)
    with console.progress(f"features of {side.name} pictures", rows, unit="pictures") as advance:
        for i in shards:
            due = [key for key in wanted if i in missing[key]]
            for key, columns in _shard(side, run, side.rows[slice(*some.bounds(i))].tolist(), due, advance).items():
                wanted[key].write(i, columns)
            side.pictures.skipped.write(skips)
    return {key: open_artifact(writer.out, "embeddings") for key, writer in wanted.items()}


def _writer(side: Side, run: Pass, network: Features, radius: float) -> ShardWriter:
    options = {"blur": radius, "size": run.size, "dtype": run.machine.name, "pictures": len(side.rows)}
    made = history("evaluate", {"features": network.name, **options}, pictures=side.source, features=network.digest)
    config = {"encoder": network.digest, "width": network.width}
    return ShardWriter(run.path(side, network, radius), "embeddings", len(side.rows), SHARD, config, made)


def _shard(
    side: Side, run: Pass, rows: list[int], due: Sequence[tuple[str, float]], advance: console.Advance
) -> dict[tuple[str, float], dict[str, Any]]:
    """The columns of one shard, for each network and radius that lack it."""
    networks = {network.name: network for network in run.networks}
    features: dict[tuple[str, float], list[Any]] = {
        (n, r): [np.zeros((0, networks[n].width), np.float32)] for n, r in due
    }
    logits: dict[tuple[str, float], list[Any]] = {
        (n, r): [np.zeros((0, networks[n].classes), np.float32)] for n, r in due
    }
    ids: list[str] = []
    for kept, images in sequential(side.pictures, run.size, rows, run.batch_size, run.workers):
        pixels = from_uint8(torch.from_numpy(images).to(run.machine.device))
        ids += [side.pictures.ids[row] for row in kept.tolist()]
        for radius in dict.fromkeys(r for _, r in due):
            blurred = gaussian_blur(pixels, radius)
            for name in (n for n, r in due if r == radius):
                found = networks[name](blurred)
                features[name, radius].append(found.features.astype(np.float32))
                if found.logits is not None:
                    logits[name, radius].append(found.logits.astype(np.float32))
        advance(len(kept))
    columns: dict[tuple[str, float], dict[str, Any]] = {}
    for key in due:
        columns[key] = {"embeddings": np.concatenate(features[key]), "ids": ids}
        if networks[key[0]].classes:
            columns[key]["logits"] = np.concatenate(logits[key])
    return columns


def caption_embeddings(texts: Sequence[str], clip: ClipFeatures, run: Pass) -> Artifact:
    """The captions' embeddings, each caption once, in the order of `texts`; made, or found as they were left.

    Raises:
        DalleError: the tokenizer is not beside the CLIP.
    """
    path = run.folder / f"captions-{_plain(clip.name)}.safetensors"
    digest = digest_bytes("\0".join(texts).encode("utf-8", "replace"))
    made = history(
        "evaluate", {"features": clip.name, "dtype": run.machine.name}, captions=digest, features=clip.digest
    )
    config = {"encoder": clip.digest, "width": clip.width}
    if _is_there(path, config, made):
        return open_artifact(path, "embeddings")
    embedded = np.empty((len(texts), clip.width), np.float32)
    with console.progress("captions", len(texts), unit="captions") as advance:
        for start in range(0, len(texts), run.batch_size):
            lot = texts[start : start + run.batch_size]
            embedded[start : start + len(lot)] = clip.captions(lot)
            advance(len(lot))
    columns = {"embeddings": embedded, "ids": [f"{i:06d}" for i in range(len(texts))], "text": list(texts)}
    write_artifact(path, "embeddings", columns, config, made)
    return open_artifact(path, "embeddings")


def _is_there(path: Path, config: dict[str, Any], made: list[dict[str, Any]]) -> bool:
    try:
        header = read_header(path)
    except DalleError:
        return False
    return (header.kind, header.config, header.history) == ("embeddings", config, made)


def _plain(name: str) -> str:
    return "".join(char if char.isalnum() or char in "-._" else "_" for char in name)
