"""One page of a run, complete in itself: curves, pictures, scores, and how every artifact came to be.

What the page is, is a function of the files alone: no times, no paths from outside the folder.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dalle_cli import __version__
from dalle_cli.report import charts as panels
from dalle_cli.report import details as dossiers
from dalle_cli.report import html, json_tables, lineage
from dalle_cli.report import sections as exhibits
from dalle_cli.report.markup import Html, count, duration, el, join, number, size, text
from dalle_cli.report.scan import Findings, Item, Training
from dalle_cli.viz.charts import LABELS, Label

GENERATOR = "dalle report"
HERE = Path(__file__).parent
MOST_FIGURES = 3  # of held-out data, in the table of models
MOST_LINES = 60  # of a text
ABSENT = {
    "Models": "No weights. The train- stages write them.",
    "Curves": "No log of a training (a metrics.jsonl in the .run folder beside weights).",
    "While training": "No sheets that a training drew (samples/ in the .run folder beside weights).",
    "Samples": "No pictures drawn for prompts. dalle sample, decode and rerank, or generate --images, write them.",
    "Scores": "No scores. dalle evaluate writes them as JSON; they belong in this folder.",
    "History": "No artifact that says how it was made.",
}


class Section(NamedTuple):
    """A part of the page."""

    name: str
    body: Html

    @property
    def anchor(self) -> str:
        """Where it stands."""
        return self.name.lower().replace(" ", "-")


def page(found: Findings, title: str | None = None) -> str:
    """The whole page, as HTML."""
    title = title or found.title
    anchors = {item.name: f"artifact-{place}" for place, item in enumerate(found.items)}
    links = {item.digest: anchors[item.name] for item in found.items if item.digest}
    curves, values = _curves(found)
    beside = _beside_scores(found)
    drawn = join((exhibits.samples(found), exhibits.loose(found, beside)))
    sections = [
        Section("Models", _models(found)),
        Section("Curves", curves),
        Section("While training", exhibits.sheets(found)),
        Section("Samples", drawn),
        Section("Scores", _scores(found, beside, links)),
        *_history(found, anchors, links),
    ]
    absent = [ABSENT[section.name] for section in sections if not section.body and section.name in ABSENT]
    sections.append(Section("Left out", _left_out(absent, found.notes)))
    return _whole(title, _lead(found), [section for section in sections if section.body], values)


def _whole(title: str, lead: str, sections: Sequence[Section], values: object) -> str:
    """The template filled in; only this page's own script and style may run, and nothing may be fetched."""
    sheet = (HERE / "page.css").read_text(encoding="utf-8") + (HERE / "report.css").read_text(encoding="utf-8")
    script = (HERE / "report.js").read_text(encoding="utf-8")
    policy = f"default-src 'none'; img-src data:; style-src '{_sha(sheet)}'; script-src '{_sha(script)}'"
    links = [el("a", {"href": f"#{section.anchor}"}, section.name) for section in sections]
    body = join((
        el("header", None, el("h1", None, title), el("p", {"class": "lead"}, lead)),
        el("nav", {"aria-label": "Sections"}, el("div", None, *links)),
        el("main", None, *(
            el("section", {"id": section.anchor}, el("h2", None, section.name), section.body) for section in sections
        )),
        el("footer", None, f"Made by dalle report, version {__version__}. Everything is in this one file."),
    ))  # fmt: skip
    slots = {"generator": GENERATOR, "policy": policy, "title": text(title), "sheet": sheet, "body": body}
    return html.fill("report.html", {**slots, "values": html.embed(values), "script": script})


