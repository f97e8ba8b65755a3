"""Whatever JSON a score or a config is, as tables: numbers in columns, series as small curves, grids as heat maps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dalle_cli.report.markup import Html, el, is_digest, join, number, short

MOST_ROWS, MOST_DEEP = 60, 6
MOST_RECORDS = 8  # side by side
MOST_IN_LINE, MOST_WORDS = 8, 24  # values of a list written out: of a short one, and of a long one that is no series
MOST_CELLS = 64  # of a heat map's side
INTERVALS = (("low", "high"), ("lower", "upper"))  # what the ends of an interval are called
CENTERS = ("value", "mean", "score", "estimate", "median")
ERRORS = ("error", "std", "standard_error")
NAMES = {True: "true", False: "false", None: "none"}
Scalar = (str, int, float, bool, type(None))


def render(value: object, depth: int = 0) -> Html:
    """A value of JSON."""
    if _is_leaf(value):
        return _leaf(value)
    if depth >= MOST_DEEP:
        return el("span", {"class": "faint"}, "deeper than is shown here")
    if isinstance(value, Mapping):
        return _mapping(value, depth)
    assert isinstance(value, Sequence)
    if _is_table(value):
        return _table([("", row) for row in value])
    if _is_grid(value):
        return _heat(value)
    if value and all(isinstance(entry, Mapping) for entry in value):
        if len(value) <= MOST_RECORDS:
            return _records(value, depth)
        if _is_table(rows := [dict(_figures(entry)) for entry in value]):
            return _table([("", row) for row in rows])
    if all(_is_number(entry) for entry in value):
        return _series(value)
    if all(isinstance(entry, Scalar) for entry in value):
        return join([join(map(_leaf, value[:MOST_WORDS]), ", "), _more(value, MOST_WORDS)])
    return el("ul", None, *(el("li", None, render(entry, depth + 1)) for entry in value[:MOST_ROWS]), _more(value))


def facts(table: Mapping[str, Any], links: Mapping[str, str]) -> Html:
    """A config as rows of name and value; a digest that lies in this page is a link to it."""
    rows = [
        el("tr", None, el("th", {"scope": "row"}, key), el("td", None, linked(value, links)))
        for key, value in flat(table)
    ]
    return el("table", {"class": "facts"}, *rows)


def linked(value: object, links: Mapping[str, str]) -> object:
    """A digest as a link where it is one of this page's, else short; anything else as JSON has it."""
    if not is_digest(value):
        return NAMES[value] if value is None or isinstance(value, bool) else value
    told = el("code", {"title": value}, short(value))  # type: ignore[dict-item]
    return el("a", {"href": f"#{links[str(value)]}"}, told) if value in links else told


