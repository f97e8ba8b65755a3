"""The training loop of every model.

Randomness is a function of (seed, update): each update seeds the generators anew, and a batch is a function of its
number. A checkpoint therefore holds no generator states, and a resumed run is the run that was never stopped.
"""

import hashlib
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dalle_cli import console
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.training.blocks import blocks, compiled, recomputed, surround
from dalle_cli.training.config import TrainConfig
from dalle_cli.training.figures import Averages, Meter
from dalle_cli.training.optim import EMA, load_optimizer_state, optimizer_state, optimizers
from dalle_cli.training.run import Board, Run
from dalle_cli.training.scaling import BlockScales
from dalle_cli.training.schedules import Plateau, learning_rate

Batch = tuple[Tensor, ...]


class Task(Protocol):
    """What differs between models: data, loss, validation, and the picture that shows how far it has come.

    A task may also be one that `Splits`, `Counts` or `Costs`.
    """

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


@runtime_checkable
class Splits(Protocol):
    """A task whose batch can be computed in parts: one whose loss is a mean, not a comparison within the batch."""

    def split(self, batch: Batch, parts: int, step: int, generator: torch.Generator) -> list[Batch]:
        """Batches for `loss` whose losses, and figures, average to those of the whole.

        Where a loss is a mean over something of which the parts hold unequal numbers (tokens of captions), a part must
        carry its weight along. What is drawn for the batch as a whole is drawn here.
        """


@runtime_checkable
class Counts(Protocol):
    """A task that says what its rate is counted in; otherwise in pictures, which are the rows of a batch."""

    def units(self, batch: Batch) -> tuple[str, int]:
        """The unit's name in the plural, and how many a batch holds."""


