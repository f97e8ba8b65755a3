"""How far a C library's heap reaches by what is taken and given back: more than what is in use, for it has holes.

Training on a CPU has the C library (glibc) keep what is freed (`devices.keep_freed_memory`), so that all arrays lie in
one heap. There the smallest hole that is large enough is taken, and neighbouring holes become one. But an array begins
at a multiple of 64, for which more is asked than it needs, and the ends that are left over go to the small records that
a tensor has beside its array. So a hole between such records is too small, by a little, for the next array of its own
size: that one lies elsewhere, and what is computed block by block, in parts or once more, leaves the holes behind.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Hashable

ALIGNMENT = 64  # of a tensor's array
# Bytes of what torch has beside each array: its storage, the tensor, and who refers to it. They are the commonest sizes
# that were found next to arrays where a trace of malloc and free was taken of an update.
RECORDS = (96, 176, 32)
# Which record comes to lie where is chance (runs alike differ by 5%): a mean over orders is what to expect.
ORDERS = len(RECORDS)
UNIT, HEADER, LEAST = 16, 8, 32  # malloc.c: multiples of which chunks are, what each has beside its bytes, the smallest
CACHED, CACHE = 1040, 7  # chunks up to this size, and so many of each, are handed out again as they are


class Heap:
    """Arrays and their records by name, about where malloc and free of glibc 2.36 would have them.

    Of the library's rules these are the ones that decide about arrays; its lists of small pieces are simpler here.
    """

    def __init__(self, order: int = 0) -> None:
        """`order` says with which record each array's begin."""
        self.records = RECORDS[order:] + RECORDS[:order]
        self.top = self.most = 0  # where the heap ends, and the furthest end so far
        self.holes: list[tuple[int, int]] = []  # size and start, sorted
        self.starts: dict[int, int] = {}  # of holes: start to end
        self.ends: dict[int, int] = {}
        self.cache: defaultdict[int, list[int]] = defaultdict(list)  # starts, by size
        self.used: dict[Hashable, list[tuple[int, int]]] = {}

    def take(self, name: Hashable, n_bytes: int) -> None:
        """An array of so many bytes, and a tensor's records."""
        if n_bytes:
            self.used[name] = [self._array(n_bytes), *(self._record(n) for n in self.records)]

    def give_back(self, name: Hashable) -> None:
        """An array and its records."""
        for start, size in self.used.pop(name, ()):
            self._free(start, size)

    def _array(self, n_bytes: int) -> tuple[int, int]:
        size = _chunk(n_bytes)
        start, all_ = self._find(_chunk(size + ALIGNMENT + LEAST))
        first, end = start, start + all_
        if (first + UNIT) % ALIGNMENT:
            first = -(-(start + UNIT) // ALIGNMENT) * ALIGNMENT - UNIT
            first += ALIGNMENT * (first - start < LEAST)
            self._free(start, first - start)
        if end - first - size < LEAST:
            return first, end - first
        self._free(first + size, end - first - size)
        return first, size

    def _record(self, n_bytes: int) -> tuple[int, int]:
        size = _chunk(n_bytes)
        return (self.cache[size].pop(), size) if self.cache[size] else self._find(size)

    def _find(self, size: int) -> tuple[int, int]:
        """The best place and what is there of it: a little more where the rest would be too small for a hole."""
        place = bisect_left(self.holes, (size, -1))
        if place == len(self.holes):
            start, self.top = self.top, self.top + size
            self.most = max(self.most, self.top)
            return start, size
        found, start = self.holes[place]
        self._close(start, found)
        if found - size < LEAST:
            return start, found
        self._open(start + size, found - size)
        return start, size

    def _free(self, start: int, size: int) -> None:
        if size <= CACHED and len(self.cache[size]) < CACHE:
            self.cache[size].append(start)
            return
        if before := self.ends.get(start, start) - start:
            self._close(start + before, -before)
            start, size = start + before, size - before
        end = start + size
        if end == self.top:
            self.top = start
            return
        if after := self.starts.get(end, end) - end:
            self._close(end, after)
        self._open(start, size + after)

    def _open(self, start: int, size: int) -> None:
        insort(self.holes, (size, start))
        self.starts[start], self.ends[start + size] = start + size, start

    def _close(self, start: int, size: int) -> None:
        self.holes.pop(bisect_left(self.holes, (size, start)))
        del self.starts[start], self.ends[start + size]


def _chunk(n_bytes: int) -> int:
    return max(LEAST, -(-(n_bytes + HEADER) // UNIT) * UNIT)
