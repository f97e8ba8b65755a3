"""Training: a run that was stopped anywhere ends in the very bytes of one that was not; and the parts of the loop."""

import itertools
import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import run_bad, run_cli, run_ok, write_pictures
from torch import nn

from dalle_cli import load
from dalle_cli.artifacts import open_artifact, write_artifact
from dalle_cli.artifacts.weights import load_tensors, save_tensors
from dalle_cli.data.order import Order
from dalle_cli.data.pairs import Pairs
from dalle_cli.data.split import split
from dalle_cli.errors import DalleError
from dalle_cli.models.dvae import DVAE
from dalle_cli.training.config import TrainConfig
from dalle_cli.training.dvae import DVAETrain
from dalle_cli.training.loop import Trainer, mix
from dalle_cli.training.optim import EMA, optimizers
from dalle_cli.training.schedules import cosine, learning_rate

TRAINERS = ("dvae", "clip", "prior")


def command(chain, name, out, *more):
    """The arguments that train one of the chain's models anew, to `out`."""
    inputs = {
        "dvae": (chain.data,),
        "clip": (chain.data, "-t", chain.tokenizer),
        "prior": (chain.captions, chain.codes, "-t", chain.tokenizer),
    }
    return (f"train-{name}", *inputs[name], "--config", chain.recipe, "--dtype", "float32", "-o", out, *more)


