"""`dalle encode-images`."""

from typing import Annotated

import typer

from dalle_cli.options import (
    BatchSize,
    DatasetArg,
    DeviceOptions,
    Force,
    Model,
    OutRows,
    Recipe,
    Seed,
    Sets,
    ShardSize,
    Workers,
)

WAIT = 7 * 86_400  # seconds that a process which has no shards left waits for those that have
EXAMPLE = """dalle encode-images photos/ -m dvae.safetensors -o codes/
dalle encode-images photos/ -m clip.safetensors -o embeddings/"""

Augment = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="center; a random crop: prior (the paper's for stage two) or dvae; place: shrunk a little, anywhere.",
    ),
]
Repeats = Annotated[int, typer.Option(min=1, metavar="N", help="Rows per image, each cropped anew.")]


def run(
    dataset: DatasetArg,
    out: OutRows,
    model: Model = None,
    config: Recipe = None,
    sets: Sets = [],
    augment: Augment = "center",
    repeats: Repeats = 1,
    shard_size: ShardSize = 8192,
    batch_size: BatchSize = 64,
    workers: Workers = 2,
    machine: DeviceOptions = DeviceOptions(),
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Encode a data set's images: with a dVAE to codes, with a CLIP to embeddings."""
    from dalle_cli import config as recipes
    from dalle_cli import console
    from dalle_cli.pipelines import encoding
    from dalle_cli.training.distributed import process_group

    table, opened = recipes.read(config, sets), machine.open()
    with process_group(opened.device, WAIT) as group:
        made = encoding.encode_images(
            dataset, model, out, table, machine=opened, crops=encoding.Crops(augment, repeats, seed),
            shard_size=shard_size, batch_size=batch_size, workers=workers, force=force, group=group,
            progress=console.progress,
        )  # fmt: skip
    if group.rank == 0:
        console.result(out, **made)
