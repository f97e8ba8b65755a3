"""What the machine is, whether anything else runs on it, and how fast it multiplies."""

import os
import platform
import time
from pathlib import Path

from bench.timing import Subject

BUSY = 0.1  # cores; more, and what is measured is not to be trusted


def name() -> str:
    """The processor, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy(seconds: float = 0.5) -> float:
    """Cores that work while this process sleeps, those taken by other machines on the same host included."""
    before = _spent()
    if before is None:
        return os.getloadavg()[0]
    time.sleep(seconds)
    after = _spent()
    assert after is not None
    work, total = after[0] - before[0], after[1] - before[1]
    return (os.cpu_count() or 1) * work / max(total, 1)


def _spent() -> tuple[int, int] | None:
    """Ticks at work, and all ticks, of all cores since the start; None where the system does not tell."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0]
    except OSError:
        return None
    ticks = [int(field) for field in first.split()[1:9]]  # user nice system idle iowait irq softirq steal
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def product(side: int) -> Subject:
    """A bfloat16 product of two square matrices: what the machine can do at best."""
    import torch

    torch.manual_seed(0)
    a, b = torch.randn(2, side, side).to(torch.bfloat16)
    return Subject(lambda: a @ b, 2.0 * side**3)


def copy(mebibytes: int) -> Subject:
    """A copy of a long array by all threads: bytes read and bytes written."""
    import torch

    source = torch.zeros(mebibytes << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    return Subject(lambda: target.copy_(source), 2.0 * len(source))
