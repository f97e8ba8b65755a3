"""Logs of training runs: the curves in them, and which are worth a look."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dalle_cli.errors import DalleError

LOG = "metrics.jsonl"
AXES = ("step", "seconds")
HELD_OUT = "_held_out"
MOST_FIGURES = 24
# Figures in the order in which they are shown; what a log has besides follows.
ORDER = (
    "image_nats",
    "text_nats",
    "loss",
    "recon",
    "psnr",
    "accuracy",
    "kl",
    "codebook",
    "codes_used",
    "perplexity",
    "scale",
    "grad_norm",
    "lr",
)
ASIDE = ("rate", "peak_memory")  # not drawn unless asked for
SAME = {"code_perplexity": "perplexity"}  # a validation's name for a figure of training


@dataclass(frozen=True)
class Line:
    """One figure over one run: update or second, and value, in order."""

    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Curves:
    """A run's name and its lines by figure, of training and of validation."""

    name: str
    training: dict[str, Line]
    validation: dict[str, Line]

    @property
    def keys(self) -> list[str]:
        """Figures that it has."""
        return list(dict.fromkeys([*self.training, *self.validation]))


def read(paths: Sequence[Path], x: str = "step") -> list[Curves]:
    """The logs of runs, each named so that no two are alike; `x` is `step` or `seconds`.

    Raises:
        DalleError: no such log, one without figures, or one that does not say how long it took.
    """
    logs = [find(path) for path in paths]
    return [_read(log, name, x) for log, name in zip(logs, _names(logs), strict=True)]


def find(path: Path) -> Path:
    """The log that a weights file, the folder beside it, or the log itself leads to.

    Raises:
        DalleError: there is none.
    """
    if path.is_dir():
        log = path / LOG
    elif path.suffix == ".jsonl":
        log = path
    else:
        log = path.parent / f"{path.name.removesuffix('.safetensors')}.run" / LOG
    if not log.is_file():
        wanted = "give weights that lie beside their .run folder, such a folder, or a metrics.jsonl"
        raise DalleError(f"expected the log of a run, found none at {log}; {wanted}")
    return log


def _names(logs: Sequence[Path]) -> list[str]:
    """Of each run's path what is not the same in all; the last folder's name where nothing would be left."""
    parts = [_parts(log.resolve()) for log in logs]
    if len(set(map(tuple, parts))) == 1:
        return [p[-1] for p in parts]
    shared = next(i for i, level in enumerate(zip_longest(*parts)) if len(set(level)) > 1)
    parts = [p[shared:] or p[-1:] for p in parts]
    while all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    return ["/".join(p) for p in parts]


def _parts(log: Path) -> list[str]:
    parts = [part.removesuffix(".run") for part in log.parts[1:]]
    return parts[:-1] if log.name == LOG and len(parts) > 1 else [*parts[:-1], log.stem]


def _read(log: Path, name: str, x: str) -> Curves:
    training: dict[str, Line] = {}
    validation: dict[str, Line] = {}
    rows = _rows(log)
    for row in rows:
        held_out = row.get("validation")
        lines, figures = (validation, held_out) if isinstance(held_out, dict) else (training, row)
        for key, value in figures.items():
            if key not in AXES and _is_number(value) and _is_number(row.get(x)):
                line = lines.setdefault(figure(key), Line())
                line.x.append(float(row[x]))
                line.y.append(float(value))
    if not training and not validation:
        found = f"no {x} in any of {len(rows)} rows" if rows else "no row"
        raise DalleError(f"expected figures of a run in {log}, found {found}; give the log of a run that has begun")
    return Curves(name, training, validation)


def _rows(log: Path) -> list[dict[str, Any]]:
    """The log's rows; a line that was cut, as by a kill or because it is being written, is left out."""
    rows = []
    try:
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                rows.append(row)
    except OSError as error:
        raise DalleError(f"expected the log of a run, found {error.strerror}: {log}; mend that") from None
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def figure(key: str) -> str:
    """What a figure is called in training: that of a validation shares its panel."""
    key = key.removesuffix(HELD_OUT)
    return SAME.get(key, key)


def choose(runs: Sequence[Curves], keys: Sequence[str] = ()) -> list[str]:
    """The figures to draw: those asked for, else all that tell something, in the their order.

    Raises:
        DalleError: a figure that no run has, or too many.
    """
    known = list(dict.fromkeys(key for run in runs for key in run.keys))
    if keys:
        for key in keys:
            if figure(key) not in known:
                raise DalleError(f"expected --keys among {', '.join(known)}, found {key!r}; correct it")
        return list(dict.fromkeys(map(figure, keys)))
    known.sort(key=lambda key: ORDER.index(key) if key in ORDER else len(ORDER))
    chosen: list[str] = []
    for key in known:
        lines = [(run.training.get(key), run.validation.get(key)) for run in runs]
        told = any(len(set(line.y)) > 1 or len(line.y) == 1 for pair in lines for line in pair if line)
        twice = any(lines == [(r.training.get(other), r.validation.get(other)) for r in runs] for other in chosen)
        if told and not twice and key not in ASIDE:
            chosen.append(key)
    if len(chosen) > MOST_FIGURES:
        raise DalleError(f"expected at most {MOST_FIGURES} figures, found {len(chosen)}; choose some with --keys")
    return chosen or known[:1]


def target(path: Path) -> Path:
    """Where a run's picture goes without -o: beside its folder, under its name."""
    log = find(path)
    stem = _parts(log.resolve())[-1]
    return (log.parent.parent if log.name == LOG else log.parent) / f"{stem}.png"
