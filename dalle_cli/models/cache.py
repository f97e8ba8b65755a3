"""Key-value caches for sampling codes one after another.

P prompts, K candidates of each (B = P*K, prompts first), N heads, D head width, R = P*N*K rows, S positions of start
and caption, T of a caption's states.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dalle_cli.models.attention import Pattern, as_bias

FEW = 32  # rows R; below this, float32 products on CPU take less time than a conversion to 16 bits


def cache_dtype(dtype: torch.dtype, n_rows: int, on_cpu: bool) -> torch.dtype:
    """The dtype in which a cache stores keys and values of R rows when products are in `dtype`."""
    return torch.float32 if on_cpu and n_rows < FEW and dtype.itemsize < 4 else dtype


@dataclass(frozen=True)
class Prompt:
    """Prefilled captions: logits of the first code (P, V), and keys and values (P, N, S, D) by layer.

    An encoder-decoder has keys and values of the start alone there, and those of cross-attention to the T states of the
    caption in `cross_keys` and `cross_values` (P, N, T, D). `visible` (P, S or T) bool says which of the caption's
    positions may be attended to; None is all.
    """

    logits: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    visible: Tensor | None = None
    cross_keys: tuple[Tensor, ...] = ()
    cross_values: tuple[Tensor, ...] = ()

    def repeat(self, times: int) -> "Prompt":
        """Each caption `times` times, one after another."""
        return Prompt(
            self.logits.repeat_interleave(times, 0),
            tuple(x.repeat_interleave(times, 0) for x in self.keys),
            tuple(x.repeat_interleave(times, 0) for x in self.values),
            None if self.visible is None else self.visible.repeat_interleave(times, 0),
            tuple(x.repeat_interleave(times, 0) for x in self.cross_keys),
            tuple(x.repeat_interleave(times, 0) for x in self.cross_values),
        )

    @staticmethod
    def join(prompts: "Sequence[Prompt]") -> "Prompt":
        """The captions of several prompts, one after another."""
        return Prompt(
            torch.cat([p.logits for p in prompts]),
            tuple(torch.cat(x) for x in zip(*(p.keys for p in prompts), strict=True)),
            tuple(torch.cat(x) for x in zip(*(p.values for p in prompts), strict=True)),
            torch.cat(visible) if (visible := [p.visible for p in prompts if p.visible is not None]) else None,
            tuple(torch.cat(x) for x in zip(*(p.cross_keys for p in prompts), strict=True)),
            tuple(torch.cat(x) for x in zip(*(p.cross_values for p in prompts), strict=True)),
        )


class PromptRows:
    """How K candidates of each of P prompts lie in R = P*N*K rows: those of a prompt together, for each head."""

    def __init__(self, keys: Tensor, candidates: int) -> None:
        """Keys (P, N, S, D) that the candidates of a prompt share."""
        self.n_prompts, self.n_head = keys.shape[:2]
        self.candidates = candidates
        self.n_rows = self.n_prompts * self.n_head * candidates
        self.dtype = cache_dtype(keys.dtype, self.n_rows, keys.is_cpu)

    def _rows(self, x: Tensor) -> Tensor:
        """(P*K, N, 1, D) -> (P*N*K, D), with the candidates of a prompt next to each other for each head."""
        return x.reshape(self.n_prompts, self.candidates, self.n_head, -1).transpose(1, 2).reshape(-1, x.shape[-1])

    def _heads(self, y: Tensor) -> Tensor:
        """Inverse of `_rows`: (P*N*K, D) -> (P*K, N, 1, D)."""
        y = y.view(self.n_prompts, self.n_head, self.candidates, -1).transpose(1, 2)
        return y.reshape(-1, self.n_head, 1, y.shape[-1])


class CrossCache(PromptRows):
    """Keys and values of one layer's cross-attention to a caption's states, shared by the caption's candidates."""

    def __init__(self, keys: Tensor, values: Tensor, visible: Tensor | None, candidates: int) -> None:
        """Keys and values (P, N, T, D), and which of them are visible (P, T) bool; None is all."""
        super().__init__(keys, candidates)
        self.keys, self.values = (x.flatten(0, 1).to(self.dtype) for x in (keys, values))
        shown = torch.ones(len(keys), keys.shape[2], dtype=torch.bool, device=keys.device)
        bias = as_bias(shown if visible is None else visible, self.dtype)
        self.bias = bias.repeat_interleave(self.n_head, 0)[:, None]

    def attend(self, q: Tensor) -> Tensor:
        """(B, N, 1, D) -> same."""
        query = (self._rows(q).to(self.dtype) * q.shape[-1] ** -0.5).view(-1, self.candidates, q.shape[-1])
        weights = torch.softmax(torch.baddbmm(self.bias, query, self.keys.mT), dim=-1)
        return self._heads(torch.bmm(weights, self.values).flatten(0, 1)).to(q.dtype)


