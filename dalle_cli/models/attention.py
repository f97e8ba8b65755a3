"""Which positions of the stream attend to which, for the token prior (Ramesh et al. 2021, app. B.1, fig. 11).

The stream is a start-of-text embedding, T caption positions, then the codes of a W x W grid in raster order, except the
last code, which nothing reads. L = 1 + T + W*W - 1 positions; B batch, P prompts, K candidates of each prompt
(B = P*K, prompts first), N heads, D head width.
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

    def slot(self, position: int) -> int:
        """Where a cache keeps code `position`: a ring, or column after column so that a column is one slice."""
        if self.kind == "column":
            row, column = divmod(position, self.grid)
            return column * self.grid + row
        return position % self.n_slots

    def visible(self, position: int) -> slice:
        """The slots that code `position` sees, itself already stored; of these "conv" hides some by `ring_bias`."""
        if self.kind == "column":
            row, column = divmod(position, self.grid)
            return slice(column * self.grid, column * self.grid + row + 1)
        return slice(0, min(position + 1, self.n_slots))

    def ring_bias(self, like: Tensor) -> Tensor | None:
        """What "conv" adds to its ring's scores, by position modulo the ring's size: (n_slots, n_slots) 0 or -inf."""
        if self.kind != "conv":
            return None
        place = torch.arange(self.n_slots, device=like.device)
        seen = torch.isin((place[:, None] - place) % self.n_slots, torch.tensor(self.offsets, device=like.device))
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


class LayerCache:
    """Keys and values of one layer while codes are drawn: the caption's, shared by its candidates, and the codes'.

    The buffers are allocated once and hold no more of the codes than the pattern can still see.
    """

    def __init__(self, pattern: Pattern, text_keys: Tensor, text_values: Tensor, candidates: int) -> None:
        """Caption keys and values (P, N, 1 + T, D)."""
        self.pattern = pattern
        self.n_prompts, self.n_head = text_keys.shape[:2]
        self.candidates = candidates
        self.text_keys, self.text_values = text_keys.flatten(0, 1), text_values.flatten(0, 1)
        n_rows = self.n_prompts * self.n_head * candidates
        self.keys = text_keys.new_zeros(n_rows, pattern.n_slots, text_keys.shape[-1])
        self.values = torch.zeros_like(self.keys)
        self.bias = pattern.ring_bias(text_keys)

    def attend(self, position: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store code `position` and attend from it, three times (B, N, 1, D) -> (B, N, 1, D)."""
        q, k, v = self._rows(q * q.shape[-1] ** -0.5), self._rows(k), self._rows(v)
        slot, seen = self.pattern.slot(position), self.pattern.visible(position)
        self.keys[:, slot] = k
        self.values[:, slot] = v
        keys, values = self.keys[:, seen], self.values[:, seen]
        n_text = self.text_keys.shape[1]
        # one product for all candidates of a prompt over the caption, one for each row over its own codes
        text_scores = torch.bmm(q.view(-1, self.candidates, q.shape[-1]), self.text_keys.mT).view(q.shape[0], n_text)
        scores = torch.bmm(q[:, None], keys.mT)[:, 0]
        if self.bias is not None:
            scores = scores + self.bias[position % self.pattern.n_slots, seen]
        weights = torch.softmax(torch.cat([text_scores, scores], dim=-1), dim=-1)
        text_weights = weights[:, :n_text].view(-1, self.candidates, n_text)
        y = torch.bmm(text_weights, self.text_values).view(q.shape) + torch.bmm(weights[:, None, n_text:], values)[:, 0]
        y = y.view(self.n_prompts, self.n_head, self.candidates, -1).transpose(1, 2)
        return y.reshape(-1, self.n_head, 1, y.shape[-1])

    def _rows(self, x: Tensor) -> Tensor:
        """(P*K, N, 1, D) -> (P*N*K, D), so that a prompt's candidates lie together under each head."""
        return x.reshape(self.n_prompts, self.candidates, self.n_head, -1).transpose(1, 2).reshape(-1, x.shape[-1])
