"""Curves of training runs as a picture, and figures by place in the grid of codes.

A panel shows one figure; each run has a color there, thin for training, thick with points for held-out data.
"""

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dalle_cli.errors import DalleError
from dalle_cli.viz.curves import Curves, Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ENDS = 6  # values beside a panel
MOST_TICKS = 5
MOST_POINTS = 60  # marked on a curve
MOST_STEPS = 300  # of a curve; a longer one is drawn as the means of neighbors, or its noise would hide the others

INK, FAINT, RULE = "#262626", "#6e6e6a", "#e4e4e0"
# Okabe and Ito's colors, which color-blind people can tell apart, the pale yellow left out; then dashes.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#262626")
DASHES = ("solid", "dashed", "dotted", "dashdot")
WIDE, HIGH, DPI = 3.7, 2.5, 160  # inches of a panel, dots an inch
LINE = 0.085  # of a panel's height, from one of the values beside it to the next
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
    "axes.labelcolor": FAINT, "axes.labelsize": 8.5, "axes.formatter.limits": (-3, 5), "svg.hashsalt": "dalle",
}  # fmt: skip
LOG_RANGE = 12.0  # largest over smallest, from where on a scale is logarithmic
LINEAR = ("lr", "accuracy", "psnr", "codes_used", "seconds")


class Format(NamedTuple):
    """How files of a kind begin, and what of their metadata must be left out, or no two would be equal."""

    begins: tuple[bytes, ...]
    hushed: dict[str, None]


FORMATS = {
    ".png": Format((b"\x89PNG",), {"Software": None}),
    ".svg": Format((b"<?xml", b"<svg"), {"Date": None}),
    ".pdf": Format((b"%PDF",), {"CreationDate": None}),
}


class Label(NamedTuple):
    """What a panel is headed by, and what its numbers are."""

    title: str
    unit: str = ""


LABELS = {
    "image_nats": Label("image loss", "nats per code"),
    "text_nats": Label("text loss", "nats per token"),
    "loss": Label("loss"),
    "recon": Label("reconstruction loss", "per pixel value"),
    "psnr": Label("reconstruction", "PSNR, dB"),
    "accuracy": Label("own caption nearest", "share"),
    "kl": Label("KL divergence", "nats per code"),
    "codebook": Label("codebook loss"),
    "codes_used": Label("codes in use", "codes"),
    "perplexity": Label("perplexity of codes", "codes"),
    "scale": Label("CLIP's scale", "1 / temperature"),
    "grad_norm": Label("gradient norm"),
    "lr": Label("learning rate"),
    "rate": Label("speed", "a second"),
    "peak_memory": Label("peak memory", "MiB"),
}


