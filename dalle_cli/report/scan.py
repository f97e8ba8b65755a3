"""Find the parts of a run in a folder: artifacts, logs, image grids, scores; and what of them cannot be read.

This reads headers only, and each artifact once through for its SHA-256. It needs no torch.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle_cli import console
from dalle_cli.artifacts import Artifact, digest_file, open_artifact
from dalle_cli.artifacts.container import SHARDS
from dalle_cli.errors import DalleError
from dalle_cli.viz import curves
from dalle_cli.viz.curves import Curves

HASHED = 64 * 10**9  # bytes to read for digests; artifacts beyond them are not linked to their inputs
MOST_ARTIFACTS = 400
LONGEST_TEXT, LONGEST_JSON = 20_000, 4_000_000  # bytes
IMAGES = (".png", ".jpg", ".jpeg", ".svg")
GENERIC = ("build", "model", "models", "out", "output", "run")  # folders whose name says nothing about the run


@dataclass
class Item:
    """An artifact, or a tokenizer (`artifact` is None), by its name within the folder; "" is a digest not taken."""

    name: str
    artifact: Artifact | None  # its length is its rows, so that weights are falsy: compare with None
    size: int
    digest: str = ""

    @property
    def history(self) -> list[dict[str, Any]]:
        """The stages that made it, oldest first."""
        return [] if self.artifact is None else self.artifact.history

    @property
    def kind(self) -> str:
        """The artifact's kind."""
        return "tokenizer" if self.artifact is None else self.artifact.kind

    @property
    def label(self) -> str:
        """The file's name without folder and suffix."""
        return self.name.rpartition("/")[2].removesuffix(".safetensors")


@dataclass(frozen=True)
class RunFolder:
    """A .run folder: the log of a training, its image grids and checkpoints, and how long it took."""

    name: str
    curves: Curves | None
    seconds: float | None
    grids: list[Path]
    checkpoints: int
    checkpoint_bytes: int


