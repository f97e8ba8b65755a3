"""The training loop of every model.

Randomness is a function of (seed, update): each update seeds the generators anew, and a batch is a function of its
number. A checkpoint therefore holds no generator states, and a resumed run is the same as one that never stopped.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext

import torch
from torch import Tensor, nn

from dalle_cli import console
from dalle_cli.artifacts import Artifact
from dalle_cli.artifacts.weights import stored_as
from dalle_cli.devices import Arithmetic, compiled, keep_freed_memory
from dalle_cli.errors import DalleError
from dalle_cli.training import resuming
from dalle_cli.training.blocks import blocks, recompute, wrap_forward
from dalle_cli.training.config import TrainConfig
from dalle_cli.training.distributed import DataParallel, ProcessGroup, ReadsShard, SingleProcess, process_group
from dalle_cli.training.interrupt import Interrupt
from dalle_cli.training.metrics import Averages, Meter, Silent
from dalle_cli.training.optim import EMA, load_optimizer_state, optimizer_state, optimizers, to_bfloat16
from dalle_cli.training.run import Board, Run
from dalle_cli.training.scaling import BlockScales
from dalle_cli.training.schedules import Plateau, learning_rate
from dalle_cli.training.sharding import FullySharded
from dalle_cli.training.shards import full_tensor
from dalle_cli.training.task import Batch, Costs, Counts, Splits, Task, mix
from dalle_cli.training.warm_start import initialize_from

__all__ = ["Batch", "Costs", "Counts", "Splits", "Task", "Trainer", "mix", "train"]


class Trainer:
    """Trains a task's model, from its last checkpoint if there is one, and writes the final weights."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        run: Run,
        machine: Arithmetic,
        seed: int,
        group: ProcessGroup | None = None,
    ):
        self.task, self.config, self.run = task, config, run
        self.machine, self.device, self.seed = machine, machine.device, seed
        self.group = group or ProcessGroup()
        if self.device.type == "cpu":
            keep_freed_memory()
        sharded = self.group.world > 1 and config.parallel == "shard"  # FSDP: no rank holds the full weights
        if config.weights_dtype == "bfloat16":
            if machine.dtype != torch.bfloat16:
                found = f"found {machine.name}"
                raise DalleError(f"expected --dtype bfloat16 beside weights_dtype = 'bfloat16', {found}; give it")
            to_bfloat16(task.model)
        self.model = (task.model if sharded else task.model.to(self.device)).train()
        self.ema = EMA(self.model, config.ema)
        self.strategy = self._strategy(sharded)
        self.optimizers = optimizers(self.model, config)
        self.step = 0
        c = config
        self.plateau = Plateau(c.plateau_metric, c.plateau_patience, c.plateau_factor, c.plateau_least)
        self.logged, self.validated = Averages(), Averages()  # since the last log row, since the last validation
        flops = task.flops() / self.group.world if isinstance(task, Costs) else None
        self.meter = Meter(machine, flops, config.log_every)
        self.board: Board | None = None
        self.scales: BlockScales | None = None
        self._wrap()  # after the average was made, which is a plain model

    def _strategy(self, sharded: bool) -> SingleProcess:
        """The parallel strategy: one process, data parallel or fully sharded.

        Raises:
            DalleError: a loss over the whole batch, or settings that contradict each other.
        """
        c, world = self.config, self.group.world
        if world == 1:
            return SingleProcess(self.task, self.group)
        refusals = {
            f"{world} equal parts of batch_size {c.batch_size}": c.batch_size % (world * c.accumulate),
            "one process for a loss that takes the whole batch": not isinstance(self.task, (Splits, ReadsShard)),
            "compile = false for weights in shards": sharded and c.compile,
            "powersgd_rank = 0 in float16": c.powersgd_rank and self.machine.dtype == torch.float16,
        }
        for wanted, refused in refusals.items():
            if refused:
                raise DalleError(f"expected {wanted}, found {world} processes; change one of them")
        if sharded:
            return FullySharded(self.task, self.group, self.ema.model, self.device)
        if isinstance(self.task, ReadsShard):
            self.task.share(self.group.rank, world)
        return DataParallel(self.task, self.group, c.powersgd_rank, c.warmup)

    def _wrap(self) -> None:
        """Wrap the model's blocks and its loss as the settings say.

        Raises:
            DalleError: accumulation of a loss over the whole batch, or a model without blocks.
        """
        c = self.config
        if c.accumulate > 1 and not isinstance(self.task, Splits):
            name = type(self.model).__name__
            raise DalleError(
                f"expected accumulate = 1 for {name}, whose loss takes the whole batch, found {c.accumulate}"
            )
        if c.checkpoint_activations:
            for block in blocks(self.model).values():
                wrap_forward(block, recompute)
        if self.machine.dtype == torch.float16:
            self.scales = BlockScales(self.model)
            self.scales.attach()
        if c.compile:
            name = "loss" if hasattr(self.model, "loss") else "forward"  # a denoiser's loss is outside its model
            vars(self.model)[name] = compiled(getattr(self.model, name))

    def resume(self) -> None:
        """Continue from the last checkpoint, if there is one."""
        found = None
        scales = self.scales.state() if self.scales else {}
        fits = resuming.fits(self.model, {name: tuple(tensor.shape) for name, tensor in scales.items()})

        def find() -> tuple[bool, float]:
            nonlocal found
            self.run.sweep()
            found = self.run.latest(fits)
            return found is not None, self.run.rewind_log(found[0] if found else -1)

        exists, seconds = self.group.first(find)
        found = found if self.group.rank == 0 else self.run.latest(fits) if exists else None
        if found is None:
            return
        self.step, tensors = found
        tensors = self.strategy.read(self.run, self.step, tensors)
        self.model.load_state_dict(_part(tensors, "model"))
        self.ema.model.load_state_dict(_part(tensors, "ema"))
        load_optimizer_state(self.model, self.optimizers, _part(tensors, "optimizer"))
        self.logged.load(_part(tensors, "loop/logged"), self.device)
        self.validated.load(_part(tensors, "loop/validated"), self.device)
        self.plateau.load(_part(tensors, "loop/plateau"))
        if self.scales:
            self.scales.load(_part(tensors, "loop/scales"))
        self.meter.seconds = seconds
        self._note(f"resuming from update {self.step}")

    def save(self) -> None:
        """Write a checkpoint: weights, their average, and the states of optimizers and loop."""
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
        self.strategy.write(self.run, self.step, tensors, self.config.keep)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One update of the weights; the metrics to log."""
        c = self.config
        rate = learning_rate(self.step, c.schedule, c.lr, c.final_lr, c.warmup, c.schedule_steps) * self.plateau.share
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        metrics = self._gradients(tuple(t.to(self.device, non_blocking=True) for t in batch))
        if self.scales:
            self.scales.unscale(self.strategy.overflowed)
        if c.clip_norm:
            metrics["grad_norm"] = full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), c.clip_norm))
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        if self.step % c.ema_every == 0:
            self.ema.update(self.model, self.step // c.ema_every - 1)
        return {**metrics, "lr": torch.tensor(rate)}

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the gradients of a batch, whole or in parts, by one process or several; loss and metrics."""
        self.model.zero_grad()
        parts, metrics = self._parts(batch), Averages()
        for number, part in parts.items():
            generator = self._seeded(self.step, *([] if number is None else [number]))
            with self.strategy.part(metrics.count + 1 == len(parts)):
                with self._autocast():
                    loss, more = self.strategy.loss(part, self.step, generator)
                (loss / len(parts)).backward()  # type: ignore[no-untyped-call]
            metrics.add({"loss": loss.detach(), **{k: v.detach() for k, v in more.items()}})
        self.strategy.average_buffers()
        return self.group.means({name: total / len(parts) for name, total in metrics.sums.items()})

    def _parts(self, batch: Batch) -> dict[int | None, Batch]:
        """The parts of a batch that this process computes, by their numbers; None for a batch in one part."""
        here, world = self.config.accumulate, self.group.world
        if here * world == 1:
            return {None: batch}
        shares = isinstance(self.task, ReadsShard)  # the batch is this process's part already
        n_parts, first = here if shares else here * world, self.group.rank * here
        parts = [batch]
        if n_parts > 1:
            assert isinstance(self.task, Splits)
            parts = self.task.split(batch, n_parts, self.step, self._seeded(self.step))
        return dict(zip(range(first, first + here), parts if shares else parts[first : first + here], strict=True))

    def _seeded(self, *numbers: int) -> torch.Generator:
        """Seed torch's global generators (dropout) from these numbers, and make an independent one for the task."""
        torch.manual_seed(mix(self.seed, *numbers, "global"))
        return torch.Generator(self.device).manual_seed(mix(self.seed, *numbers))

    def _autocast(self) -> AbstractContextManager[None]:
        """The arithmetic of the loss; float16 is used inside the blocks alone."""
        return nullcontext() if self.scales else self.machine.autocast()

    def _validate(self) -> dict[str, float]:
        def validate() -> dict[str, float]:
            with torch.no_grad(), self.machine.autocast():
                return self.task.validate(self.ema.model, self.device)

        return validate() if self.strategy.sharded else self.group.first(validate)  # sharded weights need all processes

    def validate(self) -> dict[str, float]:
        """Metrics of the averaged weights on held-out data, logged; and an image grid."""
        metrics = self._validate()
        if not self.strategy.sharded:
            self.group.first(self._save_samples)
        self._write({"step": self.step, "seconds": round(self.meter.seconds, 3), "validation": metrics})
        self._update_plateau({"loss": self.validated.take()["loss"], **metrics})
        return metrics

    def _save_samples(self) -> None:
        with torch.no_grad(), self.machine.autocast():
            grid = self.task.samples(self.ema.model, self.device)
        if grid is not None:
            folder = self.run.folder / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            grid.save(folder / f"{self.step:08d}.png")

    def _update_plateau(self, metrics: dict[str, float]) -> None:
        """Update the plateau schedule; `loss` is that of training. The warm-up does not count."""
        if self.config.schedule == "plateau" and self.step > self.config.warmup and self.plateau.update(metrics):
            self._note(f"{self.plateau.metric} has stopped falling: from here lr times {self.plateau.share:.4g}")

    def train(self) -> dict[str, float]:
        """Train to the end and write the weights; the last validation's metrics."""
        c, interrupt = self.config, Interrupt()
        last: dict[str, float] = {}
        with ExitStack() as stack:
            stack.enter_context(interrupt.watching())
            if c.tensorboard and self.group.rank == 0:
                self.board = stack.enter_context(closing(Board(self.run, self.step)))
            display = stack.enter_context(self._display())
            if display.live:
                self.meter.measure_machine()
            batches = stack.enter_context(closing(self.task.batches(self.step)))
            if c.schedule == "plateau" and c.plateau_metric != "loss" and self.step == 0:
                self.plateau.value({"loss": 0.0, **self._validate()})  # refuses a wrong name now, not hours later
            while self.step < c.steps:
                self._advance(batches, display)
                if self.step % c.validate_every == 0 or self.step == c.steps:
                    last = self.validate()
                    display.tell(self.meter.pace(), **last)
                display.advance()
                stops = self.group.any(interrupt.received)
                if stops or self.step % c.checkpoint_every == 0 or self.step == c.steps:
                    self.logged.check(self.step)
                    self.save()
                if stops:
                    self._note(f"stopped after update {self.step}; the same command resumes from here")
                    raise KeyboardInterrupt
        self._finish()
        return last or self._validate()

    def _finish(self) -> None:
        """Write the weights."""
        weights = self.strategy.weights(self.ema.model.state_dict())
        self.group.first(lambda: self.run.save_weights(stored_as(weights, self.config.save_dtype)))

    def _display(self) -> AbstractContextManager[console.Display]:
        if self.group.rank:
            return nullcontext(Silent())
        return console.training(f"train {self.run.name}", self.config.steps, self.step)

    def _advance(self, batches: Iterator[Batch], display: console.Display) -> None:
        """One update, timed, logged and shown."""
        began = time.monotonic()
        batch = next(batches)
        metrics = self.update(batch)
        self.logged.add(metrics)
        self.validated.add({"loss": metrics["loss"]})
        logs = self.step % self.config.log_every == 0 or self.step == self.config.steps
        means: dict[str, float] = {}
        if logs or display.due():
            if logs or self.group.world == 1:  # all processes must find a fault at the same update
                self.logged.check(self.step)
            means = self.logged.take() if logs else self.logged.means()  # waits for the device
        units = self.task.units(batch) if isinstance(self.task, Counts) else ("images", len(batch[0]))
        read = self.group.world if isinstance(self.task, ReadsShard) else 1
        self.meter.add(time.monotonic() - began, units[0], units[1] * read)
        if logs:
            self._write({"step": self.step, **means, **self.meter.row()})
        if means:
            display.tell(self.meter.pace(), **{k: v for k, v in means.items() if k != "lr"})

    def _write(self, row: dict[str, object]) -> None:
        if self.group.rank == 0:
            self.run.log(row)
        if self.board:
            self.board.write(row)

    def _note(self, text: str) -> None:
        if self.group.rank == 0:
            console.note(text)


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names begin with `part/`, without that prefix."""
    return {name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")}


def train(
    build: Callable[[], Task], config: TrainConfig, run: Run, machine: Arithmetic, seed: int, fresh: bool = False,
    start: Artifact | None = None,
) -> dict[str, float]:  # fmt: skip
    """Train a task from its last checkpoint, or else from the weights `start`, to its end.

    Returns the last validation's metrics, none if the run was finished before.

    Raises:
        DalleError: checkpoints of another run, initial weights of another model, a full disk, a loss that is no longer
            finite, or a lost process.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint has been written.
    """
    run.check()
    with process_group(machine.device, config.timeout) as group:
        if fresh:
            group.first(run.start_over)
        elif group.first(lambda: _finished(run)):
            return {}
        task = build()
        if start is not None:
            initialize_from(task.model, start)
        trainer = Trainer(task, config, run, machine, seed, group)
        trainer.resume()
        return trainer.train()


def _finished(run: Run) -> bool:
    if done := run.finished():
        console.note(f"{run.out.name} is finished, by this config and these inputs: left alone (--fresh starts over)")
    return done
