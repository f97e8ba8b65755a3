"""What lies in the folder of a run: artifacts, logs, sheets, scores; and what of it could not be read.

Only headers are read here, and every artifact once through for its SHA-256. No torch.
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

HASHED = 64 * 10**9  # bytes that are read for digests; what is beyond is not linked to what was made from it
MOST_FILES = 400  # artifacts of one page
LONGEST_TEXT, LONGEST_JSON = 20_000, 4_000_000  # bytes
PICTURES = (".png", ".jpg", ".jpeg", ".svg")
GENERIC = ("build", "model", "models", "out", "output", "run")  # names of folders that say nothing


@dataclass(frozen=True)
class Item:
    """An artifact, or a tokenizer (`artifact` None): its name within the folder, bytes, SHA-256 ("" if not taken)."""

    name: str
    artifact: Artifact | None  # whose length is its rows, so that weights are false: ask whether it is None
    size: int
    digest: str

    @property
    def history(self) -> list[dict[str, Any]]:
        """The stages that led to it."""
        return [] if self.artifact is None else self.artifact.history

    @property
    def kind(self) -> str:
        """Of the artifact."""
        return self.artifact.kind if self.artifact is not None else "tokenizer"

    @property
    def label(self) -> str:
        """The file's name without what all files have."""
        return self.name.rpartition("/")[2].removesuffix(".safetensors")


@dataclass(frozen=True)
class Training:
    """A .run folder: what training logged, drew and kept, and how long it took."""

    name: str
    curves: Curves | None
    seconds: float | None
    sheets: list[Path]
    checkpoints: int
    checkpoint_bytes: int


