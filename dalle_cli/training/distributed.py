"""Data-parallel training: several processes, each with its own device, make one update (Ramesh et al. 2021, app. E).

Without a launcher such as torchrun there is one process, and these functions leave their arguments unchanged.
"""

import itertools
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_cli import devices
from dalle_cli.data.skips import SkipLog
from dalle_cli.errors import DalleError
from dalle_cli.training import shards
from dalle_cli.training.run import Run

T = TypeVar("T")
CPU = torch.device("cpu")
POWERSGD_TABLES = {"p": "p_memory_dict", "q": "q_memory_dict", "error": "error_dict"}
CONNECTION_WORDS = (
    "gloo",
    "nccl",
    "connection closed",
    "connection reset",
    "broken pipe",
    "timed out",
    "application timeout",
)


class Lost(DalleError):
    """Another process of the run is gone."""

    at_once = True  # cli.py exits at once: the lost process cannot report the error


@runtime_checkable
class ReadsShard(Protocol):
    """A task whose `batches` can give each process its own part of a batch. The loop splits other tasks' batches."""

    def share(self, rank: int, world: int) -> None:
        """From now on `batches` gives the rank-th of `world` equal parts."""


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run; this one is number `rank` of `world`."""

    rank: int = 0
    world: int = 1

    def first(self, action: Callable[[], T]) -> T:
        """Run an action in the first process only; all processes get its result, or raise its error."""
        if self.world == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = action()
            except (DalleError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, 0, device=CPU)
        if outcome[1] is not None:
            raise outcome[1]
        return cast(T, outcome[0])

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def collect(self, skipped: SkipLog) -> None:
        """Add the unusable samples that any process has found to each process's list."""
        for entry in itertools.chain.from_iterable(self.gathered(skipped.entries())):
            skipped.add(*entry)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process: if one receives a signal, all must stop after the same update."""
        if self.world == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.uint8)  # on the CPU, to wait for no device
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def means(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over the processes, each of which has all these metrics."""
        if self.world == 1:
            return metrics
        values = torch.stack([value.double() for value in metrics.values()])
        dist.all_reduce(values)
        return {name: v.to(old.dtype) for (name, old), v in zip(metrics.items(), values / self.world, strict=True)}


@contextmanager
def process_group(device: torch.device, seconds: float) -> Iterator[ProcessGroup]:
    """Join the processes that a launcher started; each waits for the others at most this many seconds.

    Raises:
        Lost: one of them has ended or hangs.
    """
    if devices.world() == 1:
        yield ProcessGroup()
        return
    try:
        if dist.is_initialized():
            yield ProcessGroup(dist.get_rank(), dist.get_world_size())
            return
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
        yield ProcessGroup(dist.get_rank(), dist.get_world_size())
        dist.destroy_process_group()
    except RuntimeError as error:
        raise (_lost(error) or error) from None


def _lost(error: RuntimeError) -> Lost | None:
    """The error to raise if a process waited for another in vain; None for any other error."""
    if not isinstance(error, dist.DistError) and not any(word in str(error).lower() for word in CONNECTION_WORDS):
        return None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends the others; report first
    found = " ".join(str(error).split())
    return Lost(
        f"expected all {devices.world()} processes to go on, found one gone or stuck ({found[:160]}); "
        "see its own error, then repeat the command: it resumes from the last checkpoint"
    )


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor, in place, with that of rank 0."""
    if dist.is_available() and dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


class _Gather(torch.autograd.Function):
    """All-gather whose backward pass sums the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # every process computes the whole loss, and weight gradients are averaged later: so sum here
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """Gather the rows of all processes, equally many from each: (B, ...) -> (world * B, ...), differentiable."""
    y: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return y


