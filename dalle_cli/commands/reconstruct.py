"""`dalle reconstruct`."""

from typing import TYPE_CHECKING, Annotated

import typer

from dalle_cli.commands.exploring import Guidance, KeptImages, PictureArg, SheetOut, Steps, UpsamplerSteps
from dalle_cli.errors import DalleError
from dalle_cli.options import BatchSize, Columns, Device, Dtype, Force, Model, Seed, Terminal

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact

FEWEST, TIMES = 8, 4  # components where nothing was said: 8, 32, 128 and so on, then all
EXAMPLE = "dalle reconstruct radish.png --components 8,32,128 -m model/ -o components.png"


def run(
    picture: PictureArg,
    out: SheetOut = None,
    model: Model = None,
    components: Annotated[
        str | None,
        typer.Option(
            metavar="N,N", help="How many principal components, for each picture of the sheet; else 8, 32, ... and all."
        ),
    ] = None,
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
    """Paint what the first principal components of a picture's CLIP embedding hold."""
    import torch

    from dalle_cli import console
    from dalle_cli.commands import exploring
    from dalle_cli.commands.painting import Asked
    from dalle_cli.devices import arithmetic
    from dalle_cli.hub import bundles as bundle
    from dalle_cli.pipelines import loading as load

    source = exploring.read(picture)
    sheet = exploring.Sheet("reconstruct", [source], out, images, force)
    prior = prior_of(model)
    principal = load.embedding_prior(prior, torch.device("cpu")).principal.float()
    width = len(principal.mean)
    counts = numbers(components, width)
    asked = Asked(steps, None, guidance, None, upsampler_steps, seed)
    explorer = exploring.Explorer(model, asked, arithmetic(device, dtype), batch_size)
    bundle.check_digest("CLIP", explorer.clip.digest, prior.fact("encoder", str), prior.path)
    z = explorer.embed(source)
    rebuilt = torch.cat([principal.rebuild(principal.project(z, count)) for count in counts])
    painted = explorer.paint("reconstruct", rebuilt, [0] * len(counts))
    made = explorer.history("reconstruct", {"components": counts}, {"picture": source.digest, "prior": prior})
    held = principal.spectrum.cumsum(0) / principal.spectrum.sum()
    labels = ["original", *(f"{n} of {width} components, {held[n - 1]:.0%} of variance" for n in counts)]
    sheet.write([explorer.original(source), *painted], labels, made, columns, terminal)
    console.result(sheet.path, components=",".join(map(str, counts)))


def prior_of(model: str | None) -> "Artifact":
    """The prior over embeddings whose principal components are taken.

    Raises:
        DalleError: there is none.
    """
    from dalle_cli.hub import bundles as bundle

    try:
        return bundle.weights(model, "weights.prior.embeddings")
    except DalleError as error:
        raise DalleError(
            f"{error}. Principal components come with a prior over embeddings, of either kind: `dalle train-prior "
            "CAPTIONS EMBEDDINGS` makes one, which is then put into the bundle"
        ) from None


def numbers(components: str | None, width: int) -> list[int]:
    """How many components, each number once.

    Raises:
        DalleError: something else than numbers from 1 to the width of the embeddings.
    """
    if components is None:
        return [*(n for n in (FEWEST * TIMES**i for i in range(width.bit_length())) if n < width), width]
    try:
        found = [int(number) for number in components.split(",")]
    except ValueError:
        raise DalleError(f"expected --components as 8,32,128, found {components!r}") from None
    if not 1 <= min(found) <= max(found) <= width:
        raise DalleError(f"expected --components from 1 to {width}, found {components}; embeddings are {width} wide")
    return list(dict.fromkeys(found))
