"""Several processes make what one makes. Two of them, on the CPU, joined through a file: no network."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import run_cli, run_ok, write_pictures
from test_training_loop import Crash, assert_equal, rows
from toy_task import SplitToy, ToyTask, config, run_of, train_toy, trainer

from dalle_cli.artifacts import open_artifact
from dalle_cli.artifacts.weights import load_tensors
from dalle_cli.errors import DalleError
from dalle_cli.models.quantizers import VectorQuantizer
from dalle_cli.training import distributed, pieces
from dalle_cli.training.loop import Trainer
from dalle_cli.training.scaling import BlockScales

CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # sums of two halves are not the sum of the whole, bit for bit
WORLD = 2


# Two processes that do what they are told


def work(rank, store, pipe):
    """One of the processes: run functions of this file, and say what came of it."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    while (order := pipe.recv()) is not None:
        name, args, kwargs = order
        try:
            pipe.send((True, globals()[name](*args, **kwargs)))
        except DalleError as error:
            pipe.send((False, str(error)))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


class Pair:
    """Two processes; called with a function of this file, they both run it, and their answers are given."""

    def __init__(self, store):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "test_distributed"])
        self.pipes, self.processes = [], []
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
            pipe.send((function.__name__, args, kwargs))
        answers = [pipe.recv() if pipe.poll(30) else (None, "no answer") for pipe in self.pipes]
        assert not any(good is None for good, _ in answers), "\n".join(str(value) for _, value in answers)
        return answers

    def close(self):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join(10)
            process.kill()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        pair = Pair(tmp_path_factory.mktemp("pair") / "store")
        yield pair
        pair.close()


def train_here(folder, c, task=SplitToy, crash=None, **more):
    """Train the toy in these processes, and break off after an update, if told so."""
    original = Trainer.update

    def update(self, batch):
        figures = original(self, batch)
        if self.step == crash:
            raise Crash
        return figures

    with mock.patch.object(Trainer, "update", update):
        try:
            train_toy(Path(folder), c, task, **more)
        except Crash:
            assert crash


def weights(folder):
    return load_tensors(open_artifact(folder / "toy.safetensors"))


