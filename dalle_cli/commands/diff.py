"""`dalle diff`."""

from typing import Annotated

import typer

from dalle_cli.commands.exploring import DecoderSteps, Guidance, KeptImages, PictureArg, SheetOut, UpsamplerSteps
from dalle_cli.errors import DalleError
from dalle_cli.options import BatchSize, Columns, Device, Dtype, Force, Model, Seed, Terminal

EXAMPLE = 'dalle diff house.png "a photo of a house" "a photo of a house in snow" -m model/ -o snow.png'


def run(
    picture: PictureArg,
    before: Annotated[
        str, typer.Argument(metavar="FROM", help='A caption of the picture; "" goes by the other alone.')
    ],
    after: Annotated[str, typer.Argument(metavar="TO", help="A caption of what it shall become.")],
    out: SheetOut = None,
    model: Model = None,
    strength: Annotated[
        float,
        typer.Option(metavar="X", help="How far to turn to the difference, of 1; the paper's are from 0.25 to 0.5."),
    ] = 0.5,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="How many pictures, from 0 up to --strength.")] = 5,
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
    """Paint a picture anew with a change that two captions tell: a text diff."""
    import torch

    from dalle_cli import console
    from dalle_cli.commands import exploring
    from dalle_cli.commands.drawing_embeddings import TextEncoder
    from dalle_cli.commands.painting import Asked
    from dalle_cli.devices import arithmetic
    from dalle_cli.sampling.interpolation import rising, slerp, text_diff

    if not 0 <= strength <= 1:
        raise DalleError(f"expected --strength from 0 to 1, found {strength}; the paper's are from 0.25 to 0.5")
    if not after.strip():
        raise DalleError("expected a caption of what the picture shall become, found an empty one; give TO")
    source, machine = exploring.read(picture), arithmetic(device, dtype)
    sheet = exploring.Sheet("diff", [source], out, images, force)
    asked = Asked(decoder_steps, None, guidance, None, upsampler_steps, seed)
    explorer = exploring.Explorer(model, asked, machine, batch_size)
    said = [text for text in (before, after) if text.strip()]
    z_t = torch.from_numpy(TextEncoder(explorer.clip, machine).embed(said))
    z_d = text_diff(z_t[0] if len(said) == 2 else torch.zeros_like(z_t[-1]), z_t[-1])
    z, thetas = explorer.embed(source), rising(steps, strength)
    turned = slerp(z[0], z_d, thetas)
    start = explorer.invert(z, source)
    painted = explorer.paint("diff", turned, [0] * steps, start.expand(steps, -1, -1, -1))
    options = {"from": before, "to": after, "strength": strength, "n": steps}
    made = explorer.history("diff", options, {"picture": source.digest})
    labels = ["original", *(f"theta {theta:.3g}" for theta in thetas)]
    title = " to ".join(f'"{text}"' for text in said)
    sheet.write([explorer.original(source), *painted], labels, made, columns, terminal, title)
    console.result(sheet.path, pictures=steps, strength=strength)
