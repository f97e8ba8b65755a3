"""`dalle train-decoder`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact
    from dalle_cli.data.datasets import Dataset
    from dalle_cli.training.config import TrainConfig
    from dalle_cli.training.loop import Task

EXAMPLE = """dalle train-decoder photos/ embeddings/ --captions captions.safetensors -o decoder.safetensors
dalle train-decoder photos/ --upsampler 1 --config recipe.toml -o upsampler-1.safetensors"""


@dataclass(frozen=True)
class Part:
    """What is trained: kind and header of its weights, how to train, the inputs beside the data set, the task."""

    kind: str
    header: dict[str, Any]
    options: "TrainConfig"
    inputs: dict[str, Any]
    build: "Callable[[], Task]"


def run(
    dataset: DatasetArg,
    out: OutFile,
    embeddings: Annotated[
        Path | None,
        typer.Argument(metavar="EMBEDDINGS", help="What `encode-images` wrote with a CLIP; none for an upsampler."),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option("--captions", metavar="FILE", help="What `tokenize` wrote, for a decoder that reads captions."),
    ] = None,
    upsampler: Annotated[
        int | None,
        typer.Option(
            "--upsampler", min=1, max=2, metavar="N", help="Train the recipe's first or second upsampler instead."
        ),
    ] = None,
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
    """Train a diffusion decoder, which paints embeddings, or an upsampler of pictures."""
    from dataclasses import asdict

    from dalle_cli import config as recipes
    from dalle_cli import console
    from dalle_cli.artifacts import history
    from dalle_cli.data.datasets import open_dataset
    from dalle_cli.data.exclude import leave_out, told
    from dalle_cli.data.filters import Filters
    from dalle_cli.devices import arithmetic
    from dalle_cli.errors import DalleError
    from dalle_cli.paths import skip_list
    from dalle_cli.training import warm_start as beginning
    from dalle_cli.training.distributed import joined
    from dalle_cli.training.loop import train
    from dalle_cli.training.run import Run

    if upsampler is not None and (embeddings or captions):
        raise DalleError("expected pictures alone for an upsampler, found EMBEDDINGS or --captions; leave them out")
    table = recipes.read(config, sets)
    (filters,) = recipes.section(table, "data", Filters)
    data = open_dataset(dataset, need_captions=False, filters=filters)
    gone, digest = leave_out(without, data.ids), data.digest
    data = data.without(gone)
    start = beginning.opened(init, f"weights.{'upsampler' if upsampler else 'decoder'}", "train-decoder")
    if upsampler is None:
        part = decoder_of(table, data, embeddings, captions, start, seed, workers)
    else:
        part = upsampler_of(table, f"upsampler_{upsampler}", data, start, seed, workers)
    beginning.check_inputs(start, part.header)
    machine = arithmetic(device, dtype)
    settings: dict[str, Any] = {"seed": seed, "dtype": machine.name, "data": asdict(filters)}
    settings |= {} if upsampler is None else {"upsampler": upsampler}
    made = history("train-decoder", settings, dataset=digest, **part.inputs, **told(gone), **beginning.named(start))
    run_ = Run(out, part.kind, part.header, made, force)
    with joined(machine.device, part.options.timeout) as group:
        figures = train(part.build, part.options, run_, machine, seed, fresh, start)
        group.collect(data.skipped)
    if group.rank == 0:
        data.skipped.write(skip_list(out))
        console.result(out, **figures, skipped=data.skipped.summary() or None)


def decoder_of(
    table: dict[str, Any],
    data: "Dataset",
    embeddings: Path | None,
    captions: Path | None,
    start: "Artifact | None",
    seed: int,
    workers: int,
) -> Part:
    """A decoder of the pictures that have an embedding.

    Raises:
        DalleError: no embeddings, none of these pictures, or settings that they contradict.
    """
    from dataclasses import asdict

    from dalle_cli import config as recipes
    from dalle_cli import console
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.data.conditions import Conditions
    from dalle_cli.devices import rank
    from dalle_cli.errors import DalleError
    from dalle_cli.models.decoder import DecoderConfig
    from dalle_cli.training import warm_start as beginning
    from dalle_cli.training.decoder import DecoderTask, DecoderTrain

    if embeddings is None:
        raise DalleError("expected EMBEDDINGS for a decoder, found none; give them, or --upsampler N")
    inputs = {"embeddings": open_artifact(embeddings, "embeddings")}
    if captions is not None:
        inputs["captions"] = open_artifact(captions, "captions")
    told = Conditions(inputs["embeddings"], inputs.get("captions"))
    known = {"n_embedding": told.width, "n_text": told.n_text, "n_text_vocab": told.n_vocab}
    known = beginning.sizes(start, known, table.get("decoder", {}))
    model, options = recipes.section(table, "decoder", DecoderConfig, known, train=DecoderTrain)
    header = {"model": asdict(model), "train": asdict(options), "encoder": inputs["embeddings"].fact("encoder", str)}
    if captions is not None:
        header["tokenizer"] = inputs["captions"].fact("tokenizer", str)
    if (missing := told.missing(data.ids)) and rank() == 0:
        console.note(f"{len(missing)} of {len(data)} pictures have no embedding and are left out")
    data = data.without(missing)
    return Part(
        "weights.decoder", header, options, inputs, lambda: DecoderTask(model, options, data, told, seed, workers)
    )


def upsampler_of(
    table: dict[str, Any], section: str, data: "Dataset", start: "Artifact | None", seed: int, workers: int
) -> Part:
    """An upsampler by a section of the recipe.

    Raises:
        DalleError: settings that do not go together.
    """
    from dataclasses import asdict

    from dalle_cli import config as recipes
    from dalle_cli.models.upsampler import UpsamplerConfig
    from dalle_cli.training import warm_start as beginning
    from dalle_cli.training.upsampler import UpsamplerTask, UpsamplerTrain

    known = beginning.sizes(start, {}, table.get(section, {}))
    model, options = recipes.section(table, section, UpsamplerConfig, known, train=UpsamplerTrain)
    header = {"model": asdict(model), "train": asdict(options)}
    return Part("weights.upsampler", header, options, {}, lambda: UpsamplerTask(model, options, data, seed, workers))