@runtime_checkable
class Costs(Protocol):
    """A task that knows how much it computes."""

    def flops(self) -> float:
        """Floating-point operations of one update, forward and backward."""


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
        c = config
        self.plateau = Plateau(c.plateau_figure, c.plateau_patience, c.plateau_factor, c.plateau_least)
        self.logged, self.validated = Averages(), Averages()  # since the last row of the log, since the last validation
        self.meter = Meter(machine, task.flops() if isinstance(task, Costs) else None, config.log_every)
        self.board: Board | None = None
        self.scales: BlockScales | None = None
        self._surround()  # after the average was made, which is a plain model

    def _surround(self) -> None:
        """What the settings put around the model's blocks and around its loss.

        Raises:
            DalleError: accumulation of a loss that takes the whole batch, or a model without blocks.
        """
        c = self.config
        if c.accumulate > 1 and not isinstance(self.task, Splits):
            name = type(self.model).__name__
            raise DalleError(
                f"expected accumulate = 1 for {name}, whose loss takes the whole batch, found {c.accumulate}"
            )
        if c.checkpoint_activations:
            for block in blocks(self.model).values():
                surround(block, recomputed)
        if self.machine.dtype == torch.float16:
            self.scales = BlockScales(self.model)
            self.scales.attach()
        if c.compile:
            vars(self.model)["loss"] = compiled(getattr(self.model, "loss"))  # noqa: B009  (no submodule)

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        self.run.sweep()
        found = self.run.latest()
        if found is None:
            self.run.rewind_log(-1)
            return
        self.step, tensors = found
        self.model.load_state_dict(_part(tensors, "model"))
        self.ema.model.load_state_dict(_part(tensors, "ema"))
        load_optimizer_state(self.model, self.optimizers, _part(tensors, "optimizer"))
        self.logged.load(_part(tensors, "loop/logged"), self.device)
        self.validated.load(_part(tensors, "loop/validated"), self.device)
        self.plateau.load(_part(tensors, "loop/plateau"))
        if self.scales:
            self.scales.load(_part(tensors, "loop/scales"))
        self.meter.seconds = self.run.rewind_log(self.step)
        console.note(f"resuming from update {self.step}")

    def save(self) -> None:
        """Write a checkpoint: weights, their average, the optimisers' state, and what the loop itself remembers."""
        parts = {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": optimizer_state(self.model, self.optimizers),
            "loop/logged": self.logged.state(),
            "loop/validated": self.validated.state(),
            "loop/plateau": self.plateau.state(),
            "loop/scales": self.scales.state() if self.scales else {},
        }
        tensors = {f"{part}/{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
        self.run.save_checkpoint(self.step, tensors, self.config.keep)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One update of the weights; the figures to log."""
        c = self.config
        rate = learning_rate(self.step, c.schedule, c.lr, c.final_lr, c.warmup, c.schedule_steps) * self.plateau.share
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        figures = self._gradients(tuple(t.to(self.device, non_blocking=True) for t in batch))
        if self.scales:
            self.scales.unscale()
        if c.clip_norm:
            figures["grad_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), c.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        if self.step % c.ema_every == 0:
            self.ema.update(self.model, self.step // c.ema_every - 1)
        return {**figures, "lr": torch.tensor(rate)}

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of a batch, computed whole or in parts; loss and figures."""
        c = self.config
        self.model.zero_grad()
        parts, figures = [batch], Averages()
        if c.accumulate > 1:
            assert isinstance(self.task, Splits)
            parts = self.task.split(batch, c.accumulate, self.step, self._seeded(self.step))
        for number, part in enumerate(parts):
            generator = self._seeded(self.step, *([number] if len(parts) > 1 else []))
            with self._autocast():
                loss, told = self.task.loss(part, self.step, generator)
            (loss / len(parts)).backward()  # type: ignore[no-untyped-call]
            figures.add({"loss": loss.detach(), **{k: v.detach() for k, v in told.items()}})
        return {name: total / len(parts) for name, total in figures.sums.items()}

    def _seeded(self, *numbers: int) -> torch.Generator:
        """Torch's own generators and one for the task, as these numbers have them."""
        seed = mix(self.seed, *numbers)
        torch.manual_seed(seed)
        return torch.Generator(self.device).manual_seed(seed)

    def _autocast(self) -> AbstractContextManager[None]:
        """The arithmetic of the loss; with scales, float16 is inside the blocks alone."""
        return nullcontext() if self.scales else self.machine.autocast()

    def _figures(self) -> dict[str, float]:
        with torch.no_grad(), self.machine.autocast():
            return self.task.validate(self.ema.model, self.device)

    def validate(self) -> dict[str, float]:
        """Figures of the averaged weights on held-out data, logged; and a picture of them."""
        figures = self._figures()
        with torch.no_grad(), self.machine.autocast():
            self.task.sheet(self.ema.model, self.device, self.run.folder / "samples" / f"{self.step:08d}.png")
        self._write({"step": self.step, "seconds": round(self.meter.seconds, 2), "validation": figures})
        self._see({"loss": self.validated.take()["loss"], **figures})
        return figures

    def _see(self, figures: dict[str, float]) -> None:
        """Let the plateau see a validation, `loss` being that of training; the warm-up tells nothing of one."""
        if self.config.schedule == "plateau" and self.step > self.config.warmup and self.plateau.see(figures):
            console.note(f"{self.plateau.figure} has stopped falling: from here lr times {self.plateau.share:.4g}")

    def train(self) -> dict[str, float]:
        """Train to the end and write the weights; the last validation's figures."""
        c, interrupt = self.config, Interrupt()
        last: dict[str, float] = {}
        with ExitStack() as stack:
            stack.enter_context(interrupt.watching())
            if c.tensorboard:
                self.board = stack.enter_context(closing(Board(self.run, self.step)))
            display = stack.enter_context(console.training(f"train {self.run.name}", c.steps, self.step))
            if display.live:
                self.meter.measure_machine()
            batches = stack.enter_context(closing(self.task.batches(self.step)))
            if c.schedule == "plateau" and c.plateau_figure != "loss" and self.step == 0:
                self.plateau.value({"loss": 0.0, **self._figures()})  # a wrong name is told now, not hours later
            while self.step < c.steps:
                self._advance(batches, display)
                if self.step % c.validate_every == 0 or self.step == c.steps:
                    last = self.validate()
                    display.tell(self.meter.pace(), **last)
                display.advance()
                if interrupt.came or self.step % c.checkpoint_every == 0 or self.step == c.steps:
                    self.logged.check(self.step)
                    self.save()
                if interrupt.came:
                    console.note(f"stopped after update {self.step}; the same command goes on from here")
                    raise KeyboardInterrupt
        self.run.save_weights(stored_as(self.ema.model.state_dict(), c.save_dtype))
        return last or self._figures()

    def _advance(self, batches: Iterator[Batch], display: console.Display) -> None:
        """One update, timed, logged and shown."""
        began = time.monotonic()
        batch = next(batches)
        figures = self.update(batch)
        self.logged.add(figures)
        self.validated.add({"loss": figures["loss"]})
        logs = self.step % self.config.log_every == 0 or self.step == self.config.steps
        means: dict[str, float] = {}
        if logs or display.due():
            self.logged.check(self.step)
            means = self.logged.take() if logs else self.logged.means()  # waits for the device
        units = self.task.units(batch) if isinstance(self.task, Counts) else ("pictures", len(batch[0]))
        self.meter.add(time.monotonic() - began, *units)
        if logs:
            self._write({"step": self.step, **means, **self.meter.row()})
        if means:
            display.tell(self.meter.pace(), **{k: v for k, v in means.items() if k != "lr"})

    def _write(self, row: dict[str, object]) -> None:
        self.run.log(row)
        if self.board:
            self.board.write(row)


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names begin with `part/`, without it; none in a checkpoint older than that."""
    return {name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")}


def stored_as(tensors: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors with all floating ones in `dtype`, by torch's name for it."""
    kind: torch.dtype = getattr(torch, dtype)
    return {name: t.to(kind) if t.is_floating_point() else t for name, t in tensors.items()}


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
