"""The only module that prints: data to stdout, everything said to a person to stderr."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

INTERVAL = 10.0  # seconds between plain progress lines where stderr is no terminal
LIVE_INTERVAL = 0.5  # seconds between two pictures of the panel of a training, on a terminal


class Advance(Protocol):
    """Called with the number of units done since the last call, and figures to show beside the bar."""

    def __call__(self, n: int = 1, /, **figures: object) -> None: ...


def error(message: str) -> None:
    """What ended the command, in one line."""
    _stderr(f"dalle: error: {_one_line(message)}")


def warn(message: str) -> None:
    """What a person should look at, in one line; the command goes on."""
    _stderr(f"dalle: warning: {_one_line(message)}")


def note(message: str) -> None:
    """What a person may want to know."""
    _stderr(message)


class _LibraryMessages(logging.Handler):
    """What the library logs, as warnings and notes of the command line."""

    def emit(self, record: logging.LogRecord) -> None:
        (warn if record.levelno >= logging.WARNING else note)(record.getMessage())


def show_library_messages() -> None:
    """Show what the library logs from now on."""
    log = logging.getLogger("dalle_cli")
    if not any(isinstance(handler, _LibraryMessages) for handler in log.handlers):
        log.addHandler(_LibraryMessages(logging.INFO))
        log.setLevel(logging.INFO)
        log.propagate = False


def preview(text: str) -> None:
    """A picture as coloured characters: for the eye, so to stderr, and stdout stays data."""
    _stderr(text)


def emit(text: str) -> None:
    """Data, to stdout."""
    print(text, flush=True)


def emit_json(value: object) -> None:
    """One JSON object, to stdout."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def result(path: Path | str, **figures: object) -> None:
    """The path of what was written, on stdout, and the facts, on stderr; of several processes only the first prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and os.environ.get("RANK", "0") != "0":
        return
    if said := _figures(figures):
        _stderr(f"{Path(path).name}: {said}")
    print(path, flush=True)


@contextmanager
def progress(label: str, total: int, done: int = 0, unit: str = "") -> Iterator[Advance]:
    """A progress bar on a terminal, a plain line now and then elsewhere; yields `advance(n, **figures)`."""
    with (_bar if sys.stderr.isatty() else _lines)(label, total, done, unit) as advance:
        yield advance


@contextmanager
def _bar(label: str, total: int, done: int, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TextColumn(unit))
    tail = (TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, *tail, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, completed=done, figures="")

        def advance(n: int = 1, /, **figures: object) -> None:
            if figures:
                bar.update(task, figures=_figures(figures))
            bar.advance(task, n)

        yield advance


@contextmanager
def _lines(label: str, total: int, done: int, unit: str) -> Iterator[Advance]:
    begin = last = time.monotonic()
    first, at, shown = done, done, done
    latest: dict[str, object] = {}

    def line() -> None:
        rate = (at - first) / max(time.monotonic() - begin, 1e-9)
        rest = f", {_figures(latest)}" if latest else ""
        _stderr(f"{label}: {at}/{total}{' ' + unit if unit else ''}, {_rate(rate)}/s{rest}")

    def advance(n: int = 1, /, **figures: object) -> None:
        nonlocal at, last, shown
        at += n
        latest.update(figures)
        if time.monotonic() - last >= INTERVAL:
            last, shown = time.monotonic(), at
            line()

    yield advance
    if at != shown and time.monotonic() - begin > 2:
        line()


class Pace(NamedTuple):
    """How fast a training goes: units a second, the most memory held in MiB, and the share of the machine's best."""

    rate: float
    unit: str
    memory: float | None = None
    share: float | None = None

    def __str__(self) -> str:
        parts = [f"{_thousands(self.rate)} {self.unit}/s"]
        if self.share is not None:
            parts.append(f"{self.share:.0%} of the machine's peak")
        if self.memory is not None:
            parts.append(
                f"peak memory {self.memory / 1024:.1f} GiB"
                if self.memory >= 1024
                else f"peak memory {self.memory:.0f} MiB"
            )
        return ", ".join(parts)


class Display(Protocol):
    """What a person sees of a training."""

    live: bool  # whether it is a picture on a terminal

    def due(self) -> bool:
        """Whether it is time for new figures."""

    def tell(self, pace: Pace, /, **figures: object) -> None:
        """Take in figures and pace, to be shown next."""

    def advance(self) -> None:
        """One more update is done."""


@contextmanager
def training(label: str, total: int, done: int = 0) -> Iterator[Display]:
    """What a training shows of itself: a panel of a few lines on a terminal, a plain line now and then elsewhere."""
    if not sys.stderr.isatty():
        lines = _TrainingLines(label, total, done)
        yield lines
        lines.end()
        return
    from rich.console import Console
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TextColumn("updates"))
    bar = Progress(*columns, TextColumn("ETA"), TimeRemainingColumn())
    bar.add_task(label, total=total, completed=done)
    panel = _TrainingPanel(bar)
    with Live(panel, console=Console(stderr=True), refresh_per_second=1 / LIVE_INTERVAL):
        yield panel


class _TrainingPanel:
    """Three lines, which rich draws anew again and again: bar and ETA; figures; pace."""

    live = True

    def __init__(self, bar: "Progress"):
        self.bar = bar
        self.told = float("-inf")
        self.pace: Pace | None = None
        self.figures: dict[str, object] = {}

    def due(self) -> bool:
        return time.monotonic() - self.told >= LIVE_INTERVAL

    def tell(self, pace: Pace, /, **figures: object) -> None:
        self.told, self.pace = time.monotonic(), pace
        self.figures = {**self.figures, **figures}  # a new one: the old may be being drawn

    def advance(self) -> None:
        self.bar.advance(self.bar.task_ids[0])

    def __rich__(self) -> "RenderableType":
        from rich.console import Group
        from rich.text import Text

        lines = [Text(_figures(self.figures)), Text(str(self.pace or ""), style="dim")]
        return Group(self.bar, *(line for line in lines if line))


class _TrainingLines:
    """One line every ten seconds, and a last one."""

    live = False

    def __init__(self, label: str, total: int, done: int):
        self.label, self.total, self.at, self.shown, self.first = label, total, done, done, done
        self.began = self.last = time.monotonic()
        self.pace: Pace | None = None
        self.figures: dict[str, object] = {}

    def due(self) -> bool:
        return time.monotonic() - self.last >= INTERVAL

    def tell(self, pace: Pace, /, **figures: object) -> None:
        self.pace = pace
        self.figures.update(figures)

    def advance(self) -> None:
        self.at += 1
        if self.due():
            self.last = time.monotonic()
            self._line()

    def end(self) -> None:
        if self.at != self.shown and time.monotonic() - self.began > 2:
            self._line()

    def _line(self) -> None:
        self.shown = self.at
        rate = (self.at - self.first) / max(time.monotonic() - self.began, 1e-9)
        parts = [f"{self.at}/{self.total} updates", f"{_rate(rate)}/s", str(self.pace or ""), _figures(self.figures)]
        _stderr(f"{self.label}: {', '.join(part for part in parts if part)}")


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _thousands(value: float) -> str:
    """12345 -> 12.3k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):.1f}{letter}"
    return _rate(value)


def _figures(figures: dict[str, object]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {_show(value)}" for key, value in figures.items() if value is not None)


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _stderr(text: Any) -> None:
    print(text, file=sys.stderr, flush=True)
