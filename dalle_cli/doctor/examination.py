"""What `doctor` examines: a trained model and a task of its kind, on held-out rows.

The rows are one batch as the task makes it for training. A check changes columns of it (another caption, a null
embedding) and asks the task for its loss again, so `doctor` has no loss of its own. N rows, G groups of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dalle_cli.artifacts import Artifact
from dalle_cli.devices import Arithmetic

GROUPS, GROUP_ROWS = 8, 32  # at least so many groups, for a standard error, of at most so many rows

Columns = dict[str, Tensor]
Metrics = dict[str, Tensor]


class Request(NamedTuple):
    """What to examine, on which data, and how."""

    weights: Artifact
    inputs: list[str]
    captions: Path | None
    exclude: Path | None
    machine: Arithmetic
    seed: int
    limit: int | None
    workers: int


@dataclass
class Examination:
    """A trained model, a task of its kind with a fresh model, and N held-out rows as a training batch.

    `loss` and `error` are functions of a batch's columns and of what `loss` returns; learning must lower the error.
    """

    request: Request
    task: Any
    model: Any
    digests: dict[str, str]
    held_out: bool
    names: tuple[str, ...]  # of the batch's columns
    width: int  # of the model's stream
    error: Callable[[Tensor, Metrics], Tensor]
    loss: Callable[..., tuple[Tensor, Metrics]] | None = None  # where it is not the task's
    counted: Columns = field(default_factory=dict)  # of training pairs

    def __post_init__(self) -> None:
        self.fresh, self.device = self.task.model, self.request.machine.device
        batches = self.task.batches(0)
        self.batch: tuple[Tensor, ...] = next(batches)
        batches.close()
        self.n = len(self.batch[0])
        self.columns: Columns = dict(zip(self.names, self.batch, strict=False))  # a sketch's own have no name
        self.task.held_out = np.arange(self.n)  # the rows of its validation

    @cached_property
    def captions(self) -> Tensor:
        """A number for each row, equal where the captions are: (N,) int64; all differ where there are none."""
        if "tokens" not in self.columns or not self.columns["tokens"].shape[1]:
            return torch.arange(self.n)
        tokens, lengths = self.columns["tokens"], self.columns["lengths"]
        tokens = tokens.masked_fill(torch.arange(tokens.shape[1]) >= lengths[:, None], -1)
        numbers: Tensor = torch.unique(tokens, dim=0, return_inverse=True)[1]
        return numbers

    @cached_property
    def others(self) -> Tensor:
        """For each row the next one with another caption, or just the next if no caption differs: (N,) int64."""
        following = (torch.arange(self.n)[:, None] + torch.arange(1, self.n)) % self.n
        return following[torch.arange(self.n), (self.captions[following] != self.captions[:, None]).byte().argmax(1)]

    def of_others(self, *names: str) -> Columns:
        """These columns, each row's taken from another row."""
        return {name: self.columns[name][self.others] for name in names}

    def null(self, name: str = "lengths") -> Columns:
        """A column of zeros: lengths of null captions, or the mask of null embeddings."""
        return {name: torch.zeros_like(self.columns[name])}

    def setting(self, name: str) -> float:
        """A share in the training's settings; 0 where there is none."""
        return float(self.request.weights.require("train", dict).get(name, 0.0))

    def validate(self) -> dict[str, float]:
        """The metrics of the task's own validation on these rows."""
        with torch.no_grad(), self.request.machine.autocast():
            metrics: dict[str, float] = self.task.validate(self.model, self.device)
        return metrics

    @torch.no_grad()
    def run(self, changed: Columns) -> tuple[Tensor, Tensor]:
        """The trained model's error on each group (G,) and its outputs (N, ...) with changed columns: on the CPU."""
        columns, outputs, errors = {**self.columns, **changed}, [torch.zeros(0)], []
        loss = self.loss or (lambda *batch: self.task.loss(batch, 0, torch.Generator(self.device).manual_seed(0)))
        self.task.model = self.model
        with self.hook(lambda output: outputs.append(output.double().cpu())), self.request.machine.autocast():
            for rows in torch.arange(self.n).tensor_split(min(self.n, max(-(-self.n // GROUP_ROWS), GROUPS))):
                errors.append(self.error(*loss(*(column[rows].to(self.device) for column in columns.values()))))
        self.task.model = self.fresh
        return torch.stack(errors).double().cpu(), torch.cat(outputs[1:] or outputs)

    @contextmanager
    def hook(self, call: Callable[[Tensor], Tensor | None] = torch.zeros_like) -> Iterator[None]:
        """Let `call` see, or replace, the network's outputs; zeros are the outputs of a model that knows nothing."""
        handle = self.model.register_forward_hook(lambda _module, _inputs, output: call(output))
        try:
            yield
        finally:
            handle.remove()
