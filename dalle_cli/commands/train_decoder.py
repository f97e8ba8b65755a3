"""`dalle train-decoder`."""

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.errors import DalleError
from dalle_cli.options import DatasetArg, OutFile, Workers
from dalle_cli.training.options import TrainingOptions

EXAMPLE = """dalle train-decoder photos/ embeddings/ --captions captions.safetensors -o decoder.safetensors
dalle train-decoder photos/ --upsampler 1 --config recipe.toml -o upsampler-1.safetensors"""


def run(
    dataset: DatasetArg,
    out: OutFile,
    options: TrainingOptions = TrainingOptions(),
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
        typer.Option("--upsampler", min=1, max=2, metavar="N", help="Train the recipe's first or second upsampler."),
    ] = None,
    workers: Workers = 2,
) -> None:
    """Train a diffusion decoder of CLIP embeddings, or an upsampler."""
    from dalle_cli import console, training

    more = {"workers": workers, **vars(options)}
    if upsampler is not None:
        if embeddings or captions:
            raise DalleError("expected images alone for an upsampler, found EMBEDDINGS or --captions; leave them out")
        metrics = training.train_upsampler(dataset, upsampler, out, **more)
    elif embeddings is None:
        raise DalleError("expected EMBEDDINGS for a decoder, found none; give them, or --upsampler N")
    else:
        metrics = training.train_decoder(dataset, embeddings, out, captions=captions, **more)
    console.result(out, **metrics)
