"""`dalle plan`: a recipe's models on a machine, before anything is trained."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dalle_cli.options import Json, Sets

if TYPE_CHECKING:
    from rich.table import Table

    from dalle_cli.planning.hardware import Machine, Rate
    from dalle_cli.planning.plan import Memory, ModelPlan

PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
MEMORY = {  # what of a memory's parts is called in the table
    "weights": "weights",
    "gradients": "gradients",
    "moments": "optimizer",
    "average": "average",
    "copies": "16-bit weights",
    "activations": "activations",
}
FIRST = ("dvae", "clip", "prior")  # the models of DALL-E
COLUMNS, WIDTH = 6, 140  # of a table, models and characters
EXAMPLE = "dalle plan recipes/paper/recipe.toml --device v100-16gb --devices 1024 --pairs 250000000"


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe's TOML.")],
    sets: Sets = [],
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="auto, cpu, cuda, mps: this machine; or a data sheet's, as t4, a100-80gb, h100."
        ),
    ] = "auto",
    devices: Annotated[int, typer.Option(min=1, metavar="N", help="How many of it.")] = 1,
    rate: Annotated[
        float | None,
        typer.Option(min=1.0, metavar="FLOPS", help="Operations a second that one device reaches in training."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Find out the rate by updates of the models on this machine.")
    ] = False,
    pairs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Also the bytes of so many captions, codes and embeddings, and epochs."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate whether a recipe's models fit on a machine, and how long training takes."""
    from dataclasses import asdict

    from dalle_cli import config, console
    from dalle_cli.planning import hardware as machines
    from dalle_cli.planning import plan
    from dalle_cli.planning.subjects import subjects
    from dalle_cli.training.embedding_prior import SECTION, chosen

    table = config.read(recipe, sets)
    if SECTION in table:
        chosen(table)  # refuses what no training would take
    models, machine = subjects(table), machines.machine(device)
    _check_rate(rate, measure, machine)
    plans: list[ModelPlan] = []
    with console.progress("plan", len(models), unit="models") as advance:
        for subject in models:

            def speed(flops: int, fits: bool, subject: Any = subject) -> "Rate | None":
                if rate is not None:
                    return machines.Rate(rate, "as stated")
                return machines.measured(subject, device, flops, fits) if measure else machines.assumed(machine)

            plans.append(plan.plan(subject, machine, devices, speed))
            advance()
    stored = plan.data(table, pairs) if pairs else {}
    if as_json:
        told = {"name": machine.name, "memory": machine.memory, "count": devices, "arithmetic": machine.half}
        epochs = {p.name: p.updates * p.batch / pairs for p in plans} if pairs else {}
        console.emit_json(
            {"device": told, "models": {p.name: asdict(p) for p in plans}, "data": stored, "epochs": epochs}
        )
        return
    console.emit(_page(plans, machine, devices, pairs, stored))


def _check_rate(rate: float | None, measure: bool, machine: "Machine") -> None:
    from dalle_cli.errors import DalleError

    if rate is not None and not math.isfinite(rate):
        raise DalleError(f"expected a finite --rate, found {rate}; say how many operations a second")
    if rate is not None and measure:
        raise DalleError("expected --rate or --measure, found both; leave one out")
    if measure and machine.peak is not None:
        raise DalleError(f"expected --measure for this machine, found --device {machine.name}; leave one out")


def _page(plans: list["ModelPlan"], machine: "Machine", devices: int, pairs: int | None, stored: dict[str, int]) -> str:
    """A column for each model, then the verdicts, then what was assumed; in colour on a terminal."""
    from rich.console import Console
    from rich.text import Text

    from dalle_cli.planning.plan import size

    terminal = Console().is_terminal
    page = Console(width=WIDTH, force_terminal=terminal, color_system="auto" if terminal else None)
    first = [p for p in plans if p.name in FIRST]
    with page.capture() as told:
        for side_by_side in [plans] if len(plans) <= COLUMNS else [first, [p for p in plans if p not in first]]:
            page.print(_grid(side_by_side, devices, pairs))
            page.print()
        for p in plans:
            page.print(Text(f"{p.name} {p.verdict}", style="green" if p.fits else "red"), soft_wrap=True)
        if stored:
            parts = ", ".join(f"{name} {size(n)}" for name, n in stored.items())
            page.print(Text(f"{pairs:,} pairs: {parts}; ids and text come on top"), soft_wrap=True)
        for note in _notes(plans, machine):
            page.print(Text(note, style="dim"), soft_wrap=True)
    return "\n".join(line.rstrip() for line in told.get().rstrip().splitlines())


def _grid(plans: list["ModelPlan"], devices: int, pairs: int | None) -> "Table":
    """Models side by side."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 3))
    for justify in ("left", *("right" for _ in plans)):
        grid.add_column(justify=justify)  # type: ignore[arg-type]
    for title, cells in _rows(plans, devices, pairs):
        style = "" if title.startswith(" ") else "bold"
        grid.add_row(Text(title, style=style), *(Text(cell, style=style) for cell in cells))
    return grid


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
    memory("memory on one device, at its fullest", lambda p: p.alone)
    if devices > 1:
        memory(f"sharded, on each of {devices:,}", lambda p: p.sharded or p.alone)
        row(f"a whole copy, on each of {devices:,}", lambda p: size((p.replicated or p.alone).peak))
    row("arithmetic of an update", lambda p: _short(p.flops, " FLOP"))
    row("of all updates", lambda p: _short(p.flops * p.updates, " FLOP"))
    if any(p.seconds for p in plans):
        row("rate", lambda p: _short(p.rate.flops * devices, " FLOP/s") if p.rate else "")
        row("time", lambda p: _time(p.seconds) if p.seconds else "")
    return rows


def _notes(plans: list["ModelPlan"], machine: "Machine") -> list[str]:
    """Where the numbers come from, and what they leave out."""
    from dalle_cli.planning.plan import SLACK_GPU

    sources = {p.rate.source: p.name for p in plans if p.rate}
    if len(sources) > 1:
        told = "; ".join(f"{p.name} {p.rate.source}" for p in plans if p.rate)
    else:
        told = next(iter(sources), "give --rate, --measure or a data sheet's --device, and it says how long this takes")
    notes = [f"rate of one device: {told}" if sources else told]
    if sources:
        notes.append("time: updates alone; validation, reading, and what devices tell each other come on top")
    added = f"{SLACK_GPU:.0%} of the activations" if machine.accelerator else "a heap's holes"
    notes.append(f"memory: an update rehearsed on tensors without any; {added} are added for what an allocator wastes")
    if machine.half == "float16":
        notes.append(f"{machine.name} has no bfloat16: train with --dtype float16")
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
    for unit, length in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}" if seconds < 1000 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.3g} s"