def flat(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Names with dots, and values that are no tables."""
    rows: list[tuple[str, Any]] = []
    for key, value in table.items():
        rows += flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return rows


def _mapping(value: Mapping[str, Any], depth: int) -> Html:
    """Plain values first, as rows; then what is deeper, under headings."""
    value = _with_errors(value)
    plain = {key: entry for key, entry in value.items() if _is_leaf(entry)}
    deep = {key: entry for key, entry in value.items() if key not in plain}
    parts = []
    if plain:
        rows = [
            el("tr", None, el("th", {"scope": "row"}, _words(key)), el("td", {"class": _align(entry)}, _leaf(entry)))
            for key, entry in plain.items()
        ]
        parts.append(_wide(el("table", {"class": "facts"}, *rows[:MOST_ROWS]), _more(rows)))
    if deep and not plain and _is_table(list(value.values())):
        return _table(list(value.items()))
    if deep and not plain and _are_alike(list(value.values())):
        return _records(list(value.values()), depth, [_words(key) for key in value])
    parts += [
        el("section", {"class": "deeper"}, el(f"h{min(4 + depth, 6)}", None, _words(key)), render(entry, depth + 1))
        for key, entry in deep.items()
    ]
    return join(parts)


def _with_errors(value: Mapping[str, Any]) -> dict[str, Any]:
    """Figures joined with their errors and intervals, which stand beside them as NAME_error and NAME_interval."""
    joined = dict(value)
    for key, figure in value.items():
        for part in ("error", "interval"):
            told = {"value": figure, part: value.get(f"{key}_{part}")}
            if _estimate(told) not in (None, _estimate({"value": figure})):
                joined[key] = told
                del joined[f"{key}_{part}"]
    return joined


def _words(key: object) -> str:
    return str(key).replace("_", " ")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _estimate(value: object) -> str | None:
    """A value with its error or interval, in any of the forms that are usual; None if this is something else."""
    if not isinstance(value, Mapping) or not all(isinstance(entry, (*Scalar, list)) for entry in value.values()):
        return None
    center = next((value[name] for name in CENTERS if _is_number(value.get(name))), None)
    error = next((value[name] for name in ERRORS if _is_number(value.get(name))), None)
    pairs = [value.get("interval"), *([value.get(low), value.get(high)] for low, high in INTERVALS)]
    ends = next((p for p in pairs if isinstance(p, list) and len(p) == 2 and all(map(_is_number, p))), None)
    if center is None or (error is None and ends is None and "value" not in value):
        return None
    if ends:
        return f"{_figure(center)} ({_figure(ends[0])}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{_figure(ends[1])})"
    return _figure(center) + (f" \N{PLUS-MINUS SIGN} {_figure(error)}" if error is not None else "")


def _is_leaf(value: object) -> bool:
    short_list = isinstance(value, list) and len(value) <= MOST_IN_LINE and all(isinstance(v, Scalar) for v in value)
    return isinstance(value, Scalar) or _estimate(value) is not None or short_list


def _is_table(value: Sequence[Any]) -> bool:
    """Whether these are rows of one table: mappings of plain values, with a name in common."""
    if not value or not all(isinstance(row, Mapping) and row and all(map(_is_leaf, row.values())) for row in value):
        return False
    return not any(map(_is_leaf, value)) and bool(set.intersection(*(set(row) for row in value)))


def _are_alike(value: Sequence[Any]) -> bool:
    """Whether these are several tables of the same figures, to stand side by side."""
    if not 1 < len(value) <= MOST_RECORDS or not all(isinstance(entry, Mapping) for entry in value):
        return False
    return all(entry.keys() == value[0].keys() for entry in value) and any(map(_is_leaf, value[0].values()))


def _is_grid(value: Sequence[Any]) -> bool:
    rows = [row for row in value if isinstance(row, list) and row and all(map(_is_number, row))]
    return len(rows) == len(value) > 1 and len({len(row) for row in rows}) == 1


def _leaf(value: object) -> Html:
    if estimate := _estimate(value):
        rest = {key: entry for key, entry in value.items() if isinstance(entry, Scalar)}  # type: ignore[attr-defined]
        return el("span", {"title": ", ".join(f"{_words(key)} {entry}" for key, entry in rest.items())}, estimate)
    if isinstance(value, list):
        return join(map(_leaf, value), ", ")
    if is_digest(value):
        return el("code", {"title": str(value)}, short(value))
    return join([_plain(value)])


def _plain(value: object) -> object:
    if _is_number(value):
        return _figure(value)  # type: ignore[arg-type]
    return NAMES[value] if value is None or isinstance(value, bool) else value


def _figure(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if math.isfinite(value) else str(value)


def _align(value: object) -> str | None:
    return "number" if _is_number(value) or _estimate(value) else None


def _table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Html:
    keys = list(dict.fromkeys(key for _, row in rows for key in row))
    named = any(name for name, _ in rows)
    classes = {
        key: next((_align(row[key]) for _, row in rows if key in row and _align(row[key])), None) for key in keys
    }
    corner = [el("td", None)] if named else []
    head = el("tr", None, *corner, *(el("th", {"scope": "col", "class": classes[k]}, _words(k)) for k in keys))
    body = []
    for name, row in rows[:MOST_ROWS]:
        first = [el("th", {"scope": "row"}, _words(name))] if named else []
        cells = [el("td", {"class": classes[key]}, _leaf(row[key]) if key in row else "") for key in keys]
        body.append(el("tr", None, *first, *cells))
    return _wide(el("table", None, el("thead", None, head), el("tbody", None, *body)), _more(rows))


def _records(records: Sequence[Mapping[str, Any]], depth: int, told: Sequence[str] = ()) -> Html:
    """A column for each record, a row for each figure; else headed by the first plain one that tells them apart."""
    columns = [dict(_figures(record)) for record in records]
    names = list(dict.fromkeys(name for column in columns for name in column))
    plain = [name for name in names if all(isinstance(column.get(name), Scalar) for column in columns)]
    apart = [name for name in plain if len({str(column[name]) for column in columns}) == len(columns)]
    head = apart[0] if apart and not told else None
    if not told:
        told = [f"{_words(head)} {_plain(column[head])}" if head else str(n) for n, column in enumerate(columns, 1)]
    rows = []
    for name in names:
        if name != head:
            cells = [render(column[name], depth + 1) if name in column else "" for column in columns]
            called = next(
                (c[name]["called"] for c in columns if isinstance(c.get(name), Mapping) and "called" in c[name]), name
            )
            align = {"class": next((_align(column[name]) for column in columns if name in column), None)}
            rows.append(
                el("tr", None, el("th", {"scope": "row"}, _words(called)), *(el("td", align, c) for c in cells))
            )
    heads = [el("th", {"scope": "col", "class": "number"}, text) for text in told]
    body = el("tbody", None, *rows[:MOST_ROWS])
    return _wide(el("table", None, el("thead", None, el("tr", None, el("td"), *heads)), body), _more(rows))


def _figures(record: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Figures by name, those of tables within by the names of both."""
    found: list[tuple[str, Any]] = []
    for name, value in _with_errors(record).items():
        if isinstance(value, Mapping) and _estimate(value) is None:
            found += _figures(value, f"{before}{name} ")
        else:
            found.append((f"{before}{name}", value))
    return found


def _wide(table: Html, after: Html) -> Html:
    return el("div", {"class": "wide"}, table, after)


def _more(rows: Sequence[Any], shown: int = MOST_ROWS) -> Html:
    rest = len(rows) - shown
    return el("p", {"class": "faint"}, f"and {rest:,} more, which are not shown") if rest > 0 else Html()


def _series(values: Sequence[float]) -> Html:
    """Many numbers as a small curve, with its least and its largest."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return el("span", {"class": "faint"}, f"{len(values):,} values, none of them a number")
    low, high = min(finite), max(finite)
    wide, tall = 240, 40
    points = " ".join(
        f"{wide * place / max(1, len(finite) - 1):.1f},{2 + (tall - 4) * (1 - (y - low) / ((high - low) or 1)):.1f}"
        for place, y in enumerate(finite)
    )
    curve = el("polyline", {"points": points, "class": "training"})
    svg = el("svg", {"viewBox": f"0 0 {wide} {tall}", "class": "series", "width": wide, "height": tall}, curve)
    return join([svg, " ", el("span", {"class": "faint"}, f"{len(values):,} values, {number(low)} to {number(high)}")])


def _heat(rows: Sequence[Sequence[float]]) -> Html:
    """A grid of numbers, the larger the stronger."""
    step = max(1, -(-max(len(rows), len(rows[0])) // MOST_CELLS))
    shown = [row[::step] for row in rows[::step]]
    finite = [value for row in shown for value in row if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    side = max(4, 240 // max(len(shown), len(shown[0])))
    cells = [
        el(
            "rect",
            {"x": x * side, "y": y * side, "width": side, "height": side,
             "opacity": f"{0.04 + 0.96 * (value - low) / ((high - low) or 1):.3f}"},
            el("title", None, f"row {y * step}, column {x * step}: {number(value)}"),
        )
        for y, row in enumerate(shown) for x, value in enumerate(row) if math.isfinite(value)
    ]  # fmt: skip
    wide, tall = side * len(shown[0]), side * len(shown)
    svg = el("svg", {"viewBox": f"0 0 {wide} {tall}", "class": "heat", "width": wide, "height": tall}, *cells)
    told = f"{len(rows)} by {len(rows[0])}, {number(low)} (faint) to {number(high)} (strong)"
    if step > 1:
        told += f"; every {step}. row and column"
    return join([svg, el("p", {"class": "faint"}, told)])
