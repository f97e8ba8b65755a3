"""`dalle import`."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = """dalle import hf://kakaobrain/karlo-v1-alpha --dtype bfloat16 -o karlo/
dalle import 1.3B.tar.gz --clip clip-vit-base-patch32/ -o mindalle/"""


def run(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A file, a folder or a tar on this machine, or hf://owner/repo[@revision]."),
    ],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The bundle to write.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="NAME",
            help="Store matrices as bfloat16, float16 or float32; by default as the publisher does.",
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            "--clip", metavar="SOURCE",
            help="The CLIP that ranks images, likewise; by default the one that was published with the model.",
        ),
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option("--prior", metavar="SOURCE", help="A prior to take in the place of the model's own, likewise."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle.")] = False,
) -> None:  # fmt: skip
    """Turn published weights into a bundle like our own, recognized by their files."""
    from dalle_cli import console
    from dalle_cli.importing import known

    folder = known.import_bundle(
        source, out, dtype=dtype, clip=clip, prior=prior, progress=console.progress, force=force
    )
    files = list(folder.iterdir())
    console.result(folder, files=len(files), bytes=f"{sum(path.stat().st_size for path in files):,}")