@dataclass
class Scan:
    """The content of a report; `notes` name what is left out and why."""

    title: str
    root: Path
    items: list[Item] = field(default_factory=list)
    trainings: list[RunFolder] = field(default_factory=list)
    scores: list[tuple[str, Any]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def name(self, path: Path) -> str:
        """The name of a path within the folder."""
        return path.relative_to(self.root).as_posix()

    def note(self, path: Path, said: object) -> None:
        """Note why a file is left out; its message must not name folders outside the run."""
        self.notes.append(f"{self.name(path)}: {str(said).replace(f'{self.root}/', '')}")

    def of_kind(self, kind: str) -> list[tuple[Item, Artifact]]:
        """The artifacts whose kind starts with `kind`."""
        return [(i, i.artifact) for i in self.items if i.artifact is not None and i.kind.startswith(kind)]


def scan(path: Path) -> Scan:
    """The parts of a run: a folder, weights or another artifact, or the .run folder beside weights.

    Raises:
        DalleError: nothing is there, or no part of a run is in it.
    """
    if not path.exists():
        raise DalleError(f"expected a run, found no such file: {path}; give a recipe's build folder or weights")
    resolved = path.resolve()
    stem = resolved.name.removesuffix(".safetensors").removesuffix(".run")
    single = resolved.is_file() or resolved.suffix == ".run" or any(resolved.glob(SHARDS))
    title = f"{resolved.parent.name}/{stem}" if stem in GENERIC and resolved.parent.name else stem
    found = Scan(title, resolved.parent if single else resolved)
    if single:
        weights, run = (resolved.with_name(f"{stem}{suffix}") for suffix in (".safetensors", ".run"))
        parts = [weights if resolved.suffix == ".run" else resolved, run]
    else:
        parts = [part for folder in _folders(found) for part in sorted(folder.iterdir())]
    for part in parts:
        if part.exists() and not part.name.startswith("."):
            _add(part, found)
    if not (found.items or found.trainings or found.scores or found.images):
        why = f" ({found.notes[0]})" if found.notes else ""
        said = f"expected a run, found no artifact, log or scores in {path}{why}"
        raise DalleError(f"{said}; give a recipe's build folder")
    _take_digests(found)
    return found


def _folders(found: Scan) -> list[Path]:
    """The folder, and those within that hold artifacts, as model/ does, unless they are runs of their own."""
    folders = [found.root]
    for folder in sorted(path for path in found.root.iterdir() if path.is_dir()):
        if folder.suffix == ".run" or folder.name.startswith(".") or any(folder.glob(SHARDS)):
            continue
        if (folder / "model").is_dir():
            found.notes.append(f"{folder.name}/ is a run of its own; it has no part in this page")
        elif any(folder.glob("*.safetensors")) or any(folder.glob("*.run")):
            folders.append(folder)
    return folders


def _add(path: Path, found: Scan) -> None:
    """Add whatever a file or folder holds."""
    if path.suffix == ".run" and path.is_dir():
        _add_run(path, found)
    elif path.suffix == ".safetensors" or (path.is_dir() and any(path.glob(SHARDS))):
        _add_artifact(path, found)
    elif not path.is_file():
        return
    elif path.name.endswith(".skipped.jsonl"):
        found.note(path, f"{len(path.read_bytes().splitlines()):,} samples were skipped")
    elif add := {".json": _add_json, ".txt": _add_text}.get(path.suffix):
        add(path, found)
    elif path.suffix.lower() in IMAGES:
        found.images.append(path)


def _add_artifact(path: Path, found: Scan) -> None:
    if len(found.items) >= MOST_ARTIFACTS:
        found.note(path, f"left out, as there are more than {MOST_ARTIFACTS} artifacts")
        return
    try:
        artifact = open_artifact(path)
        size = sum(header.path.stat().st_size for header in artifact.headers)
    except (DalleError, OSError) as error:  # a training that goes on removes its oldest checkpoint
        found.note(path, error)
    else:
        found.items.append(Item(found.name(path), artifact, size))


def _add_run(folder: Path, found: Scan) -> None:
    checkpoints, run, seconds = sorted(folder.glob("checkpoint-*.safetensors")), None, None
    try:
        (run,) = curves.read([folder])
        lines = curves.read([folder], "seconds")[0].training.values()
        seconds = max((line.x[-1] for line in lines), default=None)
    except DalleError as error:
        if run is None:
            found.note(folder, error)
    n_bytes = sum(path.stat().st_size for path in checkpoints if path.exists())
    name, grids = found.name(folder).removesuffix(".run"), sorted((folder / "samples").glob("*.png"))
    found.trainings.append(RunFolder(name, run, seconds, grids, len(checkpoints), n_bytes))
    weights = folder.with_suffix(".safetensors")
    if not weights.exists():
        found.note(weights, "not written yet; its training has not ended")
        if checkpoints:
            _add_artifact(checkpoints[-1], found)


def _add_json(path: Path, found: Scan) -> None:
    """Add a tokenizer, or scores."""
    try:
        if path.stat().st_size > LONGEST_JSON:
            raise ValueError(f"more than {LONGEST_JSON:,} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        found.note(path, f"not read ({error})")
        return
    if isinstance(value, dict) and isinstance(value.get("model"), dict) and "vocab" in value["model"]:
        found.items.append(Item(found.name(path), None, path.stat().st_size))
    elif isinstance(value, (dict, list)):
        found.scores.append((found.name(path), value))


def _add_text(path: Path, found: Scan) -> None:
    """Add a table in plain text, as a recipe's accuracy.txt; the images of a file of prompts name the prompts."""
    if any(path.with_name(f"{path.stem}.{kind}.safetensors").exists() for kind in ("codes", "images", "best")):
        return
    try:
        if path.stat().st_size > LONGEST_TEXT:
            found.note(path, f"left out, as it has more than {LONGEST_TEXT:,} bytes")
        else:
            found.texts.append((found.name(path), path.read_text(encoding="utf-8").strip("\n")))
    except (OSError, UnicodeDecodeError):
        found.note(path, "not read, as it is no text")


def _take_digests(found: Scan) -> None:
    """Fill in the digests, of small files first."""
    left = HASHED
    with console.progress("reading", len(found.items), unit="artifacts") as advance:
        for item in sorted(found.items, key=lambda item: (item.size, item.name)):
            left -= item.size
            if left < 0:
                found.notes.append(f"{item.name}: too large to take its SHA-256 here, so nothing is linked to it")
            elif item.kind != "checkpoint":
                item.digest = item.artifact.digest if item.artifact is not None else digest_file(found.root / item.name)
            advance()
