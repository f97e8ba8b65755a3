"""`dalle rerank`."""

from typing import Annotated

import typer

from dalle_cli.options import BatchSize, Device, Dtype, Force, ImagesArg, Keep, Model, Out

EXAMPLE = "dalle rerank radish.images.safetensors -m clip.safetensors --keep 8"


def run(
    images: ImagesArg = None,
    out: Out = None,
    model: Model = None,
    keep: Keep = 0,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Score against this instead of each picture's own text.")
    ] = None,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
) -> None:
    """Score pictures against their prompts with CLIP and keep the best."""
    import numpy as np

    from dalle_cli import bundle, console
    from dalle_cli.artifacts import history, open_artifact, write_artifact
    from dalle_cli.artifacts.container import check_replaceable
    from dalle_cli.commands import drawing
    from dalle_cli.devices import arithmetic
    from dalle_cli.errors import DalleError
    from dalle_cli.paths import beside, given_or_piped

    source = given_or_piped(images)
    pictures = open_artifact(source, "images")
    if prompt is None and "text" not in pictures:
        raise DalleError(f"expected images with their prompts, found none in {source}; give --prompt")
    if not len(pictures):
        raise DalleError(f"expected images to rank, found none in {source}")
    texts = [prompt] * len(pictures) if prompt is not None else list(pictures.strings("text"))
    drawing.check_keep(texts, keep)
    target = out or beside(source, ".best.safetensors")
    check_replaceable(target, "images", force)
    weights = bundle.weights(model, "weights.clip")
    machine = arithmetic(device, dtype)
    judge = drawing.Judge(weights, machine)
    pixels, ids = pictures.array("images"), pictures.strings("ids")
    scores = np.empty(len(pictures), dtype=np.float32)
    with console.progress("rerank", len(pictures), unit="pictures") as advance:
        for at in range(0, len(pictures), batch_size):
            rows = slice(at, at + batch_size)
            scores[rows] = judge.score(pixels[rows], texts[rows])
            advance(len(scores[rows]))
    order = drawing.best(scores, texts, keep)
    columns = {
        "images": np.asarray(pixels[order]),
        "score": scores[order],
        "ids": [ids[int(row)] for row in order],
        "text": [texts[int(row)] for row in order],
    }
    made = history("rerank", {"keep": keep, "prompt": prompt, "dtype": machine.name}, images=pictures, model=weights)
    write_artifact(target, "images", columns, {}, made, force)
    console.result(target, kept=len(order), of=len(pictures), best=float(scores.max()), mean=float(scores.mean()))
