"""`dalle score`."""

from typing import Annotated

from dalle_cli.options import BatchSize, DeviceOptions, Force, Json, Model, RowsOut, ShardSize, Workers, arg, opt

EXAMPLE = """dalle score radish.codes.safetensors -m model/
dalle score radish.images.safetensors -m model/ --prompt "a radish" --by contrast --json
dalle score photos/ -m model/ -o photos.scored.safetensors"""

Source = Annotated[
    str | None,
    arg(
        "INPUT",
        "Codes, scored as they are; or images, or a data set with captions, encoded first. Read from the pipe if left "
        "out.",
    ),
]
Prompt = Annotated[str | None, opt("TEXT", "Score against this, not each image's own text.")]
By = Annotated[
    str,
    opt(
        "NAME",
        "prior: log p(codes | caption), in nats of the whole grid. contrast: how much more that is than without the "
        "caption, which guidance sharpens.",
    ),
]


def run(
    source: Source = None,
    out: RowsOut = None,
    model: Model = None,
    prompt: Prompt = None,
    by: By = "prior",
    batch_size: BatchSize = 16,
    shard_size: ShardSize = 4096,
    workers: Workers = 2,
    machine: DeviceOptions = DeviceOptions(),
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Score codes or images by a prior: log p(codes | caption)."""
    from dalle_cli import console, paths
    from dalle_cli.pipelines import scoring

    source = source if source is not None else str(paths.given_or_piped(None))
    target = out or paths.named_after(source, ".scored.safetensors")
    made = scoring.score(
        source, model, target, machine=machine.open(), by=by, prompt=prompt, batch_size=batch_size,
        shard_size=shard_size, workers=workers, force=force, progress=console.progress,
    )  # fmt: skip
    if as_json:
        made.pop("skipped")
        console.emit_json({"stage": "score", "by": by, **made})
    else:
        console.result(target, **{name: made[name] for name in ("images", "mean", "best", "skipped")})