def _sha(inside: str) -> str:
    """How a policy names an element by what is in it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()


def _lead(found: Findings) -> str:
    weights = found.of_kind("weights.")
    total = sum(dossiers.parameters(artifact) for _, artifact in weights)
    parts = [f"{count(len(weights), 'model')} with {number(total)} parameters"] if weights else []
    for kind, one in (("captions", "caption"), ("codes", "grid of codes"), ("images", "picture")):
        rows = sum(len(artifact) for _, artifact in found.of_kind(kind))
        if rows:
            parts.append(count(rows, one) if kind != "codes" else f"{rows:,} grids of codes")
    return ", ".join(parts)


def _models(found: Findings) -> Html:
    """Weights, how large they are, and how their training went."""
    runs = {training.name: training for training in found.trainings}
    rows = []
    for item, artifact in found.of_kind("weights."):
        training = runs.pop(item.name.removesuffix(".safetensors"), None)
        shown = [artifact.headers[0].table.about.removeprefix("weights of a "), number(dossiers.parameters(artifact))]
        rows.append(_row(item.name.removesuffix(".safetensors"), [*shown, size(item.size)], training))
    rows += [_row(name, ["in training", "", ""], training) for name, training in runs.items()]
    if not rows:
        return Html()
    names = ("", "", "parameters", "size", "updates", "took", "speed", "peak memory", "held out at the end")
    align = {"parameters", "size", "updates", "took", "speed", "peak memory"}
    head = [el("th", {"scope": "col", "class": "number" if name in align else None}, name) for name in names]
    return el(
        "div", {"class": "wide"}, el("table", {"class": "models"}, el("thead", None, el("tr", None, *head)), *rows)
    )


def _row(name: str, about: list[str], training: Training | None) -> Html:
    told = ["", "", "", ""]
    curves = training.curves if training else None
    if training and curves:
        steps = max(line.x[-1] for lines in (curves.training, curves.validation) for line in lines.values())
        rate, memory = (curves.training.get(key) for key in ("rate", "peak_memory"))
        told = [
            f"{steps:,.0f}",
            duration(training.seconds) if training.seconds is not None else "",
            f"{number(float(f'{rate.y[-1]:.3g}'))}/s" if rate else "",
            size(round(memory.y[-1] * 2**20)) if memory else "",
        ]
    held_out = []
    for key, line in list((curves.validation if curves else {}).items())[:MOST_FIGURES]:
        label = LABELS.get(key, Label(key.replace("_", " ")))
        held_out.append(f"{label.title} {number(float(f'{line.y[-1]:.4g}'))}")
    first, *numbers = about
    cells = [el("td", {"class": "number"}, cell) for cell in (*numbers, *told)]
    return el(
        "tr", None, el("th", {"scope": "row"}, name), el("td", None, first), *cells, el("td", None, ", ".join(held_out))
    )


def _curves(found: Findings) -> tuple[Html, list[Any]]:
    """The panels of each training, and the numbers behind them."""
    parts: list[Html] = []
    values: list[Any] = []
    for training in found.trainings:
        if training.curves:
            drawn, told, left = panels.draw(training.curves)
            values += told
            parts += [el("h3", None, training.name), el("p", {"class": "faint"}, _kept(training)), drawn]
            if left:
                found.notes.append(f"{training.name}.run: curves of {', '.join(left)}; dalle plot --keys draws them")
    key = [
        _key("training", "training (means of neighbors where there are many)"),
        _key("validation", "held out"),
        el("span", {"class": "faint"}, "across: updates"),
    ]
    return (join((el("p", None, *key), *parts)) if parts else Html(), values)


def _key(kind: str, told: str) -> Html:
    line = el("polyline", {"points": "0,5 22,5", "class": kind})
    return el("span", {"class": "key"}, el("svg", {"viewBox": "0 0 22 10", "aria-hidden": "true"}, line), told)


def _kept(training: Training) -> str:
    if not training.checkpoints:
        return "No checkpoint kept."
    return f"{count(training.checkpoints, 'checkpoint')} kept, {size(training.checkpoint_bytes)}."


def _beside_scores(found: Findings) -> set[Path]:
    """Pictures that are named after a file of scores."""
    stems = {found.root / name.removesuffix(".json") for name, _ in found.scores}
    return {path for path in found.pictures if path.with_suffix("") in stems}


def _scores(found: Findings, beside: set[Path], links: Mapping[str, str]) -> Html:
    """What was measured: JSON as tables with its pictures, and texts as they are."""
    images = exhibits.files(sorted(beside), found)
    parts = []
    for name, value in found.scores:
        own = [
            image for path, image in images.items() if path.with_suffix("") == found.root / name.removesuffix(".json")
        ]
        parts += [
            el("h3", None, name),
            _of(value, found, links),
            el("div", {"class": "panel-box"}, _score(value, links), *own),
        ]
    for name, told in found.texts:
        lines = told.splitlines()
        rest = f"\n... and {len(lines) - MOST_LINES:,} lines more" if len(lines) > MOST_LINES else ""
        parts += [el("h3", None, name), el("pre", {"class": "panel-box"}, "\n".join(lines[:MOST_LINES]) + rest)]
    return join(parts)


def _score(value: Any, links: Mapping[str, str]) -> Html:
    """What `evaluate` or another program wrote; of what `evaluate` wrote the scores first, the rest folded."""
    if not isinstance(value, dict) or "scores" not in value:
        return json_tables.render(value)
    rest = {key: entry for key, entry in value.items() if key != "scores"}
    fold = el("details", None, el("summary", None, "inputs and settings"), json_tables.facts(rest, links))
    return join((json_tables.render(value["scores"]), fold if rest else ""))


def _of(value: Any, found: Findings, links: Mapping[str, str]) -> Html:
    """Which artifacts of this page were scored, and by what."""
    inputs = value.get("inputs") if isinstance(value, dict) else None
    names = {item.digest: item.name for item in found.items}
    known = [(k, v) for k, v in inputs.items() if isinstance(v, str) and v in links] if isinstance(inputs, dict) else []
    told = [join((el("a", {"href": f"#{links[v]}"}, names[v]), f" ({k})")) for k, v in known]
    return el("p", {"class": "faint"}, "Made from ", join(told, ", "), ".") if told else Html()


def _history(found: Findings, anchors: Mapping[str, str], links: Mapping[str, str]) -> list[Section]:
    """What was made from what, and each artifact by itself."""
    graph = lineage.trace(found.items, anchors)
    picture, words = lineage.draw(graph), lineage.words(graph)
    parts: list[Html] = []
    if picture:
        told = "Read from left to right, by the SHA-256 in each header. "
        told += "Dashed: an input that does not lie in this folder." if graph.absent else ""
        parts = [el("p", {"class": "faint"}, told), el("div", {"class": "flow"}, picture)]
    if graph.lines:
        parts.append(el("details", {"open": not picture}, el("summary", None, "The same in words"), words))
    every = [dossiers.render(item, anchors[item.name], links) for item in _in_order(found.items)]
    return [Section("History", join(parts)), Section("Artifacts", join(every))]


def _in_order(items: Sequence[Item]) -> list[Item]:
    """Oldest first, by how many stages led to them."""
    return sorted(items, key=lambda item: (len(item.history), item.name))


def _left_out(absent: Sequence[str], notes: Sequence[str]) -> Html:
    return el("ul", None, *(el("li", None, told) for told in (*absent, *notes))) if absent or notes else Html()
