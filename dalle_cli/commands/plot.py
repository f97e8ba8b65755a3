"""`dalle plot`: training curves as a chart."""

from enum import Enum
from pathlib import Path
from typing import Annotated

from dalle_cli.options import Force, Out, arg, opt

EXAMPLE = "dalle plot model/prior.safetensors wider/prior.safetensors --keys image_nats,lr -o loss.png"


class Axis(str, Enum):
    """The horizontal axis of a chart."""

    updates = "updates"
    seconds = "seconds"


Runs = Annotated[
    list[Path] | None,
    arg("RUN...", "Weights, the .run folder beside them, or a metrics.jsonl; read from the pipe if left out."),
]
X = Annotated[Axis, opt("NAME", "updates or seconds.", "--x")]
Keys = Annotated[str, opt("NAME,...", "Metrics of the log, as image_nats,lr; else all that vary.")]
Title = Annotated[str | None, opt("TEXT", "A title above the chart.")]


def run(
    runs: Runs = None, out: Out = None, x: X = Axis.updates, keys: Keys = "", title: Title = None, force: Force = False
) -> None:
    """Plot the metrics of training runs, several in one chart."""
    from dalle_cli import console
    from dalle_cli.artifacts.container import replace_file
    from dalle_cli.paths import given_or_piped
    from dalle_cli.viz import charts, curves

    paths = runs or [given_or_piped(None)]
    axis = "step" if x is Axis.updates else "seconds"
    found = curves.read(paths, axis)
    chosen = curves.choose(found, [key.strip() for key in keys.split(",") if key.strip()])
    target = out or curves.target(paths[0])
    charts.check(target, force)
    figure = charts.draw(found, chosen, axis, title)
    replace_file(target, lambda part: charts.save(figure, part, target.suffix))
    console.result(target, runs=len(found), metrics=len(chosen))
