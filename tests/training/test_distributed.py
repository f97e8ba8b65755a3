"""Several processes make what one makes. Two of them, on the CPU, joined through a file: no network."""

import math
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from comparisons import assert_equal
from process_pair import CLOSE, WORLD, assert_same_run, group, train_here, weights
from toy_task import SplitToy, ToyTask, config, log_of, machine, run_of, train_toy, trainer

from dalle_cli.errors import DalleError
from dalle_cli.training import distributed
from dalle_cli.training import shards as pieces
from dalle_cli.training.loop import Trainer
from dalle_cli.training.scaling import BlockScales

# Groups


def facts():
    group = distributed.ProcessGroup(dist.get_rank(), WORLD)
    seen = []
    x = torch.arange(3.0).view(3, 1) + 10 * group.rank
    x.requires_grad_()
    every = distributed.gather_rows(x)
    (every * torch.arange(6.0)[:, None]).sum().backward()
    shared = torch.full((2,), float(group.rank))
    distributed.broadcast([shared])
    return {
        "first": group.first(lambda: seen.append(group.rank) or "told"),
        "seen": seen,
        "any": [group.any(group.rank == 1), group.any(False)],
        "gathered": group.gathered(group.rank),
        "means": {k: v.item() for k, v in group.means({"a": torch.tensor(float(group.rank))}).items()},
        "rows": every.flatten().tolist(),
        "grad": x.grad.flatten().tolist(),
        "shared": shared.tolist(),
    }


def test_what_processes_say_to_each_other(pair):
    one, two = pair(facts)
    assert (one.pop("seen"), two.pop("seen")) == ([0], [])
    assert (one.pop("grad"), two.pop("grad")) == ([0, 2, 4], [6, 8, 10])  # summed over both: an average halves it
    told = {"first": "told", "any": [True, False], "gathered": [0, 1], "means": {"a": 0.5}, "shared": [0.0, 0.0]}
    assert one == two == {**told, "rows": [0, 1, 2, 10, 11, 12]}


def fail():
    def broken():
        raise OSError(28, "No space left on device")

    try:
        distributed.ProcessGroup(dist.get_rank(), WORLD).first(broken)
    except OSError as error:
        raise DalleError(error.strerror) from None


def test_a_fault_of_the_first_is_that_of_all(pair):
    assert pair.answers(fail) == [(False, "No space left on device")] * 2


def test_one_process_makes_no_group(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("a group was made"))
    train_toy(tmp_path, config(parallel="shard", powersgd_rank=0))
    assert not dist.is_initialized()
    assert trainer(tmp_path / "b", config(powersgd_rank=2)).strategy.__class__ is distributed.SingleProcess


def test_what_is_no_lost_process_keeps_its_traceback():
    assert distributed._lost(RuntimeError("shapes cannot be multiplied")) is None
    for error in (dist.DistBackendError("aborted"), RuntimeError("Application timeout caused pair closure")):
        assert "gone or stuck" in str(distributed._lost(error))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# DataParallel and shards, against one process

SETTINGS = (
    {},
    {"clip_norm": 0.5, "ema_every": 3, "ema": 0.9},
    {"accumulate": 3},
    {"checkpoint_activations": True},
    {"optimizer": "muon"},
    {"schedule": "plateau", "plateau_patience": 1, "lr": 0.1},
)


