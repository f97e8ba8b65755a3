"""`dalle show`."""

from typing import Annotated

import typer

from dalle_cli.options import Columns, Force, ImagesArg, Out, Terminal

EXAMPLE = "dalle show radish.best.safetensors -o radish.png --terminal"

Most = Annotated[int, typer.Option("--most", min=1, metavar="N", help="Show at most N images.")]
Title = Annotated[str | None, typer.Option(metavar="TEXT", help="A line above the grid.")]


def run(
    images: ImagesArg = None,
    out: Out = None,
    columns: Columns = 0,
    most: Most = 256,
    title: Title = None,
    terminal: Terminal = None,
    force: Force = False,
) -> None:
    """Show images as an image grid."""
    from dalle_cli import console, paths
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.errors import DalleError
    from dalle_cli.pipelines import output

    source = paths.given_or_piped(images)
    rows = open_artifact(source, "images")
    if not len(rows):
        raise DalleError(f"expected images to show, found none in {source}")
    target, n = out or paths.beside(source, ".png"), min(most, len(rows))
    pixels, texts = list(rows.array("images")[:n]), list(rows.strings("text" if "text" in rows else "ids")[:n])
    scores = [float(s) for s in rows.array("score")[:n]] if "score" in rows else None
    output.write_grid(target, pixels, texts, scores, columns=columns, title=title, force=force)
    if terminal:
        console.note(output.terminal_preview(pixels, columns))
    console.result(target, images=n, of=len(rows) if n < len(rows) else None)
