"""Settings, recipes, numbers and prompts that are none: one line that says what to do, and nothing is written."""

import numpy as np
import pytest
from conftest import run_bad, run_cli
from stage_runs import reading

from dalle_cli.artifacts import write_artifact


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("dvae.n_hidd=8", "did you mean 'n_hid'"),
        ("dvae.train.setps=8", "did you mean 'steps'"),
        ("dave.n_hid=8", "did you mean 'dvae'"),
        ("data.max_aspekt=2", "did you mean 'max_aspect'"),
        ("dvae.n_hid=wide", "expected int"),
        ("dvae.quantizer=magic", "quantizer"),
        ("dvae.n_vocab=21", "n_vocab"),
        ("dvae.image_size=17", "image_size"),
        ("dvae.train.augment=magic", "augment"),
        ("dvae.train.schedule=magic", "schedule"),
        ("dvae.train.lr=-1", "lr"),
        ("dvae.train.temperature=0", "temperature"),
        ("dvae.train.revive_every=0", "revive_every"),
        ("dvae", "section.key=value"),
        ("dvae.train.validation=0.9999", "samples to train on"),
    ],
)
def test_settings(chain, tmp_path, setting, says):
    error = run_bad(*reading(chain, "train-dvae", chain.data, tmp_path), "--set", setting)
    assert says in error
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize(
    ("stage", "setting"),
    [
        *(
            ("train-clip", f"clip.{name}=0")
            for name in ("image_size", "patch_size", "vision_heads", "n_text", "n_proj")
        ),
        *(("train-clip", s) for s in ("clip.loss=magic", "clip.train.augment=magic", "clip.n_text_vocab=7")),
        *(
            ("train-prior", s)
            for s in ("prior.n_head=3", "prior.conv_kernel=2", "prior.grid=5", "prior.attention=magic")
        ),
        *(
            ("train-prior", s)
            for s in ("prior.train.bpe_dropout=2", "prior.train.caption_dropout=-1", "prior.n_layer=0")
        ),
        ("train-prior", "prior.train.code_noise=2"),
        *(("tokenize", s) for s in ("tokenizer.length=0", "tokenizer.length=70000")),
        ("train-tokenizer", "tokenizer.vocab_size=10"),
    ],
)
def test_settings_of_other_stages(chain, tmp_path, stage, setting):
    if stage == "train-prior":
        arguments = (stage, chain.captions, chain.codes, "-t", chain.tokenizer, "--config", chain.recipe)
        run_bad(*arguments, "-o", tmp_path / "out.safetensors", "--set", setting)
    else:
        run_bad(*reading(chain, stage, chain.data, tmp_path), "--set", setting)
    assert list(tmp_path.iterdir()) == []


def test_recipes_that_are_none(chain, tmp_path):
    for name, text in (("none", None), ("broken", "[dvae"), ("odd", "[dvea]\nn_hid = 8\n"), ("flat", "dvae = 3\n")):
        path = tmp_path / f"{name}.toml"
        if text is not None:
            path.write_text(text)
        run_bad("train-dvae", chain.data, "--config", path, "-o", tmp_path / "out.safetensors")


def test_keep_eight_of_four(chain, tmp_path):
    expected = "expected at least 8 images per prompt to keep 8, found 4"
    assert expected in run_bad("rerank", chain.images, "-m", chain.model, "--keep", 8, "-o", tmp_path / "x.safetensors")
    assert expected in run_bad("generate", "x", "-n", 4, "--keep", 8, "-m", chain.model, "-o", tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [("--temperature", "nan"), ("--guidance", "nan"), ("--guidance", "inf"), ("--top-p", "nan")]
)
def test_numbers_that_are_none(chain, tmp_path, options):
    result = run_cli("sample", "x", "-n", 1, "-m", chain.model, *options, "-o", tmp_path / "x.safetensors")
    assert result.status in (1, 2)
    assert list(tmp_path.iterdir()) == []


def test_prompts_that_are_none(chain, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    for options in ((), ("",), ("  ",), ("--prompts", tmp_path / "none.txt"), ("--prompts", tmp_path / "latin.txt")):
        run_bad("sample", *options, "-m", chain.model, "-o", tmp_path / "x.safetensors")
    run_bad("generate", "--prompts", tmp_path / "empty.txt", "-m", chain.model, "-o", tmp_path / "x.png")
    for stage in (("sample", "caf\udce9"), ("rerank", chain.images, "--prompt", "caf\udce9")):
        assert "UTF-8" in run_bad(*stage, "-m", chain.model, "-o", tmp_path / "x.safetensors")


def test_pictures_without_prompts(chain, tmp_path):
    columns = {"images": np.zeros((2, 3, 16, 16), np.uint8), "ids": ["a", "b"]}
    path = write_artifact(tmp_path / "i.safetensors", "images", columns, {}, [])
    assert "--prompt" in run_bad("rerank", path, "-m", chain.model)
    columns = {"images": np.zeros((0, 3, 16, 16), np.uint8), "ids": [], "text": []}
    none = write_artifact(tmp_path / "none.safetensors", "images", columns, {}, [])
    for arguments in (("rerank", none, "-m", chain.model), ("show", none)):
        assert "found none" in run_bad(*arguments, "-o", tmp_path / "x.safetensors")
