"""`dalle train-dvae`."""

from dalle_cli.options import (
    DatasetArg,
    Device,
    Dtype,
    Force,
    Fresh,
    Init,
    OutFile,
    Recipe,
    Seed,
    Sets,
    Without,
    Workers,
)

EXAMPLE = "dalle train-dvae photos/ --config recipes/emoji/recipe.toml -o dvae.safetensors"


def run(
    dataset: DatasetArg,
    out: OutFile,
    config: Recipe = None,
    sets: Sets = [],
    init: Init = None,
    without: Without = None,
    seed: Seed = 0,
    workers: Workers = 2,
    device: Device = "auto",
    dtype: Dtype = "auto",
    fresh: Fresh = False,
    force: Force = False,
) -> None:
    """Train a discrete VAE: pictures to codes and back."""
    from dataclasses import asdict

    from dalle_cli import config as recipes
    from dalle_cli import console
    from dalle_cli.artifacts import history
    from dalle_cli.data.datasets import open_dataset
    from dalle_cli.data.exclude import leave_out, told
    from dalle_cli.data.filters import Filters
    from dalle_cli.devices import arithmetic
    from dalle_cli.models.dvae import DVAEConfig
    from dalle_cli.paths import skip_list
    from dalle_cli.training import warm_start as beginning
    from dalle_cli.training.distributed import joined
    from dalle_cli.training.dvae import DVAETask, DVAETrain
    from dalle_cli.training.loop import train
    from dalle_cli.training.run import Run

    table = recipes.read(config, sets)
    start = beginning.opened(init, "weights.dvae", "train-dvae")
    known = beginning.sizes(start, {}, table.get("dvae", {}))
    model, options = recipes.section(table, "dvae", DVAEConfig, known, train=DVAETrain)
    (filters,) = recipes.section(table, "data", Filters)
    data = open_dataset(dataset, need_captions=False, filters=filters)
    gone = leave_out(without, data.ids)
    machine = arithmetic(device, dtype)
    header = {"model": asdict(model), "train": asdict(options)}
    settings = {"seed": seed, "dtype": machine.name, "data": asdict(filters)}
    made = history("train-dvae", settings, dataset=data.digest, **told(gone), **beginning.named(start))
    data = data.without(gone)
    run_ = Run(out, "weights.dvae", header, made, force)
    with joined(machine.device, options.timeout) as group:
        figures = train(
            lambda: DVAETask(model, options, data, seed, workers), options, run_, machine, seed, fresh, start
        )
        group.collect(data.skipped)
    if group.rank == 0:
        data.skipped.write(skip_list(out))
        console.result(out, **figures, skipped=data.skipped.summary() or None)
