"""Charts by matplotlib: training curves, heat maps over the code grid, and files of them.

One panel shows one metric. Each run has its color: a thin line for training, a thick one with points for validation.
"""

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dalle_cli.errors import DalleError
from dalle_cli.viz.curves import Curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ENDS = 6  # values beside a panel
MOST_TICKS = 5
MOST_POINTS = 60  # marked on a curve
MOST_STEPS = 300  # of a curve; a longer one is reduced to means of neighbors, or its noise would hide the others

INK, FAINT, RULE = "#262626", "#6e6e6a", "#e4e4e0"
# The palette of Okabe and Ito, which color-blind people can tell apart, without its pale yellow; then dashes.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#262626")
DASHES = ("solid", "dashed", "dotted", "dashdot")
WIDE, HIGH, DPI = 3.7, 2.5, 160  # inches of a panel, dots per inch
LINE = 0.085  # least distance of the values beside a panel, as a share of its height
KINDS: dict[str, dict[str, Any]] = {
    "training": {"linewidth": 0.9, "alpha": 0.7, "markersize": 3},
    "validation": {"linewidth": 2.0, "markersize": 3.6},
}
STYLE = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.titlepad": 5, "legend.fontsize": 9, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT, "axes.linewidth": 0.7,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": RULE, "grid.linewidth": 0.7, "axes.axisbelow": True,
    "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "xtick.major.size": 3, "ytick.major.size": 0, "text.color": INK,
    "axes.labelcolor": FAINT, "axes.labelsize": 8.5, "svg.hashsalt": "dalle",
    "figure.dpi": DPI, "figure.titlesize": 12, "figure.titleweight": "bold",
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.08,
}  # fmt: skip
LOG_RANGE = 12.0  # ratio of the largest to the smallest value from which a scale is logarithmic
LINEAR = ("lr", "accuracy", "psnr", "codes_used", "seconds")
# First bytes of a file of each format, and the metadata to leave out: with a date no two files would be equal.
FORMATS: dict[str, tuple[tuple[bytes, ...], str]] = {
    ".png": ((b"\x89PNG",), "Software"), ".svg": ((b"<?xml", b"<svg"), "Date"), ".pdf": ((b"%PDF",), "CreationDate"),
}  # fmt: skip


class Label(NamedTuple):
    """The title of a panel, and the unit of its values."""

    title: str
    unit: str = ""


LABELS = {
    "image_nats": Label("image loss", "nats per code"), "text_nats": Label("text loss", "nats per token"),
    "recon": Label("reconstruction loss", "per pixel value"), "psnr": Label("reconstruction", "PSNR, dB"),
    "accuracy": Label("own caption nearest", "share"), "kl": Label("KL divergence", "nats per code"),
    "codebook": Label("codebook loss"), "codes_used": Label("codes in use", "codes"),
    "perplexity": Label("perplexity of codes", "codes"), "scale": Label("CLIP logit scale", "1 / temperature"),
    "grad_norm": Label("gradient norm"), "lr": Label("learning rate"), "rate": Label("speed", "per second"),
    "peak_memory": Label("peak memory", "MiB"),
}  # fmt: skip


def label(key: str) -> Label:
    """The label of a metric; the metric's own name where it is unknown."""
    return LABELS.get(key, Label(key.replace("_", " ")))


