"""Noise that belongs to the sample: a function of (stage, seed, index, step) and of nothing else.

B samples of one batch. So a sample is the same whatever is drawn beside it, in batches of any size, on any device.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Noise = Callable[[int, Sequence[int]], Tensor]  # (step, shape of a sample) -> (B, *shape), standard normal
_BYTES = 4


def noise_for(seed: int, indices: Sequence[int], step: int, shape: Sequence[int], stage: str = "") -> Tensor:
    """Standard normal numbers of one step, one sample for each index: -> (B, *shape) float32 on the CPU.

    Each sample's are the SHAKE-256 stream of (stage, seed, index, step), 32 bits for each number, through the inverse
    of the normal distribution: within 6.4 of 0. Stages of one chain that share a seed, such as prior, decoder and
    upsampler, take names, as otherwise the numbers which drew an embedding would also paint it.
    """
    size = torch.Size(shape).numel()
    streams = (hashlib.shake_256(f"{stage} {seed} {index} {step}".encode()).digest(_BYTES * size) for index in indices)
    rows = [torch.frombuffer(bytearray(stream), dtype=torch.int32) for stream in streams if size]
    if not rows:
        return torch.empty(len(indices), *shape)
    normal: Tensor = torch.special.ndtri((torch.stack(rows).double() + (2**31 + 0.5)) / 2**32)
    return normal.float().view(len(indices), *shape)


def row_noise(seed: int, indices: Sequence[int], stage: str = "") -> Noise:
    """The noise of a batch, as samplers take it: step 0 is where they start, step k what their k-th step adds."""
    return lambda step, shape: noise_for(seed, indices, step, shape, stage)