def rows(out):
    """What the run beside `out` wrote down."""
    text = (out.parent / f"{out.stem}.run" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def checkpoints(out):
    return sorted(p.name for p in (out.parent / f"{out.stem}.run").glob("checkpoint-*"))


class Crash(Exception):
    """As if the process were gone."""


def after_update(monkeypatch, step, act):
    """Call `act` once update number `step` is made."""
    original = Trainer.update

    def update(self, batch):
        figures = original(self, batch)
        if self.step == step:
            act()
        return figures

    monkeypatch.setattr(Trainer, "update", update)


def crash():
    raise Crash


# What is written at the end


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", TRAINERS)
def test_weights_are_stored_in_the_dtype_asked_for(chain, tmp_path, name, dtype):
    whole = getattr(chain, name)
    out = run_ok(*command(chain, name, tmp_path / "a.safetensors", "--set", f"{name}.train.save_dtype={dtype}"))
    full, half = load_tensors(open_artifact(whole)), load_tensors(open_artifact(out))
    assert open_artifact(out).config["train"]["save_dtype"] == dtype
    assert open_artifact(whole).config["train"]["save_dtype"] == "float32"
    for key, tensor in full.items():
        expected = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        assert torch.equal(half[key], expected), key
    assert {t.dtype for t in half.values()} == {getattr(torch, dtype)}
    near, exact = (outputs(name, open_artifact(path)) for path in (out, whole))
    assert not torch.equal(near, exact)  # else nothing would have been rounded
    torch.testing.assert_close(near, exact, rtol=0.05, atol=0.05)


def outputs(name, weights):
    """What a model makes of a fixed input, in float32 whatever its weights were stored in."""
    model = getattr(load, name)(weights, torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    if name == "dvae":
        return model.decode(torch.arange(16).view(1, 4, 4))
    if name == "clip":
        return torch.nn.functional.normalize(model.encode_image(torch.linspace(0, 1, 768).view(1, 3, 16, 16)), dim=-1)
    return model(torch.zeros(1, 24, dtype=torch.int64), torch.tensor([3]), torch.arange(16).view(1, 4, 4))[1].detach()


# Stopped anywhere, the same bytes


@pytest.mark.parametrize("name", TRAINERS)
def test_crashed_and_gone_on(chain, tmp_path, monkeypatch, name):
    out = tmp_path / f"{name}.safetensors"
    for step in (2, 7, 11):  # before the first checkpoint, between two, and before the end
        with monkeypatch.context() as patch:
            after_update(patch, step, crash)
            with pytest.raises(Crash):
                run_cli(*command(chain, name, out))
        assert not out.exists()
    assert checkpoints(out) == ["checkpoint-00000004.safetensors", "checkpoint-00000008.safetensors"]
    result = run_cli(*command(chain, name, out))
    assert result.status == 0
    assert "resuming from update 8" in result.stderr
    assert out.read_bytes() == getattr(chain, name).read_bytes()
    whole, mine = rows(getattr(chain, name)), rows(out)
    assert [row["step"] for row in mine] == [row["step"] for row in whole]
    for ours, theirs in zip(mine, whole, strict=True):
        assert ours.get("validation") == theirs.get("validation")


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", TRAINERS)
def test_interrupted_and_gone_on(chain, tmp_path, monkeypatch, name, sign):
    out = tmp_path / f"{name}.safetensors"
    for step in (3, 6):
        with monkeypatch.context() as patch:
            after_update(patch, step, lambda: os.kill(os.getpid(), sign))
            result = run_cli(*command(chain, name, out))
        assert (result.status, result.stdout) == (130, "")
        assert f"stopped after update {step}; the same command goes on from here" in result.stderr
    assert run_ok(*command(chain, name, out)) == str(out)
    assert out.read_bytes() == getattr(chain, name).read_bytes()


def test_interrupted_in_the_last_update_the_weights_come_with_the_next_call(chain, tmp_path, monkeypatch):
    out = tmp_path / "dvae.safetensors"
    with monkeypatch.context() as patch:
        after_update(patch, 12, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run_cli(*command(chain, "dvae", out)).status == 130
    assert run_ok(*command(chain, "dvae", out))
    assert out.read_bytes() == chain.dvae.read_bytes()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dvae", ("dvae.quantizer=vq", "dvae.train.revive_every=5")),
        ("dvae", ("dvae.quantizer=gumbel", "dvae.block=bottleneck", "dvae.likelihood=logit_laplace")),
        ("clip", ("clip.loss=sigmoid",)),
        ("prior", ("prior.train.optimizer=muon", "prior.dropout=0.1")),
    ],
    ids=str,
)
def test_other_settings_go_on_too(chain, tmp_path, monkeypatch, name, settings):
    more = tuple(itertools.chain.from_iterable(("--set", setting) for setting in settings))
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    run_ok(*command(chain, name, whole, *more))
    with monkeypatch.context() as patch:
        after_update(patch, 7, crash)
        with pytest.raises(Crash):
            run_cli(*command(chain, name, out, *more))
    run_ok(*command(chain, name, out, *more))
    assert out.read_bytes() == whole.read_bytes()


def test_a_broken_checkpoint_is_passed_over(chain, tmp_path, monkeypatch):
    out = tmp_path / "clip.safetensors"
    with monkeypatch.context() as patch:
        after_update(patch, 10, crash)
        with pytest.raises(Crash):
            run_cli(*command(chain, "clip", out))
    last = tmp_path / "clip.run/checkpoint-00000008.safetensors"
    last.write_bytes(last.read_bytes()[:-5])
    assert "resuming from update 4" in run_cli(*command(chain, "clip", out)).stderr
    assert out.read_bytes() == chain.clip.read_bytes()


# The same command again


def copy_run(path, tmp_path):
    shutil.copy(path, tmp_path)
    shutil.copytree(path.parent / f"{path.stem}.run", tmp_path / f"{path.stem}.run")
    return tmp_path / path.name


@pytest.mark.parametrize("name", TRAINERS)
def test_finished_weights_are_left_alone(chain, tmp_path, name):
    out = copy_run(getattr(chain, name), tmp_path)
    os.utime(out, (1, 1))
    before = out.stat().st_ino
    result = run_cli(*command(chain, name, out))
    assert (result.status, result.stdout) == (0, f"{out}\n")
    assert "left alone" in result.stderr
    assert out.stat().st_ino == before
    assert out.stat().st_mtime > 1  # as good as new, which Make goes by
    result = run_cli(*command(chain, name, out, "--fresh"))
    assert result.status == 0
    assert out.stat().st_ino != before
    assert out.read_bytes() == getattr(chain, name).read_bytes()


def test_weights_from_before_a_setting_came_count_as_its_default(chain, tmp_path):
    out = copy_run(chain.clip, tmp_path)
    for path in (out, *(tmp_path / "clip.run").glob("checkpoint-*")):
        found = open_artifact(path)
        train = {k: v for k, v in found.config["train"].items() if k != "save_dtype"}
        tensors = load_tensors(found)
        save_tensors(path, found.kind, tensors, {**found.config, "train": train}, found.history)
    assert "left alone" in run_cli(*command(chain, "clip", out)).stderr
    out.unlink()
    assert "resuming from update 12" in run_cli(*command(chain, "clip", out)).stderr
    assert out.read_bytes() == chain.clip.read_bytes()
    half = ("--set", "clip.train.save_dtype=bfloat16")
    assert "starting over" in run_cli(*command(chain, "clip", out, *half)).stderr


def test_another_config(chain, tmp_path, monkeypatch):
    out = copy_run(chain.dvae, tmp_path)
    other = ("--set", "dvae.train.lr=1e-3")
    result = run_cli(*command(chain, "dvae", out, *other))
    assert result.status == 0
    assert "another config or other inputs than last time, so starting over" in result.stderr
    assert out.read_bytes() != chain.dvae.read_bytes()
    run_ok(*command(chain, "dvae", tmp_path / "b.safetensors", *other))
    assert out.read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        after_update(patch, 5, crash)
        with pytest.raises(Crash):
            run_cli(*command(chain, "dvae", tmp_path / "c.safetensors"))
    before = checkpoints(tmp_path / "c.safetensors")
    for more in (other, ("--seed", 1)):
        assert "--fresh" in run_bad(*command(chain, "dvae", tmp_path / "c.safetensors", *more))
    assert checkpoints(tmp_path / "c.safetensors") == before
    run_ok(*command(chain, "dvae", tmp_path / "c.safetensors", *other, "--fresh"))
    assert (tmp_path / "c.safetensors").read_bytes() == out.read_bytes()


def test_other_inputs(chain, tmp_path):
    more = write_pictures(tmp_path / "more")
    shutil.copy(more / "00.png", more / "99.png")
    shutil.copy(more / "00.txt", more / "99.txt")
    out = copy_run(chain.dvae, tmp_path)
    run_ok("train-dvae", more, "--config", chain.recipe, "--dtype", "float32", "-o", out)
    assert out.read_bytes() != chain.dvae.read_bytes()


def test_seed_matters_and_workers_do_not(chain, tmp_path):
    out = tmp_path / "dvae.safetensors"
    for workers in (0, 5):
        run_ok(*command(chain, "dvae", out, "--workers", workers, "--fresh"))
        assert out.read_bytes() == chain.dvae.read_bytes()
    run_ok(*command(chain, "dvae", out, "--seed", 1))
    ours, others = (load_tensors(open_artifact(path)) for path in (out, chain.dvae))
    assert not any(torch.equal(ours[name], others[name]) for name in ours if ours[name].ndim > 1)


def test_nothing_else_is_replaced(chain, tmp_path):
    out = tmp_path / "mine.txt"
    out.write_text("mine")
    for more in ((), ("--fresh",)):
        assert "--force" in run_bad(*command(chain, "dvae", out, *more))
        assert "weights.clip" in run_bad(*command(chain, "dvae", copy_run(chain.clip, tmp_path), *more))
        shutil.rmtree(tmp_path / "clip.run")
        (tmp_path / "folder").mkdir(exist_ok=True)
        assert "folder" in run_bad(*command(chain, "dvae", tmp_path / "folder", *more))
    assert out.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.safetensors", "folder", "mine.txt"]


# What a run writes down


def test_metrics_and_checkpoints(chain):
    for name, figure in (("dvae", "psnr_held_out"), ("clip", "accuracy_held_out"), ("prior", "image_nats")):
        path = getattr(chain, name)
        logged = rows(path)
        assert [row["step"] for row in logged if "loss" in row] == [3, 6, 9, 12]
        assert [row["step"] for row in logged if "validation" in row] == [6, 12]
        assert all(figure in row["validation"] for row in logged if "validation" in row)
        assert all(np.isfinite(row["loss"]) for row in logged if "loss" in row)
        assert checkpoints(path) == ["checkpoint-00000008.safetensors", "checkpoint-00000012.safetensors"]
    assert [p.name for p in sorted((chain.model / "dvae.run/samples").iterdir())] == ["00000006.png", "00000012.png"]


def test_headers_tell_the_config(chain):
    prior = open_artifact(chain.prior)
    assert prior.config["encoder"] == open_artifact(chain.dvae).digest
    assert prior.config["model"]["n_image_vocab"] == 20
    assert prior.config["model"]["grid"] == 4
    assert prior.config["train"]["lr"] == 3e-3
    assert prior.config["tokenizer"] == open_artifact(chain.captions).config["tokenizer"]
    assert open_artifact(chain.clip).config["tokenizer"] == prior.config["tokenizer"]


@pytest.mark.parametrize("name", TRAINERS)
def test_loss_goes_down(chain, tmp_path, name):
    out = tmp_path / "a.safetensors"
    more = itertools.chain.from_iterable(
        ("--set", f"{name}.train.{k}") for k in ("steps=120", "log_every=20", "lr=1e-2")
    )
    run_ok(*command(chain, name, out, *more))
    losses = [row["loss"] for row in rows(out) if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]


def test_a_loss_that_is_no_number(chain, tmp_path):
    out = tmp_path / "a.safetensors"
    error = run_bad(*command(chain, "dvae", out, "--set", "dvae.train.lr=1e30", "--set", "dvae.train.log_every=1"))
    assert "finite loss" in error
    assert not out.exists()
    assert checkpoints(out) == []  # none of a state that is lost


def test_broken_pictures_stand_back(chain, tmp_path):
    mixed = write_pictures(tmp_path / "mixed")
    for i in range(0, 24, 3):
        (mixed / f"{i:02d}.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    for name, more in (("dvae", ()), ("clip", ("-t", chain.tokenizer))):
        out = tmp_path / f"{name}.safetensors"
        result = run_cli(f"train-{name}", mixed, *more, "--config", chain.recipe, "-o", out)
        assert result.status == 0
        assert "8 skipped" in result.stderr
        assert len((tmp_path / f"{name}.skipped.jsonl").read_text().splitlines()) == 8


# Parts


def test_cosine():
    assert [cosine(s, 1.0, 0.0, 4) for s in (0, 2, 4, 9)] == pytest.approx([1, 0.5, 0, 0])
    assert cosine(0, 1.0, 0.2, 0) == 0.2


def test_learning_rates():
    def rates(kind, steps=10, warmup=2):
        return [learning_rate(s, kind, 1.0, 0.1, warmup, steps) for s in range(steps + 1)]

    assert rates("constant") == pytest.approx([0.5, 1] + [1] * 9)
    assert rates("trapezoid") == pytest.approx([0.5] + [1] * 8 + [0.55, 0.1])
    falling = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(9)]
    assert rates("cosine") == pytest.approx([0.5, 1, *falling])
    with pytest.raises(DalleError, match="schedule"):
        learning_rate(0, "linear", 1.0, 0.0, 0, 1)


def test_temperature_and_beta_are_functions_of_the_update_alone(chain, tmp_path, monkeypatch):
    """None compounds on the one before, and a resumed run goes on where it was: the paper's cosines, in closed form."""
    seen, loss = {}, DVAE.loss

    def spy(self, images, *, temperature, beta, generator):
        seen[len(seen)] = (temperature, beta)
        return loss(self, images, temperature=temperature, beta=beta, generator=generator)

    monkeypatch.setattr(DVAE, "loss", spy)
    settings = ("temperature_steps=8", "beta_steps=5", "beta=6.6", "final_temperature=0.0625", "checkpoint_every=4")
    more = tuple(itertools.chain.from_iterable(("--set", f"dvae.train.{k}") for k in settings))
    with monkeypatch.context() as patch:
        after_update(patch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run_cli(*command(chain, "dvae", tmp_path / "a.safetensors", *more)).status == 130
    run_ok(*command(chain, "dvae", tmp_path / "a.safetensors", *more))
    for step in range(12):
        falling = 0.5 * (1 + math.cos(math.pi * min(step / 8, 1)))
        rising = 0.5 * (1 - math.cos(math.pi * min(step / 5, 1)))
        assert seen[step] == pytest.approx((0.0625 + 0.9375 * falling, 6.6 * rising))
    assert len(seen) == 12
    assert seen[7][0] > seen[8][0] == 0.0625  # the floor is reached at its step, not before


def test_the_dvae_learning_rate_comes_down_by_lr_steps():
    assert TrainConfig(steps=7).schedule_steps == 7
    assert DVAETrain().schedule_steps == 1_200_000
    assert DVAETrain(steps=300).schedule_steps == 300


@pytest.mark.parametrize(
    "values",
    [
        *(
            {"steps": 0},
            {"batch_size": 0},
            {"keep": 0},
            {"schedule": "linear"},
            {"ema": 1.0},
            {"validation": 1.0},
            {"save_dtype": "int8"},
        ),
        *({"lr": -1.0}, {"weight_decay": -0.1}, {"warmup": -1}, {"eps": -1.0}, {"clip_norm": -1.0}, {"beta1": 1.0}),
        {"save_dtype": "int8"},
    ],
    ids=str,
)
def test_settings_out_of_range(values):
    with pytest.raises(DalleError, match=next(iter(values))):
        TrainConfig(**values)


def decays(optimizer):
    return {g["weight_decay"]: {id(p) for p in g["params"]} for g in optimizer.param_groups}


def test_weight_decay_is_for_matrices():
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv2d(1, 1, 3))
    (adamw,) = optimizers(model, TrainConfig(weight_decay=0.5))
    assert decays(adamw)[0.5] == {id(model[1].weight), id(model[3].weight)}
    assert len(decays(adamw)[0.0]) == 5


def test_muon_has_the_matrices_of_blocks_and_adamw_the_rest():
    model = nn.ModuleDict(
        {"blocks": nn.ModuleList([nn.Linear(4, 4)]), "head": nn.Linear(4, 9), "token": nn.Embedding(3, 4)}
    )
    adamw, muon = optimizers(model, TrainConfig(optimizer="muon", weight_decay=0.5))
    assert decays(muon) == {0.5: {id(model["blocks"][0].weight)}}
    assert decays(adamw)[0.5] == {id(model["head"].weight)}
    assert sum(map(len, (*decays(adamw).values(), *decays(muon).values()))) == len(list(model.parameters()))


def test_ema_against_its_formula():
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, 0.5)
    value = model.weight.item()
    for count, new in enumerate((1.0, 5.0, -3.0)):
        with torch.no_grad():
            model.weight.fill_(new)
        ema.update(model, count)
        decay = min(0.5, (1 + count) / (10 + count))
        value = decay * value + (1 - decay) * new
        assert ema.model.weight.item() == pytest.approx(value, rel=1e-6)


