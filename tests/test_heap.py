"""The heap that plans follow, against the C library's own."""

import json
import platform
import subprocess
import sys
from itertools import pairwise

import pytest

from dalle_cli.planning import heap
from dalle_cli.planning.heap import ORDERS, RECORDS, Heap

MB, RUNS = 1 << 20, 5
# The same arrays and records by the C library: nothing is written to them, so they take no memory.
REPLAY = """
import ctypes, json, random, sys
c = ctypes.CDLL(None)
c.malloc.restype = c.sbrk.restype = ctypes.c_void_p
c.malloc.argtypes, c.free.argtypes, c.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_void_p], [ctypes.c_ssize_t]
c.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
assert c.mallopt(-4, 0) and c.mallopt(-1, 2**31 - 1)
events, records = json.load(sys.stdin)
held = [c.malloc(n) for n in range(8, 4096, 16) for _ in range(200)]  # what others left
for address in random.Random(int(sys.argv[1])).sample(held, 20):
    c.free(address)
used, place, before = {}, ctypes.c_void_p(), c.sbrk(0)
for name, size in events:
    if size:
        assert c.posix_memalign(ctypes.byref(place), 64, size) == 0
        used[name] = [place.value, *(c.malloc(n) for n in records)]
    else:
        for address in used.pop(name):
            c.free(address)
print(c.sbrk(0) - before)
"""


def layers(depth, again):
    """Arrays of a stack's forward and backward pass; with `again` a layer's are made once more in the backward."""
    events, shapes = [], (2 * MB, 6 * MB, 2 * MB, 8 * MB, MB)
    for update in range(3):
        for layer in range(depth):
            events += [((update, layer, n), size) for n, size in enumerate(shapes)]
            if again:
                events += [((update, layer, n), 0) for n in range(1, len(shapes))]
        for layer in reversed(range(depth)):
            if again:
                events += [((update, layer, n), size) for n, size in enumerate(shapes) if n]
            for n in reversed(range(len(shapes))):
                events += [((update, layer, n, "gradient"), shapes[n] // 2), ((update, layer, n), 0)]
        events += [((update, layer, n, "gradient"), 0) for layer in range(depth) for n in range(len(shapes))]
    return events


def reach(events, order=0):
    """How far the heap reaches, and the most that was in use."""
    followed, sizes, live, most = Heap(order), {}, 0, 0
    for name, size in events:
        if size:
            followed.take(name, size)
        else:
            followed.give_back(name)
        live += size or -sizes[name]
        sizes[name] = size
        most = max(most, live)
    return followed.most, most


CASES = {"kept": layers(6, False), "again": layers(6, True)}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another")
@pytest.mark.skipif(platform.libc_ver()[1] >= "2.38", reason="later ones look for aligned places in holes")
@pytest.mark.parametrize("name", CASES)
def test_the_heap_reaches_about_as_far_as_the_c_librarys(name):
    """The library's own depends on what else a process has taken before: both are means."""
    names: dict[tuple[object, ...], int] = {}
    events = [(names.setdefault(key, len(names)), size) for key, size in CASES[name]]
    given = json.dumps([events, RECORDS])
    runs = [
        subprocess.run(
            [sys.executable, "-c", REPLAY, str(seed)], input=given, capture_output=True, text=True, check=True
        ).stdout
        for seed in range(RUNS)
    ]
    told, followed = sum(map(int, runs)) / RUNS, sum(reach(CASES[name], n)[0] for n in range(ORDERS)) / ORDERS
    print([round(int(run) / 1e6) for run in runs], round(followed / 1e6))
    assert followed == pytest.approx(told, rel=0.2)


@pytest.mark.parametrize("order", range(ORDERS))
def test_holes_are_what_records_keep_apart(monkeypatch, order):
    """Without records and what waits for them, holes become one and serve again."""
    far, most = reach(CASES["again"], order)
    assert far > 1.1 * most
    monkeypatch.setattr(heap, "RECORDS", ())
    monkeypatch.setattr(heap, "CACHE", 0)
    assert most <= reach(CASES["again"])[0] < 0.95 * far


def test_what_is_given_back_is_one_hole_again():
    followed = Heap()
    for n in range(50):
        followed.take(n, MB + 64 * n)
    assert followed.most > sum(MB + 64 * n for n in range(50))
    for n in (*range(0, 50, 2), *range(1, 50, 2)):
        followed.give_back(n)
    waiting = sum(size * len(starts) for size, starts in followed.cache.items())
    held = sum(size for size, _ in followed.holes)
    assert held + waiting == followed.top < 60_000_000
    assert not followed.used
    assert max(size for size, _ in followed.holes) > MB
    spans = sorted((start, start + size) for size, start in followed.holes)
    assert all(end < start for (_, end), (start, _) in pairwise(spans))


def test_an_empty_array_takes_nothing():
    followed = Heap()
    followed.take("none", 0)
    followed.give_back("none")
    assert followed.most == 0