@dataclass
class Findings:
    """All that a report is made of; `notes` say what could not be read."""

    title: str
    root: Path
    items: list[Item] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)
    scores: list[tuple[str, Any]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def name(self, path: Path) -> str:
        """Of a path within the folder."""
        return path.relative_to(self.root).as_posix()

    def of_kind(self, *kinds: str) -> list[tuple[Item, Artifact]]:
        """The artifacts whose kinds begin so."""
        return [
            (item, item.artifact) for item in self.items if item.artifact is not None and item.kind.startswith(kinds)
        ]


def look(path: Path) -> Findings:
    """All that can be told of a run: a folder, weights or another artifact, or the .run folder beside weights.

    Raises:
        DalleError: nothing there, or nothing of a run in it.
    """
    if not path.exists():
        raise DalleError(f"expected a run, found no such file: {path}; give a recipe's build folder or weights")
    resolved = path.resolve()
    single = resolved.is_file() or resolved.suffix == ".run" or any(resolved.glob(SHARDS))
    found = Findings(_title(resolved), resolved.parent if single else resolved)
    if single:
        _look_at_one(resolved, found)
    else:
        for folder in _folders(found):
            _look_into(folder, found)
    if not (found.items or found.trainings or found.scores or found.pictures):
        why = f" ({found.notes[0]})" if found.notes else ""
        raise DalleError(
            f"expected a run, found no artifact, log or scores in {path}{why}; give a recipe's build folder"
        )
    _digest(found)
    return found


def _title(path: Path) -> str:
    name = path.name.removesuffix(".safetensors").removesuffix(".run")
    return f"{path.parent.name}/{name}" if name in GENERIC and path.parent.name else name


def _look_at_one(path: Path, found: Findings) -> None:
    """Weights and the folder beside them, by either."""
    stem = path.name.removesuffix(".safetensors").removesuffix(".run")
    weights, run = path.with_name(f"{stem}.safetensors"), path.with_name(f"{stem}.run")
    if path.suffix != ".run":
        weights = path
    if weights.exists():
        _add_artifact(weights, found)
    if run.is_dir():
        _add_training(run, found)


def _folders(found: Findings) -> list[Path]:
    """The folder and those in it that hold part of the run, as model/; not data, nor another run."""
    folders = [found.root]
    for folder in sorted(path for path in found.root.iterdir() if path.is_dir()):
        inside = [*folder.glob("*.safetensors"), *folder.glob("*.run")]
        if folder.suffix == ".run" or folder.name.startswith(".") or any(folder.glob(SHARDS)):
            continue
        if (folder / "model").is_dir():
            found.notes.append(f"{folder.name}/ is a run of its own; it has no part in this page")
        elif inside:
            folders.append(folder)
    return folders


def _look_into(folder: Path, found: Findings) -> None:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix == ".run" and path.is_dir():
            _add_training(path, found)
        elif path.suffix == ".safetensors" or (path.is_dir() and any(path.glob(SHARDS))):
            _add_artifact(path, found)
        elif path.name.endswith(".skipped.jsonl"):
            with open(path, "rb") as file:
                found.notes.append(f"{found.name(path)}: {sum(1 for _ in file):,} samples were skipped")
        elif path.suffix == ".json" and path.is_file():
            _add_json(path, found)
        elif path.suffix == ".txt" and path.is_file():
            _add_text(path, found)
        elif path.suffix.lower() in PICTURES and path.is_file():
            found.pictures.append(path)


def _add_artifact(path: Path, found: Findings) -> None:
    if len(found.items) >= MOST_FILES:
        found.notes.append(f"{found.name(path)}: left out, as there are more than {MOST_FILES} artifacts")
        return
    try:
        artifact = open_artifact(path)
        size = sum(header.path.stat().st_size for header in artifact.headers)
    except (DalleError, OSError) as error:  # a run that goes on removes its oldest checkpoint
        found.notes.append(f"{found.name(path)}: {str(error).replace(f'{found.root}/', '')}")
    else:
        found.items.append(Item(found.name(path), artifact, size, ""))


def _add_training(folder: Path, found: Findings) -> None:
    name = found.name(folder).removesuffix(".run")
    sheets = sorted((folder / "samples").glob("*.png"))
    kept = sorted(folder.glob("checkpoint-*.safetensors"))
    read, seconds = None, None
    try:
        (read,) = curves.read([folder])
        lines = list(curves.read([folder], "seconds")[0].training.values())
        seconds = max((line.x[-1] for line in lines), default=None)
    except DalleError as error:
        if read is None:
            found.notes.append(f"{name}.run: {str(error).replace(f'{found.root}/', '')}")
    n_bytes = sum(path.stat().st_size for path in kept if path.exists())
    found.trainings.append(Training(name, read, seconds, sheets, len(kept), n_bytes))
    weights = folder.with_suffix(".safetensors")
    if not weights.exists():
        found.notes.append(f"{name}.safetensors: not written yet; its training has not ended")
        if kept:
            _add_artifact(kept[-1], found)


def _add_json(path: Path, found: Findings) -> None:
    """A tokenizer, or scores."""
    try:
        if path.stat().st_size > LONGEST_JSON:
            raise ValueError(f"more than {LONGEST_JSON:,} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        found.notes.append(f"{found.name(path)}: not read ({error})")
        return
    if isinstance(value, dict) and isinstance(value.get("model"), dict) and "vocab" in value["model"]:
        found.items.append(Item(found.name(path), None, path.stat().st_size, ""))
    elif isinstance(value, (dict, list)):
        found.scores.append((found.name(path), value))


def _add_text(path: Path, found: Findings) -> None:
    """A table in plain type, as a recipe's accuracy.txt; prompts are told by what was drawn for them."""
    if any(path.with_name(f"{path.stem}.{kind}.safetensors").exists() for kind in ("codes", "images", "best")):
        return
    try:
        if path.stat().st_size <= LONGEST_TEXT:
            found.texts.append((found.name(path), path.read_text(encoding="utf-8").strip("\n")))
        else:
            found.notes.append(f"{found.name(path)}: left out, as it has more than {LONGEST_TEXT:,} bytes")
    except (OSError, UnicodeDecodeError):
        found.notes.append(f"{found.name(path)}: not read, as it is no text")


def _digest(found: Findings) -> None:
    """Fill in the digests, small files first."""
    left, digests = HASHED, {}
    with console.progress("reading", len(found.items), unit="artifacts") as advance:
        for item in sorted(found.items, key=lambda item: (item.size, item.name)):
            left -= item.size
            if left >= 0 and item.kind != "checkpoint":
                digests[item.name] = _sha256(item, found.root)
            elif left < 0:
                found.notes.append(f"{item.name}: too large to take its SHA-256 here, so nothing is linked to it")
            advance()
    found.items = [Item(i.name, i.artifact, i.size, digests.get(i.name, "")) for i in found.items]


def _sha256(item: Item, root: Path) -> str:
    return digest_file(root / item.name) if item.artifact is None else item.artifact.digest
