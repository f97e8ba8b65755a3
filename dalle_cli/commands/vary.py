"""`dalle vary`."""

from typing import Annotated

import typer

from dalle_cli.commands.exploring import Guidance, KeptImages, PictureArg, SheetOut, Steps, UpsamplerSteps
from dalle_cli.options import BatchSize, Columns, Device, Dtype, Force, Model, Seed, Terminal

EXAMPLE = "dalle vary radish.png -n 8 -m model/ -o variations.png"


def run(
    picture: PictureArg,
    out: SheetOut = None,
    model: Model = None,
    n: Annotated[int, typer.Option("-n", "--samples", min=1, metavar="N", help="How many variations.")] = 8,
    eta: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, metavar="X", help="Noise added on the way: 0 gives the picture back, 1 varies the most."
        ),
    ] = 1.0,
    steps: Steps = None,
    guidance: Guidance = 1.0,
    upsampler_steps: UpsamplerSteps = None,
    seed: Seed = 0,
    images: KeptImages = None,
    batch_size: BatchSize = 64,
    columns: Columns = 0,
    terminal: Terminal = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
) -> None:
    """Paint variations of a picture, of the same CLIP embedding."""
    from dalle_cli import console
    from dalle_cli.commands import exploring
    from dalle_cli.commands.painting import Asked
    from dalle_cli.devices import arithmetic

    source = exploring.read(picture)
    sheet = exploring.Sheet("vary", [source], out, images, force)
    asked = Asked(steps, None, guidance, eta, upsampler_steps, seed)
    explorer = exploring.Explorer(model, asked, arithmetic(device, dtype), batch_size)
    z = explorer.embed(source)
    start = explorer.invert(z, source)
    painted = explorer.paint("vary", z.expand(n, -1), range(n), start.expand(n, -1, -1, -1))
    made = explorer.history("vary", {"n": n}, {"picture": source.digest})
    labels = ["original", *(f"variation {k}" for k in range(1, n + 1))]
    sheet.write([explorer.original(source), *painted], labels, made, columns, terminal)
    console.result(sheet.path, variations=n)
