"""Which artifact came from which, by the digests in their histories, as a picture of boxes and lines.

An input that does not lie in the folder is drawn, too; how it was made is followed where the history leaves no doubt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from dalle_cli.report.markup import Attributes, Html, el, join
from dalle_cli.report.scan import Item

WIDE, HIGH = 136, 40  # of a box
ACROSS, DOWN, LANE = 36, 12, 16  # between columns, between boxes, height of a line that passes a column
MOST_BOXES = 80
NARROW = 860  # up to so wide it fits into most windows; what is wider can be scrolled
LONGEST = 17  # characters of a name
SWEEPS = 8  # over the columns, to untangle lines
# Which stages can have made an input, by what it is called and by the stage that read it, the nearer ones first;
# histories name inputs by digest alone.
MAKERS: dict[str, dict[str, tuple[tuple[str, ...], ...]]] = {
    "captions": {"": (("tokenize",),)},
    "codes": {"train-prior": (("encode-images",),), "": (("sample",), ("encode-images",))},
    "embeddings": {"": (("sample",), ("encode-images",))},
    "images": {"": (("decode", "generate"),)},
    "drawn": {"": (("sample",),)},
    "dvae": {"": (("train-dvae",),)},
    "clip": {"": (("train-clip",),)},
    "prior": {"": (("train-prior",),)},
    "model": {
        "encode-images": (("train-dvae", "train-clip"),),
        "sample": (("train-prior",),),
        "decode": (("train-dvae", "train-decoder"),),
        "rerank": (("train-clip",),),
    },
}


@dataclass(frozen=True)
class Box:
    """An artifact or an input: what it is called, what is said of it, its place in the page ("" if it is not here)."""

    label: str
    about: str
    kind: str
    title: str
    anchor: str = ""


@dataclass
class Graph:
    """Boxes by digest, and lines from input to output."""

    boxes: dict[str, Box] = field(default_factory=dict)
    lines: dict[tuple[str, str], None] = field(default_factory=dict)

    @property
    def absent(self) -> list[Box]:
        """Inputs that do not lie in the folder."""
        return [box for box in self.boxes.values() if not box.anchor]


def trace(items: Sequence[Item], anchors: Mapping[str, str]) -> Graph:
    """The graph of all artifacts; `anchors` are their places in the page, by name."""
    graph = Graph()
    for item in items:
        history = item.history
        made = history[-1]["stage"] if history else item.kind
        title = f"{item.name}: {item.kind}" + (f" by {made}" if history else "")
        box = Box(item.label, made, item.kind, title, anchors[item.name])
        graph.boxes.setdefault(item.digest or item.name, box)
    for item in items:
        if item.history:
            _follow(graph, item.digest or item.name, item.history, len(item.history) - 1)
    return graph


def _follow(graph: Graph, made: str, history: list[dict[str, Any]], number: int) -> None:
    """Add the inputs of a stage, and what is known of theirs."""
    entry = history[number]
    for name, digest in sorted(entry["inputs"].items()):
        if digest == made or (digest, made) in graph.lines:
            continue
        graph.lines[digest, made] = None
        if digest in graph.boxes:
            continue
        maker = _maker(entry["stage"], name, history[:number])
        label = "data set" if name == "dataset" else name
        about = history[maker]["stage"] if maker is not None else f"sha256 {digest[:8]}"
        graph.boxes[digest] = Box(label, about, name, f"{label}, sha256 {digest}; not in this folder")
        if maker is not None:
            _follow(graph, digest, history, maker)


def _maker(stage: str, name: str, earlier: list[dict[str, Any]]) -> int | None:
    """The entry that made an input, where only one can have."""
    makers = MAKERS.get(name, {})
    for wanted in makers.get(stage, makers.get("", ())):
        found = [number for number, entry in enumerate(earlier) if entry["stage"] in wanted]
        if found:
            return found[0] if len(found) == 1 else None
    return None


@dataclass(frozen=True)
class Passing:
    """Where a line crosses a column on its way."""

    start: str
    end: str
    column: int


Place = str | Passing


def draw(graph: Graph) -> Html:
    """The picture; nothing where there is nothing to link, or too much to see."""
    if not graph.lines or len(graph.boxes) > MOST_BOXES:
        return Html()
    columns, routes = _columns(graph)
    _untangle(columns, list(routes.values()))
    places, wide, high = _places(columns)
    drawn = [_line(route, ends, places) for ends, route in routes.items()]
    boxes = [_box(key, box, places[key]) for key, box in graph.boxes.items()]
    about: Attributes = {
        "class": "lineage" if wide > NARROW else "lineage narrow", "role": "group", "viewBox": f"0 0 {wide} {high}",
        "width": wide, "height": high, "aria-label": "Which artifact was made from which; told in words below, too",
    }  # fmt: skip
    return el("svg", about, *drawn, *boxes)


def _columns(graph: Graph) -> tuple[list[list[Place]], dict[tuple[str, str], list[Place]]]:
    """Boxes by the longest way to them, with lanes for lines that pass; and each line's way through the columns."""
    inputs: dict[str, list[str]] = {key: [] for key in graph.boxes}
    for start, end in graph.lines:
        inputs[end].append(start)
    depth: dict[str, int] = {}

    def deep(key: str, above: frozenset[str]) -> int:
        if key not in depth:
            ways = [deep(start, above | {key}) + 1 for start in inputs[key] if start not in above]
            depth[key] = max(ways, default=0)
        return depth[key]

    columns: list[list[Place]] = [[] for _ in range(1 + max(deep(key, frozenset((key,))) for key in inputs))]
    for key in graph.boxes:
        columns[depth[key]].append(key)
    routes: dict[tuple[str, str], list[Place]] = {}
    for start, end in graph.lines:
        if depth[start] >= depth[end]:
            continue  # a header that lies of its inputs
        lanes = [Passing(start, end, column) for column in range(depth[start] + 1, depth[end])]
        for lane in lanes:
            columns[lane.column].append(lane)
        routes[start, end] = [start, *lanes, end]
    return columns, routes


