"""`dalle report`: one page of a run, which also says what is missing."""

from pathlib import Path
from typing import Annotated

from dalle_cli.options import OUT, Force, arg, opt

EXAMPLE = "dalle report recipes/emoji/build -o report.html"

Run = Annotated[
    Path | None,
    arg("RUN", "A folder such as a recipe's build/, weights, or a .run folder; read from the pipe if left out."),
]
Page = Annotated[Path | None, opt("FILE", "Where to write; else report.html in the folder, or beside weights.", *OUT)]
Title = Annotated[str | None, opt("TEXT", "The page's heading; else the folder's name.")]


def run(path: Run = None, out: Page = None, title: Title = None, force: Force = False) -> None:
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
    counts = {"artifacts": len(found.items), "trainings": len(found.trainings), "scores": len(found.scores)}
    console.result(target, **counts, left_out=len(found.notes) or None, megabytes=target.stat().st_size / 1e6)