def draw(runs: Sequence[Curves], keys: Sequence[str], x: str = "step", title: str | None = None) -> "Figure":
    """The picture: a panel for each key.

    Raises:
        DalleError: matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    n_columns = min(len(keys), 3 if len(keys) != 4 else 2)
    n_rows = -(-len(keys) // n_columns)
    wide, high = (6.4, 4.0) if len(keys) == 1 else (WIDE, HIGH)
    title = title or (runs[0].name if len(runs) == 1 else None)
    with matplotlib.rc_context(STYLE):
        new = importlib.import_module("matplotlib.figure").Figure
        picture: Figure = new((wide * n_columns, high * n_rows), dpi=DPI, layout="constrained")
        panels = picture.subplots(n_rows, n_columns, squeeze=False).flatten().tolist()
        for panel in panels[len(keys) :]:
            panel.remove()
        lines = [lines[key] for run in runs for lines in (run.training, run.validation) for key in keys if key in lines]
        most = max(max(line.x) for line in lines)
        unit, length = _unit(x, most)
        for place, (panel, key) in enumerate(zip(panels, keys, strict=False)):
            panel.set_xlim(0, most / length * 1.02 or 1)
            _panel(panel, key, runs, length)
            if place >= n_columns * (n_rows - 1):
                panel.set_xlabel(unit)
        _header(picture, runs, keys, title)
    return picture


def check_drawable() -> None:
    """Raises: DalleError if matplotlib is not installed."""
    _matplotlib()


def _matplotlib() -> Any:
    try:
        return importlib.import_module("matplotlib")
    except ImportError:
        raise DalleError(
            "expected matplotlib to draw curves, found it is not installed; run pip install 'dalle-cli[plot]'"
        ) from None


def _unit(x: str, most: float) -> tuple[str, float]:
    """What the axis is called, and how much of `x` one of its units is."""
    if x == "step":
        return "updates", 1.0
    units = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))
    return next(((name, length) for name, length in units if most >= 2 * length), ("seconds", 1.0))


def _panel(panel: "Axes", key: str, runs: Sequence[Curves], length: float) -> None:
    """One figure of all runs that have it, with the last value of each at the right."""
    ends: dict[int, float] = {}
    values: list[float] = []
    for kind, style in KINDS.items():
        for number, run in enumerate(runs):
            if line := getattr(run, kind).get(key):
                drawn = _calm(line)
                ends[number] = drawn.y[-1]  # of held-out data where there is any
                values += drawn.y
                few = len(drawn.y) == 1 or (kind == "validation" and len(drawn.y) <= MOST_POINTS)
                at, point = [x / length for x in drawn.x], "o" if few else ""
                panel.plot(at, drawn.y, marker=point, **_look(number), **style)
    low, high = min(values), max(values)
    if key not in LINEAR and low > 0 and high / low > LOG_RANGE:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(_ticker("LogLocator", subs=(1, 2, 5) if high / low < 400 else (1,)))
        panel.yaxis.set_minor_locator(_ticker("NullLocator"))
    else:
        panel.yaxis.set_major_locator(_ticker("MaxNLocator", MOST_TICKS))
        if 0 <= low < 0.3 * high:
            panel.set_ylim(bottom=0)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(_ticker("FuncFormatter", lambda value, _: _plain(value)))
    label = LABELS.get(key, Label(key.replace("_", " ")))
    panel.set_title(label.title, loc="left", fontweight="bold")
    panel.set_title(label.unit, loc="right", color=FAINT, fontsize=8)
    if key != "lr" and len(ends) <= MOST_ENDS:
        _ends(panel, [(value, _look(number)["color"]) for number, value in ends.items()])


def _look(number: int) -> dict[str, Any]:
    """Color and dashes of a run."""
    return {"color": COLORS[number % len(COLORS)], "linestyle": DASHES[number // len(COLORS) % len(DASHES)]}


def _calm(line: Line) -> Line:
    """A line of many points by means of as many neighbors each."""
    each = -(-len(line.y) // MOST_STEPS)
    groups = [slice(start, start + each) for start in range(0, len(line.y), each)]
    return Line(*([sum(part) / len(part) for part in (values[g] for g in groups)] for values in (line.x, line.y)))


def _ticker(name: str, *args: Any, **options: Any) -> Any:
    return getattr(importlib.import_module("matplotlib.ticker"), name)(*args, **options)


def _plain(value: float) -> str:
    """0.0284, 33, 12k, 2e-5."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:g}".replace("e-0", "e-")


def _ends(panel: "Axes", ends: list[tuple[float, str]]) -> None:
    """The last values beside the panel, moved apart where they would touch."""
    panel.get_ylim()  # fixes the scale, which matplotlib puts off
    to_panel = panel.transData + panel.transAxes.inverted()
    places = sorted((to_panel.transform((0, value))[1], value, color) for value, color in ends)
    height = -math.inf
    heights = [height := max(place, height + LINE) for place, _, _ in places]
    over = max(0.0, heights[-1] - 1) if heights else 0.0
    for at, (_, value, color) in zip(heights, places, strict=True):
        panel.annotate(
            _plain(float(f"{value:.3g}")), (1, at - over), xytext=(4, 0), xycoords="axes fraction",
            textcoords="offset points", color=color, fontsize=8, va="center",
        )  # fmt: skip


