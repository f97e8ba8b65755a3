"""`dalle plan`: whether a recipe's models fit on a device, and how long training takes; or sampling with a bundle."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dalle_cli.options import Json, Sets

if TYPE_CHECKING:
    from dalle_cli.planning.hardware import Hardware, Rate
    from dalle_cli.planning.plan import Memory, ModelPlan

PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
MEMORY = {  # field of a Memory -> label in the table
    "weights": "weights",
    "gradients": "gradients",
    "moments": "optimizer",
    "average": "average",
    "copies": "16-bit weights",
    "activations": "activations",
}
FIRST = ("dvae", "clip", "prior")  # the models of DALL-E
COLUMNS, WIDTH = 6, 140  # of a table, models and characters
UNITS = (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("min", 60))
EXAMPLE = """dalle plan recipes/paper/recipe.toml --device v100-16gb --devices 1024 --pairs 250000000
dalle plan emoji -n 16"""


def run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe's TOML, to train; or a bundle, to sample with.")
    ],
    sets: Sets = [],
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="auto, cpu, cuda, mps: this machine; or a data sheet: t4, a100-80gb, h100, ..."
        ),
    ] = "auto",
    devices: Annotated[int, typer.Option(min=1, metavar="N", help="Number of devices.")] = 1,
    rate: Annotated[
        float | None,
        typer.Option(min=1.0, metavar="FLOPS", help="Operations a second that one device reaches in training."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the rate by updates of the models on this machine.")
    ] = False,
    pairs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Also show epochs, and bytes of so many captions, codes and embeddings."),
    ] = None,
    n: Annotated[int, typer.Option("-n", "--samples", min=1, metavar="N", help="Of a bundle: candidates.")] = 1,
    keep: Annotated[int, typer.Option(min=1, metavar="N", help="Of a bundle: images to enlarge.")] = 1,
    as_json: Json = False,
) -> None:
    """Estimate memory and time of a recipe's training on a machine, or of sampling with a bundle."""
    from dataclasses import asdict

    from dalle_cli import config, console
    from dalle_cli.planning import hardware, plan
    from dalle_cli.planning.workload import Workload, workloads

    path = Path(recipe)
    if path.suffix == ".safetensors" or (path.suffix != ".toml" and not path.is_file()):
        _sampling(recipe, n, min(keep, n), device, rate, as_json)
        return
    table = config.read(path, sets)
    models, found = workloads(table), hardware.find(device)
    _check_rate(rate, measure, found)

    def speed(workload: Workload, flops: int, fits: bool) -> "Rate | None":
        if rate is not None:
            return hardware.Rate(rate, "as stated")
        return hardware.measured_rate(workload, device, flops, fits) if measure else hardware.assumed_rate(found)

    plans: list[ModelPlan] = []
    with console.progress("plan", len(models), unit="models") as advance:
        for model in models:
            plans.append(plan.plan(model, found, devices, lambda flops, fits, model=model: speed(model, flops, fits)))  # type: ignore[misc]
            advance()
    stored = plan.stored_bytes(table, pairs) if pairs else {}
    if as_json:
        about = {"name": found.name, "memory": found.memory, "count": devices, "arithmetic": found.half}
        epochs = {p.name: p.updates * p.batch / pairs for p in plans} if pairs else {}
        whole = {"device": about, "models": {p.name: asdict(p) for p in plans}, "data": stored, "epochs": epochs}
        console.emit_json(whole)
    else:
        console.emit(_page(plans, found, devices, pairs, stored))


