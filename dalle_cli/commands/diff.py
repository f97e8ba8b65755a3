"""`dalle diff`."""

from typing import Annotated

import typer

from dalle_cli.options import EditOptions, ImageArg

EXAMPLE = 'dalle diff house.png "a photo of a house" "a photo of a house in snow" -m model/ -o snow.png'

Before = Annotated[str, typer.Argument(metavar="FROM", help='A caption of the image; "" uses the other alone.')]
After = Annotated[str, typer.Argument(metavar="TO", help="A caption of what it shall become.")]
Strength = Annotated[
    float,
    typer.Option(metavar="X", help="How far to turn towards the difference, of 1; the paper's are from 0.25 to 0.5."),
]
Steps = Annotated[int, typer.Option("--steps", min=1, metavar="N", help="How many images, from 0 up to --strength.")]


def run(
    image: ImageArg,
    before: Before,
    after: After,
    strength: Strength = 0.5,
    steps: Steps = 5,
    options: EditOptions = EditOptions(),
) -> None:
    """Sample an image again with the change from one caption to another: a text diff."""
    from dalle_cli import console
    from dalle_cli.pipelines import editing

    editing.check_diff(strength, after)
    arguments = {"before": before, "after": after, "strength": strength, "n": steps}
    shown = (console.progress, console.note)
    target, _ = editing.edit_files("diff", [image], options, arguments, *shown)
    console.result(target, images=steps, strength=strength)
