"""Many processes, each with a device of its own, that make the updates of one (Ramesh et al. 2021, app. E).

Without a launcher such as torchrun there is one process, and nothing of this is in its way.
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
from dalle_cli.training import shards as pieces
from dalle_cli.training.run import Run

T = TypeVar("T")
CPU = torch.device("cpu")
WORDS = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out", "application timeout")


class Lost(DalleError):
    """Another process of the run is gone."""

    at_once = True  # cli.py: no other process can tell of it


@runtime_checkable
class Shares(Protocol):
    """A task of which each process reads its own part of a batch."""

    def share(self, rank: int, world: int) -> None:
        """From now on `batches` gives the rank-th of `world` equal parts."""


@dataclass(frozen=True)
class Group:
    """The processes of a run; this one is number `rank` of `world`."""

    rank: int = 0
    world: int = 1

    def first(self, action: Callable[[], T]) -> T:
        """What the first process finds when it alone does this; the others wait. A fault of its is that of all."""
        if self.world == 1:
            return action()
        said: list[Any] = [None, None]
        if self.rank == 0:
            try:
                said[0] = action()
            except (DalleError, OSError) as error:
                said[1] = error
        dist.broadcast_object_list(said, 0, device=CPU)
        if said[1] is not None:
            raise said[1]
        return cast(T, said[0])

    def gathered(self, value: T) -> list[T]:
        """The value of each process."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def collect(self, skipped: SkipLog) -> None:
        """Let each process's list of samples that could not be used be that of all."""
        for entry in itertools.chain.from_iterable(self.gathered(skipped.entries())):
            skipped.add(*entry)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process: a signal may come to one of them, and all must stop after one update."""
        if self.world == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.uint8)  # on the CPU: no device is waited for
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def means(self, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over the processes, each of which has all these figures."""
        if self.world == 1:
            return figures
        values = torch.stack([value.double() for value in figures.values()])
        dist.all_reduce(values)
        return {name: v.to(old.dtype) for (name, old), v in zip(figures.items(), values / self.world, strict=True)}


@contextmanager
def joined(device: torch.device, seconds: float) -> Iterator[Group]:
    """The processes that were started together, joined while this lasts; each waits so long for the others.

    Raises:
        Lost: one of them is gone.
    """
    if devices.world() == 1:
        yield Group()
        return
    try:
        if dist.is_initialized():
            yield Group(dist.get_rank(), dist.get_world_size())
            return
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
        yield Group(dist.get_rank(), dist.get_world_size())
        dist.destroy_process_group()
    except RuntimeError as error:
        raise (_lost(error) or error) from None


def _lost(error: RuntimeError) -> Lost | None:
    """What to say where a process waited for another in vain; None for any other fault."""
    if not isinstance(error, dist.DistError) and not any(word in str(error).lower() for word in WORDS):
        return None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends what is left; first a word on why
    found = " ".join(str(error).split())
    return Lost(
        f"expected all {devices.world()} processes to go on, found one gone or stuck ({found[:160]}); "
        "look at what it said, and give the same command again: it goes on from what is written"
    )


def from_first(tensors: Iterable[Tensor]) -> None:
    """Make the first process's tensors those of all."""
    if dist.is_available() and dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


class _Gather(torch.autograd.Function):
    """The rows of all processes, in order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # every process computes the whole loss, and gradients of weights are averaged afterwards: so here, the sum
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def all_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, (B, ...) -> (world * B, ...), with gradients; equally many from each."""
    y: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return y