def _untangle(columns: list[list[Place]], routes: list[list[Place]]) -> None:
    """Order each column by where its neighbors' lines come from, forth and back."""
    before: dict[Place, list[Place]] = {}
    after: dict[Place, list[Place]] = {}
    for route in routes:
        for start, end in pairwise(route):
            before.setdefault(end, []).append(start)
            after.setdefault(start, []).append(end)
    for sweep in range(SWEEPS):
        near, order = (before, columns) if sweep % 2 == 0 else (after, columns[::-1])
        rank = {place: number / max(1, len(column) - 1) for column in columns for number, place in enumerate(column)}
        for column in order:
            middle = {
                place: sum(rank[other] for other in near[place]) / len(near[place]) if near.get(place) else rank[place]
                for place in column
            }
            column.sort(key=middle.__getitem__)
            rank.update({place: number / max(1, len(column) - 1) for number, place in enumerate(column)})


def _places(columns: list[list[Place]]) -> tuple[dict[Place, tuple[float, float]], int, int]:
    """Left edge and middle of each box and lane; the picture's width and height."""
    heights = [sum((HIGH if isinstance(p, str) else LANE) + DOWN for p in column) - DOWN for column in columns]
    places: dict[Place, tuple[float, float]] = {}
    for number, (column, height) in enumerate(zip(columns, heights, strict=True)):
        top = 2 + (max(heights) - height) / 2
        for place in column:
            own = HIGH if isinstance(place, str) else LANE
            places[place] = (2 + number * (WIDE + ACROSS), top + own / 2)
            top += own + DOWN
    return places, len(columns) * (WIDE + ACROSS) - ACROSS + 4, max(heights) + 4


def _line(route: list[Place], ends: tuple[str, str], places: dict[Place, tuple[float, float]]) -> Html:
    """From the right of a box through its lanes to the left of another."""
    x, y = places[route[0]]
    way = f"M{x + WIDE} {y:g}"
    for place in route[1:]:
        left, middle = places[place]
        bend = ACROSS / 2
        way += f"C{left - ACROSS + bend:g} {y:g} {left - bend:g} {middle:g} {left:g} {middle:g}"
        way += f"H{left + WIDE:g}" if isinstance(place, Passing) else ""
        y = middle
    return el("path", {"d": way, "class": "way", "data-from": ends[0], "data-to": ends[1]})


def _box(key: str, box: Box, place: tuple[float, float]) -> Html:
    x, y = place
    label = box.label if len(box.label) <= LONGEST else f"{box.label[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"
    top = y - HIGH / 2
    inside = (
        el("title", None, box.title),
        el("rect", {"x": f"{x:g}", "y": f"{top:g}", "width": WIDE, "height": HIGH, "rx": 8}),
        el("text", {"x": f"{x + 11:g}", "y": f"{top + 17:g}", "class": "name"}, label),
        el("text", {"x": f"{x + 11:g}", "y": f"{top + 31:g}", "class": "about"}, box.about),
    )
    look = box.kind.partition(".")[0] if box.anchor else "absent"
    drawn = el("g", {"class": f"box {look}", "data-key": key}, *inside)
    return el("a", {"href": f"#{box.anchor}"}, drawn) if box.anchor else drawn


def words(graph: Graph) -> Html:
    """The same as a list, for who cannot see the picture or where it would be too large."""
    rows = []
    for key, box in graph.boxes.items():
        sources = [graph.boxes[start] for start, end in graph.lines if end == key]
        if sources:
            told = join([_name(source) for source in sources], ", ")
            rows.append(el("li", None, _name(box), " from ", told))
    return el("ul", {"class": "words"}, *rows)


def _name(box: Box) -> Html:
    return el("a", {"href": f"#{box.anchor}"}, box.label) if box.anchor else el("span", {"class": "faint"}, box.label)
