"""`dalle export`."""

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.options import ImagesArg

EXAMPLE = "dalle export radish.best.safetensors -o radish/"

Folder = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FOLDER", help="Where to write; by default named after the input."),
]
Force = Annotated[bool, typer.Option("--force", help="Write into a folder with other files.")]


def run(images: ImagesArg = None, out: Folder = None, force: Force = False) -> None:
    """Write images as PNG files with a manifest, which is a data set again."""
    from dalle_cli import console, paths
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.pipelines import output

    source = paths.given_or_piped(images)
    folder = out or paths.beside(source, "")
    n = output.export(open_artifact(source, "images"), folder, force=force, progress=console.progress)
    console.result(folder, images=n)
