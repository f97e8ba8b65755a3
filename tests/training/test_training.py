"""Stages that train: a run that was stopped anywhere ends in the very bytes of one that was not."""

import copy
import itertools
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import run_bad, run_cli, run_ok, write_pictures
from interruptions import Crash, after_update
from stage_runs import TRAINERS, checkpoints, rows, training

from dalle_cli import config as recipes
from dalle_cli import training as training_room
from dalle_cli.artifacts import open_artifact
from dalle_cli.artifacts.weights import load_tensors, save_tensors
from dalle_cli.errors import DalleError
from dalle_cli.models.dvae import DVAE
from dalle_cli.pipelines import loading

# What is written at the end


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", TRAINERS)
def test_weights_are_stored_in_the_dtype_asked_for(chain, tmp_path, name, dtype):
    whole = getattr(chain, name)
    out = run_ok(*training(chain, name, tmp_path / "a.safetensors", "--set", f"{name}.train.save_dtype={dtype}"))
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


@pytest.mark.parametrize("name", TRAINERS)
def test_weights_in_eight_bits_are_each_rows_own_scale_away(chain, tmp_path, name):
    whole = getattr(chain, name)
    out = run_ok(*training(chain, name, tmp_path / "a.safetensors", "--set", f"{name}.train.save_dtype=int8"))
    full, small = load_tensors(open_artifact(whole)), load_tensors(open_artifact(out))
    assert full.keys() == small.keys()
    stored = open_artifact(out).headers[0].tensors
    for key, tensor in full.items():
        if tensor.ndim < 2:
            assert torch.equal(small[key], tensor), key
            continue
        assert stored[key].dtype == "I8"
        for row, near in zip(tensor, small[key], strict=True):
            step = row.abs().max() / 127
            assert (row - near).abs().max() <= 0.501 * step + 1e-30
    assert open_artifact(out).headers[0].n_parameters == open_artifact(whole).headers[0].n_parameters
    assert open_artifact(out).path.stat().st_size < 0.55 * open_artifact(whole).path.stat().st_size
    near, exact = (outputs(name, open_artifact(path)) for path in (out, whole))
    assert not torch.equal(near, exact)
    torch.testing.assert_close(near, exact, rtol=0.1, atol=0.1)


def test_scales_that_fit_nothing_are_refused(chain, tmp_path):
    whole = open_artifact(chain.prior)
    tensors = load_tensors(whole)
    rows = tensors["code.weight"]
    for wrong in (
        {"code.weight": rows.to(torch.int8), "code.weight:scale": torch.ones(3)},
        {"code.weight": rows, "code.weight:scale": torch.ones(len(rows))},
        {"other:scale": torch.ones(2)},
    ):
        path = tmp_path / "wrong.safetensors"
        save_tensors(path, whole.kind, {**tensors, **wrong}, whole.config, whole.history, force=True)
        with pytest.raises(DalleError, match="expected an 8-bit matrix beside its scales"):
            loading.prior(open_artifact(path), torch.device("cpu"))


