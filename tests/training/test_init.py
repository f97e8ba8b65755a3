"""Training that begins with weights that there are, by --init."""

import pytest
import torch
from comparisons import assert_equal
from conftest import run_bad, run_cli, run_ok
from interruptions import Crash, after_update
from stage_runs import TRAINERS, lasting_rows
from stage_runs import training as of_the_chain
from test_decoder_stages import trained, unclip  # noqa: F401 - fixtures
from test_decoder_stages import training as decoder_training
from test_embedding_stages import KINDS as PRIORS
from test_embedding_stages import made  # noqa: F401 - a fixture

from dalle_cli.artifacts import open_artifact
from dalle_cli.artifacts.weights import load_tensors, save_tensors

NAMES = (*TRAINERS, *PRIORS, "decoder", "upsampler_1")


@pytest.fixture(scope="module", params=NAMES)
def stage(request, chain):
    """A section of a recipe, its weights as trained, and the arguments that train them, without --init."""
    name, get = request.param, request.getfixturevalue
    if name in TRAINERS:
        weights = getattr(chain, name)
        return name, weights, lambda out, *more: of_the_chain(chain, name, out, *more)
    if name in PRIORS:
        embedded = get("made")
        section, weights = f"embedding_prior.{name}", embedded.models[name] / "prior.safetensors"
        return section, weights, lambda out, *more: embedded.training(name, out, *more)
    inputs, weights = get("unclip"), get("trained") / f"{name}.safetensors"
    return name, weights, lambda out, *more: decoder_training(inputs, name, out, *more)


def still(section, **more):
    """Settings of one update that moves nothing."""
    settings = {"steps": 1, "lr": 0.0, **more}
    return [part for k, v in settings.items() for part in ("--set", f"{section}.train.{k}={v}")]


def tensors(path):
    return load_tensors(open_artifact(path))


def test_it_begins_with_the_weights(stage, tmp_path):
    section, weights, arguments = stage
    begun, anew = tmp_path / "begun.safetensors", tmp_path / "anew.safetensors"
    run_ok(*arguments(begun, "--init", weights, *still(section)))
    assert_equal(tensors(begun), tensors(weights))
    run_ok(*arguments(anew, "--seed", 1, *still(section)))
    assert any(not torch.equal(t, tensors(weights)[name]) for name, t in tensors(anew).items())
    entry = open_artifact(begun).history[-1]
    assert entry["inputs"]["init"] == open_artifact(weights).digest
    assert open_artifact(weights).history[-1] in open_artifact(begun).history


def test_of_a_bundle_it_takes_what_it_trains(chain, tmp_path):
    out = tmp_path / "clip.safetensors"
    run_ok(*of_the_chain(chain, "clip", out, "--init", chain.model, *still("clip")))
    assert_equal(tensors(out), tensors(chain.clip))


def test_its_sizes_are_those_of_the_weights(chain, tmp_path):
    """No recipe, but what says how to train; dropout is none of the weights' business."""
    out = tmp_path / "prior.safetensors"
    settings = [*still("prior", batch_size=8, validation=0.2), "--set", "prior.dropout=0.2"]
    inputs = (chain.captions, chain.codes, "-t", chain.tokenizer)
    run_ok("train-prior", *inputs, "--init", chain.prior, "-o", out, *settings)
    model = open_artifact(out).config["model"]
    assert model == {**open_artifact(chain.prior).config["model"], "dropout": 0.2}
    assert_equal(tensors(out), tensors(chain.prior))


def test_a_checkpoint_gives_its_average(chain, tmp_path):
    out, begun = tmp_path / "clip.safetensors", tmp_path / "begun.safetensors"
    with after_update(5), pytest.raises(Crash):
        run_cli(*of_the_chain(chain, "clip", out))
    (checkpoint,) = (tmp_path / "clip.run").glob("checkpoint-*")
    run_ok(*of_the_chain(chain, "clip", begun, "--init", checkpoint, *still("clip")))
    average = {k.removeprefix("ema/"): t for k, t in tensors(checkpoint).items() if k.startswith("ema/")}
    assert_equal(tensors(begun), average)
    bad = run_bad(*of_the_chain(chain, "dvae", tmp_path / "dvae.safetensors", "--init", checkpoint))
    assert "expected a checkpoint of train-dvae, found one of train-clip" in bad


def test_broken_off_it_goes_on_as_the_very_same(stage, tmp_path):
    section, weights, arguments = stage
    more = ("--init", weights, *still(section, steps=4, lr=1e-3, checkpoint_every=2, log_every=2))
    cut, whole = tmp_path / "cut.safetensors", tmp_path / "whole.safetensors"
    run_ok(*arguments(whole, *more))
    with after_update(3), pytest.raises(Crash):
        run_cli(*arguments(cut, *more))
    assert "resuming from update 2" in run_cli(*arguments(cut, *more)).stderr
    assert cut.read_bytes() == whole.read_bytes()
    assert lasting_rows(cut) == lasting_rows(whole)
    assert "left alone" in run_cli(*arguments(cut, *more)).stderr
    anew = [part for part in map(str, arguments(cut, *more)) if part not in ("--init", str(weights))]
    assert "found a finished run of another config" in run_bad(*anew)


def test_what_is_refused(chain, tmp_path):
    """One line each, before anything is trained."""
    out = tmp_path / "out.safetensors"

    def refused(name, init, *more):
        message = run_bad(*of_the_chain(chain, name, out, "--init", init, *more))
        assert not out.exists()
        return message

    assert "expected weights.dvae or checkpoint, found weights.clip" in refused("dvae", chain.clip)
    assert refused("dvae", tmp_path / "none").endswith("none; check --init")
    assert refused("dvae", tmp_path).endswith("give --init a folder that holds them")
    found = refused("prior", chain.prior, "--set", "prior.n_layer=3")
    assert "expected prior.n_layer = 2, as the inputs have it, found 3" in found
    (tmp_path / "recipe.toml").write_text("dvae = 5")
    assert "expected a table [dvae]" in refused("dvae", chain.dvae, "--config", tmp_path / "recipe.toml")
    other, config = tmp_path / "other.safetensors", open_artifact(chain.prior).config
    kind, history = "weights.prior.codes", open_artifact(chain.prior).history

    def written(*more, **facts):
        save_tensors(other, kind, tensors(chain.prior), {**config, **facts}, history, force=True)
        return refused("prior", other, *more)

    for name in ("tokenizer", "encoder"):
        assert f"expected inputs made by the {name} of {other} (sha256 " in written(**{name: "0" * 64})
    assert "expected inputs with n_text = 25" in written(model={**config["model"], "n_text": 25})
    for n_layer in (1, 3):
        lies = written("--set", f"prior.n_layer={n_layer}", model={**config["model"], "n_layer": n_layer})
        assert f"expected blocks.{min(n_layer, 2)}." in lies
        assert lies.endswith("give weights of the same model")
