"""The only module that prints: data to stdout, messages to stderr."""

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dalle_cli.errors import one_line, printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, ProgressColumn

INTERVAL = 10.0  # seconds between plain progress lines if stderr is not a terminal
LIVE_INTERVAL = 0.5  # seconds between updates of a training's panel on a terminal


class Advance(Protocol):
    """Called with the number of units done since the last call, and metrics to show beside the bar."""

    def __call__(self, n: int = 1, /, **metrics: object) -> None: ...


def error(message: str) -> None:
    """Print the error that ends the command in one line."""
    note(f"dalle: error: {one_line(message)}")


def warn(message: str) -> None:
    """Print a warning in one line."""
    note(f"dalle: warning: {one_line(message)}")


def note(message: str) -> None:
    """Print a message, or a preview of an image in characters, for the user: to stderr."""
    print(message, file=sys.stderr, flush=True)


class _LibraryMessages(logging.Handler):
    """What the library logs, as warnings and notes of the command line."""

    def emit(self, record: logging.LogRecord) -> None:
        (warn if record.levelno >= logging.WARNING else note)(one_line(record.getMessage()))


def show_library_messages() -> None:
    """Show what the library logs from now on."""
    log = logging.getLogger("dalle_cli")
    if not any(isinstance(handler, _LibraryMessages) for handler in log.handlers):
        log.addHandler(_LibraryMessages(logging.INFO))
        log.setLevel(logging.INFO)
        log.propagate = False


def emit(text: str) -> None:
    """Print data to stdout, as text that no terminal obeys."""
    print(printable(text), flush=True)


def emit_json(value: object) -> None:
    """Print one JSON object to stdout."""
    text = json.dumps(value, ensure_ascii=False)
    print(re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)  # JSON escapes the others


def result(path: Path | str, **metrics: object) -> None:
    """Print the path of what was written to stdout, and facts to stderr; of several processes only the first prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and os.environ.get("RANK", "0") != "0":
        return
    if facts := _format(metrics):
        note(f"{Path(path).name}: {facts}")
    print(path, flush=True)


@contextmanager
def progress(label: str, total: int, done: int = 0, unit: str = "") -> Iterator[Advance]:
    """Show a progress bar on a terminal, elsewhere a line every ten seconds; yields `advance(n, **metrics)`."""
    if not sys.stderr.isatty():
        with _plain_lines(label, total, done, unit) as lines:

            def count(n: int = 1, /, **metrics: object) -> None:
                lines.metrics.update(metrics)
                lines.advance(n)

            yield count
        return
    from rich.progress import ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{_number(task.finished_speed or task.speed or 0.0)} {unit}/s".replace(" /", "/"))

    with _bar(unit, RateColumn(), TimeRemainingColumn(), TextColumn("{task.fields[metrics]}")) as bar:
        task = bar.add_task(label, total=total, completed=done, metrics="")

        def advance(n: int = 1, /, **metrics: object) -> None:
            if metrics:
                bar.update(task, metrics=_format(metrics))
            bar.advance(task, n)

        yield advance


def _bar(unit: str, *columns: "ProgressColumn") -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    head = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TextColumn(unit))
    return Progress(*head, *columns, console=Console(stderr=True))


class Pace(NamedTuple):
    """The speed of a training: units per second, peak memory in MiB, and the share of the device's peak FLOP/s."""

    rate: float
    unit: str
    memory: float | None = None
    share: float | None = None

    def __str__(self) -> str:
        parts = [f"{_number(self.rate)} {self.unit}/s"]
        if self.share is not None:
            parts.append(f"{self.share:.0%} of the machine's peak")
        if self.memory is not None:
            large = self.memory >= 1024
            parts.append(f"peak memory {self.memory / 1024:.1f} GiB" if large else f"peak memory {self.memory:.0f} MiB")
        return ", ".join(parts)


class Display(Protocol):
    """The progress display of a training."""

    live: bool  # whether it is a panel on a terminal

    def due(self) -> bool:
        """Whether it is time for new metrics."""

    def tell(self, pace: Pace, /, **metrics: object) -> None:
        """Set the pace and add metrics, to be shown next."""

    def advance(self) -> None:
        """Count one more update."""


@contextmanager
def training(label: str, total: int, done: int = 0) -> Iterator[Display]:
    """Show the progress of a training: a panel on a terminal, elsewhere a line every ten seconds."""
    if not sys.stderr.isatty():
        with _plain_lines(label, total, done, "updates") as lines:
            yield lines
        return
    from rich.live import Live
    from rich.progress import TextColumn, TimeRemainingColumn

    bar = _bar("updates", TextColumn("ETA"), TimeRemainingColumn())
    bar.add_task(label, total=total, completed=done)
    panel = _TrainingPanel(bar)
    with Live(panel, console=bar.console, refresh_per_second=1 / LIVE_INTERVAL):
        yield panel


class _TrainingPanel:
    """Three lines that rich redraws: bar and ETA; metrics; pace."""

    live = True

    def __init__(self, bar: "Progress"):
        self.bar = bar
        self.updated = float("-inf")
        self.pace: Pace | None = None
        self.metrics: dict[str, object] = {}

    def due(self) -> bool:
        return time.monotonic() - self.updated >= LIVE_INTERVAL

    def tell(self, pace: Pace, /, **metrics: object) -> None:
        self.updated, self.pace = time.monotonic(), pace
        self.metrics = {**self.metrics, **metrics}  # a new dict: rich may be drawing the old one

    def advance(self) -> None:
        self.bar.advance(self.bar.task_ids[0])

    def __rich__(self) -> "RenderableType":
        from rich.console import Group
        from rich.text import Text

        lines = [Text(_format(self.metrics)), Text(str(self.pace or ""), style="dim")]
        return Group(self.bar, *(line for line in lines if line))


class _PlainLines:
    """A line every ten seconds."""

    live = False

    def __init__(self, label: str, total: int, done: int, unit: str):
        self.label, self.of, self.at, self.shown, self.first = label, f"{total} {unit}".strip(), done, done, done
        self.began = self.last = time.monotonic()
        self.pace: Pace | None = None
        self.metrics: dict[str, object] = {}

    def due(self) -> bool:
        return time.monotonic() - self.last >= INTERVAL

    def tell(self, pace: Pace, /, **metrics: object) -> None:
        self.pace = pace
        self.metrics.update(metrics)

    def advance(self, n: int = 1) -> None:
        self.at += n
        if self.due():
            self.show()

    def show(self) -> None:
        self.shown, self.last = self.at, time.monotonic()
        rate = (self.at - self.first) / max(self.last - self.began, 1e-9)
        parts = [f"{self.at}/{self.of}", f"{_number(rate)}/s", str(self.pace or ""), _format(self.metrics)]
        note(f"{self.label}: {', '.join(part for part in parts if part)}")


@contextmanager
def _plain_lines(label: str, total: int, done: int, unit: str) -> Iterator[_PlainLines]:
    """Lines, and a last one if the whole took more than two seconds."""
    lines = _PlainLines(label, total, done, unit)
    yield lines
    if lines.at != lines.shown and time.monotonic() - lines.began > 2:
        lines.show()


def _number(value: float) -> str:
    """12345 -> 12.3k."""
    for least, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _format(metrics: dict[str, object]) -> str:
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in metrics.items()}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items() if value is not None)
