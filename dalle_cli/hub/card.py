"""A bundle's model card: what a person has written stays, what the files say of themselves is filled in."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dalle_cli.artifacts import Artifact
from dalle_cli.errors import DalleError

CARD = "README.md"
SCORES = "scores.json"  # of a bundle: figures, as numbers and texts in tables of any depth
BEGIN, END = "<!-- dalle: figures -->", "<!-- dalle: end of figures -->"
HEADER = {"library_name": "dalle", "pipeline_tag": "text-to-image", "tags": ["dall-e", "text-to-image", "safetensors"]}
BODY = """
# {name}

Weights for `dalle`, which turns a prompt into pictures:

    dalle generate "a red circle" -m hf://{repository} -o picture.png

"""


def write(old: str, repository: str, weights: Sequence[Artifact], scores: object, license: str | None) -> str:
    """The card's text from the card there was, if any: keys that its YAML lacks, and the figures between their marks.

    Raises:
        DalleError: its YAML is broken.
    """
    import yaml  # type: ignore[import-untyped]  # comes with huggingface-hub

    known, body = _split(old)
    missing: dict[str, Any] = {key: value for key, value in HEADER.items() if key not in known}
    missing |= {"license": license} if license and known.get("license") != license else {}
    body = body if old.strip() else BODY.format(name=repository.rpartition("/")[2], repository=repository)
    if missing:  # else the header is left as it was written, comments and all
        header = yaml.safe_dump({**known, **missing}, sort_keys=False, allow_unicode=True)
        text = f"---\n{header}---\n{body}"
    else:
        text = old
    figures = f"{BEGIN}\n\n{_figures(weights, scores)}\n{END}"
    inside = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if inside.search(text):
        return inside.sub(lambda _: figures, text)
    return f"{text.rstrip()}\n\n{figures}\n"


def license_of(text: str) -> str | None:
    """The license that a card names in its YAML."""
    name = _split(text)[0].get("license")
    return name if isinstance(name, str) else None


def _split(text: str) -> tuple[dict[str, Any], str]:
    """A card's YAML, which may be missing, and its text."""
    import yaml

    match = re.match(r"\s*---\r?\n(.*?)^---[ \t]*(?:\r?\n|$)", text, re.DOTALL | re.MULTILINE)
    try:
        known = yaml.safe_load(match[1]) or {} if match else {}
    except yaml.YAMLError as error:
        known = " ".join(str(error).split())
    if not isinstance(known, dict):
        raise DalleError(f"expected YAML with keys at the head of the bundle's {CARD}, found {known!r}; mend that")
    return known, text[match.end() :] if match else text


def read(folder: Path) -> str:
    """The text of a bundle's card; empty where there is none.

    Raises:
        DalleError: it is no UTF-8.
    """
    path = folder / CARD
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise DalleError(f"expected text as UTF-8, found {error.reason}: {path}; save it as UTF-8") from None


def read_scores(folder: Path) -> object:
    """The figures of a bundle's scores.json; None where there is none.

    Raises:
        DalleError: it is no JSON.
    """
    path = folder / SCORES
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DalleError(f"expected figures as JSON, found {error}: {path}; make it again") from None


def _figures(weights: Sequence[Artifact], scores: object) -> str:
    rows = []
    for artifact in weights:
        header = artifact.headers[0]
        dtypes = ", ".join(sorted({info.dtype for info in header.tensors.values()}))
        size = header.path.stat().st_size
        sizes = f"{header.n_parameters:,}", dtypes, f"{size:,}"
        rows.append((artifact.path.name, header.table.about, *sizes, artifact.digest[:12]))
    parts = ["## Files", _table(("file", "what it is", "parameters", "dtype", "bytes", "sha256"), rows)]
    figures = [*_leaves(scores)]
    for artifact in weights:
        told = (artifact.config.get(key) for key in ("figures", "scores"))
        figures += [(f"{artifact.path.name} {name}", value) for table in told for name, value in _leaves(table)]
    if figures:
        parts += ["## Figures", _table(("figure", "value"), [(name, _show(value)) for name, value in figures])]
    return "\n\n".join(parts) + "\n"


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and text in tables of any depth, by the keys that lead to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name} {key}".strip())
    elif value is not None:
        yield name, value


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        [cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, ["---"] * len(head), *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
