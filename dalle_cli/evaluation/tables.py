"""Metrics as a small table of plain text."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from dalle_cli.viz.metric_charts import METRICS

WIDTH = 200  # characters, at most


def rendered(metrics: Mapping[str, Any]) -> str:
    """What `evaluate` computed, as text."""
    if metrics["kind"] != "images":
        return _table(["score", "value"], plain_rows(metrics["scores"]))
    heads = [f"blur {scores['blur']:g}" for scores in metrics["scores"]]
    lines = _table(["score", *heads], image_rows(metrics["scores"]))
    return "\n".join([lines, *(f"{name}: left out, {reason}" for name, reason in sorted(metrics["left_out"].items()))])


def image_rows(scores: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row per metric, a cell per radius of blur."""
    flat: list[dict[str, Any]] = [{**table, **table.get("retrieval", {})} for table in scores]
    rows = []
    for key, (title, *_) in METRICS.items():
        cells = [table.get(key) for table in flat]
        if any(cells):
            name = next(cell.get("name", title) for cell in cells if cell)
            rows.append([name, *(_cell(cell) if cell else "" for cell in cells)])
        if key == "clip" and any(cell and cell["shuffled"] is not None for cell in cells):
            others = [cell and cell["shuffled"] for cell in cells]
            rows.append(["  with others' captions", *("" if value is None else f"{value:.4g}" for value in others)])
    return rows


def _cell(score: Mapping[str, Any]) -> str:
    low, high = score.get("low"), score.get("high")
    return f"{score['value']:.4g}" + ("" if low is None or high is None else f" ({low:.4g} to {high:.4g})")


def plain_rows(scores: Mapping[str, Any], before: str = "") -> list[list[str]]:
    """A row per metric, with its error, at any depth; lists are only in the file."""
    rows: list[list[str]] = []
    for name, value in scores.items():
        words, error = f"{before}{name.replace('_', ' ')}", scores.get(f"{name}_error")
        if isinstance(value, Mapping):
            rows += plain_rows(value, f"{words}: ")
        elif isinstance(value, bool):
            rows.append([words, "yes" if value else "no"])
        elif isinstance(value, float) and name.removesuffix("_error") not in scores.keys() - {name}:
            rows.append([words, f"{value:.4g}" + ("" if error is None else f" \N{PLUS-MINUS SIGN} {error:.2g}")])
        elif isinstance(value, (str, int)):
            rows.append([words, f"{value:,}" if isinstance(value, int) else value])
    return rows


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(*heads, box=None, pad_edge=False, header_style="", show_header=len(heads) > 2)
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=WIDTH, force_terminal=False, color_system=None).print(table, markup=False)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())
