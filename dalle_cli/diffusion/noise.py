"""Noise as a function of (stage, seed, sample index, step), so that a sample depends on no other sample.

B samples of one batch. A sample gets the same noise in batches of any size, on any device.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Noise = Callable[[int, Sequence[int]], Tensor]  # (step, shape of a sample) -> (B, *shape), standard normal
_BYTES = 4


def noise_for(seed: int, indices: Sequence[int], step: int, shape: Sequence[int], stage: str = "") -> Tensor:
    """Standard normal noise of one step, a row per index: -> (B, *shape) float32 on the CPU.

    A row is the SHAKE-256 stream of (stage, seed, index, step), 32 bits per number, mapped through the inverse normal
    distribution function, which gives values within 6.4 of 0. Stages that share a seed (prior, decoder, upsampler) pass
    different names, so that their noise is independent.
    """
    size = torch.Size(shape).numel()
    streams = (hashlib.shake_256(f"{stage} {seed} {index} {step}".encode()).digest(_BYTES * size) for index in indices)
    rows = [torch.frombuffer(bytearray(stream), dtype=torch.int32) for stream in streams if size]
    if not rows:
        return torch.empty(len(indices), *shape)
    normal: Tensor = torch.special.ndtri((torch.stack(rows).double() + (2**31 + 0.5)) / 2**32)
    return normal.float().view(len(indices), *shape)


def row_noise(seed: int, indices: Sequence[int], stage: str = "") -> Noise:
    """The noise of a batch as samplers take it: step 0 is the initial noise, step k what the k-th step adds."""
    return lambda step, shape: noise_for(seed, indices, step, shape, stage)
