"""What `doctor` examines: a trained model and a task of its kind, on held-out rows.

The rows are one batch as the task makes it for training. A check changes columns of it (another caption, a null
embedding) and asks the task for its loss again, so doctor has no loss of its own. N rows, G groups of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_cli import config
from dalle_cli.artifacts import Artifact
from dalle_cli.data.split import split
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles

DETERMINISTIC: dict[str, Any] = {  # training settings with which a batch is its rows and nothing else
    "accumulate": 1, "augment": "center", "flip": False, "bpe_dropout": 0.0, "caption_dropout": 0.0,
    "embedding_dropout": 0.0, "embedding_noise": 0.0, "code_noise": 0.0, "corruption": "none", "sketch_only": False,
    "sketch_redrawn": 0.0, "validation": 0.0,
}  # fmt: skip
GROUPS, GROUP_ROWS = 8, 32  # at least so many groups, of at most so many rows

Columns = dict[str, Tensor]
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Request:
    """What to examine, on which data, and how."""

    weights: Artifact
    inputs: list[str]
    captions: Path | None
    exclude: Path | None
    machine: Arithmetic
    seed: int
    limit: int | None
    workers: int

    def options(self, cls: Any, n: int) -> Any:
        """The weights' own training settings, for deterministic batches of n rows."""
        known = {field.name for field in fields(cls)}
        same = {name: value for name, value in DETERMINISTIC.items() if name in known}
        same |= {name: n for name in ("batch_size", "sketch_batch", "max_validation") if name in known}
        return replace(config.build(cls, self.weights.fact("train", dict), "train"), **same)

    def check(self, source: Artifact, *names: str) -> Artifact:
        """Raises: DalleError unless an input was made with the tokenizer or encoder that the weights name."""
        for name in names:
            what = {"encoder": "image encoder"}.get(name, name)
            bundles.check_digest(what, source.fact(name, str), self.weights.fact(name, str), self.weights.path)
        return source

    def choose(self, ids: list[str]) -> tuple[frozenset[str], bool, Any]:
        """The ids to leave out, whether the others were held out of training, and the places of training.

        Raises:
            DalleError: fewer than two rows remain.
        """
        training, held = split(ids, float(self.weights.fact("train", dict).get("validation", 0.0)))
        places = held if len(held) > 1 else training
        if self.limit is not None and self.limit < len(places):
            places = places[np.arange(self.limit) * len(places) // self.limit]
        if len(places) < 2:
            raise DalleError(f"expected 2 rows or more to compare, found {len(places)}; give more, or raise --limit")
        chosen = {ids[place] for place in places.tolist()}
        return frozenset(ids) - chosen, len(held) > 1, training


@dataclass
class Subject:
    """A trained model, a task of its kind with fresh weights, and N held-out rows as a training batch."""

    request: Request
    task: Any
    model: Any
    digests: dict[str, str]
    held_out: bool
    names: tuple[str, ...]  # of the batch's columns
    width: int  # of the model's stream
    error: Callable[[Tensor, Metrics], Tensor] = lambda loss, _: loss  # (loss, metrics) -> what learning must lower
    counted: Columns = field(default_factory=dict)  # of pairs seen in training
    loss: Callable[..., tuple[Tensor, Metrics]] | None = None  # of a batch, where not the task's

    def __post_init__(self) -> None:
        self.fresh = self.task.model
        self.task.held_out = np.arange(len(getattr(self.task, "rows", getattr(self.task, "places", ()))))

    @cached_property
    def columns(self) -> Columns:
        """The rows, by the name of each column of a batch; what a sketch learns from has no name and is left out."""
        return dict(zip(self.names, self.batch, strict=False))

    @cached_property
    def batch(self) -> tuple[Tensor, ...]:
        """All rows as one batch of training."""
        batches = self.task.batches(0)
        batch: tuple[Tensor, ...] = next(batches)
        batches.close()
        return batch

    @property
    def n(self) -> int:
        """N."""
        return len(self.batch[0])

    @cached_property
    def captions(self) -> Tensor:
        """A number for each row, equal where the captions are: (N,) int64."""
        tokens, lengths = self.columns["tokens"], self.columns["lengths"]
        after = torch.arange(tokens.shape[1]) >= lengths[:, None]
        return torch.unique(tokens.masked_fill(after, -1), dim=0, return_inverse=True)[1]

    @cached_property
    def others(self) -> Tensor:
        """For each row the next one with another caption, or just the next if all are equal: (N,) int64."""
        following = (torch.arange(self.n)[:, None] + torch.arange(1, self.n)) % self.n
        first = (self.captions[following] != self.captions[:, None]).byte().argmax(1)
        return following[torch.arange(self.n), first]

    def of_others(self, *names: str) -> Columns:
        """These columns of the other rows."""
        return {name: self.columns[name][self.others] for name in names}

    def rolled(self, *names: str) -> Columns:
        """These columns of the next row."""
        return {name: self.columns[name].roll(1, 0) for name in names}

    def null(self, name: str = "lengths") -> Columns:
        """A column of zeros: lengths of null captions, or z_i that do not count."""
        return {name: torch.zeros_like(self.columns[name])}

    def setting(self, name: str) -> float:
        """A share that the training was set to; 0 where it was not."""
        value = self.request.weights.fact("train", dict).get(name, 0.0)
        return float(value) if isinstance(value, (int, float)) else 0.0

    def validate(self) -> dict[str, float]:
        """The metrics of the task's own validation, on these rows."""
        with torch.no_grad(), self.request.machine.autocast():
            metrics: dict[str, float] = self.task.validate(self.model, self.request.machine.device)
        return metrics

    @torch.no_grad()
    def run(self, changed: Columns | None = None) -> tuple[Tensor, Tensor]:
        """The trained model's error on each group (G,), and all that it outputs, with changed columns; on the CPU."""
        columns, device = {**self.columns, **(changed or {})}, self.request.machine.device
        outputs: list[Tensor] = []
        errors: list[Tensor] = []
        groups = torch.arange(self.n).tensor_split(min(self.n, max(-(-self.n // GROUP_ROWS), GROUPS)))
        loss = self.loss or (lambda *batch: self.task.loss(batch, 0, torch.Generator(device).manual_seed(0)))
        self.task.model = self.model
        with self.hook(lambda *args: outputs.append(args[2].double().cpu())), self.request.machine.autocast():
            for group in groups:
                errors.append(self.error(*loss(*(column[group].to(device) for column in columns.values()))))
        self.task.model = self.fresh
        return torch.stack(errors).double().cpu(), torch.cat(outputs) if outputs else torch.zeros(0)

    @contextmanager
    def hook(self, call: Callable[..., Any]) -> Iterator[None]:
        """Let `call` see, and replace, what the trained network outputs: (module, inputs, output)."""
        handle = self.model.register_forward_hook(lambda *args: call(*args))
        try:
            yield
        finally:
            handle.remove()

    def predicting_zero(self) -> Any:
        """A context in which the network outputs zeros: what a model costs that knows nothing."""
        return self.hook(lambda _module, _inputs, output: torch.zeros_like(output))
