"""`dalle reconstruct`."""

from typing import Annotated

import typer

from dalle_cli.options import EditOptions, ImageArg

EXAMPLE = "dalle reconstruct radish.png --components 8,32,128 -m model/ -o components.png"

Components = Annotated[
    str | None,
    typer.Option(
        metavar="N,N", help="How many principal components, for each image of the grid; else 8, 32, ... and all."
    ),
]


def run(image: ImageArg, components: Components = None, options: EditOptions = EditOptions()) -> None:
    """Sample what the first principal components of an image's CLIP embedding hold."""
    from dalle_cli import console
    from dalle_cli.pipelines import editing

    counts = editing.parse_components(components)
    editing.find_embedding_prior(options.model)
    shown = (console.progress, console.note)
    target, edited = editing.edit_files("reconstruct", [image], options, {"components": counts}, *shown)
    counts_text = ",".join(map(str, edited.history[-1]["options"]["components"]))
    console.result(target, components=counts_text)
