"""One case in a process of its own: the time of an update, and the memory it takes above what the imports took."""

import importlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARMUP = 2  # updates: the first allocates, compiles, and makes the optimiser's state

PATIENCE = 6


@dataclass(frozen=True)
class Subject:
    """What is timed: `update`, which works through `units` (tokens, pictures, FLOPs) by so many `flops`, if counted."""

    update: Callable[[], object]
    units: float
    flops: float = 0.0  # or bytes, of what is measured by what it reads
    parameters: int = 0
    warmup: int = WARMUP
    once: bool = False  # timed once, as what is held by a single update is asked for


def peak_memory() -> int:
    """The most bytes that this process has held at any time so far."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def times(update: Callable[[], object], warmup: int, updates: int, seconds: float) -> list[float]:
    """Seconds of each update, after some to warm up: until `seconds` have passed, and `updates` or six times `seconds`.

    So a peer that takes a minute an update is timed once a round.
    """
    for _ in range(warmup):
        update()
    taken: list[float] = []
    while sum(taken) < seconds or (len(taken) < updates and not 0 < PATIENCE * seconds <= sum(taken)):
        began = time.perf_counter()
        update()
        taken.append(time.perf_counter() - began)
    return taken


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job, given as a case's module, function and settings: time what it gives, or return what it returns."""
    import torch
    import torch._dynamo  # every optimizer loads it; here, so that it counts among the imports

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    module = importlib.import_module(job["module"])
    imported = peak_memory()
    subject = getattr(module, job["function"])(**job["settings"])
    if not isinstance(subject, Subject):
        return dict(subject)
    updates, seconds = (1, 0.0) if subject.once else (job["updates"], job["seconds"])
    taken = times(subject.update, subject.warmup, updates, seconds)
    return {
        "seconds": statistics.median(taken),
        "updates": len(taken),
        "units": subject.units,
        "flops": subject.flops,
        "parameters": subject.parameters,
        "memory": peak_memory() - imported,
        "torch": torch.__version__,
    }
