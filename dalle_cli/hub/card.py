"""A bundle's model card: keep what a person wrote, fill in what the files say."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dalle_cli.artifacts import Artifact
from dalle_cli.errors import DalleError

CARD = "README.md"
SCORES = "scores.json"  # in a bundle: its metrics, numbers and texts in nested tables
BEGIN, END = "<!-- dalle: figures -->", "<!-- dalle: end of figures -->"
HEADER = {"library_name": "dalle", "pipeline_tag": "text-to-image", "tags": ["dall-e", "text-to-image", "safetensors"]}
BODY = """
# {name}

Weights for `dalle`, which generates images from a prompt:

    dalle generate "a red circle" -m hf://{repository} -o image.png

"""


def write(old: str, repository: str, weights: Sequence[Artifact], scores: object, license: str | None) -> str:
    """The text of the new card: the old one with missing YAML keys added, and with the metrics between their marks.

    Raises:
        DalleError: the old card's YAML is broken.
    """
    import yaml  # type: ignore[import-untyped]  # comes with huggingface-hub

    known, body = _split(old)
    missing: dict[str, Any] = {key: value for key, value in HEADER.items() if key not in known}
    missing |= {"license": license} if license and known.get("license") != license else {}
    body = body if old.strip() else BODY.format(name=repository.rpartition("/")[2], repository=repository)
    text = old
    if missing:  # else the header keeps its comments
        header = yaml.safe_dump({**known, **missing}, sort_keys=False, allow_unicode=True)
        text = f"---\n{header}---\n{body}"
    metrics = f"{BEGIN}\n\n{_metrics(weights, scores)}\n\n{END}"
    between = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    return between.sub(lambda _: metrics, text) if between.search(text) else f"{text.rstrip()}\n\n{metrics}\n"


def license_of(text: str) -> str | None:
    """The license in a card's YAML, or None."""
    name = _split(text)[0].get("license")
    return name if isinstance(name, str) else None


def _split(text: str) -> tuple[dict[str, Any], str]:
    """A card's YAML header, which may be missing, and the text below it."""
    import yaml

    match = re.match(r"\s*---\r?\n(.*?)^---[ \t]*(?:\r?\n|$)", text, re.DOTALL | re.MULTILINE)
    try:
        known = yaml.safe_load(match[1]) or {} if match else {}
    except yaml.YAMLError as error:
        known = " ".join(str(error).split())
    if not isinstance(known, dict):
        raise DalleError(f"expected YAML with keys at the top of the bundle's {CARD}, found {known!r}; correct it")
    return known, text[match.end() :] if match else text


def read(folder: Path) -> str:
    """The text of a bundle's card, "" if there is none.

    Raises:
        DalleError: it is not UTF-8.
    """
    path = folder / CARD
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise DalleError(f"expected text as UTF-8, found {error.reason}: {path}; save it as UTF-8") from None


def read_scores(folder: Path) -> object:
    """The metrics in a bundle's scores.json, or None.

    Raises:
        DalleError: it is not JSON.
    """
    path = folder / SCORES
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, RecursionError) as error:
        raise DalleError(f"expected JSON, found {error}: {path}; make it again") from None


def _metrics(weights: Sequence[Artifact], scores: object) -> str:
    rows = []
    metrics = [*_leaves(scores)]
    for artifact in weights:
        header = artifact.headers[0]
        dtypes = ", ".join(sorted({info.dtype for info in header.tensors.values()}))
        sizes = f"{header.n_parameters:,}", dtypes, f"{header.path.stat().st_size:,}"
        rows.append((artifact.path.name, header.table.about, *sizes, artifact.digest[:12]))
        for table in (artifact.config.get("figures"), artifact.config.get("scores")):
            metrics += [(f"{artifact.path.name} {name}", value) for name, value in _leaves(table)]
    parts = ["## Files", _table(("file", "what it is", "parameters", "dtype", "bytes", "sha256"), rows)]
    if metrics:
        parts += ["## Figures", _table(("figure", "value"), metrics)]
    return "\n\n".join(parts)


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Every number and text in nested tables, named by the keys that lead to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name} {key}".strip())
    elif value is not None:
        yield name, f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        [cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, ["---"] * len(head), *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
