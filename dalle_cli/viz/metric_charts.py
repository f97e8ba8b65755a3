"""Each score against the radius of blur, as in fig. 9 of Ramesh et al. 2021, as one picture."""

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dalle_cli.viz.charts import COLORS, DPI, FAINT, HIGH, STYLE, WIDE, check_drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ABOVE = 0.4  # inches for the title


class Curve(NamedTuple):
    """One score: a value for each radius, its interval where there is one, what it is by chance where that is known."""

    title: str
    unit: str
    radii: list[float]
    values: list[float]
    low: list[float]
    high: list[float]
    chance: list[float]


def curves(scores: Sequence[dict[str, Any]]) -> list[Curve]:
    """What there is to draw: scores as `pictures.score` gives them, one table a radius."""
    found = []
    for key, unit in (
        ("frechet", "lower is better"), ("kernel", "lower is better"), ("inception", "higher is better"),
        ("precision", "share, higher is better"), ("recall", "share, higher is better"), ("clip", "100 x cosine"),
    ):  # fmt: skip
        found += _curve([(s["blur"], s[key]) for s in scores if key in s], NAMES.get(key, key), unit, "shuffled")
    for key in ("r1", "r5"):
        tables = [(s["blur"], s["retrieval"]) for s in scores if "retrieval" in s]
        name = f"retrieval, own among {key[1:]} nearest" if key != "r1" else "retrieval, own is nearest"
        unit = f"of {tables[0][1]['k']}" if tables else ""
        found += _curve([(blur, table[key]) for blur, table in tables if key in table], name, unit, "chance")
    return found


NAMES = {"kernel": "kernel distance", "inception": "Inception score", "clip": "CLIP score"}


def _curve(tables: list[tuple[float, dict[str, Any]]], name: str, unit: str, baseline: str) -> list[Curve]:
    if not tables:
        return []
    tables = sorted(tables, key=lambda pair: pair[0])
    values = [float(table["value"]) for _, table in tables]
    low, high, base = (
        [float(table[key]) for _, table in tables if table.get(key) is not None] for key in ("low", "high", baseline)
    )
    called, _, network = tables[0][1].get("called", name).partition(" (")  # a panel is too narrow for both in one
    radii = [radius for radius, _ in tables]
    return [Curve(called, network.rstrip(")") or unit, radii, values, low, high, base)]


def draw(found: Sequence[Curve], title: str) -> "Figure":
    """The picture: a panel for each score.

    Raises:
        DalleError: matplotlib is not installed.
    """
    check_drawable()
    matplotlib = importlib.import_module("matplotlib")
    columns = min(len(found), 3)
    rows = -(-len(found) // columns)
    wide, high = max(WIDE * columns, 5.0), HIGH * rows
    with matplotlib.rc_context(STYLE):
        new = importlib.import_module("matplotlib.figure").Figure
        picture: Figure = new((wide, high + ABOVE), dpi=DPI, layout="constrained")
        engine = picture.get_layout_engine()
        assert engine is not None
        engine.set(w_pad=0.1, h_pad=0.08, rect=(0, 0, 1, high / (high + ABOVE)))  # type: ignore[call-arg]
        panels = picture.subplots(rows, columns, squeeze=False).flatten().tolist()
        for panel in panels[len(found) :]:
            panel.remove()
        for panel, curve in zip(panels, found, strict=False):
            _panel(panel, curve)
        picture.text(0.1 / wide, 1 - 0.1 / (high + ABOVE), title, fontsize=12, fontweight="bold", va="top")
    return picture


def _panel(panel: "Axes", curve: Curve) -> None:
    color = COLORS[0]
    if len(curve.low) == len(curve.high) == len(curve.radii):
        panel.fill_between(curve.radii, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)
        if len(curve.radii) == 1:
            panel.vlines(curve.radii, curve.low, curve.high, color=color, alpha=0.5, linewidth=2)
    panel.plot(curve.radii, curve.values, color=color, linewidth=1.6, marker="o", markersize=3.6)
    if len(curve.chance) == len(curve.radii):
        look: dict[str, Any] = {"color": FAINT, "linewidth": 1.2, "linestyle": "dashed"}
        panel.plot(curve.radii, curve.chance, **look) if len(curve.radii) > 1 else panel.axhline(*curve.chance, **look)
        panel.annotate(
            "by chance", (curve.radii[-1], max(curve.chance)), xytext=(0, 4), textcoords="offset points",
            color=FAINT, fontsize=8, ha="right",
        )  # fmt: skip
    panel.set_xticks(curve.radii, [f"{radius:g}" for radius in curve.radii])
    panel.set_title(curve.title, loc="left", fontweight="bold")
    panel.set_title(curve.unit, loc="right", color=FAINT, fontsize=8)
    panel.set_xlabel("radius of blur, pixels")
    shown = [*curve.values, *curve.low, *curve.high, *curve.chance]
    if 0 <= min(shown) < 0.5 * max(shown):
        panel.set_ylim(bottom=0)