class Computes(Protocol):
    """What is needed of a task here."""

    @property
    def model(self) -> nn.Module: ...

    def loss(
        self, batch: tuple[Tensor, ...], step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


class Alone:
    """How the weights lie: whole, in the one process that there is. The others are as this one but for their own."""

    cut = False  # whether each process holds but a piece of the weights

    def __init__(self, task: Computes, group: Group) -> None:
        self.loss, self.group = task.loss, group

    def part(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a part of a batch; after the last of them gradients are those of all."""
        return nullcontext()

    def settle(self) -> None:
        """What else is to be averaged between processes after the backward passes of an update."""

    def overflowed(self, flags: Tensor) -> Tensor:
        """Which blocks have no finite gradient in any process, from which have none in this one: (n,) bool."""
        return flags

    def write(self, run: Run, step: int, tensors: dict[str, Tensor], keep: int) -> None:
        """Write a checkpoint; the last `keep` are kept."""
        self.group.first(lambda: run.save_checkpoint(step, tensors, keep))

    def read(self, run: Run, step: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a checkpoint as the weights lie here, however they lay in the processes that wrote it.

        `tensors` are those in its file; there may be more beside it.
        """
        return tensors if run.is_whole(tensors) else {**tensors, **pieces.load(run.shards(step), {})}

    def weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as they are written at the end, by the first process; the others need not have them."""
        return dict(tensors)


class _Loss(nn.Module):
    """A task's loss as a module's forward."""

    def __init__(self, task: Computes) -> None:
        super().__init__()
        self.model, self.task = task.model, task

    def forward(
        self, batch: tuple[Tensor, ...], step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.task.loss(batch, step, generator)


class Replicas(Alone):
    """Whole in every process; gradients are averaged, as they are or squeezed by PowerSGD (Vogels et al. 2019)."""

    def __init__(self, task: Computes, group: Group, powersgd_rank: int, powersgd_from: int) -> None:
        """PowerSGD begins after `powersgd_from` updates."""
        super().__init__(task, group)
        # With find_unused_parameters the buckets that gradients travel in stay as they were made. Else they are made
        # anew after the first update, and a resumed run would add up in another order than one never stopped.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            module = nn.parallel.DistributedDataParallel(
                _Loss(task), broadcast_buffers=False, find_unused_parameters=True
            )
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view", UserWarning)  # of channels_last
        self.module, self.loss = module, module
        state = task.model.state_dict(keep_vars=True)
        self.buffers = [b for name, b in task.model.named_buffers() if name in state and b.is_floating_point()]
        self.powersgd: Any = None
        if powersgd_rank:
            self._squeeze(powersgd_rank, max(powersgd_from, 2))

    def _squeeze(self, rank: int, start: int) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

        def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
            future = powerSGD_hook(state, bucket)
            if bucket.buffer().device.type == "cpu":
                # gloo runs what follows on a product in threads of its own, and then processes would not send the
                # products of several buckets in the same order
                future.wait()
            return future

        self.powersgd = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=start)
        self.module.register_comm_hook(self.powersgd, hook)

    def part(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self.module.no_sync()

    def settle(self) -> None:
        for buffer in self.buffers:
            dist.all_reduce(buffer)
            buffer /= self.group.world

    def write(self, run: Run, step: int, tensors: dict[str, Tensor], keep: int) -> None:
        if self.powersgd is not None:  # what it still owes is each process's own
            self.group.first(lambda: run.clear(run.shards(step)))
            run.save_own(step, self.group.rank, self._state())
            self.group.any(False)  # until all have; the file that says that all is there comes last
        super().write(run, step, tensors, keep)

    def read(self, run: Run, step: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.powersgd is not None:
            self._load(run.own(step, self.group.rank, self.group.world))
        return super().read(run, step, tensors)

    def _state(self) -> dict[str, Tensor]:
        tables = {"p": self.powersgd.p_memory_dict, "q": self.powersgd.q_memory_dict, "error": self.powersgd.error_dict}
        tensors = {f"{name}/{bucket}": t for name, table in tables.items() for bucket, t in table.items()}
        return {"updates": torch.tensor(self.powersgd.iter), **tensors}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        device = next(self.module.parameters()).device
        for name, tensor in state.items():
            table, _, bucket = name.partition("/")
            if table == "updates":
                self.powersgd.iter = int(tensor)
            else:
                places = {"p": "p_memory_dict", "q": "q_memory_dict", "error": "error_dict"}
                getattr(self.powersgd, places[table])[int(bucket)] = tensor.to(device)
