"""`dalle train-prior`."""

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.options import OutFile
from dalle_cli.training.options import TrainingOptions

EXAMPLE = """dalle train-prior captions.safetensors codes/ -t tokenizer.json --config recipe.toml -o prior.safetensors
dalle train-prior captions.safetensors embeddings/ --config recipe.toml -o embedding-prior.safetensors"""


def run(
    captions: Annotated[Path, typer.Argument(metavar="CAPTIONS", help="What `tokenize` wrote.")],
    latents: Annotated[Path, typer.Argument(metavar="LATENTS", help="What `encode-images` wrote.")],
    out: OutFile,
    options: TrainingOptions = TrainingOptions(),
    tokenizer: Annotated[
        Path | None,
        typer.Option("-t", "--tokenizer", metavar="FILE", help="For BPE dropout; default: beside -o or CAPTIONS."),
    ] = None,
) -> None:
    """Train a prior over codes, or over CLIP embeddings, given captions."""
    from dalle_cli import console, training

    console.result(out, **training.train_prior(captions, latents, out, tokenizer=tokenizer, **vars(options)))
