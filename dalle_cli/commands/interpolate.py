"""`dalle interpolate`."""

from typing import Annotated

import typer

from dalle_cli.options import EditOptions, ImageArg

EXAMPLE = "dalle interpolate radish.png dog.png --steps 8 -m model/ -o between.png"

Second = Annotated[str, typer.Argument(metavar="IMAGE", help="Another.")]
Steps = Annotated[int, typer.Option("--steps", min=1, metavar="N", help="How many images between them.")]
Noise = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="slerped: from the noise of one to the other's; or fixed: the same, from the seed."
    ),
]


def run(
    a: ImageArg, b: Second, steps: Steps = 8, noise: Noise = "slerped", options: EditOptions = EditOptions()
) -> None:
    """Sample what lies between two images, from the one's CLIP embedding to the other's."""
    from dalle_cli import console
    from dalle_cli.pipelines import editing

    editing.check_noise(noise)
    shown = (console.progress, console.note)
    target, _ = editing.edit_files("interpolate", [a, b], options, {"n": steps, "noise": noise}, *shown)
    console.result(target, between=steps, noise=noise)