class LayerCache(PromptRows):
    """Keys and values of one layer: those of the caption, shared by its candidates, and those of the codes.

    The buffers are allocated once, only as large as the pattern needs. They consist of blocks (n_blocks, R, slots, D);
    a code attends to all slots of some blocks and the first slots of one, because a product over a slice would copy it.
    """

    def __init__(self, pattern: Pattern, text_keys: Tensor, text_values: Tensor, candidates: int) -> None:
        """Caption keys and values (P, N, S, D)."""
        super().__init__(text_keys, candidates)
        self.pattern = pattern
        self.text_keys, self.text_values = (x.flatten(0, 1).to(self.dtype) for x in (text_keys, text_values))
        self.keys = self.text_keys.new_zeros(self.n_blocks, self.n_rows, self.block_size, text_keys.shape[-1])
        self.values = torch.zeros_like(self.keys)
        self.bias = pattern.ring_bias(self.keys)

    @property
    def block_size(self) -> int:
        """Slots of a block."""
        return self.pattern.block_size

    @property
    def n_blocks(self) -> int:
        """Blocks that hold all slots."""
        return -(-self.pattern.n_slots // self.block_size)

    def attend(self, position: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store code `position` and attend from it, three times (B, N, 1, D) -> (B, N, 1, D)."""
        block, slot = self.pattern.slot(position)
        self.keys[block, :, slot], self.values[block, :, slot] = self._rows(k), self._rows(v)
        blocks, n_visible = self.pattern.visible(position)
        query = self._rows(q).to(self.dtype) * q.shape[-1] ** -0.5
        parts = [self._text_scores(query), *(torch.bmm(query[:, None], self.keys[b].mT)[:, 0] for b in blocks)]
        scores = torch.cat(parts, dim=-1)[:, : parts[0].shape[-1] + n_visible]
        if self.bias is not None:
            scores[:, parts[0].shape[-1] :] += self.bias[position % self.pattern.n_slots, :n_visible]
        weights = torch.softmax(scores, dim=-1)
        text, *rest = torch.split(weights, [parts[0].shape[-1], *self._sizes(n_visible)], dim=-1)
        y = self._text_values(text)
        for b, part in zip(blocks, rest, strict=True):
            y = y + torch.bmm(part[:, None], self.values[b][:, : part.shape[-1]])[:, 0]
        return self._heads(y).to(q.dtype)

    def _sizes(self, n_visible: int) -> list[int]:
        """Visible slots of each block."""
        return [min(self.block_size, n_visible - begin) for begin in range(0, n_visible, self.block_size)]

    def _text_scores(self, query: Tensor) -> Tensor:
        """One product for all candidates of a prompt: (R, D) -> (R, S)."""
        scores = torch.bmm(query.view(-1, self.candidates, query.shape[-1]), self.text_keys.mT)
        return scores.view(len(query), -1)

    def _text_values(self, weights: Tensor) -> Tensor:
        """(R, S) -> (R, D)."""
        y = torch.bmm(weights.reshape(-1, self.candidates, weights.shape[-1]), self.text_values)
        return y.view(len(weights), -1)


class StaticLayerCache(LayerCache):
    """The same with the position in a tensor: every step is one graph, for torch.compile and CUDA graphs.

    Slots that a code does not attend to are masked, so "full" computes with all slots from the first code on.
    """

    def __init__(self, pattern: Pattern, text_keys: Tensor, text_values: Tensor, candidates: int) -> None:
        super().__init__(pattern, text_keys, text_values, candidates)
        self.ring = pattern.ring_mask(text_keys.device)

    @property
    def block_size(self) -> int:
        """Slots of a block; a code attends to one block."""
        return self.pattern.grid if self.pattern.kind == "column" else self.pattern.n_slots

    def attend(self, position: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        """As LayerCache, with the position () int64."""
        grid, slots = self.pattern.grid, torch.arange(self.block_size, device=q.device)
        if self.pattern.kind == "column":
            block, slot = position % grid, position // grid
            hidden = slots > slot
        else:
            block, slot = torch.zeros_like(position), position % self.block_size
            back = (position - slots) % self.block_size  # age of each slot's code
            hidden = back > position
            if self.ring is not None:
                hidden = hidden | ~self.ring.index_select(0, slot[None])[0]
        where = (block[None], slice(None), slot[None])
        self.keys[where], self.values[where] = self._rows(k).to(self.dtype)[None], self._rows(v).to(self.dtype)[None]
        keys, values = (x.index_select(0, block[None])[0] for x in (self.keys, self.values))
        query = self._rows(q).to(self.dtype) * q.shape[-1] ** -0.5
        scores = torch.bmm(query[:, None], keys.mT)[:, 0].masked_fill(hidden, float("-inf"))
        text = self._text_scores(query)
        weights = torch.softmax(torch.cat([text, scores], dim=-1), dim=-1)
        shares, rest = torch.split(weights, [text.shape[-1], self.block_size], dim=-1)
        return self._heads(self._text_values(shares) + torch.bmm(rest[:, None], values)[:, 0]).to(q.dtype)


class CacheLayer(Protocol):
    """A layer's cache; the position is an int or, in a static cache, a tensor."""

    def attend(self, position: Any, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor:
        """Store a code and attend from it."""
        ...


class Cache:
    """Sampling state of P*K candidates: `logits` (P*K, V) of the first code, buffers by layer, and the position."""

    def __init__(
        self,
        prompt: Prompt,
        patterns: Sequence[Pattern],
        candidates: int,
        positions: Tensor,
        static: bool = False,
        rotary: Tensor | None = None,
        hint_widths: tuple[int, int] | None = None,
    ) -> None:
        """`positions` (W*W, C) are summed row and column embeddings, `rotary` (W*W - 1, 2, D) rotary angles.

        `static` stores the position in a tensor. `hint_widths` are the widths of the two parts of `Hint.of`.
        """
        self.positions, self.rotary = positions, rotary
        rows = len(prompt.logits) * candidates
        self.hints: tuple[Tensor, Tensor] | None = None  # by position and row: input, and added before the head
        if hint_widths is not None:
            before, after = (positions.new_zeros(len(positions) - 1, rows, width) for width in hint_widths)
            self.hints = before, after
        self.follows = torch.zeros(rows, 1, dtype=torch.bool, device=positions.device)
        self.position: Any = torch.zeros((), dtype=torch.int64, device=positions.device) if static else 0
        self.logits = prompt.logits.repeat_interleave(candidates, 0)
        kind = StaticLayerCache if static else LayerCache
        layers = zip(patterns, prompt.keys, prompt.values, strict=True)
        self.layers: list[CacheLayer] = [kind(pattern, k, v, candidates) for pattern, k, v in layers]
        cross = zip(prompt.cross_keys, prompt.cross_values, strict=True)
        self.cross = [CrossCache(k, v, prompt.visible, candidates) for k, v in cross]
        if static:
            self._mark_static()

    def _mark_static(self) -> None:
        """Declare that the addresses of all tensors are fixed.

        CUDA graphs would otherwise copy all inputs at each step, and cannot write to the buffers.
        """
        tensors = [value for holder in (self, *self.layers, *self.cross) for value in vars(holder).values()]
        for tensor in (*tensors, *(self.hints or ())):
            if isinstance(tensor, Tensor):
                torch._dynamo.mark_static_address(tensor)

    def show(self, ahead: Tensor, late: Tensor) -> None:
        """Set the hints of the first K rows in place: (W*W - 1, K, C) and (W*W - 1, K, H); other rows have none."""
        assert self.hints is not None
        n = ahead.shape[1]
        for table, own in zip(self.hints, (ahead, late), strict=True):
            table[:, :n] = own
        self.follows[:n] = True

    def advance(self) -> None:
        """Go to the next position; a tensor is changed in place."""
        self.position += 1

    def restart(self) -> None:
        """Go back to the end of the caption, in the same buffers."""
        self.position *= 0

    def row(self, table: Tensor, offset: int = 0) -> Tensor:
        """The row of a table (M, ...) that belongs to the position: (1, ...)."""
        if isinstance(self.position, int):
            return table[self.position + offset, None]
        return table.index_select(0, self.position[None] + offset)
