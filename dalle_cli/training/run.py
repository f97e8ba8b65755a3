"""A run: the weights file, and the folder beside it with checkpoints, `metrics.jsonl` and sample sheets.

A run is known by what its weights will say of themselves (config and history). The same command therefore finds its own
checkpoints, and finished weights of the same config and inputs are left alone.
"""

import glob
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle_cli import console
from dalle_cli.artifacts import Artifact, open_artifact
from dalle_cli.artifacts.container import check_replaceable
from dalle_cli.artifacts.weights import load_tensors, save_tensors
from dalle_cli.errors import DalleError
from dalle_cli.training.config import TrainConfig, affecting, with_defaults
from dalle_cli.training.schedules import same_until


@dataclass(frozen=True)
class Run:
    """Where a run writes, and what its weights will say of themselves."""

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
            aside = affecting(self.train_type, "nothing")
            train = with_defaults(self.train_type, train)
            config["train"] = {name: value for name, value in train.items() if name not in aside}
        return json.loads(json.dumps(config))  # type: ignore[no-any-return]  # tuples are lists in JSON

    def _same_so_far(self, artifact: Artifact, config: dict[str, Any], step: int) -> bool:
        """Whether this run would have come to a checkpoint as well: its end may be another, and what it writes then."""
        mine, told = json.loads(json.dumps(self.config)).get("train"), self._compared(config).get("train")
        if not isinstance(mine, dict) or not isinstance(told, dict):
            return False
        end = {name: mine[name] for name in ("steps", *affecting(self.train_type, "end")) if name in mine}
        theirs = {**told, **end, "steps": told["steps"]}
        return self._same(artifact, {**config, "train": {**told, **end}}) and same_until(step, theirs, {**told, **end})

    def check(self) -> None:
        """Raises: DalleError if something else lies where the weights are to be written."""
        check_replaceable(self.out, self.kind, self.force)

    def start_over(self) -> None:
        """Forget the checkpoints; the weights stay until new ones replace them."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def finished(self) -> bool:
        """Whether the weights are there already, made by this config from these inputs; then they count as new."""
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
        """Remove what a killed run was in the middle of writing."""
        for cut in (
            *self.folder.glob(".checkpoint-*.part"),
            *self.folder.glob(".tmp??????"),  # which safetensors 0.8 writes first
            *self.out.parent.glob(f".{glob.escape(self.out.name)}.*.part"),
        ):
            cut.unlink(missing_ok=True)
        whole = {path.with_suffix(".shards") for path in self.checkpoints()}
        for folder in set(self.folder.glob("checkpoint-*.shards")) - whole:
            shutil.rmtree(folder)

    def checkpoints(self) -> list[Path]:
        """All that are kept, oldest first."""
        return sorted(self.folder.glob("checkpoint-*.safetensors"))

    def checkpoint(self, step: int) -> Path:
        """The file of the state after `step` updates."""
        return self.folder / f"checkpoint-{step:08d}.safetensors"

    def shards(self, step: int) -> Path:
        """The folder beside it, for what each of several processes writes by itself, before the file."""
        return self.checkpoint(step).with_suffix(".shards")

    @staticmethod
    def is_whole(names: Iterable[str]) -> bool:
        """Whether a checkpoint's file holds all tensors, not only those that are never cut into pieces."""
        return any(name.startswith("model/") for name in names)

    def latest(self) -> tuple[int, dict[str, Tensor]] | None:
        """The last whole checkpoint of this run: updates done, and its tensors.

        Raises:
            DalleError: the checkpoints are those of another config or other inputs.
        """
        for path in reversed(self.checkpoints()):
            try:
                found = open_artifact(path, "checkpoint")
            except DalleError:
                continue  # a broken one: the one before it serves
            if not self.is_whole(found.headers[0].tensors) and not path.with_suffix(".shards").is_dir():
                continue
            config, step = dict(found.config), found.fact("step", int)
            config.pop("step")
            if not self._same(found, config) and not self._same_so_far(found, config, step):
                if step == found.fact("train", dict).get("steps"):  # that run reached its end: nothing is lost
                    console.note(f"{self.out.name}: another config or other inputs than last time, so starting over")
                    self.start_over()
                    return None
                raise DalleError(
                    f"expected checkpoints of this run, found unfinished ones of another config or other inputs in "
                    f"{self.folder}; give --fresh to start over, or another -o"
                )
            return step, load_tensors(found)
        return None

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], keep: int) -> None:
        """Write the state after `step` updates, and remove all but the last `keep`."""
        self._save_checkpoint(self.checkpoint(step), step, tensors)
        for old in self.checkpoints()[:-keep]:
            old.unlink()
            shutil.rmtree(old.with_suffix(".shards"), ignore_errors=True)

    def _save_checkpoint(self, path: Path, step: int, tensors: dict[str, Tensor]) -> None:
        save_tensors(path, "checkpoint", tensors, {**self.config, "step": step}, self.history, force=True)

    def clear(self, folder: Path) -> None:
        """An empty folder for pieces; what a killed run left in it is gone."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def save_own(self, step: int, rank: int, tensors: dict[str, Tensor]) -> None:
        """Write what the process of this number alone remembers after `step` updates."""
        self._save_checkpoint(self._own(step, rank), step, tensors)

    def own(self, step: int, rank: int, world: int) -> dict[str, Tensor]:
        """What `save_own` wrote; nothing if that were not as many processes."""
        if not self._own(step, world - 1).exists() or self._own(step, world).exists():
            return {}
        return load_tensors(open_artifact(self._own(step, rank), "checkpoint"))

    def _own(self, step: int, rank: int) -> Path:
        return self.shards(step) / f"own-{rank:05d}.safetensors"

    def save_weights(self, tensors: dict[str, Tensor]) -> None:
        """Write what the run was for."""
        save_tensors(self.out, self.kind, tensors, self.config, self.history, self.force)

    def log(self, row: dict[str, Any]) -> None:
        """Append a line to the log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rewind_log(self, step: int) -> float:
        """Drop log rows from beyond `step`, which will be made again; the seconds that the run has taken till there."""
        if not self.metrics.exists():
            return 0.0
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # a line cut short by a kill
            if isinstance(row, dict) and row.get("step", step) <= step:
                rows.append(row)
        self.metrics.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        return float(rows[-1].get("seconds", 0.0)) if rows else 0.0


class Board:
    """The rows of the log as scalars for TensorBoard, in a folder of its own in the run's."""

    def __init__(self, run: Run, step: int):
        """Begin after update `step`; what an earlier process wrote from beyond is hidden.

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
        folder = str(run.folder / "tensorboard")
        self.writer = SummaryWriter(folder, purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """One row of the log: its numbers, those of a validation under `validation/`."""
        for name, value in row.items():
            scalars = {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
            for key, scalar in scalars.items():
                if key != "step":
                    self.writer.add_scalar(key, scalar, row["step"])
        self.writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()
