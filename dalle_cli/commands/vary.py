"""`dalle vary`."""

from typing import Annotated

import typer

from dalle_cli.options import EditOptions, ImageArg

EXAMPLE = "dalle vary radish.png -n 8 -m model/ -o variations.png"

Number = Annotated[int, typer.Option("-n", "--samples", min=1, metavar="N", help="How many variations.")]
Eta = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, metavar="X", help="Noise added at each step: 0 gives the image back, 1 varies the most."
    ),
]


def run(image: ImageArg, n: Number = 8, eta: Eta = 1.0, options: EditOptions = EditOptions()) -> None:
    """Sample variations of an image, with the same CLIP embedding."""
    from dalle_cli import console
    from dalle_cli.pipelines import editing

    shown = (console.progress, console.note)
    target, _ = editing.edit_files("vary", [image], options, {"n": n}, *shown, eta=eta)
    console.result(target, variations=n)
