"""The layout of any JSON as tables, for the macro `show` of tables.html.

Records stand side by side, values with their errors or intervals; long lists of numbers are small graphics.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from dalle_cli.viz.charts import number

MOST_DEEP, MOST_RECORDS = 6, 8  # levels, records side by side
MOST_IN_LINE = 8  # values of a list that stands in a cell
MOST_CELLS = 64  # of a heat map's side
FINITE = 1e300  # an integer of JSON can be beyond any float
FLAT = 3  # levels of a record that become columns
NAMES = {True: "true", False: "false", None: "none"}
Scalar = (str, int, float, bool, type(None))


class Table(NamedTuple):
    """A head, and rows of a name ("" if they have none) and JSON values; `None` is an empty cell."""

    head: list[str]
    rows: list[tuple[str, list[tuple[Any] | None]]]


def layout(value: Any, depth: int = 0) -> tuple[str, Any]:
    """How to show a JSON value, and what the template needs for it."""
    if is_leaf(value):
        return "leaf", value
    if depth >= MOST_DEEP:
        return "deep", None
    if found := _table(value):
        return "table", found
    if isinstance(value, Mapping):
        value = join_errors(value)
        plain = {key: entry for key, entry in value.items() if is_leaf(entry)}
        return "mapping", (plain, {key: entry for key, entry in value.items() if key not in plain})
    if len({len(row) if _is_numbers(row) else -1 for row in value} - {-1}) == 1 and all(map(_is_numbers, value)):
        return "grid", _grid(value)
    if _is_numbers(value):
        return "series", _series(value)
    return ("words" if all(isinstance(entry, Scalar) for entry in value) else "list"), value


def plain(value: Any) -> str:
    """A scalar as text: integers with commas, other numbers with four digits."""
    if value is None or isinstance(value, bool):
        return NAMES[value]
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if isinstance(value, float) and _is_finite(value) else str(value)


def estimate(value: Any) -> str | None:
    """The text of {"value", and "error" or "interval" or "low" and "high"}; None if `value` is something else."""
    if not isinstance(value, Mapping) or not is_number(value.get("value")):
        return None
    if not all(isinstance(entry, (*Scalar, list)) for entry in value.values()):
        return None
    center, error = plain(value["value"]), value.get("error")
    for ends in (value.get("interval"), [value.get("low"), value.get("high")]):
        if _is_numbers(ends) and len(ends) == 2:
            return f"{center} ({plain(ends[0])}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{plain(ends[1])})"
    return f"{center} \N{PLUS-MINUS SIGN} {plain(error)}" if is_number(error) else center


def flat(value: Mapping[str, Any], separator: str = ".", levels: int = 32) -> dict[str, Any]:
    """The entries of nested mappings by their joined names; a number stays with its error or interval."""
    found: dict[str, Any] = {}
    for name, entry in join_errors(value).items():
        if isinstance(entry, Mapping) and levels > 1 and estimate(entry) is None:
            inner = flat(entry, separator, levels - 1)
            found |= {f"{name}{separator}{key}": inside for key, inside in inner.items()}
        else:
            found[name] = entry
    return found


def join_errors(value: Mapping[str, Any]) -> dict[str, Any]:
    """Join NAME with NAME_error and NAME_interval beside it to an estimate."""
    joined = dict(value)
    for key, center in value.items():
        for part in ("error", "interval"):
            pair = {"value": center, part: value.get(f"{key}_{part}")}
            if estimate(pair) not in (None, estimate({"value": center})):
                joined[key] = pair
                del joined[f"{key}_{part}"]
    return joined


def _is_finite(value: float) -> bool:
    return abs(value) < FINITE


def is_digest(value: object) -> bool:
    """Whether this is a SHA-256 in hex."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def is_number(value: object) -> bool:
    """Whether this is a number of JSON; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_leaf(value: Any) -> bool:
    """Whether this fits into a cell: a scalar, an estimate, or a short list of scalars."""
    if isinstance(value, list):
        return len(value) <= MOST_IN_LINE and all(isinstance(entry, Scalar) for entry in value)
    return isinstance(value, Scalar) or estimate(value) is not None


def _is_numbers(value: Any) -> TypeGuard[list[float]]:
    return isinstance(value, list) and bool(value) and all(map(is_number, value))


def _table(value: Any) -> Table | None:
    """Records, by name or as a list, if they have metrics in common."""
    names = [words(name) for name in value] if isinstance(value, Mapping) else []
    records = list(value.values()) if names else list(value)
    if not records or not all(isinstance(one, Mapping) and one and estimate(one) is None for one in records):
        return None
    rows = [flat(one, " ", FLAT) for one in records]
    fits = all(is_leaf(entry) for row in rows for entry in row.values()) or 1 < len(rows) <= MOST_RECORDS
    if not fits or not set.intersection(*map(set, rows)):
        return None
    keys = list(dict.fromkeys(key for row in rows for key in row))
    if len(keys) <= len(rows) or len(rows) > MOST_RECORDS:
        cells = [[(row[key],) if key in row else None for key in keys] for row in rows]
        return Table([*[""] * bool(names), *map(words, keys)], list(zip(names or [""] * len(rows), cells, strict=True)))
    if not names:  # a record is headed by the first value in which all differ
        apart = [key for key in keys if len({str(row.get(key)) for row in rows}) == len(rows)]
        scalar = [key for key in apart if all(isinstance(row.get(key), Scalar) for row in rows)]
        names = [f"{words(scalar[0])} {plain(row[scalar[0]])}" if scalar else str(n) for n, row in enumerate(rows, 1)]
        keys = [key for key in keys if key not in scalar[:1]]
    return Table(
        ["", *names], [(_metric_name(key, rows), [(row[key],) if key in row else None for row in rows]) for key in keys]
    )


def _metric_name(key: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A metric's own name, where its values have one."""
    values = [row[key] for row in rows if isinstance(row.get(key), Mapping)]
    return words(next((value["name"] for value in values if "name" in value), key))


def words(key: object) -> str:
    """A name of JSON as words."""
    return str(key).replace("_", " ")


def _series(values: Sequence[float]) -> dict[str, Any]:
    """A small curve, 240 by 40."""
    finite = [value for value in values if _is_finite(value)] or [0.0]
    low, high = min(finite), max(finite)
    heights = [2 + 36 * (1 - (y - low) / ((high - low) or 1)) for y in finite]
    points = " ".join(f"{240 * i / max(1, len(finite) - 1):.1f},{height:.1f}" for i, height in enumerate(heights))
    return {"points": points, "n": len(values), "low": low, "high": high}


def _grid(rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A heat map; of a large grid every `step`-th row and column."""
    step = max(1, -(-max(len(rows), len(rows[0])) // MOST_CELLS))
    shown = [row[::step] for row in rows[::step]]
    cells = [(x, y, value) for y, row in enumerate(shown) for x, value in enumerate(row) if _is_finite(value)]
    values = [value for _, _, value in cells] or [0.0]
    size = {"rows": len(rows), "columns": len(rows[0]), "wide": len(shown[0]), "tall": len(shown)}
    side = max(4, 240 // max(len(shown), len(shown[0])))
    return {"cells": cells, "side": side, "step": step, "low": min(values), "high": max(values), **size}
