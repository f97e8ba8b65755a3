"""Sampling defaults that weights record: they are used where no option is given."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from artifact_files import array
from conftest import run_bad, run_cli, run_ok
from test_generate_embeddings import KINDS, plant
from test_training import copy_run, training

from dalle_cli.artifacts import open_artifact
from dalle_cli.artifacts.weights import load_tensors, save_tensors

PROMPT = "a red circle on white"
MUCH = 300.0  # of a tiny prior, for which captions mean little


def told(path: Path, out: Path, **settings) -> Path:
    """The weights with these sampling defaults."""
    found = open_artifact(path)
    config = {**found.config, "sampling": {**found.config.get("sampling", {}), **settings}}
    save_tensors(out, found.kind, load_tensors(found), config, found.history, force=True)
    return out


@pytest.fixture
def model(chain, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(chain.model, folder, ignore=shutil.ignore_patterns("*.run"))
    told(folder / "prior.safetensors", folder / "prior.safetensors", guidance=MUCH)
    return folder


def drawn(stage, model, out, column, *more):
    where = ("-o", out) if stage == "sample" else ("-o", out.with_suffix(".png"), "--images", out, "--keep", 0)
    run_ok(stage, PROMPT, "-n", 3, "-m", model, *where, *more)
    return array(out, column), open_artifact(out).history


@pytest.mark.parametrize(("stage", "column"), [("sample", "codes"), ("generate", "images")])
def test_it_is_taken_where_nothing_is_said(chain, model, tmp_path, stage, column):
    own, history = drawn(stage, model, tmp_path / "own", column)
    assert [entry["options"]["guidance"] for entry in history if entry["stage"] == "sample"] == [MUCH]
    said, _ = drawn(stage, chain.model, tmp_path / "said", column, "--guidance", MUCH)
    none, _ = drawn(stage, chain.model, tmp_path / "none", column)
    over, _ = drawn(stage, model, tmp_path / "over", column, "--guidance", 1)
    np.testing.assert_array_equal(own, said)
    np.testing.assert_array_equal(over, none)
    assert not np.array_equal(own, none)


@pytest.mark.parametrize(("stage", "column"), [("sample", "codes"), ("generate", "images")])
def test_the_temperature_is_taken_likewise(chain, model, tmp_path, stage, column):
    told(model / "prior.safetensors", model / "prior.safetensors", guidance=1, temperature=0)
    own, history = drawn(stage, model, tmp_path / "own", column)
    assert [entry["options"]["temperature"] for entry in history if entry["stage"] == "sample"] == [0]
    said, _ = drawn(stage, chain.model, tmp_path / "said", column, "--temperature", 0)
    none, _ = drawn(stage, chain.model, tmp_path / "none", column)
    over, _ = drawn(stage, model, tmp_path / "over", column, "--temperature", 1)
    np.testing.assert_array_equal(own, said)
    np.testing.assert_array_equal(over, none)
    assert not np.array_equal(own, none)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prior_over_embeddings_has_one_too(chain, tmp_path, kind):
    folder = plant(chain, tmp_path / kind, kind)
    none, _ = drawn("sample", folder, tmp_path / "none", "embeddings")
    said, _ = drawn("sample", folder, tmp_path / "said", "embeddings", "--guidance", 3)
    told(folder / "drawer.safetensors", folder / "drawer.safetensors", guidance=3)
    own, history = drawn("sample", folder, tmp_path / "own", "embeddings")
    assert history[-1]["options"]["guidance"] == 3
    np.testing.assert_array_equal(own, said)
    assert not np.array_equal(own, none)


def test_what_was_drawn_is_drawn_again_with_the_guidance_of_then(model, tmp_path):
    codes, _ = drawn("sample", model, tmp_path / "a", "codes", "--guidance", 1)
    run_ok("sample", "--from", tmp_path / "a", "--rows", "1", "-m", model, "-o", tmp_path / "b")
    np.testing.assert_array_equal(array(tmp_path / "b", "codes"), codes[1:2])


@pytest.mark.parametrize("name", ["guidance", "temperature"])
@pytest.mark.parametrize("value", [-1, "much", None, True])
def test_what_is_none_is_said(model, tmp_path, name, value):
    told(model / "prior.safetensors", model / "prior.safetensors", **{name: value})
    error = run_bad("sample", PROMPT, "-m", model, "-o", tmp_path / "a")
    assert f"expected a number of at least 0 for sampling.{name}" in error


def test_training_writes_them_down_and_only_the_weights_follow(chain, tmp_path):
    out = copy_run(chain.prior, tmp_path)
    said = open_artifact(out).config["sampling"]
    assert (said["guidance"], said["temperature"]) == (1, 1)
    settings = ("--set", "prior.train.guidance=4", "--set", "prior.train.temperature=0.5")
    result = run_cli(*training(chain, "prior", out, *settings))
    assert "resuming from update" in result.stderr
    said = open_artifact(out).config["sampling"]
    assert (said["guidance"], said["temperature"]) == (4, 0.5)
    before, after = load_tensors(open_artifact(chain.prior)), load_tensors(open_artifact(out))
    assert all((before[name] == after[name]).all() for name in before)
    for name in ("guidance", "temperature"):
        assert f"expected {name}" in run_bad(*training(chain, "prior", out, "--set", f"prior.train.{name}=-1"))


def test_weights_of_before_the_table_get_one_from_their_last_checkpoint(chain, tmp_path):
    """What was among the training settings is read no more."""
    out = copy_run(chain.prior, tmp_path)
    for path in (out, *(tmp_path / "prior.run").glob("checkpoint-*.safetensors")):
        found = open_artifact(path)
        config = {name: value for name, value in found.config.items() if name != "sampling"}
        config["train"] = {**config["train"], "guidance": 4.0, "temperature": 0.5}
        save_tensors(path, found.kind, load_tensors(found), config, found.history, force=True)
    result = run_cli(*training(chain, "prior", out, "--set", "prior.train.guidance=4"))
    assert "resuming from update" in result.stderr
    made = open_artifact(out).config
    assert (made["sampling"]["guidance"], made["sampling"]["temperature"]) == (4, 1)
    assert made["train"].keys() & {"guidance", "temperature"} == set()


def test_a_fine_tuned_prior_keeps_the_defaults_that_its_recipe_does_not_set(chain, tmp_path):
    begin = told(chain.prior, tmp_path / "begin.safetensors", guidance=4.0, temperature=0.5, top_k=7)
    out, quick = tmp_path / "prior.safetensors", ("--set", "prior.train.steps=1", "--set", "prior.train.lr=0")
    run_ok(*training(chain, "prior", out, "--init", begin, *quick, "--set", "prior.train.guidance=2"))
    made = open_artifact(out).config["sampling"]
    assert made == {"guidance": 2, "temperature": 0.5, "top_k": 7, "sketch_guidance": 1}
    told(begin, begin, steps=5)
    assert "expected guidance, sketch_guidance" in run_bad(*training(chain, "prior", out, "--init", begin, *quick))


def test_a_temperature_of_a_dvae_is_of_its_training(chain, tmp_path):
    """By another one the checkpoints are of another run."""
    out = copy_run(chain.dvae, tmp_path)
    result = run_cli(*training(chain, "dvae", out, "--set", "dvae.train.temperature=0.5"))
    assert "resuming from update" not in result.stderr
