"""`dalle rerank`."""

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.options import BatchSize, DeviceOptions, Force, ImagesArg, Keep, Model, Out

EXAMPLE = """dalle rerank radish.images.safetensors -m clip.safetensors --keep 8
dalle rerank radish.images.safetensors -m model/ --by prior --keep 8"""

Prompt = Annotated[str | None, typer.Option(metavar="TEXT", help="Score against this, not each image's own text.")]
By = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="clip: cosine of image and caption. prior or contrast: what `score` computes; MODEL must then hold a "
        "prior and its dVAE.",
    ),
]
Codes = Annotated[
    Path | None,
    typer.Option(
        metavar="CODES",
        help="With --by prior or contrast: the codes that the images were decoded from. Without it images are encoded "
        "again, which seldom gives back the codes that were sampled.",
    ),
]


def run(
    images: ImagesArg = None,
    out: Out = None,
    model: Model = None,
    keep: Keep = 0,
    prompt: Prompt = None,
    by: By = "clip",
    codes: Codes = None,
    batch_size: BatchSize = 64,
    machine: DeviceOptions = DeviceOptions(),
    force: Force = False,
) -> None:
    """Score images against their prompts, by CLIP or by a prior, and keep the best."""
    from dalle_cli import console, paths
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.pipelines import stages

    source = paths.given_or_piped(images)
    target = out or paths.beside(source, ".best.safetensors")
    made = stages.rerank(
        open_artifact(source, "images"), model, target, machine=machine.open(), keep=keep, prompt=prompt, by=by,
        codes=codes, batch_size=batch_size, force=force, progress=console.progress,
    )  # fmt: skip
    console.result(target, **made)
