"""Hardware specs: memory and speed of a device, from data sheets or measured on this machine."""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dalle_cli.devices import Arithmetic, arithmetic, peak_flops
from dalle_cli.errors import DalleError
from dalle_cli.planning.workload import Workload
from dalle_cli.training.loop import Trainer
from dalle_cli.training.run import Run

UTILIZATION = 0.3  # of a data sheet's speed, assumed: what transformers reach without kernels made for them
GB = 10**9  # sold as 16 GB means 16 GiB: the 7% between stay for the driver
USABLE = 0.93  # of a memory whose size the system reports
MEASURED_SECONDS = 10.0  # that a measured update may take; of a larger batch a part is measured
STEADY_SECONDS, MOST_UPDATES = 4.0, 10  # short updates are repeated for so long, at most so many times
LONGEST_SECONDS = 60.0  # of a single row; beyond, a matrix product is measured instead


@dataclass(frozen=True)
class Hardware:
    """One device: bytes that training may take, and the peak of its 16-bit products if a data sheet gives it."""

    name: str
    memory: int
    peak: float | None = None
    half: str = "bfloat16"  # its 16-bit arithmetic
    accelerator: bool = True
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Rate:
    """Operations a second of one device in training, and where the number comes from."""

    flops: float
    source: str


# Memory in GB and 10**12 operations a second, dense (no sparsity), sums in float32, as in the makers' data sheets.
DATA_SHEETS = {
    "t4": (16, 65, "float16"),
    "v100-16gb": (16, 125, "float16"),
    "v100-32gb": (32, 125, "float16"),
    "rtx-3090": (24, 71, "bfloat16"),
    "rtx-4090": (24, 165, "bfloat16"),
    "rtx-5090": (32, 209, "bfloat16"),
    "a10": (24, 125, "bfloat16"),
    "l4": (24, 121, "bfloat16"),
    "l40s": (48, 362, "bfloat16"),
    "a100-40gb": (40, 312, "bfloat16"),
    "a100-80gb": (80, 312, "bfloat16"),
    "h100": (80, 989, "bfloat16"),  # SXM
    "h200": (141, 989, "bfloat16"),
    "b200": (180, 2250, "bfloat16"),
    "mi250x": (64, 191, "bfloat16"),  # one of its two dies, which is one device
    "mi300x": (192, 1307, "bfloat16"),
}


def find(name: str) -> Hardware:
    """The device of a data sheet, or this machine's `auto`, `cpu`, `cuda` or `mps`.

    Raises:
        DalleError: no such device.
    """
    if sheet := DATA_SHEETS.get(name.lower()):
        memory, peak, half = sheet
        return Hardware(name.lower(), memory * GB, peak * 1e12, half)
    if name.split(":")[0] not in ("auto", "cpu", "cuda", "mps"):
        raise DalleError(f"expected --device auto, cpu, cuda, mps or one of {', '.join(DATA_SHEETS)}, found {name!r}")
    here = arithmetic(name, "auto")
    cuda = here.device.type == "cuda"
    size = torch.cuda.get_device_properties(here.device).total_memory if cuda else _main_memory()
    label = torch.cuda.get_device_name(here.device) if cuda else f"this machine's {here.device.type}"
    return Hardware(label, int(size * USABLE), None, here.name, here.device.type != "cpu", here.dtype)


def _main_memory() -> int:
    """Bytes of this machine's memory, or of the container's share of it.

    Raises:
        DalleError: the system does not say.
    """
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        raise DalleError("expected the size of this machine's memory, found none; name a --device") from None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            size = min(size, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue  # no such file, or "max"
    return size


def assumed_rate(device: Hardware) -> Rate | None:
    """A share of the data sheet's speed; None for a device without a data sheet."""
    if device.peak is None:
        return None
    source = f"{UTILIZATION:.0%} of the data sheet's {device.peak / 1e12:,.0f} TFLOP/s in {device.half}, assumed"
    return Rate(UTILIZATION * device.peak, f"{source}; small models reach less")


def measured_rate(workload: Workload, device: str, flops: int, fits: bool) -> Rate:
    """What this machine reaches in updates of the model, or in a matrix product where the model is too large.

    `flops` are those of an update of the recipe's batch; `fits` says whether it fits into memory.
    """
    here = arithmetic(device, "auto")
    best, batch = peak_flops(here), workload.train.batch_size
    rows = max(1, min(batch, int(batch * MEASURED_SECONDS * UTILIZATION * best / flops)))
    if not fits or flops * rows / batch > LONGEST_SECONDS * UTILIZATION * best:
        source = f"{UTILIZATION:.0%}, assumed, of a {here.name} product's {best / 1e12:.3g} TFLOP/s, measured here"
        return Rate(UTILIZATION * best, source)
    seconds = _update_seconds(workload, rows, here)
    return Rate(flops * rows / batch / seconds, f"measured here, by updates of {rows} in {here.name}")


def _update_seconds(workload: Workload, rows: int, here: Arithmetic) -> float:
    """Seconds of an update of so many rows: the shortest of two or more after a first one."""
    train = replace(workload.train, batch_size=rows, accumulate=1, compile=False)
    trainer = Trainer(workload.task(train), train, Run(Path(), "", {}, []), here, 0)
    trainer.step = 1  # the first update may do what is done once in a hundred
    batch, times = workload.batch(rows), list[float]()
    while len(times) < 3 or (sum(times) < STEADY_SECONDS and len(times) < MOST_UPDATES):
        started = time.perf_counter()
        trainer.update(batch)["loss"].item()  # waits for the device
        times.append(time.perf_counter() - started)
    return min(times[1:])
