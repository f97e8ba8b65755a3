"""Which positions of the stream attend to which, for the token prior (Ramesh et al. 2021, app. B.1, fig. 11).

The stream is a start-of-text embedding, T caption positions, then the codes of a W x W grid in raster order, except the
last code, which nothing reads. L = 1 + T + W*W - 1 positions; B batch, N heads, D head width.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.errors import DalleError
from dalle_cli.models import block_attention
from dalle_cli.models.local_attention import (
    batched_attention,
    causal_attention,
    column_attention,
    local_attention,
)

LONG_STREAM = 512  # positions; beyond, the weights of every head take more memory than they save time
LOCAL_GAIN = 1.5  # times that the stream must be longer than what a row sees, for gathering keys row by row to pay
BLOCK = 128  # codes of a "full" cache that lie together
KINDS = ("full", "row", "column", "conv")


def layer_kinds(n_layer: int, attention: str) -> list[str]:
    """Kind of every layer: row, column, row, row, repeated, and the last one convolutional (app. B.1); or all full.

    Raises: DalleError where `attention` is neither "sparse" nor "full".
    """
    if attention == "full":
        return ["full"] * n_layer
    if attention != "sparse":
        raise DalleError(f'expected attention "sparse" or "full", found "{attention}"; correct the recipe')
    # layers are counted from 1, as the paper does
    kinds = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, n_layer + 1)]
    return [*kinds[:-1], "conv"]


@dataclass(frozen=True)
class Pattern:
    """What the positions of one layer see; the caption, start included, is seen whole by every code, in one softmax.

    Code j sees, of the codes k <= j, itself included:

    - "full": all;
    - "row": itself and the previous W in raster order, across the row's boundary, so back to the one right above;
    - "column": those of its own column;
    - "conv": a `kernel` x `kernel` window around j. The key dr rows up and dc columns aside is the raster index
      j - dr*W + dc, whatever j's column: stepping past a row's end goes on in the neighboring row ("wraparound
      behavior, similar to the row attention"), as if the rows were written on one long line. It neither stops at the
      row's edge nor clamps to it nor comes back on the other side of the same row.
    """

    kind: str
    n_text: int
    grid: int
    kernel: int = 11

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Distances j - k that the convolution sees, rising; all >= 0."""
        reach = self.kernel // 2
        window = {dr * self.grid - dc for dr in range(reach + 1) for dc in range(-reach, reach + 1)}
        return tuple(sorted(distance for distance in window if distance >= 0))

    def codes_mask(self, device: torch.device) -> Tensor:
        """Whether code j (first axis) sees code k: (W*W, W*W) bool."""
        query = torch.arange(self.grid**2, device=device)[:, None]
        distance = query - query.T
        causal = distance >= 0
        if self.kind == "row":
            return causal & (distance <= self.grid)
        if self.kind == "column":
            return causal & (distance % self.grid == 0)
        if self.kind == "conv":
            return torch.isin(distance, torch.tensor(self.offsets, device=device))
        return causal

    def mask(self, device: torch.device) -> Tensor:
        """Whether a position of the stream sees another: (L, L) bool, one shared tensor per pattern and device."""
        return _stream_mask(self, device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over the whole stream, three times (B, N, L, D) -> (B, N, L, D)."""
        if q.device.type == "cpu" and self.kind == "column":
            return column_attention(q, k, v, self.n_text + 1, self.grid)
        if q.device.type == "cpu" and self.kind != "full" and LOCAL_GAIN * self.n_seen < q.shape[-2]:
            return local_attention(q, k, v, self.n_text + 1, self.grid, self.distances)
        if q.device.type == "cuda" and self.kind != "full" and block_attention.usable():
            return block_attention.block_attention(q, k, v, self.n_text + 1, self.distances)
        if trains_on_cpu(q):
            return batched_attention(q, k, v, _stream_bias(self, q.device, q.dtype))
        if self.kind == "full" and q.device.type == "cpu" and torch.is_grad_enabled():
            return causal_attention(q, k, v)
        if self.kind == "full":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(q.device))

    @property
    def distances(self) -> tuple[int, ...]:
        """Distances j - k that codes see, rising."""
        if self.kind == "conv":
            return self.offsets
        stop, step = {"row": (self.grid + 1, 1), "column": (self.grid**2, self.grid)}.get(self.kind, (self.grid**2, 1))
        return tuple(range(0, stop, step))

    @property
    def n_seen(self) -> int:
        """Keys that `local_attention` gathers for a row of "row" and "conv"."""
        rows = min(-(-self.distances[-1] // self.grid), self.grid - 1) + 1
        return self.n_text + 1 + rows * self.grid

    @property
    def n_slots(self) -> int:
        """Codes whose keys a cache has to hold: no more than later codes can still see."""
        n_codes = max(self.grid**2 - 1, 1)
        if self.kind == "row":
            return min(self.grid + 1, n_codes)
        if self.kind == "conv":
            return min(self.offsets[-1] + 1, n_codes)
        return self.grid**2 if self.kind == "column" else n_codes

    @property
    def block_size(self) -> int:
        """Slots of a cache that lie together: a column, some of all codes, or all slots."""
        if self.kind == "column":
            return self.grid
        return min(self.n_slots, BLOCK) if self.kind == "full" else self.n_slots

    def slot(self, position: int) -> tuple[int, int]:
        """Where a cache keeps code `position`, as block and slot: in a ring, in its column, or in raster order."""
        if self.kind == "column":
            row, column = divmod(position, self.grid)
            return column, row
        return divmod(position, self.block_size) if self.kind == "full" else (0, position % self.n_slots)

    def visible(self, position: int) -> tuple[range, int]:
        """The blocks that code `position` sees, itself already stored, and how many of their slots from the first on.

        Of these "conv" hides some by `ring_bias`.
        """
        block, slot = self.slot(position)
        if self.kind == "column":
            return range(block, block + 1), slot + 1
        return range(block + 1), min(position + 1, self.n_slots)

    def allowed(self, device: torch.device) -> Tensor:
        """Whether a code sees what was stored so many codes before it, by age: (n_slots,) bool; of "column" all."""
        ages = torch.arange(self.n_slots, device=device)
        return torch.isin(ages, torch.tensor(self.offsets, device=device)) if self.kind == "conv" else ages >= 0

    def ring_bias(self, like: Tensor) -> Tensor | None:
        """What "conv" adds to its ring's scores, by position modulo the ring's size: (n_slots, n_slots) 0 or -inf."""
        if self.kind != "conv":
            return None
        place = torch.arange(self.n_slots, device=like.device)
        seen = self.allowed(like.device)[(place[:, None] - place) % self.n_slots]
        return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, float("-inf"))


def trains_on_cpu(q: Tensor) -> bool:
    """Whether `batched_attention` is the faster one: a backward pass is to follow, on CPU, over a short stream."""
    return q.device.type == "cpu" and torch.is_grad_enabled() and q.shape[-2] <= LONG_STREAM


@lru_cache(maxsize=16)
def _stream_mask(pattern: Pattern, device: torch.device) -> Tensor:
    # kept across calls, so it must not become an inference tensor, which training could not save for its backward
    with torch.inference_mode(False):
        n_prefix = pattern.n_text + 1
        length = pattern.n_text + pattern.grid**2
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        mask[n_prefix:, n_prefix:] = pattern.codes_mask(device)[:-1, :-1]
        return mask


@lru_cache(maxsize=64)
def _stream_bias(pattern: Pattern, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The mask as a bias, 0 or -inf: (L, L)."""
    with torch.inference_mode(False):
        hidden = ~_stream_mask(pattern, device)
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(hidden, float("-inf"))
