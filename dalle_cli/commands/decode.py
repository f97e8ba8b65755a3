"""`dalle decode`."""

from dalle_cli.options import BatchSize, CodesArg, Device, Dtype, Force, Model, RowsOut, ShardSize

EXAMPLE = "dalle decode radish.codes.safetensors -m dvae.safetensors -o radish.images.safetensors"


def run(
    codes: CodesArg = None,
    out: RowsOut = None,
    model: Model = None,
    batch_size: BatchSize = 64,
    shard_size: ShardSize = 4096,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
) -> None:
    """Decode codes to pictures."""
    import numpy as np

    from dalle_cli import bundle, console
    from dalle_cli.artifacts import ShardWriter, history, open_artifact
    from dalle_cli.commands import drawing
    from dalle_cli.devices import arithmetic
    from dalle_cli.paths import beside, given_or_piped

    source = given_or_piped(codes)
    latents = open_artifact(source, "codes")
    weights = bundle.weights(model, "weights.dvae")
    machine = arithmetic(device, dtype)
    dvae = drawing.decoder(weights, latents.fact("encoder", str), source, machine)
    target = out or beside(source, ".images.safetensors")
    made = history("decode", {"dtype": machine.name}, codes=latents, model=weights)
    writer = ShardWriter(target, "images", len(latents), shard_size, {}, made, force)
    grids, ids = latents.array("codes"), latents.strings("ids")
    text = latents.strings("text") if "text" in latents else None
    side = dvae.config.image_size
    with console.progress("decode", len(latents), unit="pictures") as advance:
        for shard in writer.missing():
            start, stop = writer.bounds(shard)
            pixels = np.empty((stop - start, 3, side, side), dtype=np.uint8)
            for at in range(start, stop, batch_size):
                end = min(at + batch_size, stop)
                pixels[at - start : end - start] = drawing.decode(dvae, grids[at:end], machine)
                advance(end - at)
            columns = {"images": pixels, "ids": ids[start:stop]}
            writer.write(shard, columns if text is None else {**columns, "text": text[start:stop]})
    console.result(target, pictures=len(latents) if writer.wrote else "all there already")
