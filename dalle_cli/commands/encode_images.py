"""`dalle encode-images`."""

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
    from dalle_cli.devices import Arithmetic
    from dalle_cli.models.dvae import DVAE

EXAMPLE = "dalle encode-images photos/ -m dvae.safetensors -o codes/"


def run(
    dataset: DatasetArg,
    out: OutRows,
    model: Model = None,
    config: Recipe = None,
    sets: Sets = [],
    augment: Annotated[
        str, typer.Option(metavar="NAME", help="center, or a random crop: prior (the paper's for stage two) or dvae.")
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
    """Encode a data set's pictures to dVAE codes."""
    from dataclasses import asdict

    import numpy as np

    from dalle_cli import bundle, console, load
    from dalle_cli import config as recipes
    from dalle_cli.artifacts import ShardWriter, history
    from dalle_cli.data.augment import by_name
    from dalle_cli.data.datasets import open_dataset
    from dalle_cli.data.filters import Filters
    from dalle_cli.data.loader import sequential
    from dalle_cli.devices import arithmetic
    from dalle_cli.errors import DalleError
    from dalle_cli.paths import skip_list

    if repeats > 1 and augment == "center":
        raise DalleError(f"expected --augment prior or dvae with --repeats {repeats}, found center; all would be alike")
    (filters,) = recipes.section(recipes.read(config, sets), "data", Filters)
    weights = bundle.weights(model, "weights.dvae")
    machine = arithmetic(device, dtype)
    dvae = load.dvae(weights, machine.device)
    size, grid, n_vocab = dvae.config.image_size, dvae.config.grid, dvae.config.n_vocab
    data = open_dataset(dataset, need_captions=False, filters=filters)
    options = {"data": asdict(filters), "augment": augment, "repeats": repeats, "dtype": machine.name}
    options |= {"seed": seed} if augment != "center" else {}
    made = history("encode-images", options, dataset=data.digest, model=weights)
    header = {"n_vocab": n_vocab, "grid": grid, "encoder": weights.digest}
    # Shard by shard, and pass by pass over the data: `repeats` passes, each cropped anew.
    writer = ShardWriter(out, "codes", len(data) * repeats, shard_size, header, made, force)
    if any(map(writer.has, range(writer.total))):
        data.skipped.load(skip_list(out))
    small = np.uint16 if n_vocab <= 2**16 else np.int32
    crop = by_name(augment)
    written = 0
    with console.progress("encode-images", len(data) * repeats, unit="pictures") as advance:
        for shard in writer.missing():
            codes, ids = [np.zeros((0, grid, grid), small)], []
            for rows, draw in passes(*writer.bounds(shard), len(data)):
                for kept, images in sequential(data, size, rows, batch_size, workers, crop, seed, draw):
                    codes.append(encode(dvae, images, machine).astype(small))
                    ids += [data.ids[row] for row in kept]
                    advance(len(images))
            writer.write(shard, {"codes": np.concatenate(codes), "ids": ids})
            data.skipped.write(skip_list(out))
            written += len(ids)
    figures = {"pictures": written if writer.wrote else "all there already", "skipped": data.skipped.summary() or None}
    console.result(out, **figures, shards=writer.total)


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
