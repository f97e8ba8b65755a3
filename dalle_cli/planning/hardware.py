"""Machines to plan for: memory and speed, from data sheets, from a statement, or measured here."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dalle_cli.devices import Arithmetic, arithmetic, peak_flops
from dalle_cli.errors import DalleError
from dalle_cli.planning.standin import Subject, stand_in
from dalle_cli.training.loop import Trainer
from dalle_cli.training.run import Run

USED = 0.3  # of a data sheet's speed, assumed: what transformers reach without kernels made for them
WHOLE_GB = 10**9  # sold as 16 GB means 16 GiB: the 7% between stay for the driver, and for what lies between tensors
OWN_SHARE = 0.93  # of a memory that was asked for its size
MEASURED_SECONDS = 10.0  # that a measured update may take; a larger batch is measured by a part
LONGEST_SECONDS = 60.0  # beyond, a product of matrices stands for the update


@dataclass(frozen=True)
class Machine:
    """One device: bytes that a training may take, and the best speed of its 16-bit products, if a data sheet has it."""

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


# Memory in GB and 10**12 operations a second, dense (no sparsity), sums in float32, as the makers' data sheets say.
SHEETS = {
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


def machine(name: str) -> Machine:
    """A machine of the data sheets, or this one's `auto`, `cpu`, `cuda` or `mps`.

    Raises:
        DalleError: no such machine.
    """
    if sheet := SHEETS.get(name.lower()):
        memory, peak, half = sheet
        return Machine(name.lower(), memory * WHOLE_GB, peak * 1e12, half)
    if name.split(":")[0] not in ("auto", "cpu", "cuda", "mps"):
        raise DalleError(f"expected --device auto, cpu, cuda, mps or one of {', '.join(SHEETS)}, found {name!r}")
    here = arithmetic(name, "auto")
    cuda = here.device.type == "cuda"
    size = torch.cuda.get_device_properties(here.device).total_memory if cuda else _main_memory()
    about = torch.cuda.get_device_name(here.device) if cuda else f"this machine's {here.device.type}"
    return Machine(about, int(size * OWN_SHARE), None, here.name, here.device.type != "cpu", here.dtype)


def _main_memory() -> int:
    """Bytes of this machine's memory, or of the container's share of it.

    Raises:
        DalleError: the system does not say.
    """
    import os

    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        raise DalleError("expected to learn this machine's memory, found no answer; name a --device") from None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            size = min(size, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue  # no such file, or "max"
    return size


def assumed(machine: Machine) -> Rate | None:
    """A share of the data sheet's speed; None for a machine without one."""
    if machine.peak is None:
        return None
    told = f"{USED:.0%} of the data sheet's {machine.peak / 1e12:,.0f} TFLOP/s in {machine.half}, assumed"
    return Rate(USED * machine.peak, f"{told}; small models reach less")


def measured(subject: Subject, device: str, flops: int, fits: bool) -> Rate:
    """What this machine does: by updates of the model itself, or by a product of matrices where it is too large.

    `flops` are those of an update of the recipe's batch; `fits` says whether memory would do.
    """
    here = arithmetic(device, "auto")
    best = peak_flops(here)
    batch = subject.train.batch_size
    rows = max(1, min(batch, int(batch * MEASURED_SECONDS * USED * best / flops)))
    if not fits or flops * rows / batch > LONGEST_SECONDS * USED * best:
        told = f"{USED:.0%}, assumed, of a {here.name} product's {best / 1e12:.3g} TFLOP/s, measured here"
        return Rate(USED * best, told)
    seconds = _seconds(subject, rows, here)
    return Rate(flops * rows / batch / seconds, f"measured here, by updates of {rows} in {here.name}")


def _seconds(subject: Subject, rows: int, here: Arithmetic) -> float:
    """What an update of so many rows takes: the shorter of two after a first one."""
    train = replace(subject.train, batch_size=rows, accumulate=1, compile=False)
    trainer = Trainer(stand_in(subject, subject.build()), train, Run(Path(), "", {}, []), here, 0)
    batch = subject.batch(rows)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        trainer.update(batch)["loss"].item()  # waits for the device
        times.append(time.perf_counter() - began)
    return min(times[1:])
