"""Curves of a run as SVG, drawn here, so that no other library is needed; values for the pointer go along as JSON."""

import math
from typing import Any

from dalle_cli.errors import DalleError
from dalle_cli.report.markup import Attributes, Html, el, join, number
from dalle_cli.viz.charts import LABELS, LINEAR, LOG_RANGE, MOST_STEPS, Label
from dalle_cli.viz.curves import Curves, Line, choose

WIDE, HIGH = 360, 200  # of a panel, in its own units
LEFT, RIGHT, TOP, BOTTOM = 40, 44, 10, 24  # around the curves
MOST_PANELS = 16
KINDS = (("training", "training"), ("validation", "held out"))


def draw(run: Curves) -> tuple[Html, list[dict[str, Any]], list[str]]:
    """A panel for each figure that tells something; what a script shows at the pointer; figures left out."""
    try:
        keys = choose([run])
    except DalleError:
        keys = run.keys
    most = max(line.x[-1] for lines in (run.training, run.validation) for line in lines.values())
    figures, values = [], []
    for key in keys[:MOST_PANELS]:
        figure, value = _panel(key, run, most)
        figures.append(figure)
        values.append(value)
    return el("div", {"class": "panels"}, *figures), values, keys[MOST_PANELS:]


def thin(line: Line, most: int = MOST_STEPS) -> Line:
    """A line of many points by means of as many neighbors each; at most `most` points."""
    each = -(-len(line.y) // most)
    groups = [slice(start, start + each) for start in range(0, len(line.y), each)]
    return Line(*([sum(part) / len(part) for part in (values[g] for g in groups)] for values in (line.x, line.y)))


def _panel(key: str, run: Curves, most: float) -> tuple[Html, dict[str, Any]]:
    """One figure, and the numbers in it."""
    label = LABELS.get(key, Label(key.replace("_", " ")))
    lines = [(kind, told, thin(line)) for kind, told in KINDS if (line := getattr(run, kind).get(key))]
    scale = Scale(key, [y for _, _, line in lines for y in line.y], most)
    ends = [line.y[-1] for _, _, line in lines]
    drawn = [_curve(kind, line, scale) for kind, _, line in lines]
    end = el(
        "text",
        {"x": WIDE - RIGHT + 6, "y": f"{scale.down(ends[-1]) + 3.5:.1f}", "class": f"end {lines[-1][0]}"},
        number(float(f"{ends[-1]:.3g}")),
    )
    told = ", ".join(f"{told} {number(y)}" for (_, told, _), y in zip(lines, ends, strict=True))
    svg = el(
        "svg",
        {
            "viewBox": f"0 0 {WIDE} {HIGH}", "class": "panel", "role": "img", "tabindex": "0",
            "aria-label": f"{label.title} over {number(most)} updates; at the end {told}",
        },
        scale.axes(), *drawn, end if key != "lr" else "", el("g", {"class": "pointer"}),
    )  # fmt: skip
    unit = el("span", {"class": "unit"}, label.unit)
    caption = el("figcaption", None, el("b", None, label.title), " ", unit)
    tip = el("div", {"class": "tip", "hidden": True})
    return el("figure", {"class": "plot"}, caption, svg, tip), scale.told(lines)


def _curve(kind: str, line: Line, scale: "Scale") -> Html:
    points = [f"{scale.across(x):.1f},{scale.down(y):.1f}" for x, y in zip(line.x, line.y, strict=True)]
    curve = el("polyline", {"points": " ".join(points), "class": kind})
    if len(points) > 1 and (kind == "training" or len(points) > 40):
        return curve
    at = [point.split(",") for point in points]
    return join([curve, *(el("circle", {"cx": x, "cy": y, "r": 2.4, "class": kind}) for x, y in at)])


class Scale:
    """Where a value stands in a panel; logarithmic where it helps."""

    def __init__(self, key: str, values: list[float], most: float):
        low, high = min(values), max(values)
        self.most = most or 1.0
        self.log = key not in LINEAR and low > 0 and high / low > LOG_RANGE
        if self.log:
            margin = (high / low) ** 0.05
            self.low, self.high = low / margin, high * margin
        else:
            room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
            self.low = 0.0 if 0 <= low < 0.3 * high else low - room
            self.high = high + room

    def across(self, x: float) -> float:
        """An update's place, from the left."""
        return LEFT + (WIDE - LEFT - RIGHT) * x / self.most

    def down(self, y: float) -> float:
        """A value's place, from the top."""
        share = (self._level(y) - self._level(self.low)) / (self._level(self.high) - self._level(self.low))
        return TOP + (HIGH - TOP - BOTTOM) * (1 - share)

    def _level(self, y: float) -> float:
        return math.log(y) if self.log else y

    def axes(self) -> Html:
        """Rules at round values, and updates below."""
        parts = []
        for y in self._ticks():
            at = f"{self.down(y):.1f}"
            parts.append(el("line", {"x1": LEFT, "x2": WIDE - RIGHT, "y1": at, "y2": at, "class": "rule"}))
            at = f"{self.down(y) + 3.5:.1f}"
            parts.append(el("text", {"x": LEFT - 6, "y": at, "class": "tick right"}, number(y)))
        for x in _round(0, self.most, 3):
            place: Attributes = {"x": f"{self.across(x):.1f}", "y": HIGH - 8, "class": "tick middle"}
            parts.append(el("text", place, number(x)))
        return el("g", {"aria-hidden": "true"}, *parts)

    def _ticks(self) -> list[float]:
        if not self.log:
            return _round(self.low, self.high, 4)
        steps = (1, 2, 5) if self.high / self.low < 400 else (1,)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        decades = decades[:: -(-len(decades) // 6)]
        return [
            step * 10.0**power for power in decades for step in steps if self.low <= step * 10.0**power <= self.high
        ]

    def told(self, lines: list[tuple[str, str, Line]]) -> dict[str, Any]:
        """What the script needs to find the values at the pointer and to mark them."""
        values: list[dict[str, Any]] = [
            {
                "name": told,
                "class": kind,
                "x": [float(f"{x:.8g}") for x in line.x],
                "y": [float(f"{y:.5g}") for y in line.y],
                "at": [[round(self.across(x), 1), round(self.down(y), 1)] for x, y in zip(line.x, line.y, strict=True)],
            }
            for kind, told, line in lines
        ]
        return {"lines": values, "top": TOP, "bottom": HIGH - BOTTOM}


def _round(low: float, high: float, about: int) -> list[float]:
    """Round values between two others, about so many."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.8)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.10g}") for k in range(first, last + 1)]
