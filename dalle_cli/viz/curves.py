"""Training curves, read from the `metrics.jsonl` of a run, and which of them are worth a chart."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dalle_cli.errors import DalleError

LOG = "metrics.jsonl"
AXES = ("step", "seconds")
MOST_METRICS = 24
LARGEST = 1e300  # an integer of JSON can be beyond any float
ORDER = (  # of the charts; other metrics of the log follow
    "image_nats", "text_nats", "loss", "recon", "psnr", "accuracy", "kl", "codebook", "codes_used", "perplexity",
    "scale", "grad_norm", "lr",
)  # fmt: skip
ON_REQUEST = ("rate", "peak_memory")  # charted only if --keys names them
SAME = {"code_perplexity": "perplexity"}  # a validation metric -> the training metric in whose chart it belongs


@dataclass(frozen=True)
class Line:
    """One metric of one run: updates or seconds in `x`, values in `y`."""

    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)

    def thin(self, most: int) -> "Line":
        """At most `most` points, each the mean of equally many neighbors."""
        each = -(-len(self.y) // most)
        groups = [slice(start, start + each) for start in range(0, len(self.y), each)]
        return Line(*([sum(values[g]) / len(values[g]) for g in groups] for values in (self.x, self.y)))


@dataclass(frozen=True)
class Curves:
    """The lines of one run by metric: logged in training, and at each validation."""

    name: str
    training: dict[str, Line]
    validation: dict[str, Line]

    @property
    def keys(self) -> list[str]:
        """All metrics of the run."""
        return list(dict.fromkeys([*self.training, *self.validation]))

    def of(self, key: str) -> list[Line]:
        """The lines of a metric, of training first."""
        return [lines[key] for lines in (self.training, self.validation) if key in lines]

    @property
    def last(self) -> float:
        """The last update or second."""
        return max(line.x[-1] for key in self.keys for line in self.of(key))


def read(paths: Sequence[Path], x: str = "step") -> list[Curves]:
    """The curves of several runs over `x` (`step` or `seconds`), named by the parts in which their paths differ.

    Raises:
        DalleError: a log is missing, holds no metrics, or does not say when they were logged.
    """
    logs = [find(path) for path in paths]
    return [_read(log, name, x) for log, name in zip(logs, _names(logs), strict=True)]


def find(path: Path) -> Path:
    """The log of a run, given weights, the .run folder beside them, or the log itself.

    Raises:
        DalleError: there is none.
    """
    if path.is_dir():
        log = path / LOG
    else:
        run = path.with_name(f"{path.name.removesuffix('.safetensors')}.run")
        log = path if path.suffix == ".jsonl" else run / LOG
    if not log.is_file():
        wanted = "give weights that lie beside their .run folder, such a folder, or a metrics.jsonl"
        raise DalleError(f"expected the log of a run, found none at {log}; {wanted}")
    return log


def _names(logs: Sequence[Path]) -> list[str]:
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
    run, rows = Curves(name, {}, {}), _rows(log)
    for row in rows:
        validation = row.get("validation")
        lines, metrics = (run.validation, validation) if isinstance(validation, dict) else (run.training, row)
        for key, value in metrics.items():
            if key not in AXES and _is_number(value) and _is_number(row.get(x)):
                line = lines.setdefault(metric(key), Line())
                line.x.append(float(row[x]))
                line.y.append(float(value))
    if not run.keys:
        found = f"no {x} in any of {len(rows)} rows" if rows else "no rows"
        raise DalleError(f"expected metrics of a run in {log}, found {found}; give the log of a run that has begun")
    return run


def _rows(log: Path) -> list[dict[str, Any]]:
    """The rows of a log, without an incomplete line: a kill may cut one, or training may be writing it."""
    rows = []
    try:
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                continue
    except OSError as error:
        raise DalleError(f"expected the log of a run, found {error.strerror}: {log}; make the file readable") from None
    return [row for row in rows if isinstance(row, dict)]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def metric(key: str) -> str:
    """The training metric in whose chart a logged name belongs: `psnr_held_out` -> `psnr`."""
    key = key.removesuffix("_held_out")
    return SAME.get(key, key)


def choose(runs: Sequence[Curves], keys: Sequence[str] = ()) -> list[str]:
    """The metrics to chart: `keys`, or else each one that varies and does not repeat another.

    Raises:
        DalleError: no run has a metric of `keys`, or there are too many to chart.
    """
    known = list(dict.fromkeys(key for run in runs for key in run.keys))
    for key in keys:
        if metric(key) not in known:
            raise DalleError(f"expected --keys among {', '.join(known)}, found {key!r}; correct it")
    if keys:
        return list(dict.fromkeys(map(metric, keys)))
    known.sort(key=lambda key: ORDER.index(key) if key in ORDER else len(ORDER))
    chosen: dict[str, list[tuple[Line | None, Line | None]]] = {}
    for key in known:
        lines = [(run.training.get(key), run.validation.get(key)) for run in runs]
        varies = any(len(set(line.y)) > 1 or len(line.y) == 1 for pair in lines for line in pair if line)
        if varies and key not in ON_REQUEST and lines not in chosen.values():
            chosen[key] = lines
    if len(chosen) > MOST_METRICS:
        raise DalleError(f"expected at most {MOST_METRICS} metrics, found {len(chosen)}; choose some with --keys")
    return list(chosen) or known[:1]


def target(path: Path) -> Path:
    """The default name of a chart: beside the .run folder, under its name."""
    log = find(path)
    folder = log.parent.parent if log.name == LOG else log.parent
    return folder / f"{_parts(log.resolve())[-1]}.png"
