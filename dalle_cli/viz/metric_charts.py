"""Image metrics against the radius of blur, as in fig. 9 of Ramesh et al. 2021."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dalle_cli.viz.charts import COLORS, FAINT, HIGH, STYLE, WIDE, load_matplotlib, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Key in a table of scores: title, unit (without one the number of candidates), key of the value by chance.
METRICS = {
    "frechet": ("frechet", "lower is better", ""), "kernel": ("kernel distance", "lower is better", ""),
    "inception": ("Inception score", "higher is better", ""),
    "precision": ("precision", "share, higher is better", ""), "recall": ("recall", "share, higher is better", ""),
    "clip": ("CLIP score", "100 x cosine", "shuffled"), "r1": ("retrieval R@1", "share whose own is nearest", "chance"),
    "r5": ("retrieval R@5", "share with their own among 5", "chance"),
}  # fmt: skip


class Curve(NamedTuple):
    """One metric by radius, with its interval and its value by chance where they are known (else empty lists)."""

    title: str
    unit: str
    radii: list[float]
    values: list[float]
    low: list[float]
    high: list[float]
    chance: list[float]


def curves(scores: Sequence[dict[str, Any]]) -> list[Curve]:
    """The curves in the scores that `evaluate` wrote, one table for each radius."""
    tables = sorted(({**table, **table.get("retrieval", {})} for table in scores), key=lambda table: table["blur"])
    found = []
    for key, (title, unit, baseline) in METRICS.items():
        if cells := [(float(table["blur"]), table[key]) for table in tables if key in table]:
            title, _, network = cells[0][1].get("name", title).partition(" (")  # both do not fit into one title
            unit = network.rstrip(")") or unit or f"of {tables[0]['k']}"
            lines = [[float(c[k]) for _, c in cells if c.get(k) is not None] for k in ("low", "high", baseline)]
            found.append(Curve(title, unit, [blur for blur, _ in cells], [float(c["value"]) for _, c in cells], *lines))
    return found


def draw(found: Sequence[Curve], title: str) -> "Figure":
    """A panel for each curve.

    Raises:
        DalleError: matplotlib is not installed.
    """
    columns = min(len(found), 3)
    with load_matplotlib().rc_context(STYLE):
        figure, axes = panels(len(found), columns, (max(WIDE, 5.0 / columns), HIGH), title)
        for panel, curve in zip(axes, found, strict=True):
            _panel(panel, curve)
    return figure


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