class HasLoss(Protocol):
    """The part of a task that parallel training needs: a model and its loss."""

    @property
    def model(self) -> nn.Module: ...

    def loss(
        self, batch: tuple[Tensor, ...], step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


class SingleProcess:
    """The parallel strategy of a single process, and the base class of the others."""

    sharded = False  # whether each process holds only a shard of the weights

    def __init__(self, task: HasLoss, group: ProcessGroup) -> None:
        self.loss, self.group = task.loss, group

    def part(self, last: bool) -> AbstractContextManager[None]:
        """Wraps forward and backward of a part of a batch; after the last part, all processes' gradients are in."""
        return nullcontext()

    def average_buffers(self) -> None:
        """Average the buffers that training changes, after the backward passes of an update."""

    def overflowed(self, flags: Tensor) -> Tensor:
        """Which blocks have overflowed in any process, from those that have in this one: (n,) bool -> (n,) bool."""
        return flags

    def write(self, run: Run, step: int, tensors: dict[str, Tensor], keep: int) -> None:
        """Write a checkpoint, and keep the last `keep`."""
        self.group.first(lambda: run.save_checkpoint(step, tensors, keep))

    def read(self, run: Run, step: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a checkpoint in this strategy's layout, whatever the layout that it was written in.

        `tensors` are those of its file; there may be shards beside it.
        """
        return tensors if run.is_whole(tensors) else {**tensors, **shards.load(run.shards(step), {})}

    def weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the first process, which writes them at the end; the others may get none."""
        return dict(tensors)


class _Loss(nn.Module):
    """A task's loss as the forward of a module, as DistributedDataParallel needs it."""

    def __init__(self, task: HasLoss) -> None:
        super().__init__()
        self.model, self.task = task.model, task

    def forward(
        self, batch: tuple[Tensor, ...], step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.task.loss(batch, step, generator)


class DataParallel(SingleProcess):
    """Whole weights in every process; gradients are averaged, exactly or by PowerSGD (Vogels et al. 2019)."""

    def __init__(self, task: HasLoss, group: ProcessGroup, powersgd_rank: int, powersgd_from: int) -> None:
        """PowerSGD starts after `powersgd_from` updates."""
        super().__init__(task, group)
        # Without find_unused_parameters DDP rebuilds its buckets after the first update, and a resumed run would sum
        # gradients in another order than an uninterrupted one.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            module = nn.parallel.DistributedDataParallel(
                _Loss(task), broadcast_buffers=False, find_unused_parameters=True
            )
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view", UserWarning)  # of channels_last
        self.module, self.loss = module, module
        self.buffers = [getattr(m, name) for m in task.model.modules() for name in getattr(m, "trained_buffers", ())]
        self.powersgd: Any = None
        if powersgd_rank:
            self._compress(powersgd_rank, max(powersgd_from, 2))

    def _compress(self, rank: int, start: int) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

        def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
            future = powerSGD_hook(state, bucket)
            if bucket.buffer().device.type == "cpu":
                # gloo runs callbacks in its own threads: processes would send several buckets in different orders
                future.wait()
            return future

        self.powersgd = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=start)
        self.module.register_comm_hook(self.powersgd, hook)

    def part(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self.module.no_sync()

    def average_buffers(self) -> None:
        for buffer in self.buffers:
            dist.all_reduce(buffer)
            buffer /= self.group.world

    def write(self, run: Run, step: int, tensors: dict[str, Tensor], keep: int) -> None:
        if self.powersgd is not None:  # each process has its own error feedback
            self.group.first(lambda: run.clear(run.shards(step)))
            run.save_own(step, self.group.rank, self._state())
            self.group.any(False)  # a barrier: the checkpoint's file, which marks it complete, comes last
        super().write(run, step, tensors, keep)

    def read(self, run: Run, step: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.powersgd is not None:
            self._load(run.own(step, self.group.rank, self.group.world))
        return super().read(run, step, tensors)

    def _state(self) -> dict[str, Tensor]:
        tables = {name: getattr(self.powersgd, attribute) for name, attribute in POWERSGD_TABLES.items()}
        tensors = {f"{name}/{bucket}": t for name, table in tables.items() for bucket, t in table.items()}
        return {"updates": torch.tensor(self.powersgd.iter), **tensors}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        device = next(self.module.parameters()).device
        for name, tensor in state.items():
            table, _, bucket = name.partition("/")
            if table == "updates":
                self.powersgd.iter = int(tensor)
            else:
                getattr(self.powersgd, POWERSGD_TABLES[table])[int(bucket)] = tensor.to(device)