def _header(picture: "Figure", runs: Sequence[Curves], keys: Sequence[str], title: str | None) -> None:
    """Above the panels a title, and what the colors are, and what is thin and what thick."""
    new = importlib.import_module("matplotlib.lines").Line2D
    entries = []
    if len(runs) > 1:
        entries = [new([], [], linewidth=2.2, label=run.name, **_look(number)) for number, run in enumerate(runs)]
    for kind, style in KINDS.items():
        if any(key in getattr(run, kind) for run in runs for key in keys):
            name, point = ("held out", "o") if kind == "validation" else (kind, "")
            entries.append(new([], [], color=FAINT, marker=point, label=name, **style))
    wide, high = picture.get_size_inches()
    longest = max(len(str(entry.get_label())) for entry in entries)
    columns = min(len(entries), max(1, int(wide / (0.65 + 0.08 * longest))))
    above = 0.34 * bool(title) + 0.21 * -(-len(entries) // columns) + 0.12  # inches
    picture.set_size_inches(wide, high + above)
    engine = picture.get_layout_engine()
    assert engine is not None
    engine.set(w_pad=0.1, h_pad=0.08, rect=(0, 0, 1, high / (high + above)))  # type: ignore[call-arg]
    left = 0.1 / wide
    if title:
        top = 1 - 0.1 / (high + above)
        picture.text(left, top, title, fontsize=12, fontweight="bold", va="top")
    place = (left, 1 - (0.34 * bool(title) + 0.02) / (high + above))
    picture.legend(handles=entries, loc="upper left", bbox_to_anchor=place, ncols=columns, borderaxespad=0)


class Heat(NamedTuple):
    """A figure by place, (H, W); `signed` is one whose sign matters, so that 0 is white and both sides look alike."""

    label: Label
    values: Sequence[Sequence[float]]
    signed: bool = False


def heat_maps(maps: Sequence[Heat], title: str | None = None) -> "Figure":
    """Each figure as a grid of colors beside its scale.

    Raises:
        DalleError: matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        new = importlib.import_module("matplotlib.figure").Figure
        above = 0.34 * bool(title)  # inches
        picture: Figure = new((4.1 * len(maps), 3.5 + above), dpi=DPI, layout="constrained")
        engine = picture.get_layout_engine()
        assert engine is not None
        engine.set(w_pad=0.1, h_pad=0.08, rect=(0, 0, 1, 3.5 / (3.5 + above)))  # type: ignore[call-arg]
        for panel, heat in zip(picture.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
            most = max(abs(value) for row in heat.values for value in row) or 1.0
            colors: dict[str, Any] = {"cmap": "PuOr_r", "vmin": -most, "vmax": most} if heat.signed else {}
            drawn = panel.imshow(heat.values, interpolation="nearest", **{"cmap": "viridis", **colors})
            panel.set_title(heat.label.title, loc="left", fontweight="bold")
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_locator(_ticker("MaxNLocator", MOST_TICKS, integer=True))
            scale = picture.colorbar(drawn, ax=panel, shrink=0.85, label=heat.label.unit)
            scale.outline.set_visible(False)
        if title:
            picture.text(
                0.1 / (4.1 * len(maps)), 1 - 0.1 / (3.5 + above), title, fontsize=12, fontweight="bold", va="top"
            )
    return picture


def check(path: Path, force: bool) -> None:
    """Raises: DalleError if the name asks for no format we write, or anything but such a picture lies there."""
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        raise DalleError(f"expected a picture's name, with {' or '.join(FORMATS)}, found {path.name}; rename it")
    if path.is_dir() or (path.exists() and not force and not path.read_bytes().startswith(form.begins)):
        raise DalleError(f"expected to write a picture to {path}, found something else; choose another -o or --force")


def save(picture: "Figure", path: Path, suffix: str) -> None:
    """Write the picture in the format of a name that ends so; the same picture is the same bytes."""
    kind = suffix.lower()
    with _matplotlib().rc_context(STYLE):
        picture.savefig(path, format=kind.removeprefix("."), metadata=FORMATS[kind].hushed)
