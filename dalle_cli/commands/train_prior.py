"""`dalle train-prior`."""

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.options import Device, Dtype, Force, Fresh, OutFile, Recipe, Seed, Sets, Without

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
    without: Without = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    fresh: Fresh = False,
    force: Force = False,
) -> None:
    """Train a prior over codes, or over CLIP embeddings, given captions."""
    from dataclasses import asdict

    from dalle_cli import bundle, console
    from dalle_cli import config as recipes
    from dalle_cli.artifacts import history, open_artifact
    from dalle_cli.commands import embedding_priors
    from dalle_cli.data import tokenizer as tokenizers
    from dalle_cli.data.pairs import Pairs
    from dalle_cli.data.without import leave_out, told
    from dalle_cli.devices import arithmetic, rank
    from dalle_cli.models.prior import PriorConfig
    from dalle_cli.training.loop import train
    from dalle_cli.training.prior import PriorTask, PriorTrain
    from dalle_cli.training.run import Run

    texts, codes = open_artifact(captions, "captions"), open_artifact(latents, "codes", "embeddings")
    table, machine, pairs = recipes.read(config, sets), arithmetic(device, dtype), Pairs(texts, codes)
    if pairs.unmatched and rank() == 0:
        found = f"{len(pairs)} pictures have captions and {codes.kind}"
        console.note(f"{found}; {pairs.unmatched} have only one and are left out")
    gone = leave_out(without, pairs.ids)
    if codes.kind == "embeddings":
        given = embedding_priors.Inputs(texts, codes, pairs.without(gone), told(gone), out)
        figures = embedding_priors.train_prior(table, given, machine, seed, fresh, force)
        if rank() == 0:
            console.result(out, **figures)
        return
    known = {
        "n_text_vocab": texts.fact("n_vocab", int),
        "n_text": texts.fact("n_text", int),
        "n_image_vocab": codes.fact("n_vocab", int),
        "grid": codes.fact("grid", int),
    }
    read_with, encoder = texts.fact("tokenizer", str), codes.fact("encoder", str)
    model, options = recipes.section(table, "prior", PriorConfig, known, train=PriorTrain)
    bpe = None
    if options.bpe_dropout:
        folders = (out.parent, captions.parent)
        bpe = tokenizers.load(tokenizer or bundle.find_tokenizer(read_with, *folders))
        bundle.check_digest("tokenizer", bpe.digest, read_with, captions)
    header = {"model": asdict(model), "train": asdict(options), "tokenizer": read_with, "encoder": encoder}
    made = history("train-prior", {"seed": seed, "dtype": machine.name}, captions=texts, codes=codes, **told(gone))
    run_ = Run(out, "weights.prior.codes", header, made, force)
    pairs = pairs.without(gone)
    dvae = bundle.find_weights(encoder, out.parent, latents.parent)
    figures = train(lambda: PriorTask(model, options, pairs, bpe, seed, dvae), options, run_, machine, seed, fresh)
    if rank() == 0:
        console.result(out, **figures)
