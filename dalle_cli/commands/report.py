"""`dalle report`: one page of a run, which also says what is missing."""

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.options import Force

EXAMPLE = "dalle report recipes/emoji/build -o report.html"


def run(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            help="A folder such as a recipe's build/, weights, or a .run folder; read from the pipe if left out.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Where to write; else report.html in the folder, or beside weights."
        ),
    ] = None,
    title: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The page's heading; else the folder's name.")
    ] = None,
    force: Force = False,
) -> None:
    """Write one HTML page about a run: charts, images, metrics, and each artifact's history."""
    from dalle_cli import console
    from dalle_cli.artifacts.container import SHARDS
    from dalle_cli.artifacts.text import write_text
    from dalle_cli.paths import given_or_piped
    from dalle_cli.report import html, page
    from dalle_cli.report.scan import scan

    source = given_or_piped(path)
    if source.is_dir() and source.resolve().suffix != ".run" and not any(source.glob(SHARDS)):
        target = out or source / "report.html"
    else:
        stem = source.name.removesuffix(".safetensors").removesuffix(".run")
        target = out or source.with_name(f"{stem}.report.html")
    html.check_page(target, page.GENERATOR, force)
    found = scan(source)
    write_text(target, page.page(found, title))
    console.result(
        target,
        artifacts=len(found.items),
        trainings=len(found.trainings),
        scores=len(found.scores),
        left_out=len(found.notes) or None,
        megabytes=target.stat().st_size / 1e6,
    )
