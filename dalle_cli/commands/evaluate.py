"""`dalle evaluate`."""

from typing import Annotated

from dalle_cli.evaluation.options import EvaluateOptions
from dalle_cli.options import DeviceOptions, Force, Json, Out, arg

EXAMPLE = """dalle evaluate radish.images.safetensors --reference photos/ --blur 0,1,2,4,8 -o s.json --plot blur.png
dalle evaluate dvae.safetensors --reference photos/ --grid worst.png
dalle evaluate prior.safetensors captions.safetensors codes/ --plot positions.png"""

Inputs = Annotated[
    list[str] | None,
    arg(
        "INPUT...",
        "Images, from `decode` or a data set; or the weights of a dVAE; or a prior, its captions and its codes. Read "
        "from the pipe if left out.",
    ),
]


def run(
    inputs: Inputs = None,
    out: Out = None,
    options: EvaluateOptions = EvaluateOptions(),
    machine: DeviceOptions = DeviceOptions(),
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Score images against real ones, or a dVAE or a prior on data."""
    from dalle_cli import console, paths
    from dalle_cli.evaluation import stage, tables

    given = inputs or [str(paths.given_or_piped(None))]
    target, metrics = stage.evaluate(given, out, options, machine.open(), force)
    if as_json:
        console.emit(stage.as_text(metrics).rstrip("\n"))
    else:
        console.note(tables.rendered(metrics))
        console.result(target)
