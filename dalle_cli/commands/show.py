"""`dalle show`."""

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.options import Columns, Force, ImagesArg, Out, Terminal

EXAMPLE = "dalle show radish.best.safetensors -o radish.png --terminal"


def run(
    images: ImagesArg = None,
    out: Out = None,
    columns: Columns = 0,
    most: Annotated[int, typer.Option("--most", min=1, metavar="N", help="Draw at most so many pictures.")] = 256,
    n: Annotated[
        int | None, typer.Option("-n", min=1, metavar="N", hidden=True, help="The former name of --most, for recipes.")
    ] = None,
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="A line above the sheet.")] = None,
    terminal: Terminal = False,
    force: Force = False,
) -> None:
    """Draw a contact sheet of pictures."""
    from dalle_cli import console
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.commands import drawing
    from dalle_cli.errors import DalleError
    from dalle_cli.paths import beside, given_or_piped

    source = given_or_piped(images)
    pictures = open_artifact(source, "images")
    if not len(pictures):
        raise DalleError(f"expected images to show, found none in {source}")
    count = min(n or most, len(pictures))
    pixels = list(pictures.array("images")[:count])
    texts = list(pictures.strings("text" if "text" in pictures else "ids")[:count])
    scores = [float(s) for s in pictures.array("score")[:count]] if "score" in pictures else None
    target = drawing.save_sheet(out or beside(Path(source), ".png"), pixels, texts, scores, columns, title, force)
    if terminal:
        drawing.preview(pixels, columns)
    console.result(target, pictures=count, of=len(pictures) if count < len(pictures) else None)
