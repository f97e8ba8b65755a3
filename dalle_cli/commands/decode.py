"""`dalle decode`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dalle_cli.options import (
    BatchSize,
    Device,
    Dtype,
    Force,
    LatentsArg,
    Model,
    PaintEta,
    PaintGuidance,
    PaintSampler,
    PaintSeed,
    PaintSteps,
    RowsOut,
    ShardSize,
    UpsamplerSteps,
)

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact
    from dalle_cli.commands.painting import Asked
    from dalle_cli.devices import Arithmetic

EXAMPLE = """dalle decode radish.codes.safetensors -m dvae.safetensors -o radish.images.safetensors
dalle decode radish.embeddings.safetensors -m model/ --steps 50 --guidance 2"""


def run(
    latents: LatentsArg = None,
    out: RowsOut = None,
    model: Model = None,
    steps: PaintSteps = None,
    sampler: PaintSampler = None,
    guidance: PaintGuidance = None,
    eta: PaintEta = None,
    upsampler_steps: UpsamplerSteps = None,
    seed: PaintSeed = None,
    batch_size: BatchSize = 64,
    shard_size: ShardSize = 4096,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
) -> None:
    """Decode codes to pictures, or paint CLIP embeddings."""
    import numpy as np

    from dalle_cli import console
    from dalle_cli.artifacts import ShardWriter, open_artifact
    from dalle_cli.commands.painting import Asked
    from dalle_cli.devices import arithmetic
    from dalle_cli.paths import beside, given_or_piped

    source = given_or_piped(latents)
    rows = open_artifact(source, "codes", "embeddings")
    machine = arithmetic(device, dtype)
    asked = Asked(steps, sampler, guidance, eta, upsampler_steps, seed)
    way = of_codes(rows, model, machine, asked) if rows.kind == "codes" else of_embeddings(rows, model, machine, asked)
    target = out or beside(source, ".images.safetensors")
    writer = ShardWriter(target, "images", len(rows), shard_size, {}, way.history, force)
    ids, text = rows.strings("ids"), rows.strings("text") if "text" in rows else None
    with console.progress("decode", len(rows), unit="pictures") as advance:
        for shard in writer.missing():
            start, stop = writer.bounds(shard)
            pixels = np.empty((stop - start, 3, way.side, way.side), dtype=np.uint8)
            for at in range(start, stop, batch_size):
                end = min(at + batch_size, stop)
                pixels[at - start : end - start] = way.decode(at, end)
                advance(end - at)
            columns = {"images": pixels, "ids": ids[start:stop]}
            writer.write(shard, columns if text is None else {**columns, "text": text[start:stop]})
    console.result(target, pictures=len(rows) if writer.wrote else "all there already")


@dataclass(frozen=True)
class Way:
    """How rows become pictures: `decode` takes the first row and the one after the last."""

    side: int
    history: list[dict[str, Any]]
    decode: Callable[[int, int], Any]


def of_codes(codes: "Artifact", model: str | None, machine: "Arithmetic", asked: "Asked") -> Way:
    """By a dVAE."""
    from dalle_cli.artifacts import history
    from dalle_cli.commands import drawing
    from dalle_cli.hub import bundles as bundle

    asked.refuse(codes.path)
    weights = bundle.weights(model, "weights.dvae")
    dvae = drawing.decoder(weights, codes.fact("encoder", str), codes.path, machine)
    grids = codes.array("codes")
    made = history("decode", {"dtype": machine.name}, codes=codes, model=weights)
    return Way(dvae.config.image_size, made, lambda start, stop: drawing.decode(dvae, grids[start:stop], machine))


def of_embeddings(embeddings: "Artifact", model: str | None, machine: "Arithmetic", asked: "Asked") -> Way:
    """By a diffusion decoder, told of the captions too where it reads any and the rows have them."""
    from dalle_cli.artifacts import history
    from dalle_cli.commands.painting import Painter

    painter = Painter(model, asked, machine)
    painter.check(embeddings)
    table = embeddings.array("embeddings")
    texts = embeddings.strings("text") if "text" in embeddings else None
    made = history("decode", painter.options, embeddings=embeddings, **painter.inputs)

    def decode(start: int, stop: int) -> Any:
        captions = None if texts is None else texts[start:stop]
        return painter.paint(table[start:stop], range(start, stop), captions)

    return Way(painter.side, made, decode)