@pytest.mark.parametrize("parallel", ["replicate", "shard"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_two_processes_make_what_one_makes(pair, tmp_path, settings, parallel):
    """With dropout: a part has its own noise, whichever process computes it."""
    parts = settings.get("accumulate", 1)
    train_toy(tmp_path / "one", config(**{**settings, "accumulate": 2 * parts}), dropout=0.1)
    pair(train_here, str(tmp_path / "two"), config(**settings, parallel=parallel), dropout=0.1)
    # Muon's products are in bfloat16, whose rounding depends on how matrices are cut
    loose = {"rtol": 0.05, "atol": 1e-2} if settings.get("optimizer") == "muon" and parallel == "shard" else CLOSE
    if loose is CLOSE:
        assert_same_run(tmp_path / "two", tmp_path / "one", **CLOSE)
    assert_equal(weights(tmp_path / "two"), weights(tmp_path / "one"), **loose)


def test_the_whole_batch_counts(pair, tmp_path):
    """Without dropout it is the plain run; and half of the rows would have been another."""
    train_toy(tmp_path / "one", config())
    pair(train_here, str(tmp_path / "two"), config())
    assert_same_run(tmp_path / "two", tmp_path / "one", **CLOSE)
    train_toy(tmp_path / "half", config(batch_size=3))
    assert not torch.allclose(weights(tmp_path / "half")["first.weight"], weights(tmp_path / "one")["first.weight"])


@pytest.mark.parametrize(
    "settings",
    [{}, {"parallel": "shard"}, {"powersgd_rank": 1, "warmup": 3}, {"parallel": "shard", "optimizer": "muon"}],
    ids=str,
)
@pytest.mark.parametrize("crash", [3, 10])
def test_a_stopped_run_goes_on_as_the_very_same(pair, tmp_path, settings, crash):
    c, more = config(**settings), {"dropout": 0.1, "held_out": {4: 3.0, 8: 4.0, 12: 5.0}}
    pair(train_here, str(tmp_path / "whole"), c, **more)
    pair(train_here, str(tmp_path / "cut"), c, crash=crash, **more)
    pair(train_here, str(tmp_path / "cut"), c, **more)
    assert (tmp_path / "cut/toy.safetensors").read_bytes() == (tmp_path / "whole/toy.safetensors").read_bytes()
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")


@pytest.mark.parametrize("order", ["one two", "two one", "shard replicate", "replicate shard"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_another_number_of_processes_goes_on(pair, tmp_path, order, optimizer):
    """Checkpoints in pieces and in one, read by as many processes as there are now."""
    train_toy(tmp_path / "plain", config(optimizer=optimizer))
    for name in order.split():
        crash = 6 if name == order.split()[0] else None
        c = config(optimizer=optimizer, parallel="replicate" if name == "replicate" else "shard")
        if name == "one":
            train_here(str(tmp_path / "run"), c, crash=crash)
        else:
            pair(train_here, str(tmp_path / "run"), c, crash=crash)
        if crash:
            assert (tmp_path / "run/toy.run/checkpoint-00000004.shards").is_dir() == (name in ("two", "shard"))
    tolerance = CLOSE if optimizer == "adamw" else {"rtol": 0.05, "atol": 1e-2}
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "plain"), **tolerance)
    assert [row["step"] for row in log_of(tmp_path / "run")] == [row["step"] for row in log_of(tmp_path / "plain")]


def test_checkpoints_in_pieces(pair, tmp_path):
    """Plain safetensors, the last few kept; what a kill left half written is cleared away; a lost piece is told."""
    c = config(parallel="shard")
    pair(train_here, str(tmp_path), c, crash=10)
    folder = tmp_path / "toy.run"
    assert {p.name for p in folder.glob("checkpoint-*")} == {
        f"checkpoint-0000000{n}.{end}" for n in (4, 8) for end in ("shards", "safetensors")
    }
    found = pieces.load(folder / "checkpoint-00000008.shards", {})
    assert found["model/blocks.0.inner.weight"].shape == (16, 8)
    assert {name.partition("/")[0] for name in found} == {"model", "ema", "optimizer"}
    half = folder / "checkpoint-00000010.shards"
    half.mkdir()
    (half / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"cut off")
    next(iter(sorted((folder / "checkpoint-00000008.shards").iterdir()))).write_bytes(b"cut off")
    answers = pair.answers(train_here, str(tmp_path), c)
    assert [good for good, _ in answers] == [False, False]
    assert all("expected to read the shards of a checkpoint in" in said for _, said in answers), answers
    assert not half.exists()
    (folder / "checkpoint-00000008.safetensors").unlink()
    pair(train_here, str(tmp_path), c)
    assert len(log_of(tmp_path)) == 7


def lay_out(folder):
    """How many numbers of the weights, their average and their moments lie in this process."""
    loop = Trainer(SplitToy(c := config(parallel="shard")), c, run_of(Path(folder), c), machine(), 0, group())
    loop.update(loop.task.batch(0))
    states = [pieces.local(t).numel() for o in loop.optimizers for s in o.state.values() for t in s.values() if t.ndim]
    return [sum(pieces.local(p).numel() for p in model.parameters()) for model in (loop.model, loop.ema.model)] + [
        sum(states)
    ]


def test_shards_hold_half(pair, tmp_path):
    total = sum(p.numel() for p in SplitToy(config()).model.parameters())
    held = pair(lay_out, str(tmp_path))
    assert [sum(both) for both in zip(*held, strict=True)] == [total, total, 2 * total]
    assert max(held[0][0], held[1][0]) < 0.6 * total


# PowerSGD


def compress(folder, rank):
    c = config(steps=40, powersgd_rank=rank, warmup=3, schedule="constant")
    loop = Trainer(SplitToy(c), c, run_of(Path(folder), c), machine(), 0, group())
    losses = [loop.update(loop.task.batch(step))["loss"].item() for step in range(40)]
    powersgd = loop.strategy.powersgd
    return losses, [p.detach().clone() for p in loop.model.parameters()], powersgd and powersgd.compression_stats()[0]


def test_squeezed_gradients(pair, tmp_path):
    """Fewer numbers travel, both replicas stay the same, the first updates are exact, and it still learns."""
    plain, exact, _ = pair(compress, str(tmp_path), 0)[0]
    (losses, one, rate), (_, two, _) = pair(compress, str(tmp_path), 1)
    assert rate > 1.5
    for ours, theirs in zip(one, two, strict=True):
        assert torch.equal(ours, theirs)
    assert losses[:3] == plain[:3]
    assert losses[6:] != plain[6:]
    assert not all(torch.allclose(a, b) for a, b in zip(one, exact, strict=True))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


# Buffers


class BufferToy(SplitToy):
    """Counts the rows that it saw, as a codebook counts its codes, beside a table that never changes."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.model.register_buffer("table", torch.ones(50))
        self.model.register_buffer("seen", torch.zeros(1))
        self.model.trained_buffers = ("seen",)

    def loss(self, batch, step, generator):
        self.model.seen += batch[1].sum()
        return super().loss(batch, step, generator)


def averaged(folder):
    loop = Trainer(BufferToy(c := config()), c, run_of(Path(folder), c), machine(), 0, group())
    sent, all_reduce = [], dist.all_reduce
    with mock.patch.object(dist, "all_reduce", lambda t, *args: sent.append(t.numel()) or all_reduce(t, *args)):
        loop.strategy.average_buffers()
    loop.update(loop.task.batch(0))
    return sent, loop.model.seen.item(), loop.task.batch(0)[1].sum().item()


def test_only_the_buffers_that_change_are_averaged(pair, tmp_path):
    for sent, seen, total in pair(averaged, str(tmp_path)):
        assert sent == [1]
        assert seen == total / 2


# float16


def scales(folder, parallel, overflow):
    c = config(parallel=parallel)
    loop = Trainer(SplitToy(c), c, run_of(Path(folder), c), machine(torch.float16), 0, group())
    loop._gradients(loop.task.batch(0))
    if overflow:  # in the piece of one process, of one block
        grad = pieces.local(loop.model.blocks[1].inner.weight.grad)
        if parallel == "replicate" or dist.get_rank() == 1:
            grad[-1, -1] = math.inf
    loop.scales.unscale(loop.strategy.overflowed)
    found = {n: None if p.grad is None else pieces.full_tensor(p.grad) for n, p in loop.model.named_parameters()}
    return loop.scales.log2, found


@pytest.mark.parametrize("overflow", [False, True])
def test_a_block_that_overflows_anywhere_is_left_out_everywhere(pair, tmp_path, overflow):
    (log2, plain), _ = pair(scales, str(tmp_path), "replicate", overflow)
    for other, found in pair(scales, str(tmp_path), "shard", overflow):
        assert torch.equal(other, log2)
        assert {n for n, g in found.items() if g is None} == {n for n, g in plain.items() if g is None}
        assert any(g is None for g in found.values()) == overflow
        for name, grad in found.items():
            if grad is not None:
                torch.testing.assert_close(grad, plain[name], rtol=1e-2, atol=1e-3)


def test_scales_of_one_process_agree_with_themselves():
    scales = BlockScales(SplitToy(config()).model)
    scales.unscale()
    assert scales.lost == [0, 0]


# Refusals


def refuse(folder, task, dtype="float32", **settings):
    Trainer(task(c := config(**settings)), c, run_of(Path(folder), c), machine(getattr(torch, dtype)), 0, group())


class LooseToy(SplitToy):
    """A scalar weight, which cannot be cut."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.model.scale = torch.nn.Parameter(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("task", "settings", "said"),
    [
        (ToyTask, {}, "expected one process for a loss that takes the whole batch, found 2 processes"),
        (SplitToy, {"batch_size": 5}, "expected 2 equal parts of batch_size 5, found 2 processes"),
        (SplitToy, {"parallel": "shard", "compile": True}, "expected compile = false"),
        (SplitToy, {"powersgd_rank": 2, "dtype": "float16"}, "expected powersgd_rank = 0 in float16"),
        (LooseToy, {"parallel": "shard"}, 'expected parallel = "replicate" for Toy, whose scale is a scalar'),
    ],
)
def test_what_does_not_go_together(pair, tmp_path, task, settings, said):
    answers = pair.answers(refuse, str(tmp_path), task, **settings)
    assert [good for good, _ in answers] == [False, False]
    assert all(said in line for _, line in answers), answers


def test_settings_that_are_none():
    for settings in ({"parallel": "split"}, {"powersgd_rank": -1}, {"timeout": 0}):
        with pytest.raises(DalleError, match=next(iter(settings))):
            config(**settings)
    with pytest.raises(DalleError, match="powersgd_rank = 0"):
        config(parallel="shard", powersgd_rank=1)
