"""The only module that prints: data to stdout, everything said to a person to stderr."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

INTERVAL = 10.0  # seconds between plain progress lines where stderr is no terminal


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
    """The path of what was written, on stdout, and the facts, on stderr."""
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
        shown_rate = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
        rest = f", {_figures(latest)}" if latest else ""
        _stderr(f"{label}: {at}/{total}{' ' + unit if unit else ''}, {shown_rate}/s{rest}")

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


def _figures(figures: dict[str, object]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {_show(value)}" for key, value in figures.items() if value is not None)


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _stderr(text: Any) -> None:
    print(text, file=sys.stderr, flush=True)
