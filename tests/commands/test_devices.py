"""What is freed is kept for what is allocated next, by the page faults of updates in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest
from toy_task import config, trainer

# As in an update: large tensors between small ones, all held until its end. Those above 32 MiB are what glibc, left
# alone, gives back each time; smaller ones it learns to keep. Huge pages would hide how much is asked for.
ROUNDS = """
import ctypes, resource, sys
import torch
from dalle_cli.devices import keep_freed_memory

def faults(updates):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(updates):
        held = [torch.ones(size) for _ in range(4) for size in (9 << 20, 300, 1 << 18, 300)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

no_huge_pages = 41  # PR_SET_THP_DISABLE of prctl.h
ctypes.CDLL(None).prctl(no_huge_pages, 1, 0, 0, 0)
kept = sys.argv[1] == "keep" and keep_freed_memory()
print(int(kept), faults(3), faults(5))
"""


def rounds(how):
    """Whether the C library keeps what is freed, and the page faults of the first three updates and of five more."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("LD_PRELOAD", "MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", ROUNDS, how], check=True, capture_output=True, text=True, env=own)
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the settings that are made")
def test_freed_memory_is_kept_for_the_next_update():
    pages = 4 * (36 << 20) // os.sysconf("SC_PAGE_SIZE")  # of an update
    kept, first, more = rounds("keep")
    if first < pages / 2:
        pytest.skip(f"this system counts {first} faults where {pages} pages are new")
    assert kept
    _, _, left_alone = rounds("leave")
    assert left_alone > 5 * pages / 2  # else there was nothing to mend
    assert more < left_alone / 2


def test_training_on_cpu_keeps_what_it_frees(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("dalle_cli.training.loop.keep_freed_memory", lambda: told.append("keep"))
    trainer(tmp_path, config())
    assert told == ["keep"]
