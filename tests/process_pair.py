"""Two processes of one group, on the CPU and joined through a file: they run what they are told, side by side."""

import contextlib
import multiprocessing
import os
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from comparisons import assert_equal
from interruptions import Crash, after_update
from toy_task import SplitToy, log_of, train_toy

from dalle_cli.artifacts import open_artifact
from dalle_cli.artifacts.weights import load_tensors
from dalle_cli.errors import DalleError
from dalle_cli.training.distributed import ProcessGroup

CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # sums of two halves are not the sum of the whole, bit for bit
WORLD = 2


def work(rank, store, pipe):
    """One of the processes: run functions, and say what came of them."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    while (order := pipe.recv()) is not None:
        function, args, kwargs = order
        try:
            pipe.send((True, function(*args, **kwargs)))
        except DalleError as error:
            pipe.send((False, str(error)))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


class Pair:
    """Two processes; called with a function of a module's top level, they both run it, and their answers are given."""

    def __init__(self, store):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "process_pair"])
        self.pipes, self.processes = [], []
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
            for rank in range(WORLD):
                ours, theirs = context.Pipe()
                process = context.Process(target=work, args=(rank, str(store), theirs), daemon=True)
                process.start()
                theirs.close()
                self.pipes.append(ours)
                self.processes.append(process)

    def __call__(self, function, *args, **kwargs):
        answers = self.answers(function, *args, **kwargs)
        assert all(good for good, _ in answers), answers
        return [value for _, value in answers]

    def answers(self, function, *args, **kwargs):
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        answers = [pipe.recv() if pipe.poll(30) else (None, "no answer") for pipe in self.pipes]
        assert not any(good is None for good, _ in answers), "\n".join(str(value) for _, value in answers)
        return answers

    def close(self):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join(10)
            process.kill()


def group():
    """The group that the two processes are, for what runs in them."""
    return ProcessGroup(dist.get_rank(), WORLD)


def train_here(folder, c, task=SplitToy, crash=None, **more):
    """Train the toy in these processes, and break off after an update, if told so."""
    with after_update(crash), pytest.raises(Crash) if crash else contextlib.nullcontext():
        train_toy(Path(folder), c, task, **more)


def weights(folder):
    return load_tensors(open_artifact(folder / "toy.safetensors"))


def assert_same_run(ours, theirs, **tolerance):
    """Two folders with the toy's runs: equal weights, and logs that say the same."""
    assert_equal(weights(ours), weights(theirs), **tolerance)
    logs = (log_of(folder) for folder in (ours, theirs))
    both = [[{k: v for k, v in row.items() if k != "validation"} for row in log] for log in logs]
    assert [row.keys() for row in both[0]] == [row.keys() for row in both[1]]
    for one, other in zip(*both, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
