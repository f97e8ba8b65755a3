"""`dalle encode-images`."""

from typing import Annotated

import typer

from dalle_cli.options import BatchSize, DatasetArg, Device, Dtype, Force, Model, OutFile, Recipe, Seed, Sets
from dalle_cli.options import ShardSize, Workers

EXAMPLE = "Example: dalle encode-images photos/ -m dvae.safetensors -o codes/"


def run(
    dataset: DatasetArg,
    out: OutFile,
    model: Model = None,
    config: Recipe = None,
    sets: Sets = [],  # noqa: B006
    augment: Annotated[str, typer.Option(help="center, or a random crop: prior (the paper's for stage two) or dvae.")] = (
        "center"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Rows per picture, each cropped anew.")] = 1,
    shard_size: ShardSize = 8192,
    batch_size: BatchSize = 64,
    workers: Workers = 2,
    device: Device = "auto",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Encode a data set's pictures to dVAE codes."""
    import numpy as np
    import torch

    from dalle_cli import bundle, console
    from dalle_cli import config as recipes
    from dalle_cli.artifacts import ShardWriter, history
    from dalle_cli.data.augment import by_name
    from dalle_cli.data.datasets import open_dataset
    from dalle_cli.data.filters import Filters
    from dalle_cli.data.loader import sequential
    from dalle_cli.devices import autocast, select_device, select_dtype
    from dalle_cli.errors import DalleError
    from dalle_cli import load
    from dalle_cli.models.pixels import from_uint8
    from dalle_cli.paths import skip_list

    if repeats > 1 and augment == "center":
        raise DalleError(f"expected --augment prior or dvae with --repeats {repeats}, found center; all would be alike")
    (filters,) = recipes.section(recipes.read(config, sets), "data", Filters)
    weights = bundle.weights(model, "weights.dvae")
    where = select_device(device)
    arithmetic = select_dtype(dtype, where)
    dvae = load.dvae(weights, where)
    data = open_dataset(dataset, need_captions=False, filters=filters)
    options = {"augment": augment, "repeats": repeats, "dtype": str(arithmetic).removeprefix("torch.")}
    options |= {"seed": seed} if augment != "center" else {}
    made = history("encode-images", options, dataset=data.digest, model=weights)
    header = {"n_vocab": dvae.config.n_vocab, "grid": dvae.config.grid, "encoder": weights.digest}
    # Shard by shard, and pass by pass over the data: `repeats` passes, each cropped anew.
    writer = ShardWriter(out, "codes", len(data) * repeats, shard_size, header, made, force)
    data.skipped.load(skip_list(out))
    small = np.uint16 if dvae.config.n_vocab <= 2**16 else np.int32
    crop = by_name(augment)
    written = 0
    with console.progress("encode-images", len(data) * repeats, unit="pictures") as advance:
        for shard in writer.missing():
            codes, ids = [np.zeros((0, dvae.config.grid, dvae.config.grid), small)], []
            for rows, draw in passes(*writer.bounds(shard), len(data)):
                reader = sequential(data, dvae.config.image_size, rows, batch_size, workers, crop, seed, draw)
                for kept, images in reader:
                    with autocast(where, arithmetic):
                        found = dvae.encode(from_uint8(torch.from_numpy(images).to(where)))
                    codes.append(found.cpu().numpy().astype(small))
                    ids += [data.ids[row] for row in kept]
                    advance(len(images))
            writer.write(shard, {"codes": np.concatenate(codes), "ids": ids})
            data.skipped.write(skip_list(out))
            written += len(ids)
    found_before = None if written else "all there already"
    console.result(out, pictures=written or found_before, shards=writer.total, skipped=data.skipped.summary() or None)


def passes(start: int, stop: int, n: int) -> list[tuple[range, int]]:
    """Rows `start` to `stop` of several passes over n samples: the rows within each pass, and its number."""
    numbers = range(start // n, -(-stop // n))
    return [(range(max(start - k * n, 0), min(stop - k * n, n)), k) for k in numbers]
