"""`dalle interpolate`."""

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.commands.exploring import DecoderSteps, Guidance, KeptImages, SheetOut, UpsamplerSteps
from dalle_cli.errors import DalleError
from dalle_cli.options import BatchSize, Columns, Device, Dtype, Force, Model, Seed, Terminal

NOISES = ("slerped", "fixed")
EXAMPLE = "dalle interpolate radish.png dog.png --steps 8 -m model/ -o between.png"


def run(
    a: Annotated[str, typer.Argument(metavar="A", help="An image: PNG, JPEG, WebP or BMP. Its middle square counts.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    out: SheetOut = None,
    model: Model = None,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="How many pictures between them.")] = 8,
    noise: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="slerped: from A's own noise to B's; or fixed: one for all, a function of the seed."
        ),
    ] = "slerped",
    decoder_steps: DecoderSteps = None,
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
    """Paint what lies between two pictures, from the one's CLIP embedding to the other's."""
    from dalle_cli import console
    from dalle_cli.commands import exploring
    from dalle_cli.commands.painting import Asked
    from dalle_cli.devices import arithmetic
    from dalle_cli.sampling.interpolation import between, slerp

    if noise not in NOISES:
        raise DalleError(f"expected --noise {' or '.join(NOISES)}, found {noise!r}; take one of them")
    sources = [exploring.read(a, "A"), exploring.read(b, "B")]
    sheet = exploring.Sheet("interpolate", sources, out, images, force)
    asked = Asked(decoder_steps, None, guidance, None, upsampler_steps, seed)
    explorer = exploring.Explorer(model, asked, arithmetic(device, dtype), batch_size)
    shares, z = between(steps), explorer.embed(*sources)
    start = None
    if noise == "slerped":
        own = explorer.invert(z, *sources)
        start = slerp(own[0], own[1], shares)
    painted = explorer.paint("interpolate", slerp(z[0], z[1], shares), [0] * steps, start)
    digests = {"a": sources[0].digest, "b": sources[1].digest}
    made = explorer.history("interpolate", {"n": steps, "noise": noise}, digests)
    labels = [f"A: {Path(a).name}", *(f"{share:.3g}" for share in shares), f"B: {Path(b).name}"]
    first, last = map(explorer.original, sources)
    sheet.write([first, *painted, last], labels, made, columns, terminal)
    console.result(sheet.path, between=steps, noise=noise)
