"""The training loop of every model.

Randomness is a function of (seed, update): each update seeds the generators anew, and a batch is a function of its
number. A checkpoint therefore holds no generator states, and a resumed run is the run that was never stopped.
"""

import hashlib
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor, nn

from dalle_cli import console
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.training.config import TrainConfig
from dalle_cli.training.optim import EMA, load_optimizer_state, optimizer_state, optimizers
from dalle_cli.training.run import Run
from dalle_cli.training.schedules import learning_rate

Batch = tuple[Tensor, ...]


class Task(Protocol):
    """What differs between models: data, loss, validation, and the picture that shows how far it has come."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    def batches(self, start: int) -> Generator[Batch]:
        """Batches of update `start`, `start` + 1, ...: tensors on the CPU."""

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one update, and figures to log, averaged over the updates between two log lines."""

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Figures on held-out data, of the averaged weights."""

    def sheet(self, model: nn.Module, device: torch.device, path: Path) -> None:
        """Draw the state of the run as a picture; may do nothing."""


def mix(*numbers: int) -> int:
    """A seed from several numbers, well mixed, below 2**63."""
    data = b"".join(n.to_bytes(8, "little", signed=True) for n in numbers)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


class Interrupt:
    """Remembers SIGINT and SIGTERM so that an update is finished and a checkpoint written before leaving."""

    def __init__(self) -> None:
        self.came = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this lasts, the first signal is remembered and a second one raises KeyboardInterrupt."""

        def remember(number: int, frame: FrameType | None) -> None:
            if self.came:
                raise KeyboardInterrupt  # the second time means now
            self.came = True

        kept = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)


class Trainer:
    """Carries a task from its last checkpoint to its weights."""

    def __init__(self, task: Task, config: TrainConfig, run: Run, machine: Arithmetic, seed: int):
        self.task, self.config, self.run = task, config, run
        self.machine, self.device, self.seed = machine, machine.device, seed
        self.model = task.model.to(self.device).train()
        self.optimizers = optimizers(self.model, config)
        self.ema = EMA(self.model, config.ema)
        self.step = 0
        self.seconds = 0.0

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        self.run.sweep()
        found = self.run.latest()
        if found is None:
            self.run.rewind_log(-1)
            return
        self.step, tensors = found
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.ema.model.load_state_dict(parts["ema"])
        load_optimizer_state(self.model, self.optimizers, parts["optimizer"])
        self.seconds = self.run.rewind_log(self.step)
        console.note(f"resuming from update {self.step}")

    def save(self) -> None:
        """Write a checkpoint: weights, their average, the optimisers' state."""
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.model.state_dict().items()}
        tensors |= {f"optimizer/{k}": v for k, v in optimizer_state(self.model, self.optimizers).items()}
        self.run.save_checkpoint(self.step, tensors, self.config.keep)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One update of the weights; the figures to log."""
        c = self.config
        rate = learning_rate(self.step, c.schedule, c.lr, c.final_lr, c.warmup, c.schedule_steps)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        seed = mix(self.seed, self.step)
        torch.manual_seed(seed)
        generator = torch.Generator(self.device).manual_seed(seed)
        batch = tuple(t.to(self.device, non_blocking=True) for t in batch)
        with self.machine.autocast():
            loss, figures = self.task.loss(batch, self.step, generator)
        self.model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if c.clip_norm:
            figures["grad_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), c.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        if self.step % c.ema_every == 0:
            self.ema.update(self.model, self.step // c.ema_every - 1)
        return {"loss": loss.detach(), **{k: v.detach() for k, v in figures.items()}, "lr": torch.tensor(rate)}

    def validate(self) -> dict[str, float]:
        """Figures of the averaged weights on held-out data, logged; and a picture of them."""
        with torch.no_grad(), self.machine.autocast():
            figures = self.task.validate(self.ema.model, self.device)
            self.task.sheet(self.ema.model, self.device, self.run.folder / "samples" / f"{self.step:08d}.png")
        self.run.log({"step": self.step, "seconds": round(self.seconds, 2), "validation": figures})
        return figures

    def train(self) -> dict[str, float]:
        """Train to the end and write the weights; the last validation's figures."""
        c, interrupt = self.config, Interrupt()
        last: dict[str, float] = {}
        label = self.run.out.name.removesuffix(".safetensors")
        with (
            interrupt.watching(),
            console.progress(f"train {label}", c.steps, self.step, "updates") as advance,
            closing(self.task.batches(self.step)) as batches,
        ):
            averages = Averages()
            while self.step < c.steps:
                began = time.monotonic()
                averages.add(self.update(next(batches)))
                self.seconds += time.monotonic() - began
                shown = self._log(averages) if self.step % c.log_every == 0 or self.step == c.steps else {}
                if self.step % c.validate_every == 0 or self.step == c.steps:
                    last = self.validate()
                    shown |= last
                advance(1, **shown)
                if interrupt.came or self.step % c.checkpoint_every == 0 or self.step == c.steps:
                    averages.check(self.step)
                    self.save()
                if interrupt.came:
                    console.note(f"stopped after update {self.step}; the same command goes on from here")
                    raise KeyboardInterrupt
        self.run.save_weights(stored_as(self.ema.model.state_dict(), c.save_dtype))
        return last or self._last_validation()

    def _last_validation(self) -> dict[str, float]:
        with torch.no_grad(), self.machine.autocast():
            return self.task.validate(self.ema.model, self.device)

    def _log(self, averages: "Averages") -> dict[str, float]:
        averages.check(self.step)
        figures = averages.take()
        self.run.log({"step": self.step, "seconds": round(self.seconds, 2), **figures})
        return {k: v for k, v in figures.items() if k != "lr"}


def stored_as(tensors: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors with all floating ones in `dtype`, by torch's name for it."""
    kind: torch.dtype = getattr(torch, dtype)
    return {name: t.to(kind) if t.is_floating_point() else t for name, t in tensors.items()}


class Averages:
    """Means of the figures since they were last taken; kept as tensors, so that no update waits for the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.last: Tensor | None = None

    def add(self, figures: dict[str, Tensor]) -> None:
        """Take in the figures of one update."""
        self.count += 1
        self.last = figures["loss"]
        for key, value in figures.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value

    def check(self, step: int) -> None:
        """Raises: DalleError if the loss is no longer a finite number; the last checkpoint is the good one."""
        if self.last is not None and not torch.isfinite(self.last).item():
            raise DalleError(f"expected a finite loss, found {self.last.item()} by update {step}; lower the lr")

    def take(self) -> dict[str, float]:
        """The means of the scalar figures; begins anew."""
        means = {key: (value / self.count).item() for key, value in self.sums.items() if value.ndim == 0}
        self.sums, self.count = {}, 0
        return means


def train(
    build: Callable[[], Task], config: TrainConfig, run: Run, machine: Arithmetic, seed: int, fresh: bool = False
) -> dict[str, float]:
    """Train a task from its last checkpoint to its end; the last validation's figures, none if it was finished before.

    Raises:
        DalleError: checkpoints of another run, a full disk, or a loss that is no longer finite.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint has been written.
    """
    run.check()
    if fresh:
        run.start_over()
    elif run.finished():
        console.note(f"{run.out.name} is finished, by this config and these inputs: left alone (--fresh starts over)")
        return {}
    trainer = Trainer(build(), config, run, machine, seed)
    trainer.resume()
    return trainer.train()
