"""The page of `dalle report`: the curves, images, scores and provenance of a run.

It is a function of the files alone: no times, no paths from outside the folder.
"""

import math
from collections import Counter
from typing import Any

from dalle_cli import __version__
from dalle_cli.artifacts import Artifact
from dalle_cli.errors import DalleError
from dalle_cli.report import charts, html, images, lineage, tables
from dalle_cli.report.scan import Item, Scan
from dalle_cli.viz.charts import label, number

GENERATOR = "dalle report"
STYLES = ("page.css", "report.css")
MOST_METRICS = 3  # of the validation, in the table of models
MOST_LINES = 60  # of a text


def page(found: Scan, title: str | None = None) -> str:
    """The page as HTML.

    Raises:
        DalleError: jinja2 is not installed.
    """
    anchors = {item.name: f"artifact-{i}" for i, item in enumerate(found.items)}
    curves, values, fault = _curves(found)
    stems = {found.root / name.removesuffix(".json"): name for name, _ in found.scores}
    beside = {path: stems[path.with_suffix("")] for path in found.images if path.with_suffix("") in stems}
    score_images = images.files(sorted(beside), found)
    nodes = lineage.trace(found.items, anchors)
    oldest_first = sorted(found.items, key=lambda item: (len(item.history), item.name))
    return html.render(
        "report.html", STYLES, "report.js", generator=GENERATOR, version=__version__, title=title or found.title,
        found=found, lead=_lead(found), models=_models(found), curves=curves, no_curves=fault, values=values,
        links={item.digest: anchors[item.name] for item in found.items if item.digest},
        names={item.digest: item.name for item in found.items},
        grids=images.grids(found), samples=images.samples(found),
        files=images.files([path for path in found.images if path not in beside], found).values(),
        scores=[
            (name, value, [tile for path, tile in score_images.items() if beside[path] == name])
            for name, value in found.scores
        ],
        texts=[(name, _first_lines(text)) for name, text in found.texts],
        lineage=lineage.tree(nodes), outside=any(not node.anchor for node in nodes.values()),
        artifacts=[(anchors[item.name], item, _facts(item)) for item in oldest_first], json=tables,
    )  # fmt: skip


def _lead(found: Scan) -> str:
    weights = found.of_kind("weights.")
    total = number(sum(artifact.headers[0].n_parameters for _, artifact in weights))
    parts = [f"{html.count(len(weights), 'model')} with {total} parameters"] if weights else []
    for kind, one in (("captions", "caption"), ("codes", "code grid"), ("images", "image")):
        if rows := sum(len(artifact) for _, artifact in found.of_kind(kind)):
            parts.append(html.count(rows, one))
    return ", ".join(parts)


def _models(found: Scan) -> list[dict[str, Any]]:
    """The weights of the run, and how their training went."""
    runs = {training.name: training for training in found.trainings}
    rows: list[dict[str, Any]] = []
    for item, artifact in found.of_kind("weights."):
        about = artifact.headers[0].table.about.removeprefix("weights of a ")
        cells = (number(artifact.headers[0].n_parameters), html.size(item.size))
        name = item.name.removesuffix(".safetensors")
        rows.append({"name": name, "about": about, "cells": cells, "run": runs.pop(name, None)})
    rows += [{"name": name, "about": "in training", "cells": ("", ""), "run": run} for name, run in runs.items()]
    for row in rows:
        run = row.pop("run")
        curves = run.curves if run else None
        last = {key: line.y[-1] for key, line in curves.training.items()} if curves else {}
        row["cells"] += (
            f"{curves.last:,.0f}" if curves else "",
            html.duration(run.seconds) if run and run.seconds is not None else "",
            f"{number(float(format(last['rate'], '.3g')))}/s" if "rate" in last else "",
            html.size(round(last["peak_memory"] * 2**20)) if "peak_memory" in last else "",
        )
        ends = list(curves.validation.items())[:MOST_METRICS] if curves else []
        row["validation"] = ", ".join(f"{label(key).title} {number(line.y[-1])}" for key, line in ends)
    return rows


def _curves(found: Scan) -> tuple[list[tuple[str, str, list[charts.Panel]]], list[dict[str, Any]], str]:
    """The panels of each training, the values in all of them, and why there are no panels if there are none."""
    sections = []
    try:
        for i, run in enumerate(found.trainings):
            if run.curves:
                panels, left = charts.draw(run.curves, f"run{i}")
                kept = f"{html.count(run.checkpoints, 'checkpoint')} kept, {html.size(run.checkpoint_bytes)}."
                sections.append((run.name, kept if run.checkpoints else "No checkpoint kept.", panels))
                if left:
                    found.notes.append(f"{run.name}.run: curves of {', '.join(left)}; dalle plot --keys draws them")
    except DalleError as error:
        return [], [], str(error)
    return sections, [panel.values for _, _, panels in sections for panel in panels], ""


def _first_lines(text: str) -> str:
    lines, rest = text.splitlines()[:MOST_LINES], text.count("\n") + 1 - MOST_LINES
    return "\n".join(lines) + (f"\n... and {rest:,} lines more" if rest > 0 else "")


def _facts(item: Item) -> dict[str, Any]:
    """The size, config and parts of an artifact, as the page shows them."""
    artifact = item.artifact
    if artifact is None:
        return {"about": ["tokenizer", html.size(item.size)], "config": {}, "columns": [], "parts": []}
    table, tensors = artifact.headers[0].table, artifact.headers[0].tensors
    if table.rows:
        shards = f" in {html.count(len(artifact.headers), 'shard')}" if len(artifact.headers) > 1 else ""
        measure = html.count(len(artifact), "row") + shards
    else:
        measure = f"{artifact.headers[0].n_parameters:,} parameters" if item.kind.startswith("weights.") else ""
    nested = {key: value for key, value in artifact.config.items() if isinstance(value, dict)}
    config = {"config": {key: value for key, value in artifact.config.items() if key not in nested}} | nested
    return {
        "about": [fact for fact in (table.about, measure, html.size(item.size)) if fact],
        "config": {key: tables.flat(value) for key, value in config.items() if value},
        "columns": [(name, info.dtype, _shape(info.shape)) for name, info in sorted(tensors.items()) if table.rows],
        "parts": _parts(artifact) if item.kind.startswith("weights.") else [],
    }


def _shape(shape: tuple[int, ...]) -> str:
    return " \N{MULTIPLICATION SIGN} ".join(f"{side:,}" for side in shape) or "scalar"


def _parts(artifact: Artifact) -> list[tuple[str, str, int]]:
    """The parameters of each part of a network, the largest part first."""
    sums = Counter[tuple[str, str]]()
    for name, info in artifact.headers[0].tensors.items():
        sums[name.partition(".")[0], info.dtype] += math.prod(info.shape)
    return [(*key, n) for key, n in sorted(sums.items(), key=lambda part: (-part[1], part[0]))]