def assert_same_run(ours, theirs, **tolerance):
    assert_equal(weights(ours), weights(theirs), **tolerance)
    both = [[{k: v for k, v in row.items() if k != "validation"} for row in rows(folder)] for folder in (ours, theirs)]
    assert [row.keys() for row in both[0]] == [row.keys() for row in both[1]]
    for one, other in zip(*both, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


# Groups


def facts():
    group = distributed.Group(dist.get_rank(), WORLD)
    seen = []
    x = torch.arange(3.0).view(3, 1) + 10 * group.rank
    x.requires_grad_()
    every = distributed.all_rows(x)
    (every * torch.arange(6.0)[:, None]).sum().backward()
    shared = torch.full((2,), float(group.rank))
    distributed.from_first([shared])
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
        distributed.Group(dist.get_rank(), WORLD).first(broken)
    except OSError as error:
        raise DalleError(error.strerror) from None


def test_a_fault_of_the_first_is_that_of_all(pair):
    assert pair.answers(fail) == [(False, "No space left on device")] * 2


def test_one_process_makes_no_group(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("a group was made"))
    train_toy(tmp_path, config(parallel="shard", powersgd_rank=0))
    assert not dist.is_initialized()
    assert trainer(tmp_path / "b", config(powersgd_rank=2)).spread.__class__ is distributed.Alone


def test_what_is_no_lost_process_keeps_its_traceback():
    assert distributed._lost(RuntimeError("shapes cannot be multiplied")) is None
    for error in (dist.DistBackendError("aborted"), RuntimeError("Application timeout caused pair closure")):
        assert "gone or stuck" in str(distributed._lost(error))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# Replicas and shards, against one process

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
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


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
    assert [row["step"] for row in rows(tmp_path / "run")] == [row["step"] for row in rows(tmp_path / "plain")]


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
    assert all("expected to read the pieces of a checkpoint in" in said for _, said in answers), answers
    assert not half.exists()
    (folder / "checkpoint-00000008.safetensors").unlink()
    pair(train_here, str(tmp_path), c)
    assert len(rows(tmp_path)) == 7


def lay_out(folder):
    """How many numbers of the weights, their average and their moments lie in this process."""
    loop = Trainer(SplitToy(c := config(parallel="shard")), c, run_of(Path(folder), c), machine(), 0, group())
    loop.update(loop.task.batch(0))
    states = [pieces.local(t).numel() for o in loop.optimizers for s in o.state.values() for t in s.values() if t.ndim]
    return [sum(pieces.local(p).numel() for p in model.parameters()) for model in (loop.model, loop.ema.model)] + [
        sum(states)
    ]


def machine(dtype=torch.float32):
    from toy_task import machine

    return machine(dtype)


def group():
    return distributed.Group(dist.get_rank(), WORLD)


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
    powersgd = loop.spread.powersgd
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


# float16


def scales(folder, parallel, overflow):
    c = config(parallel=parallel)
    loop = Trainer(SplitToy(c), c, run_of(Path(folder), c), machine(torch.float16), 0, group())
    loop._gradients(loop.task.batch(0))
    if overflow:  # in the piece of one process, of one block
        grad = pieces.local(loop.model.blocks[1].inner.weight.grad)
        if parallel == "replicate" or dist.get_rank() == 1:
            grad[-1, -1] = math.inf
    loop.scales.unscale(loop.spread.overflowed)
    found = {n: None if p.grad is None else pieces.whole(p.grad) for n, p in loop.model.named_parameters()}
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
        (LooseToy, {"parallel": "shard"}, 'expected parallel = "replicate" for Toy, whose scale is a single number'),
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


# Stages


def stage(*args):
    with mock.patch("dalle_cli.cli.GRACE", 0.0):
        result = run_cli(*args)
    assert "Traceback" not in result.stderr
    return tuple(result)


def stages_agree(pair, arguments, tmp_path, *more, **tolerance):
    """A training stage in one process and in two: the same weights; the first process alone speaks."""
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    run_ok(*arguments, *more, "-o", one)
    results = pair(stage, *map(str, (*arguments, *more)), "-o", str(two))
    assert [status for status, _, _ in results] == [0, 0], results
    assert results[0][1] == f"{two}\n"
    assert results[1][1:] == ("", "")
    # a bias of keys changes nothing but by rounding, of which AdamW makes whole steps
    found = [
        {n: t for n, t in load_tensors(open_artifact(out)).items() if "k_proj.bias" not in n} for out in (two, one)
    ]
    assert_equal(*found, **tolerance)
    logs = [out.with_suffix(".run") / "metrics.jsonl" for out in (one, two)]
    trained = [[row for row in map(json.loads, log.read_text().splitlines()) if "loss" in row] for log in logs]
    assert len(trained[1]) == len(trained[0]) > 3
    for ours, theirs in zip(*trained, strict=True):  # AdamW would hide gradients of another size
        for name in ("loss", "grad_norm", "lr"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
    again = pair(stage, *map(str, (*arguments, *more)), "-o", str(two))
    assert "left alone" in again[0][2]


@pytest.mark.parametrize("name", ["train-prior", "train-dvae", "train-clip"])
def test_stages(pair, chain, tmp_path, name):
    inputs = {
        "train-prior": (chain.captions, chain.codes, "-t", chain.tokenizer),
        "train-dvae": (chain.data,),
        "train-clip": (chain.data, "-t", chain.tokenizer),
    }
    arguments = (name, *inputs[name], "--config", chain.recipe, "--dtype", "float32")
    arguments += ("--set", f"{name.removeprefix('train-')}.train.clip_norm=10.0")
    stages_agree(pair, arguments, tmp_path, rtol=1e-3, atol=1e-4)


def test_the_prior_in_shards(pair, chain, tmp_path):
    arguments = ("train-prior", chain.captions, chain.codes, "-t", chain.tokenizer, "--config", chain.recipe)
    more = ("--dtype", "float32", "--set", "prior.train.parallel=shard", "--set", "prior.train.clip_norm=10.0")
    stages_agree(pair, arguments, tmp_path, *more, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["dvae", "clip"])
def test_no_shards_of_it(pair, chain, tmp_path, name):
    tokenizer = ("-t", str(chain.tokenizer)) if name == "clip" else ()
    arguments = (f"train-{name}", str(chain.data), *tokenizer, "--config", str(chain.recipe))
    results = pair(stage, *arguments, "-o", str(tmp_path / "a"), "--set", f"{name}.train.parallel=shard")
    for status, out, err in results:
        assert (status, out) == (1, "")
        assert err.startswith(f'dalle: error: expected parallel = "replicate" for {name.upper()}, whose ')


def codebook(data, recipe):
    """The codebook and its usage after some updates, of which the first revives every code."""
    from dalle_cli.data.datasets import open_dataset
    from dalle_cli.models.dvae import DVAEConfig
    from dalle_cli.training.dvae import DVAETask, DVAETrain

    sizes = {"image_size": 16, "n_groups": 3, "n_hid": 16, "n_blk_per_group": 1, "n_init": 16}
    c = DVAETrain(steps=4, batch_size=8, lr=1e-3, augment="center", revive_every=2, beta=0.0)
    task = DVAETask(
        DVAEConfig(**sizes, quantizer="vq", n_vocab=12, block="residual"),
        c,
        open_dataset(data, need_captions=False),
        0,
        0,
    )
    loop = Trainer(task, c, run_of(Path(data), c), machine(), 0, group() if dist.is_initialized() else None)
    batches = task.batches(0)
    for _ in range(3):
        loop.update(next(batches))
    assert isinstance(task.model.quantizer, VectorQuantizer)
    return {name: t.clone() for name, t in task.model.quantizer.state_dict().items()}


def test_dead_codes_are_moved_alike(pair, data, recipe):
    one, two = pair(codebook, str(data), str(recipe))
    assert_equal(one, two, rtol=0, atol=0)
    alone = codebook(str(data), str(recipe))
    assert one.keys() == alone.keys()
    assert one["usage"].sum().item() == pytest.approx(alone["usage"].sum().item(), rel=0.2)


def test_pictures_are_encoded_by_shards(pair, chain, tmp_path):
    """The same bytes as one process writes, and the list of what was broken is one."""
    data = write_pictures(tmp_path / "data")
    for number in (2, 17, 21):
        (tmp_path / f"data/broken{number}.png").write_bytes(b"\x89PNG but no more")
    arguments = ("encode-images", data, "-m", chain.dvae, "--shard-size", 4, "--config", chain.recipe)
    run_ok(*arguments, "-o", tmp_path / "one")
    results = pair(stage, *map(str, arguments), "-o", str(tmp_path / "two"))
    assert [status for status, _, _ in results] == [0, 0], results
    assert results[1][1:] == ("", "")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert len(names) > 4
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    lists = [(tmp_path / f"{name}.skipped.jsonl").read_text() for name in ("one", "two")]
    assert lists[0] == lists[1] != ""
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    # one shard is missing, and a killed process has left its list
    (tmp_path / "two" / names[3]).unlink()
    (tmp_path / "two.skipped.jsonl").rename(tmp_path / "two.skipped.1.jsonl")
    results = pair(stage, *map(str, arguments), "-o", str(tmp_path / "two"))
    assert (tmp_path / "two" / names[3]).read_bytes() == (tmp_path / "one" / names[3]).read_bytes()
    assert (tmp_path / "two.skipped.jsonl").read_text() == lists[0]
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


# Processes that end


def launch(chain, out, *sets, steps=400):
    command = ("train-prior", chain.captions, chain.codes, "-t", chain.tokenizer, "--config", chain.recipe)
    settings = (f"steps={steps}", "checkpoint_every=20", "validate_every=400", "log_every=5", *sets)
    more = [part for setting in settings for part in ("--set", f"prior.train.{setting}")]
    launcher = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "dalle_cli",
    )
    return subprocess.Popen(
        [*launcher, *map(str, command), "--dtype", "float32", *more, "-o", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_checkpoint(child, folder, seen=()):
    while not (found := set(folder.glob("checkpoint-*.safetensors")) - set(seen)):
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.02)
    return found


def workers(child):
    """The launcher's processes by rank."""
    ids = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    ranks = {}
    for number in map(int, ids):
        try:
            environ = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has just ended
        ranks |= {int(pair[5:]): number for pair in environ if pair.startswith(b"RANK=")}
    return ranks


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_a_stuck_process_is_waited_for_no_longer_than_told(chain, tmp_path):
    """Nobody sees that a process stands still but those that wait for it."""
    child = launch(chain, tmp_path / "prior.safetensors", "timeout=5")
    wait_for_checkpoint(child, tmp_path / "prior.run")
    stuck = workers(child)[1]
    os.kill(stuck, signal.SIGSTOP)
    while 0 in workers(child):  # the launcher waits for the stuck one, which does not hear its signal
        time.sleep(0.1)
        assert child.poll() is None
    os.kill(stuck, signal.SIGKILL)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode != 0
    lines = ours(stderr)
    assert len(lines) == 1, stderr
    (line,) = lines
    assert "found one gone or stuck" in line


def ours(stderr):
    """Lines that are not the launcher's."""
    return [line for line in stderr.splitlines() if line.startswith("dalle:") or "stopped after" in line]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_a_killed_process_ends_the_run_and_a_signal_stops_all(chain, tmp_path):
    out, folder = tmp_path / "prior.safetensors", tmp_path / "prior.run"
    child = launch(chain, out)
    wait_for_checkpoint(child, folder)
    os.kill(workers(child)[0], signal.SIGKILL)
    began = time.monotonic()
    _, stderr = child.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert child.returncode != 0
    lines = ours(stderr)
    assert len(lines) == 1, stderr
    (line,) = lines
    assert "expected all 2 processes to go on, found one gone or stuck" in line
    assert 'File "' + str(Path(distributed.__file__).parent) not in stderr  # no traceback of ours
    seen = set(folder.glob("checkpoint-*.safetensors"))

    child = launch(chain, out)
    wait_for_checkpoint(child, folder, seen)
    child.send_signal(signal.SIGTERM)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode != 0
    lines = ours(stderr)
    assert len(lines) == 1, stderr
    (line,) = lines
    assert "resuming from update" in stderr
    stopped = int(line.split()[3].rstrip(";"))
    assert sorted(folder.glob("checkpoint-*.safetensors"))[-1].name == f"checkpoint-{stopped:08d}.safetensors"
    logged = [json.loads(row)["step"] for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert logged == sorted(set(logged)) == list(range(5, 5 * (stopped // 5) + 1, 5))
    assert not out.exists()
