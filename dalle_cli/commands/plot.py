"""`dalle plot`: training curves as a chart."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.options import Force, Out

EXAMPLE = "dalle plot model/prior.safetensors wider/prior.safetensors --keys image_nats,lr -o loss.png"


class Axis(str, Enum):
    """The horizontal axis of a chart."""

    updates = "updates"
    seconds = "seconds"


def run(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN...",
            help="Weights, the .run folder beside them, or a metrics.jsonl; read from the pipe if left out.",
        ),
    ] = None,
    out: Out = None,
    x: Annotated[Axis, typer.Option("--x", metavar="NAME", help="updates or seconds.")] = Axis.updates,
    keys: Annotated[
        str, typer.Option(metavar="NAME,...", help="Metrics of the log, as image_nats,lr; else all that vary.")
    ] = "",
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="A title above the chart.")] = None,
    force: Force = False,
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
