"""`dalle train-prior`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dalle_cli.options import Device, Dtype, Force, Fresh, Init, OutFile, Recipe, Seed, Sets, Without

if TYPE_CHECKING:
    from dalle_cli.commands.embedding_priors import Inputs
    from dalle_cli.devices import Arithmetic

EXAMPLE = """dalle train-prior captions.safetensors codes/ -t tokenizer.json --config recipe.toml -o prior.safetensors
dalle train-prior captions.safetensors embeddings/ --config recipe.toml -o embedding-prior.safetensors"""


def run(
    captions: Annotated[Path, typer.Argument(metavar="CAPTIONS", help="What `tokenize` wrote.")],
    latents: Annotated[Path, typer.Argument(metavar="LATENTS", help="What `encode-images` wrote.")],
    out: OutFile,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "-t", "--tokenizer", metavar="FILE", help="For BPE dropout; looked for beside -o and CAPTIONS if left out."
        ),
    ] = None,
    config: Recipe = None,
    sets: Sets = [],
    init: Init = None,
    without: Without = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    fresh: Fresh = False,
    force: Force = False,
) -> None:
    """Train a prior over codes, or over CLIP embeddings, given captions."""
    from dalle_cli import config as recipes
    from dalle_cli import console
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.commands import embedding_priors
    from dalle_cli.data.exclude import leave_out, told
    from dalle_cli.data.pairs import Pairs
    from dalle_cli.devices import arithmetic, rank

    texts, found = open_artifact(captions, "captions"), open_artifact(latents, "codes", "embeddings")
    pairs, table, machine = Pairs(texts, found), recipes.read(config, sets), arithmetic(device, dtype)
    gone = leave_out(without, pairs.ids)
    if pairs.unmatched and rank() == 0:
        both = f"{len(pairs)} pictures have captions and {found.kind}"
        console.note(f"{both}; {pairs.unmatched} have only one and are left out")
    given = embedding_priors.Inputs(texts, found, pairs.without(gone), told(gone), out, init)
    if found.kind == "embeddings":
        figures = embedding_priors.train_prior(table, given, machine, seed, fresh, force)
    else:
        figures = over_codes(table, given, tokenizer, machine, seed, fresh, force)
    if rank() == 0:
        console.result(out, **figures)


def over_codes(
    table: dict[str, Any], given: "Inputs", tokenizer: Path | None, machine: "Arithmetic", seed: int, fresh: bool,
    force: bool,
) -> dict[str, float]:  # fmt: skip
    """Train a prior over codes; the last validation's figures.

    Raises:
        DalleError: a recipe that does not fit the inputs, no tokenizer for BPE dropout, and as `training.loop.train`.
    """
    from dataclasses import asdict

    from dalle_cli import config as recipes
    from dalle_cli.artifacts import history
    from dalle_cli.data import tokenizer as tokenizers
    from dalle_cli.errors import DalleError
    from dalle_cli.hub import bundles as bundle
    from dalle_cli.models.prior import PriorConfig
    from dalle_cli.training import warm_start as beginning
    from dalle_cli.training.loop import train
    from dalle_cli.training.prior import PriorTask, PriorTrain
    from dalle_cli.training.run import Run

    texts, codes, pairs, out = given.captions, given.latents, given.pairs, given.out
    known = {
        "n_text_vocab": texts.fact("n_vocab", int),
        "n_text": texts.fact("n_text", int),
        "n_image_vocab": codes.fact("n_vocab", int),
        "grid": codes.fact("grid", int),
    }
    start = beginning.opened(given.init, "weights.prior.codes", "train-prior")
    known = beginning.sizes(start, known, table.get("prior", {}))
    read_with, encoder = texts.fact("tokenizer", str), codes.fact("encoder", str)
    model, options = recipes.section(table, "prior", PriorConfig, known, train=PriorTrain)
    if model.sketch and options.sketch_redrawn and not beginning.gives(start, "sketch.", model.sketch_width):
        due = f"--init with a sketch of width {model.sketch_width} for prior.train.sketch_redrawn"
        raise DalleError(f"expected {due}, found none; train it first, by prior.train.sketch_only")
    bpe = None
    if options.bpe_dropout:
        bpe = tokenizers.load(tokenizer or bundle.find_tokenizer(read_with, out.parent, texts.path.parent))
        bundle.check_digest("tokenizer", bpe.digest, read_with, texts.path)
    header = {"model": asdict(model), "train": asdict(options), "tokenizer": read_with, "encoder": encoder}
    beginning.check_inputs(start, header)
    told = {"seed": seed, "dtype": machine.name}
    made = history("train-prior", told, captions=texts, codes=codes, **given.gone, **beginning.named(start))
    run_ = Run(out, "weights.prior.codes", header, made, force)
    dvae = bundle.find_weights(encoder, out.parent, codes.path.parent)
    return train(lambda: PriorTask(model, options, pairs, bpe, seed, dvae), options, run_, machine, seed, fresh, start)
