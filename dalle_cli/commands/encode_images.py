"""`dalle encode-images`."""

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dalle_cli.options import (
    BatchSize,
    DatasetArg,
    Device,
    Dtype,
    Force,
    Model,
    OutRows,
    Recipe,
    Seed,
    Sets,
    ShardSize,
    Workers,
)

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact, ShardWriter
    from dalle_cli.data.skips import SkipLog
    from dalle_cli.devices import Arithmetic
    from dalle_cli.models.dvae import DVAE

WAIT = 7 * 86_400  # seconds that a process which has no shards left waits for those that have
EXAMPLE = """dalle encode-images photos/ -m dvae.safetensors -o codes/
dalle encode-images photos/ -m clip.safetensors -o embeddings/"""


def run(
    dataset: DatasetArg,
    out: OutRows,
    model: Model = None,
    config: Recipe = None,
    sets: Sets = [],
    augment: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="center; a random crop: prior (the paper's for stage two) or dvae; place: shrunk a little, anywhere.",
        ),
    ] = "center",
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Rows per picture, each cropped anew.")] = 1,
    shard_size: ShardSize = 8192,
    batch_size: BatchSize = 64,
    workers: Workers = 2,
    device: Device = "auto",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Encode a data set's pictures: by a dVAE to codes, by a CLIP to embeddings."""
    from contextlib import ExitStack, nullcontext
    from dataclasses import asdict

    import numpy as np

    from dalle_cli import config as recipes
    from dalle_cli import console
    from dalle_cli.artifacts import ShardWriter, history
    from dalle_cli.data.augment import by_name
    from dalle_cli.data.datasets import open_dataset
    from dalle_cli.data.filters import Filters
    from dalle_cli.data.loader import sequential
    from dalle_cli.devices import arithmetic
    from dalle_cli.errors import DalleError
    from dalle_cli.hub import bundles as bundle
    from dalle_cli.training.distributed import joined

    if repeats > 1 and augment == "center":
        raise DalleError(f"expected --augment prior, place or dvae with --repeats {repeats}, found center; pick one")
    (filters,) = recipes.section(recipes.read(config, sets), "data", Filters)
    machine = arithmetic(device, dtype)
    weights = bundle.weights(model, "weights.dvae", "weights.clip")
    encoder = to_codes(weights, machine) if weights.kind == "weights.dvae" else to_embeddings(weights, machine)
    data = open_dataset(dataset, need_captions=False, filters=filters)
    options = {"data": asdict(filters), "augment": augment, "repeats": repeats, "dtype": machine.name}
    options |= {"seed": seed} if augment != "center" else {}
    made = history("encode-images", options, dataset=data.digest, model=weights)
    header = {**encoder.facts, "encoder": weights.digest}
    # Shard by shard, and pass by pass over the data: `repeats` passes, each cropped anew.
    writer = ShardWriter(out, encoder.kind, len(data) * repeats, shard_size, header, made, force)
    crop = by_name(augment)
    written = 0
    with joined(machine.device, WAIT) as group, ExitStack() as stack:
        missing = group.first(lambda: prepare(writer, data.skipped))
        rows_here = -(-len(data) * repeats // group.world)
        bar = console.progress("encode-images", rows_here, unit="pictures") if group.rank == 0 else nullcontext()
        advance = stack.enter_context(bar)
        for shard in missing[group.rank :: group.world]:
            latents, ids = [encoder.none], []
            for rows, draw in passes(*writer.bounds(shard), len(data)):
                for kept, images in sequential(data, encoder.size, rows, batch_size, workers, crop, seed, draw):
                    latents.append(encoder.encode(images))
                    ids += [data.ids[row] for row in kept]
                    if advance:
                        advance(len(images))
            writer.write(shard, {encoder.kind: np.concatenate(latents), "ids": ids})
            data.skipped.write(skipped_by(out, group.rank))
            written += len(ids)
        written = sum(group.gathered(written))
        group.collect(data.skipped)
    if group.rank == 0:
        finish(writer, data.skipped)
        found = {"pictures": written if missing else "all there already", "skipped": data.skipped.summary() or None}
        console.result(out, **found, shards=writer.total)


@dataclass(frozen=True)
class Encoder:
    """What pictures become: the kind of artifact, side of the pictures, what its header says, and no row at all.

    `encode` takes (B, 3, S, S) uint8.
    """

    kind: str
    size: int
    facts: dict[str, Any]
    none: Any
    encode: Callable[[Any], Any]


def to_codes(weights: "Artifact", machine: "Arithmetic") -> Encoder:
    """By a dVAE: (B, H, W)."""
    import numpy as np

    from dalle_cli.models.packed import pack_pointwise
    from dalle_cli.pipelines import loading as load

    dvae = pack_pointwise(load.dvae(weights, machine.device), machine.dtype)
    grid, n_vocab = dvae.config.grid, dvae.config.n_vocab
    small = np.uint16 if n_vocab <= 2**16 else np.int32
    facts, none = {"n_vocab": n_vocab, "grid": grid}, np.zeros((0, grid, grid), small)
    return Encoder("codes", dvae.config.image_size, facts, none, lambda x: encode(dvae, x, machine).astype(small))


def to_embeddings(weights: "Artifact", machine: "Arithmetic") -> Encoder:
    """By a CLIP: (B, D) float32 of length 1."""
    import numpy as np
    import torch
    from torch.nn import functional as F

    from dalle_cli.models.pixels import from_uint8
    from dalle_cli.pipelines import loading as load

    clip = load.clip(weights, machine.device)

    def embed(images: Any) -> Any:
        with torch.inference_mode(), machine.autocast():
            z = clip.encode_image(from_uint8(torch.from_numpy(images).to(machine.device)))
        return F.normalize(z.float(), dim=-1).cpu().numpy()

    none = np.zeros((0, clip.config.n_proj), np.float32)
    return Encoder("embeddings", clip.config.image_size, {}, none, embed)


def skipped_by(out: Path, rank: int) -> Path:
    """Where a process lists the samples that it could not use; the first one's list is that of all in the end."""
    from dalle_cli.paths import skip_list

    return skip_list(out).with_suffix(f".{rank}.jsonl") if rank else skip_list(out)


def lists(out: Path) -> list[Path]:
    """The lists that are there of all processes but the first."""
    name = glob.escape(skipped_by(out, 0).stem)
    return [path for path in out.parent.glob(f"{name}.*.jsonl") if path.suffixes[-2][1:].isdecimal()]


def prepare(writer: "ShardWriter", skipped: "SkipLog") -> list[int]:
    """The shards to write, after what a run of other options left is gone; what earlier runs skipped is known again."""
    if any(map(writer.has, range(writer.total))):
        for path in (skipped_by(writer.out, 0), *lists(writer.out)):
            skipped.load(path)
    return list(writer.missing())


def finish(writer: "ShardWriter", skipped: "SkipLog") -> None:
    """Put the lists of several processes together."""
    if others := lists(writer.out):
        skipped.write(skipped_by(writer.out, 0))
    for path in others:
        path.unlink()


def encode(dvae: "DVAE", images: Any, machine: "Arithmetic") -> Any:
    """(B, 3, S, S) uint8 -> codes (B, H, W)."""
    import torch

    from dalle_cli.models.pixels import from_uint8

    with machine.autocast():
        return dvae.encode(from_uint8(torch.from_numpy(images).to(machine.device))).cpu().numpy()


def passes(start: int, stop: int, n: int) -> list[tuple[range, int]]:
    """Rows `start` to `stop` of several passes over n samples: the rows within each pass, and its number."""
    numbers = range(start // n, -(-stop // n))
    return [(range(max(start - k * n, 0), min(stop - k * n, n)), k) for k in numbers]