def _sampling(model: str, n: int, keep: int, device: str, rate: float | None, as_json: bool) -> None:
    """Print what sampling takes, a line for each model of the bundle."""
    from dataclasses import asdict

    from dalle_cli import console
    from dalle_cli.planning.plan import size
    from dalle_cli.planning.sampling import plan_sampling

    plans = plan_sampling(model, n, keep, device, rate)
    if as_json:
        console.emit_json({"models": {p.name: asdict(p) for p in plans}})
        return
    rows = [("", "calls", "weights", "activations", "arithmetic", "time")]
    for p in plans:
        sizes = size(p.weights), size(p.activations), _short(p.flops, " FLOP")
        rows.append((p.name, f"{p.calls:,}", *sizes, _time(p.seconds)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        console.emit("   ".join([first.ljust(widths[0]), *cells]))
    memory = sum(p.weights for p in plans) + max(p.activations for p in plans)
    console.emit(f"together: {size(memory)}, {_time(sum(p.seconds for p in plans))}")


def _check_rate(rate: float | None, measure: bool, device: "Hardware") -> None:
    from dalle_cli.errors import DalleError

    if rate is not None and not math.isfinite(rate):
        raise DalleError(f"expected a finite --rate, found {rate}; give operations a second")
    if rate is not None and measure:
        raise DalleError("expected --rate or --measure, found both; leave one out")
    if measure and device.peak is not None:
        raise DalleError(f"expected --measure for this machine, found --device {device.name}; leave one out")


def _page(plans: list["ModelPlan"], device: "Hardware", devices: int, pairs: int | None, stored: dict[str, int]) -> str:
    """A column for each model, then the verdicts, then what was assumed; in color on a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dalle_cli.planning.plan import size

    terminal = Console().is_terminal
    page = Console(width=WIDTH, force_terminal=terminal, color_system="auto" if terminal else None)
    first = [p for p in plans if p.name in FIRST]
    with page.capture() as captured:
        for columns in [plans] if len(plans) <= COLUMNS else [first, [p for p in plans if p not in first]]:
            grid = Table.grid(padding=(0, 3))
            grid.add_column()
            for _ in columns:
                grid.add_column(justify="right")
            for title, cells in _rows(columns, devices, pairs):
                style = "" if title.startswith(" ") else "bold"
                grid.add_row(Text(title, style=style), *(Text(cell, style=style) for cell in cells))
            page.print(grid, "")
        lines = [Text(f"{p.name} {p.verdict}", style="green" if p.fits else "red") for p in plans]
        if stored:
            parts = ", ".join(f"{name} {size(n)}" for name, n in stored.items())
            lines.append(Text(f"{pairs:,} pairs: {parts}, and ids and text"))
        for line in [*lines, *(Text(note, style="dim") for note in _notes(plans, device))]:
            page.print(line, soft_wrap=True)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def _rows(plans: list["ModelPlan"], devices: int, pairs: int | None) -> list[tuple[str, list[str]]]:
    """The table's lines; a title begins at the margin."""
    from dalle_cli.planning.plan import size

    rows: list[tuple[str, list[str]]] = []

    def row(title: str, cell: "Callable[[ModelPlan], str]") -> None:
        rows.append((title, [cell(p) for p in plans]))

    def memory(title: str, of: "Callable[[ModelPlan], Memory]") -> None:
        row(title, lambda p: size(of(p).peak))
        for name, label in MEMORY.items():
            row(f"  {label}", lambda p, name=name: size(getattr(of(p), name)))  # type: ignore[misc]

    row("", lambda p: p.name)
    row("parameters", lambda p: _short(sum(p.parameters.values())))
    for part in dict.fromkeys(part for p in plans for part in p.parameters):
        row(f"  {part}", lambda p, part=part: _short(p.parameters[part]) if part in p.parameters else "")  # type: ignore[misc]
    row("batch", lambda p: f"{p.batch:,}")
    row("updates", lambda p: f"{p.updates:,}")
    if pairs:
        row("epochs", lambda p: f"{p.updates * p.batch / pairs:.3g}")
    memory("peak memory on one device", lambda p: p.alone)
    if devices > 1:
        memory(f"sharded, on each of {devices:,}", lambda p: p.sharded or p.alone)
        row(f"replicated, on each of {devices:,}", lambda p: size((p.replicated or p.alone).peak))
    row("arithmetic of an update", lambda p: _short(p.flops, " FLOP"))
    row("of all updates", lambda p: _short(p.flops * p.updates, " FLOP"))
    if any(p.seconds for p in plans):
        row("rate", lambda p: _short(p.rate.flops * devices, " FLOP/s") if p.rate else "")
        row("time", lambda p: _time(p.seconds) if p.seconds else "")
    return rows


def _notes(plans: list["ModelPlan"], device: "Hardware") -> list[str]:
    """Where the numbers come from, and what they leave out."""
    from dalle_cli.planning.plan import slack

    sources = {p.rate.source for p in plans if p.rate}
    if len(sources) > 1:
        notes = ["rate of one device: " + "; ".join(f"{p.name} {p.rate.source}" for p in plans if p.rate)]
    elif sources:
        notes = [f"rate of one device: {sources.pop()}"]
    else:
        notes = ["for the time, give --rate, --measure or the --device of a data sheet"]
    if plans[0].rate:
        notes.append("time: updates alone; validation, reading and communication come on top")
    notes.append(f"memory: an update on fake tensors, and {slack(device):.0%} of the activations for the allocator")
    if device.half == "float16":
        notes.append(f"{device.name} has no bfloat16: train with --dtype float16")
    return notes


def _short(value: float, unit: str = "") -> str:
    """12_345_678 -> 12.3M, and with a unit 12.3 MFLOP."""
    power = 0
    while value >= 999.5 and power < len(PREFIXES) - 1:
        value, power = value / 1000, power + 1
    letter = PREFIXES[power].replace("G", "G" if unit else "B")
    number = f"{value:.0f}" if value >= 100 or (power == 0 and value == int(value)) else f"{value:.3g}"
    return f"{number} {letter}{unit.strip()}" if unit else f"{number}{letter}"


def _time(seconds: float) -> str:
    for unit, length in UNITS:
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}" if seconds < 1000 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.3g} s"
