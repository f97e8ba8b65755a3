"""Training curves as inline SVG in the colors of the page, with the values that its script shows at the pointer."""

import io
import re
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from dalle_cli.errors import DalleError
from dalle_cli.viz import charts
from dalle_cli.viz.curves import Curves, choose

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE, HIGH = 360, 200  # pixels of a panel
BOX = (40, 24, 276, 166)  # of its curves: left, bottom, width, height
MOST_PANELS = 16
PALETTE = {charts.INK: "var(--ink)", charts.FAINT: "var(--faint)", charts.RULE: "var(--line)"}
CLASSES = {"training-0": "training", "validation-0": "validation", "end": "end"}
# Text is an HTML page's own; a line has room for each of its points.
STYLE = {**charts.STYLE, "figure.dpi": 72, "svg.fonttype": "none", "path.simplify": False}


class Panel(NamedTuple):
    """One metric of a run: its chart as SVG, and the points of its lines in pixels."""

    label: charts.Label
    svg: str
    values: dict[str, Any]


def draw(run: Curves, prefix: str) -> tuple[list[Panel], list[str]]:
    """A panel for each metric that varies, and the metrics left out; `prefix` makes the ids within unique.

    Raises:
        DalleError: matplotlib is not installed.
    """
    try:
        keys = choose([run])
    except DalleError:
        keys = run.keys
    with charts.load_matplotlib().rc_context(STYLE):
        return [_panel(key, run, f"{prefix}-{i}") for i, key in enumerate(keys[:MOST_PANELS])], keys[MOST_PANELS:]


def _panel(key: str, run: Curves, prefix: str) -> Panel:
    figure: Figure = charts.load_matplotlib(".figure").Figure((WIDE / 72, HIGH / 72))
    left, bottom, wide, high = BOX
    panel = figure.add_axes((left / WIDE, bottom / HIGH, wide / WIDE, high / HIGH))
    panel.set_xlim(0, run.last or 1)
    charts.plot(panel, key, [run])
    panel.xaxis.set_major_locator(charts.load_matplotlib(".ticker").MaxNLocator(4))
    lines: list[dict[str, Any]] = []
    for line in panel.lines:
        data = np.asarray(line.get_xydata(), dtype=np.float64)
        at = [[round(x, 1), round(HIGH - y, 1)] for x, y in panel.transData.transform(data).tolist()]
        kind = CLASSES[str(line.get_gid())]
        x, y = ([float(f"{value:.8g}") for value in values] for values in data.T.tolist())
        lines.append({"name": kind, "class": kind, "x": x, "y": y, "at": at})
    ends = ", ".join(f"{line['name']} {charts.number(line['y'][-1])}" for line in lines)
    label = charts.label(key)
    about = f"{label.title} over {charts.number(run.last)} updates; at the end {ends}"
    attributes = {"class": f"panel ends-{lines[-1]['class']}", "role": "img", "tabindex": "0", "aria-label": about}
    values = {"lines": lines, "top": HIGH - bottom - high, "bottom": HIGH - bottom}
    return Panel(label, inline(figure, prefix, attributes), values)


def inline(figure: "Figure", prefix: str, attributes: dict[str, str]) -> str:
    """A figure as an <svg> for an HTML page: no inline styles, which its policy forbids, and ids of its own."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style", "clipPath"):
                parent.remove(child)
    used = set(re.findall(rb'href="#(\w+)"', file.getvalue()))
    for element in root.iter():
        element.tag, element.tail = element.tag.rpartition("}")[2], None
        element.text = (element.text or "").strip()
        element.attrib = _attributes(element.attrib, prefix, used)
    for marker in root.iterfind(".//defs/*"):
        marker.attrib.pop("stroke", None)  # inherited from its <use>, which has the color of the page
    root.attrib = {"viewBox": f"0 0 {WIDE} {HIGH}", **attributes}
    ElementTree.SubElement(root, "g", {"class": "pointer"})
    return ElementTree.tostring(root, encoding="unicode")


def _attributes(old: dict[str, str], prefix: str, used: set[bytes]) -> dict[str, str]:
    new = {}
    for key, value in old.items():
        name = key.rpartition("}")[2]
        if name == "id" and value in CLASSES:
            new["class"] = CLASSES[value]
        elif name == "id" and value.encode() in used:
            new["id"] = f"{prefix}-{value}"
        elif name == "href":
            new["href"] = f"#{prefix}-{value[1:]}"
        elif name == "style":
            rules = dict(re.findall(r"([\w-]+): *([^;]+)", value))
            new |= {rule: PALETTE.get(said, said) for rule, said in rules.items() if not rule.startswith("font")}
        elif name not in ("id", "clip-path") and not value.startswith("rotate(-0"):
            new[name] = re.sub(r"\d+\.\d{2,}", lambda found: f"{float(found[0]):.1f}", value) if name == "d" else value
    return new
