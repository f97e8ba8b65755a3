"""Which positions of the stream attend to which, for the token prior (Ramesh et al. 2021, app. B.1, fig. 11).

The stream is a start-of-text embedding, T caption positions, then the codes of a W x W grid in raster order, except the
last code, to which nothing attends. L = 1 + T + W*W - 1 positions, one fewer without a start; B batch, N heads, D head
width.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from dalle_cli.errors import DalleError

BLOCK = 128  # codes in one block of a "full" cache
SLOWEST = 100.0  # ratio of the fastest and the slowest rotary frequency
KINDS = ("full", "row", "column", "conv", "window")


def layer_kinds(n_layer: int, attention: str) -> list[str]:
    """Kind of every layer: row, column, row, row, repeated, and the last one convolutional (app. B.1); or all full.

    With "window" the last one's window is cut at the edges of the grid.

    Raises: DalleError where `attention` is not "sparse", "window" or "full".
    """
    if attention == "full":
        return ["full"] * n_layer
    if attention not in ("sparse", "window"):
        raise DalleError(f'expected attention "sparse", "window" or "full", found "{attention}"; correct the recipe')
    # layers are counted from 1, as the paper does
    kinds = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, n_layer + 1)]
    return [*kinds[:-1], "window" if attention == "window" else "conv"]


@dataclass(frozen=True)
class Pattern:
    """The attention mask of one layer. Every code attends to the whole caption, start included, in the same softmax.

    Code j attends to these codes k <= j:

    - "full": all;
    - "row": itself and the W codes before it in raster order, back to the code right above;
    - "column": those of its own column;
    - "conv": a `kernel` x `kernel` window around j. The key dr rows up and dc columns to the right is the raster index
      j - dr*W + dc, for any column of j: past the end of a row the window continues in the neighboring row ("wraparound
      behavior, similar to the row attention").
      It does not stop at the edge of the row, nor wrap within the row;
    - "window": the same window, cut at the edges of the grid.
    """

    kind: str
    n_text: int
    grid: int
    kernel: int = 11
    start: bool = True

    @property
    def n_prefix(self) -> int:
        """Positions before the codes: those of the caption, and the start, if there is one."""
        return self.n_text + self.start

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Distances j - k >= 0 within the convolution's window, ascending."""
        reach = self.kernel // 2
        window = {dr * self.grid - dc for dr in range(reach + 1) for dc in range(-reach, reach + 1)}
        return tuple(sorted(distance for distance in window if distance >= 0))

    def codes_mask(self, device: torch.device) -> Tensor:
        """Whether code j (first axis) attends to code k: (W*W, W*W) bool."""
        query = torch.arange(self.grid**2, device=device)[:, None]
        return (query >= query.T) & self._attends(query, query.T)

    def _attends(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether codes attend to codes that are not later: raster indices, int64, that broadcast -> bool."""
        distance, reach = query - key, self.kernel // 2
        if self.kind == "row":
            return distance <= self.grid
        if self.kind == "column":
            return distance % self.grid == 0
        if self.kind == "conv":
            return torch.isin(distance, torch.tensor(self.offsets, device=query.device))
        if self.kind == "window":
            columns = (query % self.grid - key % self.grid).abs()
            return (query // self.grid - key // self.grid <= reach) & (columns <= reach)
        return distance >= 0

    def mask(self, device: torch.device) -> Tensor:
        """The mask of the stream: (L, L) bool, one shared tensor per pattern and device."""
        return _stream_mask(self, device)

    def bias(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The mask as a bias on scores, 0 or -inf: (L, L)."""
        return _stream_bias(self, device, dtype)

    @property
    def distances(self) -> tuple[int, ...]:
        """Distances j - k to which codes attend, ascending; not for "window", where they depend on the column."""
        if self.kind == "conv":
            return self.offsets
        stop, step = {"row": (self.grid + 1, 1), "column": (self.grid**2, self.grid)}.get(self.kind, (self.grid**2, 1))
        return tuple(range(0, stop, step))

    @property
    def n_local_keys(self) -> int:
        """Keys that one row of "row" or "conv" needs: the caption's and those of a few rows."""
        rows = min(-(-self.distances[-1] // self.grid), self.grid - 1) + 1
        return self.n_prefix + rows * self.grid

    @property
    def n_slots(self) -> int:
        """Number of codes whose keys a cache holds: no more than later codes attend to."""
        n_codes = max(self.grid**2 - 1, 1)
        if self.kind == "row":
            return min(self.grid + 1, n_codes)
        if self.kind == "conv":
            return min(self.offsets[-1] + 1, n_codes)
        if self.kind == "window":  # whole rows: a slot of the ring is always of one column
            return min((self.kernel // 2 + 1) * self.grid, n_codes)
        return self.grid**2 if self.kind == "column" else n_codes

    @property
    def block_size(self) -> int:
        """Slots in one block of a cache: a column, BLOCK codes, or all slots."""
        if self.kind == "column":
            return self.grid
        return min(self.n_slots, BLOCK) if self.kind == "full" else self.n_slots

    def slot(self, position: int) -> tuple[int, int]:
        """Block and slot of code `position` in a cache: in its column, in raster order, or in a ring buffer."""
        if self.kind == "column":
            row, column = divmod(position, self.grid)
            return column, row
        return divmod(position, self.block_size) if self.kind == "full" else (0, position % self.n_slots)

    def visible(self, position: int) -> tuple[range, int]:
        """The blocks to which code `position` attends, once stored, and the number of their slots that it uses.

        For "conv" and "window", `ring_bias` masks some of these slots.
        """
        block, slot = self.slot(position)
        if self.kind == "column":
            return range(block, block + 1), slot + 1
        return range(block + 1), min(position + 1, self.n_slots)

    def ring_mask(self, device: torch.device) -> Tensor | None:
        """Which slots of a ring buffer a code attends to, by its position modulo n_slots: (n_slots, n_slots) bool.

        For "conv" and "window"; None for other kinds, which attend to all slots.
        """
        if self.kind not in ("conv", "window"):
            return None
        slot = torch.arange(self.n_slots, device=device)
        ages = (slot[:, None] - slot) % self.n_slots
        return self._attends(slot[:, None], slot[:, None] - ages)

    def ring_bias(self, like: Tensor) -> Tensor | None:
        """`ring_mask` as a bias on scores, 0 or -inf."""
        mask = self.ring_mask(like.device)
        return None if mask is None else as_bias(mask, like.dtype)


@lru_cache(maxsize=16)
def _stream_mask(pattern: Pattern, device: torch.device) -> Tensor:
    # cached across calls, so it must not be an inference tensor, which a backward pass cannot use
    with torch.inference_mode(False):
        n_prefix = pattern.n_prefix
        length = n_prefix + pattern.grid**2 - 1
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        mask[n_prefix:, n_prefix:] = pattern.codes_mask(device)[:-1, :-1]
        return mask


@lru_cache(maxsize=64)
def _stream_bias(pattern: Pattern, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return as_bias(_stream_mask(pattern, device), dtype)


@lru_cache(maxsize=64)
def causal_bias(length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """0 for a key at or before the query, -inf for a later one: (length, length)."""
    with torch.inference_mode(False):
        return as_bias(torch.ones(length, length, dtype=torch.bool, device=device).tril(), dtype)


def as_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a bool tensor is true, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, float("-inf"))


@lru_cache(maxsize=16)
def rotary_angles(n_prefix: int, grid: int, width: int, device: torch.device, whole: bool = False) -> Tensor:
    """Cosines and sines of rotary angles (Su et al. 2021), (2, L, D) float64: half the pairs by row, half by column.

    Caption position p has row and column p; the grid starts at row and column n_prefix. `whole` includes the last place
    of the grid, which the token prior's stream lacks.
    """
    n_pairs = width // 2
    with torch.inference_mode(False):
        rows, columns = torch.arange(grid).repeat_interleave(grid), torch.arange(grid).repeat(grid)
        prefix = torch.arange(n_prefix)
        angles = []
        for axis, n in ((rows, n_pairs // 2), (columns, n_pairs - n_pairs // 2)):
            line = torch.cat([prefix, axis + n_prefix])[: None if whole else -1].double()
            angles.append(line[:, None] * SLOWEST ** (-torch.arange(n, dtype=torch.float64) / max(n, 1)))
        angle = torch.cat(angles, dim=-1).repeat(1, 2)
        rotary = torch.stack([angle.cos(), angle.sin()])
        return rotary.float().to(device) if device.type == "mps" else rotary.to(device)  # there is no float64 there
