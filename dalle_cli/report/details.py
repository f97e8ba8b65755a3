"""What each artifact of a run is, folded up: size, parameters, config, and the stages that led to it."""

import math
from collections.abc import Mapping
from typing import Any

from dalle_cli.artifacts import Artifact
from dalle_cli.report import json_tables
from dalle_cli.report.markup import Html, count, el, join, number, size
from dalle_cli.report.scan import Item

MOST_PARTS = 24


def render(item: Item, anchor: str, links: Mapping[str, str]) -> Html:
    """One artifact; `links` are the places of all digests that lie in the page."""
    artifact = item.artifact
    inside = [_identity(item)]
    if artifact is not None:
        inside += [_config(artifact, links), _parts(artifact), _stages(artifact.history, links)]
    about = artifact.headers[0].table.about if artifact is not None else "tokenizer"
    facts = [about, measure(item), size(item.size)]
    summary = el("summary", None, el("b", None, item.name), *(el("span", None, fact) for fact in facts if fact))
    return el("details", {"class": "artifact", "id": anchor}, summary, el("div", None, *inside))


def measure(item: Item) -> str:
    """Rows, or parameters."""
    artifact = item.artifact
    if artifact is None:
        return ""
    if artifact.headers[0].table.rows:
        shards = f" in {count(len(artifact.headers), 'shard')}" if len(artifact.headers) > 1 else ""
        return count(len(artifact), "row") + shards
    return f"{parameters(artifact):,} parameters" if artifact.kind.startswith("weights.") else ""


def parameters(artifact: Artifact) -> int:
    """Of weights."""
    return sum(math.prod(info.shape) for info in artifact.headers[0].tensors.values())


def _identity(item: Item) -> Html:
    told = el("code", None, item.digest) if item.digest else "not taken"
    return el("p", {"class": "faint digest"}, "sha256 ", told, f"; {item.size:,} bytes")


def _config(artifact: Artifact, links: Mapping[str, str]) -> Html:
    """A column for each table of the config, and one for what is in none."""
    plain = {key: value for key, value in artifact.config.items() if not isinstance(value, dict)}
    groups = {"config": plain} | {key: value for key, value in artifact.config.items() if isinstance(value, dict)}
    columns = [
        el("div", None, el("h4", None, key), json_tables.facts(group, links)) for key, group in groups.items() if group
    ]
    return el("div", {"class": "groups"}, *columns)


def _parts(artifact: Artifact) -> Html:
    """Of weights, how many parameters each part of the network has; of rows, the columns."""
    tensors = artifact.headers[0].tensors
    if artifact.headers[0].table.rows:
        rows = [
            el("tr", None, *(el("td", None, cell) for cell in (name, info.dtype, _shape(info.shape))))
            for name, info in sorted(tensors.items())
        ]
        return join((el("h4", None, "columns"), el("div", {"class": "wide"}, el("table", {"class": "facts"}, *rows))))
    if not artifact.kind.startswith("weights."):
        return Html()
    sums: dict[tuple[str, str], int] = {}
    for name, info in tensors.items():
        key = (name.partition(".")[0], info.dtype)
        sums[key] = sums.get(key, 0) + math.prod(info.shape)
    ranked = sorted(sums.items(), key=lambda part: (-part[1], part[0]))
    rows = [_part(name, dtype, n, ranked[0][1] or 1) for (name, dtype), n in ranked[:MOST_PARTS]]
    if len(ranked) > MOST_PARTS:
        rows.append(el("tr", None, el("td", {"colspan": 4, "class": "faint"}, f"and {len(ranked) - MOST_PARTS} more")))
    return join((el("h4", None, "parameters"), el("table", {"class": "facts parts"}, *rows)))


def _part(name: str, dtype: str, n: int, most: int) -> Html:
    bar = el("rect", {"width": f"{100 * n / most:.2f}", "height": 8, "rx": 1})
    svg = el("svg", {"viewBox": "0 0 100 8", "preserveAspectRatio": "none", "aria-hidden": "true"}, bar)
    cells = (el("td", {"class": "number"}, number(n)), el("td", {"class": "faint"}, dtype), el("td", None, svg))
    return el("tr", None, el("th", {"scope": "row"}, name), *cells)


def _shape(shape: tuple[int, ...]) -> str:
    return " \N{MULTIPLICATION SIGN} ".join(f"{side:,}" for side in shape) or "scalar"


def _stages(history: list[dict[str, Any]], links: Mapping[str, str]) -> Html:
    """Each stage that led here, oldest first."""
    if not history:
        return Html()
    rows = []
    for entry in history:
        inputs = [
            join((name, " ", json_tables.linked(digest, links))) for name, digest in sorted(entry["inputs"].items())
        ]
        options = [f"{key} {json_tables.linked(value, {})}" for key, value in json_tables.flat(entry["options"])]
        told = join((" of " if inputs else "", join(inputs, ", ")))
        rows.append(el("li", None, el("b", None, entry["stage"]), told, el("br"), _faint(", ".join(options))))
    return join((el("h4", None, "made by"), el("ol", {"class": "stages"}, *rows)))


def _faint(told: str) -> Html:
    return el("span", {"class": "faint"}, told)