def test_mix_is_a_function_of_all_its_numbers():
    seeds = {mix(a, b) for a in range(-3, 30) for b in range(-3, 30)}
    assert len(seeds) == 33**2
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (3, 8), (1, 1), (7, 7)])
def test_order(n, batch):
    steps = 3 * n
    order = Order(n, batch, 5)
    epochs, places = map(np.concatenate, zip(*(order.batch(s) for s in range(steps)), strict=True))
    for epoch in range(steps * batch // n):
        assert sorted(places[epochs == epoch]) == list(range(n))
    assert (np.diff(epochs) >= 0).all()
    for step in reversed(range(steps)):  # a batch is a function of its number, whatever was asked for before
        np.testing.assert_array_equal(Order(n, batch, 5).batch(step)[1], order.batch(step)[1])
    if n > 3:
        assert not np.array_equal(order.permutation(0), order.permutation(1))
        assert not np.array_equal(order.permutation(0), Order(n, batch, 6).permutation(0))


def test_an_order_of_nothing():
    with pytest.raises(DalleError, match="none"):
        Order(0, 1, 0)


def test_split_is_by_the_id_alone():
    ids = [f"picture {i}" for i in range(4000)]
    train, held = split(ids, 0.1)
    assert sorted([*train, *held]) == list(range(4000))
    assert 320 < len(held) < 480
    again = split(ids[::-1], 0.1)[1]
    assert {ids[::-1][i] for i in again} == {ids[i] for i in held}
    assert {ids[i] for i in held} <= {ids[i] for i in split(ids, 0.2)[1]}
    assert len(split(ids, 0)[1]) == 0


# Captions and codes joined by id


def artifacts(tmp_path, caption_ids, code_ids, n_vocab=100, grid=1, n_text=1):
    tokens = {
        "tokens": np.arange(len(caption_ids), dtype=np.uint16)[:, None],
        "lengths": np.ones(len(caption_ids), np.uint16),
    }
    captions = write_artifact(
        *(tmp_path / "captions.safetensors", "captions", {**tokens, "ids": caption_ids, "text": caption_ids}),
        *({"n_vocab": n_vocab, "n_text": n_text}, []),
    )
    codes = {"codes": np.arange(len(code_ids), dtype=np.uint16)[:, None, None], "ids": code_ids}
    latents = write_artifact(tmp_path / "codes.safetensors", "codes", codes, {"n_vocab": n_vocab, "grid": grid}, [])
    return open_artifact(captions), open_artifact(latents)


def test_pairs_are_joined_by_id(tmp_path):
    pairs = Pairs(*artifacts(tmp_path, ["b", "a", "b", "x"], ["y", "a", "b", "a", "b", "b"]))
    assert pairs.ids == ["a", "b"]
    assert pairs.unmatched == 2
    seen = set()
    for u, v in itertools.product(np.linspace(0, 0.999, 12), repeat=2):
        captions, latents = pairs.draw(np.array([0, 1]), np.array([[u, v], [u, v]]))
        seen |= {("a", captions[0], latents[0]), ("b", captions[1], latents[1])}
    assert seen == {("a", 1, r) for r in (1, 3)} | {("b", c, r) for c in (0, 2) for r in (2, 4, 5)}
    tokens, lengths = pairs.tokens(np.array([2, 0]))
    assert (tokens.tolist(), lengths.tolist(), tokens.dtype) == ([[2], [0]], [1, 1], np.int64)
    assert pairs.codes(np.array([5])).tolist() == [[[5]]]


@pytest.mark.parametrize("lie", [{"n_vocab": 2}, {"grid": 2}, {"n_text": 3}], ids=str)
def test_rows_that_are_not_what_the_header_says(tmp_path, lie):
    inputs = artifacts(tmp_path, list("abc"), list("abc"), **lie)

    def read():
        pairs = Pairs(*inputs)
        pairs.tokens(np.arange(3))
        pairs.codes(np.arange(3))

    with pytest.raises(DalleError, match="make it again"):
        read()


def test_nothing_in_common(tmp_path):
    with pytest.raises(DalleError, match="no id in common \\('a' and 'b'\\)"):
        Pairs(*artifacts(tmp_path, ["a"], ["b"]))
