"""`dalle train-clip`."""

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
    TokenizerFile,
    Without,
    Workers,
)

EXAMPLE = "dalle train-clip photos/ -t tokenizer.json --config recipe.toml -o clip.safetensors"


def run(
    dataset: DatasetArg,
    tokenizer: TokenizerFile,
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
    """Train a CLIP, which scores how well a picture fits a caption."""
    from dataclasses import asdict

    from dalle_cli import config as recipes
    from dalle_cli import console
    from dalle_cli.artifacts import history
    from dalle_cli.data import tokenizer as tokenizers
    from dalle_cli.data.datasets import open_dataset
    from dalle_cli.data.exclude import leave_out, told
    from dalle_cli.data.filters import Filters
    from dalle_cli.devices import arithmetic
    from dalle_cli.models.clip import CLIPConfig
    from dalle_cli.paths import skip_list
    from dalle_cli.training import warm_start as beginning
    from dalle_cli.training.clip import CLIPTask, CLIPTrain
    from dalle_cli.training.distributed import joined
    from dalle_cli.training.loop import train
    from dalle_cli.training.run import Run

    bpe = tokenizers.load(tokenizer)
    table = recipes.read(config, sets)
    start = beginning.opened(init, "weights.clip", "train-clip")
    known = beginning.sizes(start, {"n_text_vocab": bpe.vocab_size}, table.get("clip", {}))
    model, options = recipes.section(table, "clip", CLIPConfig, known, train=CLIPTrain)
    (filters,) = recipes.section(table, "data", Filters)
    data = open_dataset(dataset, need_captions=True, filters=filters)
    gone = leave_out(without, data.ids)
    machine = arithmetic(device, dtype)
    header = {"model": asdict(model), "train": asdict(options), "tokenizer": bpe.digest}
    beginning.check_inputs(start, header)
    made = history(
        "train-clip",
        {"seed": seed, "dtype": machine.name, "data": asdict(filters)},
        dataset=data.digest,
        tokenizer=bpe.digest,
        **told(gone),
        **beginning.named(start),
    )
    data = data.without(gone)
    run_ = Run(out, "weights.clip", header, made, force)
    with joined(machine.device, options.timeout) as group:
        figures = train(
            lambda: CLIPTask(model, options, data, bpe, seed, workers), options, run_, machine, seed, fresh, start
        )
        group.collect(data.skipped)
    if group.rank == 0:
        data.skipped.write(skip_list(out))
        console.result(out, **figures, skipped=data.skipped.summary() or None)
