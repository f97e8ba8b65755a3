"""How many candidates fit into memory at once.

V image vocabulary, C width, T caption length, N heads.
"""

import os
from pathlib import Path

import torch

from dalle_cli.models.bart import CodePrior
from dalle_cli.models.cache import cache_dtype

CAP = 256  # candidates at once: more are hardly faster, and progress would come in large steps
SHARE = 0.5  # share of the free memory to use; other programs and fragmentation need some, too
UNKNOWN = 2**30  # bytes assumed free where the machine does not tell
_WIDTHS_OF_PREFILL = 14  # activations of a layer, mostly its MLP's, alive for each position of a caption
_ROWS_OF_LOGITS = 12  # logits, their halves, sorted values, indices in 64 bits, probabilities and sums, alive together


def fitting_batch(prior: CodePrior, n_candidates: int, guided: bool, own_captions: bool, dtype: torch.dtype) -> int:
    """How many of `n_candidates` to sample at once in `dtype` on the prior's device: 1 to CAP."""
    device = prior.device
    free = int(free_memory(device) * SHARE)
    fits = free // candidate_bytes(prior, guided, own_captions, dtype)
    rows = (2 if guided else 1) * prior.config.n_head * fits
    if (kept := cache_dtype(dtype, rows, device.type == "cpu")) != dtype:
        fits = free // candidate_bytes(prior, guided, own_captions, kept)
    return max(1, min(fits, CAP, n_candidates))


def candidate_bytes(prior: CodePrior, guided: bool, own_captions: bool, dtype: torch.dtype) -> int:
    """Bytes that one more candidate takes: caches of all layers in `dtype`, logits, one position's activations.

    `guided` counts null rows, too. `own_captions` counts a caption's keys and values for every candidate, or the memory
    of encoding the caption if that is more.
    """
    config = prior.config
    slots = sum(pattern.n_slots for pattern in prior.patterns)
    if own_captions:
        slots += 2 * config.n_layer * config.n_prefix  # as computed, and joined in the cache
    caches = 2 * slots * config.n_embd  # keys and values
    seen = config.n_prefix + max(pattern.n_slots for pattern in prior.patterns)
    activations = 16 * config.n_embd + 4 * config.n_head * seen + _ROWS_OF_LOGITS * config.n_image_vocab
    hints = 0
    if prior.hint is not None:
        hints = config.grid**2 * (prior.hint.ahead.out_features + prior.hint.seen.out_features)
    sampling = (2 if guided else 1) * (dtype.itemsize * caches + 4 * (activations + hints))
    if not own_captions:
        return sampling
    prefill = dtype.itemsize * (2 * config.n_layer + _WIDTHS_OF_PREFILL)
    return max(sampling, config.n_prefix * config.n_embd * (prefill + 4 * 5))  # the residual stream is float32


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated now on a device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type == "mps":
        return max(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory(), 0)
    known = [size for size in (_available(), _left_to_the_group()) if size is not None]
    return max(min(known, default=UNKNOWN), 0)


def _available() -> int | None:
    """Bytes available without swapping; a quarter of all memory where only that is known."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    except (AttributeError, OSError, ValueError):
        return None


def _left_to_the_group(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes left under a container's limit, with its inactive file cache as free; None without a limit."""
    try:
        stat = dict(line.split() for line in (root / "memory.stat").read_text(encoding="ascii").splitlines())
        limit, used = (int((root / name).read_text()) for name in ("memory.max", "memory.current"))
        return limit - used + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):  # no control group, or its limit is "max"
        return None