def outputs(name, weights):
    """What a model makes of a fixed input, in float32 whatever its weights were stored in."""
    model = getattr(loading, name)(weights, torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    if name == "dvae":
        return model.decode(torch.arange(16).view(1, 4, 4))
    if name == "clip":
        return torch.nn.functional.normalize(model.encode_image(torch.linspace(0, 1, 768).view(1, 3, 16, 16)), dim=-1)
    return model(torch.zeros(1, 24, dtype=torch.int64), torch.tensor([3]), torch.arange(16).view(1, 4, 4))[1].detach()


# Stopped anywhere, the same bytes


@pytest.mark.parametrize("name", TRAINERS)
def test_crashed_and_gone_on(chain, tmp_path, name):
    out = tmp_path / f"{name}.safetensors"
    for step in (2, 7, 11):  # before the first checkpoint, between two, and before the end
        with after_update(step), pytest.raises(Crash):
            run_cli(*training(chain, name, out))
        assert not out.exists()
    assert checkpoints(out) == ["checkpoint-00000004.safetensors", "checkpoint-00000008.safetensors"]
    result = run_cli(*training(chain, name, out))
    assert result.status == 0
    assert "resuming from update 8" in result.stderr
    assert out.read_bytes() == getattr(chain, name).read_bytes()
    whole, mine = rows(getattr(chain, name)), rows(out)
    assert [row["step"] for row in mine] == [row["step"] for row in whole]
    for ours, theirs in zip(mine, whole, strict=True):
        assert ours.get("validation") == theirs.get("validation")


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", TRAINERS)
def test_interrupted_and_gone_on(chain, tmp_path, name, sign):
    out = tmp_path / f"{name}.safetensors"
    for step in (3, 6):
        with after_update(step, lambda: os.kill(os.getpid(), sign)):
            result = run_cli(*training(chain, name, out))
        assert (result.status, result.stdout) == (130, "")
        assert f"stopped after update {step}; the same command resumes from here" in result.stderr
    assert run_ok(*training(chain, name, out)) == str(out)
    assert out.read_bytes() == getattr(chain, name).read_bytes()


def test_interrupted_in_the_last_update_the_weights_come_with_the_next_call(chain, tmp_path):
    out = tmp_path / "dvae.safetensors"
    with after_update(12, lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert run_cli(*training(chain, "dvae", out)).status == 130
    assert run_ok(*training(chain, "dvae", out))
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
def test_other_settings_go_on_too(chain, tmp_path, name, settings):
    more = tuple(itertools.chain.from_iterable(("--set", setting) for setting in settings))
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    run_ok(*training(chain, name, whole, *more))
    with after_update(7), pytest.raises(Crash):
        run_cli(*training(chain, name, out, *more))
    run_ok(*training(chain, name, out, *more))
    assert out.read_bytes() == whole.read_bytes()


def test_a_broken_checkpoint_is_passed_over(chain, tmp_path):
    out = tmp_path / "clip.safetensors"
    with after_update(10), pytest.raises(Crash):
        run_cli(*training(chain, "clip", out))
    last = tmp_path / "clip.run/checkpoint-00000008.safetensors"
    last.write_bytes(last.read_bytes()[:-5])
    assert "resuming from update 4" in run_cli(*training(chain, "clip", out)).stderr
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
    result = run_cli(*training(chain, name, out))
    assert (result.status, result.stdout) == (0, f"{out}\n")
    assert "left alone" in result.stderr
    assert out.stat().st_ino == before
    assert out.stat().st_mtime > 1  # as good as new, which Make goes by
    result = run_cli(*training(chain, name, out, "--fresh"))
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
    assert "left alone" in run_cli(*training(chain, "clip", out)).stderr
    out.unlink()
    assert "resuming from update 12" in run_cli(*training(chain, "clip", out)).stderr
    assert out.read_bytes() == chain.clip.read_bytes()
    half = ("--set", "clip.train.save_dtype=bfloat16")
    assert "resuming from update 12" in run_cli(*training(chain, "clip", out, *half)).stderr
    assert {info.dtype for info in open_artifact(out).headers[0].tensors.values()} == {"BF16"}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_config(chain, tmp_path):
    out = copy_run(chain.dvae, tmp_path)
    other = ("--set", "dvae.train.lr=1e-3")
    before = contents(tmp_path)
    refusal = run_bad(*training(chain, "dvae", out, *other))
    assert "found a finished run of another config or other inputs; --fresh starts over" in refusal
    assert contents(tmp_path) == before
    run_ok(*training(chain, "dvae", out, *other, "--fresh"))
    assert out.read_bytes() != chain.dvae.read_bytes()
    run_ok(*training(chain, "dvae", tmp_path / "b.safetensors", *other))
    assert out.read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with after_update(5), pytest.raises(Crash):
        run_cli(*training(chain, "dvae", tmp_path / "c.safetensors"))
    before = checkpoints(tmp_path / "c.safetensors")
    for more in (other, ("--seed", 1)):
        assert "--fresh" in run_bad(*training(chain, "dvae", tmp_path / "c.safetensors", *more))
    assert checkpoints(tmp_path / "c.safetensors") == before
    run_ok(*training(chain, "dvae", tmp_path / "c.safetensors", *other, "--fresh"))
    assert (tmp_path / "c.safetensors").read_bytes() == out.read_bytes()


@pytest.mark.parametrize("schedule", ["trapezoid", "constant", "cosine"])
def test_a_run_is_prolonged_or_cut_short_before_its_rate_comes_down(chain, tmp_path, schedule):
    def command(steps, out):
        more = ("--set", f"clip.train.schedule={schedule}", "--set", f"clip.train.steps={steps}")
        return training(chain, "clip", out, *more)

    for first, then in ((20, 6), (6, 20)):
        out, whole = tmp_path / f"from-{first}.safetensors", tmp_path / f"{then}.safetensors"
        with after_update(5), pytest.raises(Crash):
            run_cli(*command(first, out))
        if schedule == "cosine":
            assert "--fresh" in run_bad(*command(then, out))
            continue
        assert "resuming from update 4" in run_cli(*command(then, out)).stderr
        run_ok(*command(then, whole))
        assert out.read_bytes() == whole.read_bytes()


def test_other_inputs(chain, tmp_path):
    more = write_pictures(tmp_path / "more")
    shutil.copy(more / "00.png", more / "99.png")
    shutil.copy(more / "00.txt", more / "99.txt")
    out = copy_run(chain.dvae, tmp_path)
    command = ("train-dvae", more, "--config", chain.recipe, "--dtype", "float32", "-o", out)
    assert "--fresh" in run_bad(*command)
    assert out.read_bytes() == chain.dvae.read_bytes()
    run_ok(*command, "--fresh")
    assert out.read_bytes() != chain.dvae.read_bytes()


def test_seed_matters_and_workers_do_not(chain, tmp_path):
    out = tmp_path / "dvae.safetensors"
    for workers in (0, 5):
        run_ok(*training(chain, "dvae", out, "--workers", workers, "--fresh"))
        assert out.read_bytes() == chain.dvae.read_bytes()
    run_ok(*training(chain, "dvae", out, "--seed", 1, "--fresh"))
    ours, others = (load_tensors(open_artifact(path)) for path in (out, chain.dvae))
    assert not any(torch.equal(ours[name], others[name]) for name in ours if ours[name].ndim > 1)


def test_nothing_else_is_replaced(chain, tmp_path):
    out = tmp_path / "mine.txt"
    out.write_text("mine")
    for more in ((), ("--fresh",)):
        assert "--force" in run_bad(*training(chain, "dvae", out, *more))
        assert "weights.clip" in run_bad(*training(chain, "dvae", copy_run(chain.clip, tmp_path), *more))
        shutil.rmtree(tmp_path / "clip.run")
        (tmp_path / "folder").mkdir(exist_ok=True)
        assert "folder" in run_bad(*training(chain, "dvae", tmp_path / "folder", *more))
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
    run_ok(*training(chain, name, out, *more))
    losses = [row["loss"] for row in rows(out) if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]


def test_a_loss_that_is_no_number(chain, tmp_path):
    out = tmp_path / "a.safetensors"
    error = run_bad(*training(chain, "dvae", out, "--set", "dvae.train.lr=1e30", "--set", "dvae.train.log_every=1"))
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


def test_temperature_and_beta_are_functions_of_the_update_alone(chain, tmp_path, monkeypatch):
    """None compounds on the one before, and a resumed run goes on where it was: the paper's cosines, in closed form."""
    seen, loss = {}, DVAE.loss

    def spy(self, images, *, temperature, beta, generator):
        seen[len(seen)] = (temperature, beta)
        return loss(self, images, temperature=temperature, beta=beta, generator=generator)

    monkeypatch.setattr(DVAE, "loss", spy)
    settings = ("temperature_steps=8", "beta_steps=5", "beta=6.6", "final_temperature=0.0625", "checkpoint_every=4")
    more = tuple(itertools.chain.from_iterable(("--set", f"dvae.train.{k}") for k in settings))
    with after_update(4, lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert run_cli(*training(chain, "dvae", tmp_path / "a.safetensors", *more)).status == 130
    run_ok(*training(chain, "dvae", tmp_path / "a.safetensors", *more))
    for step in range(12):
        falling = 0.5 * (1 + math.cos(math.pi * min(step / 8, 1)))
        rising = 0.5 * (1 - math.cos(math.pi * min(step / 5, 1)))
        assert seen[step] == pytest.approx((0.0625 + 0.9375 * falling, 6.6 * rising))
    assert len(seen) == 12
    assert seen[7][0] > seen[8][0] == 0.0625  # the floor is reached at its step, not before


@pytest.mark.parametrize("name", TRAINERS)
def test_the_python_functions_write_what_the_commands_write(chain, tmp_path, name, capsys):
    """By a recipe's tables in place of its file; nothing goes to stdout."""
    out, table = tmp_path / f"{name}.safetensors", recipes.read(chain.recipe)
    inputs = {
        "dvae": (chain.data,), "clip": (chain.data, chain.tokenizer), "prior": (chain.captions, chain.codes),
    }[name]  # fmt: skip
    more = {"tokenizer": chain.tokenizer} if name == "prior" else {}
    before = copy.deepcopy(table)
    metrics = getattr(training_room, f"train_{name}")(*inputs, out, config=table, dtype="float32", **more)
    assert out.read_bytes() == getattr(chain, name).read_bytes()
    assert table == before
    assert metrics == rows(out)[-1]["validation"]
    assert capsys.readouterr().out == ""
    with pytest.raises(TypeError, match="no_such_option"):
        getattr(training_room, f"train_{name}")(*inputs, out, no_such_option=1)