def number(value: float) -> str:
    """0.0284, 33, 12k, 4.7M, 2e-5."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}".replace("e-0", "e-")


def load_matplotlib(name: str = "") -> Any:
    """The module `matplotlib`, or one within it.

    Raises:
        DalleError: it is not installed.
    """
    try:
        return importlib.import_module(f"matplotlib{name}")
    except ImportError:
        raise DalleError(
            "expected matplotlib to draw charts, found it is not installed; run pip install 'dalle-cli[plot]'"
        ) from None


def panels(n: int, columns: int, size: tuple[float, float], title: str | None) -> tuple["Figure", list["Axes"]]:
    """A figure of `n` panels of `size` inches each, under a title."""
    rows = -(-n // columns)
    figure: Figure = load_matplotlib(".figure").Figure(
        (size[0] * columns, size[1] * rows + 0.34 * bool(title)), layout="constrained"
    )
    axes: list[Axes] = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for empty in axes[n:]:
        empty.remove()
    if title:
        figure.suptitle(title, x=0.1 / (size[0] * columns), ha="left")
    return figure, axes[:n]


def draw(runs: Sequence[Curves], keys: Sequence[str], x: str = "step", title: str | None = None) -> "Figure":
    """A panel for each metric of `keys`.

    Raises:
        DalleError: matplotlib is not installed.
    """
    columns = min(len(keys), 3 if len(keys) != 4 else 2)
    title = title or (runs[0].name if len(runs) == 1 else None)
    with load_matplotlib().rc_context(STYLE):
        figure, axes = panels(len(keys), columns, (6.4, 4.0) if len(keys) == 1 else (WIDE, HIGH), title)
        lines = [line for run in runs for key in keys for line in run.of(key)]
        unit, length = _unit(x, most := max(max(line.x) for line in lines))
        for place, (panel, key) in enumerate(zip(axes, keys, strict=True)):
            panel.set_xlim(0, most / length * 1.02 or 1)
            plot(panel, key, runs, length)
            panel.set_title(label(key).title, loc="left", fontweight="bold")
            panel.set_title(label(key).unit, loc="right", color=FAINT, fontsize=8)
            if place >= len(keys) - columns:
                panel.set_xlabel(unit)
        _legend(figure, runs, keys)
    return figure


def _unit(x: str, most: float) -> tuple[str, float]:
    """The unit of the horizontal axis, and how much of `x` it is."""
    if x == "step":
        return "updates", 1.0
    units = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))
    return next(((name, length) for name, length in units if most >= 2 * length), ("seconds", 1.0))


def plot(panel: "Axes", key: str, runs: Sequence[Curves], length: float = 1.0) -> None:
    """Draw one metric of all runs that have it; the last value of each stands at the right."""
    ends: dict[int, float] = {}
    values: list[float] = []
    for kind, style in KINDS.items():
        for i, run in enumerate(runs):
            if full := getattr(run, kind).get(key):
                line = full.thin(MOST_STEPS)
                ends[i] = line.y[-1]  # validation comes second, and wins
                values += line.y
                few = len(line.y) == 1 or (kind == "validation" and len(line.y) <= MOST_POINTS)
                at = [x / length for x in line.x]
                panel.plot(at, line.y, marker="o" if few else "", gid=f"{kind}-{i}", **_look(i), **style)
    _scale(panel, key, min(values), max(values))
    if key != "lr" and len(ends) <= MOST_ENDS:
        _ends(panel, [(value, _look(i)["color"]) for i, value in ends.items()])


def _scale(panel: "Axes", key: str, low: float, high: float) -> None:
    ticker = load_matplotlib(".ticker")
    if key not in LINEAR and low > 0 and high / low > LOG_RANGE:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high / low < 400 else (1,)))
        panel.yaxis.set_minor_locator(ticker.NullLocator())
    else:
        panel.yaxis.set_major_locator(ticker.MaxNLocator(MOST_TICKS))
        if 0 <= low < 0.3 * high:
            panel.set_ylim(bottom=0)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: number(value)))


def _look(i: int) -> dict[str, Any]:
    """The color and dashes of a run."""
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}


def _ends(panel: "Axes", ends: list[tuple[float, str]]) -> None:
    """Write the last values beside the panel, moved apart where they would overlap."""
    panel.get_ylim()  # fixes the scale, which matplotlib defers
    to_panel = panel.transData + panel.transAxes.inverted()
    places = sorted((to_panel.transform((0, value))[1], value, color) for value, color in ends)
    height = -math.inf
    heights = [height := max(place, height + LINE) for place, _, _ in places]
    over = max(0.0, heights[-1] - 1)
    for at, (_, value, color) in zip(heights, places, strict=True):
        panel.annotate(
            number(float(f"{value:.3g}")), (1, at - over), xytext=(4, 0), xycoords="axes fraction",
            textcoords="offset points", color=color, fontsize=8, va="center", gid="end",
        )  # fmt: skip


def _legend(figure: "Figure", runs: Sequence[Curves], keys: Sequence[str]) -> None:
    """Below the panels: the color of each run, and the line of training and of validation."""
    new = load_matplotlib(".lines").Line2D
    named = runs if len(runs) > 1 else []
    entries = [new([], [], linewidth=2.2, label=run.name, **_look(i)) for i, run in enumerate(named)]
    for kind, style in KINDS.items():
        if any(key in getattr(run, kind) for run in runs for key in keys):
            entries.append(new([], [], color=FAINT, marker="o" * (kind == "validation"), label=kind, **style))
    longest = max(len(str(entry.get_label())) for entry in entries)
    columns = min(len(entries), max(1, int(figure.get_figwidth() / (0.65 + 0.08 * longest))))
    figure.set_figheight(figure.get_figheight() + 0.21 * -(-len(entries) // columns) + 0.12)
    figure.legend(handles=entries, loc="outside lower left", ncols=columns)


class Heat(NamedTuple):
    """Values over the code grid, (H, W); a `signed` map puts 0 in the middle of its colors."""

    label: Label
    values: Sequence[Sequence[float]]
    signed: bool = False


def heat_maps(maps: Sequence[Heat], title: str | None = None) -> "Figure":
    """A panel for each map, beside its color scale.

    Raises:
        DalleError: matplotlib is not installed.
    """
    with load_matplotlib().rc_context({**STYLE, "axes.grid": False}):
        figure, axes = panels(len(maps), len(maps), (4.1, 3.5), title)
        for panel, heat in zip(axes, maps, strict=True):
            most = max(abs(value) for row in heat.values for value in row) or 1.0
            colors: dict[str, Any] = {"cmap": "PuOr_r", "vmin": -most, "vmax": most} if heat.signed else {}
            image = panel.imshow(heat.values, interpolation="nearest", **{"cmap": "viridis", **colors})
            panel.set_title(heat.label.title, loc="left", fontweight="bold")
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_locator(load_matplotlib(".ticker").MaxNLocator(MOST_TICKS, integer=True))
            scale = figure.colorbar(image, ax=panel, shrink=0.85, label=heat.label.unit)
            scale.outline.set_visible(False)
    return figure


def check(path: Path, force: bool) -> None:
    """Raises: DalleError if the suffix is no format of charts, or if something else than a chart lies at `path`."""
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise DalleError(f"expected an image's name, with {' or '.join(FORMATS)}, found {path.name}; rename it")
    if path.is_dir() or (path.exists() and not force and not path.read_bytes().startswith(FORMATS[suffix][0])):
        raise DalleError(f"expected to write an image to {path}, found something else; choose another -o or --force")


def save(figure: "Figure", path: Path, suffix: str) -> None:
    """Write a figure in the format of `suffix`; the same figure gives the same bytes."""
    kind = suffix.lower()
    with load_matplotlib().rc_context(STYLE):
        figure.savefig(path, format=kind.removeprefix("."), metadata={FORMATS[kind][1]: None})
