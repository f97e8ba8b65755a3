"""A training run: the weights file, and the folder beside it with checkpoints, `metrics.jsonl` and sample images.

The config and history that the weights will record identify a run. So the same command finds its own checkpoints, and
leaves finished weights of the same config and inputs alone.
"""

import glob
import json
import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle_cli.artifacts import Artifact, open_artifact
from dalle_cli.artifacts.container import check_replaceable
from dalle_cli.artifacts.weights import load_tensors, save_tensors
from dalle_cli.errors import DalleError
from dalle_cli.training.config import TrainConfig, affecting, with_defaults
from dalle_cli.training.resuming import Fits
from dalle_cli.training.schedules import same_until

log = logging.getLogger("dalle_cli")


@dataclass(frozen=True)
class Run:
    """Where a run writes, and what its weights will record."""

    out: Path
    kind: str
    config: dict[str, Any]
    history: list[dict[str, Any]]
    force: bool = False
    model_type: type[Any] | None = None  # dataclasses of config["model"] and config["train"]
    train_type: type[Any] = TrainConfig

    @property
    def name(self) -> str:
        """`X`, where the weights are `X.safetensors`."""
        return self.out.name.removesuffix(".safetensors")

    @property
    def folder(self) -> Path:
        """`X.run/` beside `X.safetensors`."""
        return self.out.parent / f"{self.name}.run"

    @property
    def metrics(self) -> Path:
        """The log: one JSON object a line."""
        return self.folder / "metrics.jsonl"

    def _same(self, artifact: Artifact, config: dict[str, Any]) -> bool:
        """Whether an artifact says of itself what this run will say, as JSON has it (tuples are lists there).

        A setting that came after the artifact was made counts as its default: an upgrade makes nobody train again.
        """
        mine, history = json.loads(json.dumps([self.config, self.history]))
        return bool([self._compared(config), artifact.history] == [self._compared(mine), history])

    def _compared(self, config: dict[str, Any]) -> dict[str, Any]:
        """A config with the settings that came after it, and without those that change nothing of the result."""
        config = dict(config)
        if self.model_type and isinstance(model := config.get("model"), dict):
            config["model"] = with_defaults(self.model_type, model)
        if isinstance(train := config.get("train"), dict):
            sampling, aside = affecting(self.train_type, "sampling"), affecting(self.train_type, "nothing")
            kept = with_defaults(self.train_type, train).items()
            config["train"] = {name: value for name, value in kept if name not in aside | sampling}
            defaults = {name: value for name, value in with_defaults(self.train_type, {}).items() if name in sampling}
            recorded = config.get("sampling", {})
            config["sampling"] = {**defaults, **recorded} if isinstance(recorded, dict) else recorded
        return json.loads(json.dumps(config))  # type: ignore[no-any-return]  # tuples are lists in JSON

    def _same_so_far(self, artifact: Artifact, config: dict[str, Any], step: int) -> bool:
        """Whether this run would have come to a checkpoint as well: its end may be another, and what it writes then."""
        mine, recorded = json.loads(json.dumps(self.config)).get("train"), self._compared(config).get("train")
        if not isinstance(mine, dict) or not isinstance(recorded, dict):
            return False
        end = {name: mine[name] for name in ("steps", *affecting(self.train_type, "end")) if name in mine}
        theirs = {**recorded, **end, "steps": recorded["steps"]}
        now = {**recorded, **end}
        ends = {"train": now, "sampling": self.config.get("sampling", {})}
        try:
            return self._same(artifact, {**config, **ends}) and same_until(step, theirs, now)
        except (TypeError, ValueError, ArithmeticError):  # settings that are no numbers
            return False

    def check(self) -> None:
        """Raises: DalleError if the output path holds something else than weights of this kind."""
        check_replaceable(self.out, self.kind, self.force)

    def start_over(self) -> None:
        """Remove the run's folder; the weights stay until new ones replace them."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def finished(self) -> bool:
        """Whether weights of this config and these inputs exist; marks them as new, for make."""
        if not self.out.exists():
            return False
        try:
            done = self._same(found := open_artifact(self.out, self.kind), found.config)
        except DalleError:
            return False
        if done:
            os.utime(self.out)
        return done

    def sweep(self) -> None:
        """Remove partial files that a killed run left behind."""
        for partial in (
            *self.folder.glob(".checkpoint-*.part"),
            *self.folder.glob(".tmp??????"),  # which safetensors 0.8 writes first
            *self.out.parent.glob(f".{glob.escape(self.out.name)}.*.part"),
        ):
            partial.unlink(missing_ok=True)
        whole = {path.with_suffix(".shards") for path in self.checkpoints()}
        for folder in set(self.folder.glob("checkpoint-*.shards")) - whole:
            shutil.rmtree(folder)

    def checkpoints(self) -> list[Path]:
        """All checkpoint files, oldest first."""
        return sorted(self.folder.glob("checkpoint-*.safetensors"))

    def checkpoint(self, step: int) -> Path:
        """The file of the state after `step` updates."""
        return self.folder / f"checkpoint-{step:08d}.safetensors"

    def shards(self, step: int) -> Path:
        """The folder beside it, into which each of several processes writes its part before the file is written."""
        return self.checkpoint(step).with_suffix(".shards")

    @staticmethod
    def is_whole(names: Iterable[str]) -> bool:
        """Whether a checkpoint's file holds all tensors, and not only those that are never sharded."""
        return any(name.startswith("model/") for name in names)

    def latest(self, fits: Fits = lambda shapes, whole: True) -> tuple[int, dict[str, Tensor]] | None:
        """The last checkpoint of this run that can be read and `fits`: its number of updates, and its tensors.

        Raises:
            DalleError: the checkpoints are those of another config or other inputs.
        """
        for path in reversed(self.checkpoints()):
            try:
                found = open_artifact(path, "checkpoint")
                step = found.require("step", int)
            except DalleError:
                continue  # a damaged file: the checkpoint before it serves
            whole = self.is_whole(found.headers[0].tensors)
            if not whole and not path.with_suffix(".shards").is_dir():
                continue
            shapes = {name: info.shape for name, info in found.headers[0].tensors.items()}
            config = {name: value for name, value in found.config.items() if name != "step"}
            named = path == self.checkpoint(step)
            same = named and (self._same(found, config) or self._same_so_far(found, config, step))
            if not named or (same and not fits(shapes, whole)):
                log.warning("a checkpoint that does not fit the model, which is left out: %s", path)
                continue
            if same:
                return step, load_tensors(found)
            state = "a finished" if step == found.require("train", dict).get("steps") else "an unfinished"
            raise DalleError(
                f"expected checkpoints of this run in {self.folder}, found {state} run of another config or other "
                "inputs; --fresh starts over and removes it, another -o keeps both"
            )
        return None

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], keep: int) -> None:
        """Write the state after `step` updates, and remove all checkpoints but the last `keep`."""
        self._save_checkpoint(self.checkpoint(step), step, tensors)
        for old in self.checkpoints()[:-keep]:
            old.unlink()
            shutil.rmtree(old.with_suffix(".shards"), ignore_errors=True)

    def _save_checkpoint(self, path: Path, step: int, tensors: dict[str, Tensor]) -> None:
        save_tensors(path, "checkpoint", tensors, {**self.config, "step": step}, self.history, force=True)

    def clear(self, folder: Path) -> None:
        """Make an empty folder for shards; what a killed run left in it is removed."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def save_own(self, step: int, rank: int, tensors: dict[str, Tensor]) -> None:
        """Write the state after `step` updates that belongs to one process, `rank`, alone."""
        self._save_checkpoint(self._own(step, rank), step, tensors)

    def own(self, step: int, rank: int, world: int) -> dict[str, Tensor]:
        """What `save_own` wrote; empty if another number of processes wrote it."""
        if not self._own(step, world - 1).exists() or self._own(step, world).exists():
            return {}
        return load_tensors(open_artifact(self._own(step, rank), "checkpoint"))

    def _own(self, step: int, rank: int) -> Path:
        return self.shards(step) / f"own-{rank:05d}.safetensors"

    def save_weights(self, tensors: dict[str, Tensor]) -> None:
        """Write the trained weights."""
        save_tensors(self.out, self.kind, tensors, self.config, self.history, self.force)

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to the log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rewind_log(self, step: int) -> float:
        """Drop log rows after `step`, which will be written again; returns the seconds that the run took until then."""
        if not self.metrics.exists():
            return 0.0
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue  # a kill cut this line short
            if isinstance(row, dict) and row.get("step", step) <= step:
                rows.append(row)
        self.metrics.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        return float(rows[-1].get("seconds", 0.0)) if rows else 0.0


class Board:
    """The log's rows as TensorBoard scalars, in a folder inside the run's."""

    def __init__(self, run: Run, step: int):
        """Start after update `step`; later rows of an earlier process are hidden.

        Raises:
            DalleError: the package tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise DalleError(
                "expected the package tensorboard for tensorboard = true, found none; "
                "pip install 'dalle-cli[tensorboard]', or set it to false"
            ) from None
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Write the numbers of one row, those of a validation under `validation/`."""
        for name, value in row.items():
            scalars = {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
            for key, scalar in scalars.items():
                if key != "step":
                    self.writer.add_scalar(key, scalar, row["step"])
        self.writer.flush()

    def close(self) -> None:
        """Flush and close the files."""
        self.writer.close()
