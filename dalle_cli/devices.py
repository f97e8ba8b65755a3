"""Which device and arithmetic to run on, what it could do at best, and how much memory was taken."""

import ctypes
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from dalle_cli.errors import DalleError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,  # for GPUs without bfloat16; training then scales gradients (training/scaling.py)
    "fp16": torch.float16,
}
PEAK_SECONDS = 0.2  # that finding out a machine's best may take


def world() -> int:
    """How many processes a launcher such as torchrun has started for one job; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ.get("RANK", 0)) if world() > 1 else 0


def select_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else CPU; of several processes each takes the GPU of its number.

    Raises:
        DalleError: an unknown device, or one that this machine lacks.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if world() > 1:
        return _own_device(name, has["cuda"])
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if has[kind]))
    kind = name.split(":")[0]
    if kind not in has:
        raise DalleError(f"expected --device auto, cpu, cuda or mps, found {name!r}")
    if not has[kind]:
        raise DalleError(f"expected --device {name} to be there, found no {kind} on this machine; use --device auto")
    try:
        return torch.device(name)
    except RuntimeError:
        raise DalleError(f"expected --device auto, cpu, cuda or mps, found {name!r}") from None


def _own_device(name: str, has_cuda: bool) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise DalleError(f"expected --device auto, cpu or cuda for {world()} processes, found {name!r}")
    if name == "cpu" or (name == "auto" and not has_cuda):
        return torch.device("cpu")
    number, there = int(os.environ.get("LOCAL_RANK", rank())), torch.cuda.device_count()
    if number >= there:
        raise DalleError(f"expected a GPU for each process, found {there}; start fewer, or give --device cpu")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _cpu_has_bfloat16() -> bool:
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def select_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies in it, else float32.

    Raises:
        DalleError: an unknown dtype.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        return torch.bfloat16 if device.type == "cpu" and _cpu_has_bfloat16() else torch.float32
    if name not in DTYPES:
        raise DalleError(f"expected --dtype auto, bfloat16, float16 or float32, found {name!r}")
    return DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Matrix products in `dtype`; nothing changes for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@dataclass(frozen=True)
class Arithmetic:
    """Where to compute, and in what."""

    device: torch.device
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """What a history calls it: the dtype that `auto` came to."""
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager[None]:
        """Matrix products in this arithmetic."""
        return autocast(self.device, self.dtype)


def arithmetic(device: str, dtype: str) -> Arithmetic:
    """What --device and --dtype come to on this machine.

    Raises:
        DalleError: a device or a dtype that is not to be had.
    """
    where = select_device(device)
    return Arithmetic(where, select_dtype(dtype, where))


def compiled(function: Callable[..., Any], graphs: bool = False) -> Callable[..., Any]:
    """A function by torch.compile, with CUDA graphs if asked for; what goes wrong with the compiler is one line."""
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`", UserWarning)
    fast = torch.compile(function, mode="reduce-overhead") if graphs else torch.compile(function)

    def call(*args: Any, **named: Any) -> Any:
        # numbers that change with the call go in as tensors: as constants each would be compiled for itself
        tensors = {k: torch.tensor(v) if isinstance(v, float) else v for k, v in named.items()}
        try:
            return fast(*args, **tensors)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            found = str(error).strip().splitlines()[0]
            advice = "install g++ (Triton for a GPU), or leave it out"
            raise DalleError(f"expected a compiler for what is to be compiled, found {found}; {advice}") from None

    return call


def peak_memory(device: torch.device) -> float | None:
    """The most memory that this process has held at once, in MiB: the GPU's there, else all; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def peak_flops(machine: Arithmetic) -> float:
    """Floating-point operations a second of the best of some square matrix products, larger and larger."""
    best, began = 0.0, time.monotonic()
    for size in (256, 512, 1024, 2048, 4096, 8192):
        generator = torch.Generator(machine.device).manual_seed(size)
        a = torch.randn(size, size, generator=generator, device=machine.device, dtype=machine.dtype)
        seconds = min(_timed_product(a) for _ in range(3))
        best = max(best, 2 * size**3 / seconds)
        if time.monotonic() - began + 3 * 8 * seconds > PEAK_SECONDS:  # the next takes eight times as long
            break
    return best


def _timed_product(a: torch.Tensor) -> float:
    began = time.perf_counter()
    torch.sum((a @ a)[0]).item()  # a number that the host has to wait for
    return max(time.perf_counter() - began, 1e-9)


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed for what is allocated next; whether it can (glibc).

    Otherwise it gives arrays above 32 MiB back to the system at once, and each update pays for new, zeroed pages: a
    quarter of the time of an update of 8 x 1280 positions, 512 wide.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return False
    trim_threshold, mmap_max = -1, -4  # malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))
