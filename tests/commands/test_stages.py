"""The stages together, on a tiny chain: what each prints and writes down, how they are piped, and all twice."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from artifact_files import array
from conftest import Chain, run_bad, run_cli, run_ok
from PIL import Image

from dalle_cli.artifacts import open_artifact
from dalle_cli.hub import bundles
from dalle_cli.pipelines import loading

PROMPT = "a red circle on white"
CPU = torch.device("cpu")


# Where things are written, and what is said


def test_each_stage_prints_the_path_and_nothing_else(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages = {
        "train-tokenizer": (chain.data, "--set", "tokenizer.vocab_size=260", "-o", "t.json"),
        "tokenize": (chain.data, "-t", chain.tokenizer, "--set", "tokenizer.length=4", "-o", "c.safetensors"),
        "encode-images": (chain.data, "-m", chain.dvae, "-o", "codes"),
        "sample": (PROMPT, "-n", 2, "-m", chain.model),
        "decode": ("a-red-circle-on-white.codes.safetensors", "-m", chain.model),
        "rerank": ("a-red-circle-on-white.images.safetensors", "-m", chain.model, "--keep", 1),
        "show": ("a-red-circle-on-white.best.safetensors",),
        "export": ("a-red-circle-on-white.images.safetensors",),
        "generate": (PROMPT, "-n", 2, "-m", chain.model),
    }
    outputs = ["t.json", "c.safetensors", "codes"]
    outputs += [f"a-red-circle-on-white{end}" for end in (".codes.safetensors", ".images.safetensors")]
    outputs += [f"a-red-circle-on-white{end}" for end in (".best.safetensors", ".png", "", ".png")]
    for (name, arguments), out in zip(stages.items(), outputs, strict=True):
        result = run_cli(name, *arguments)
        assert (result.status, result.stdout) == (0, f"{out}\n"), result.stderr
        assert result.stderr.startswith(f"{out}: ")
        assert "Warning" not in result.stderr
        assert Path(out).exists()
    assert not list(tmp_path.rglob("*.part"))


def test_histories_tell_the_whole_way(chain):
    def stages(path):
        return [entry["stage"] for entry in open_artifact(path).history]

    assert stages(chain.captions) == ["tokenize"]
    assert stages(chain.codes) == ["train-dvae", "encode-images"]
    assert stages(chain.prior) == ["tokenize", "train-dvae", "encode-images", "train-prior"]
    assert stages(chain.best) == [*stages(chain.prior), "sample", "decode", "train-clip", "rerank"]
    text = json.dumps([open_artifact(path).history for path in (chain.prior, chain.best)])
    assert str(chain.root) not in text
    assert str(chain.data) not in text
    last = open_artifact(chain.prior).history[-1]
    assert last["inputs"] == {
        k: open_artifact(p).digest for k, p in (("captions", chain.captions), ("codes", chain.codes))
    }


def test_exit_statuses(chain, tmp_path):
    assert run_cli("--version").status == 0
    assert run_cli("no-such-stage").status == 2
    assert run_cli("sample", "--no-such-option").status == 2
    assert run_cli("sample", PROMPT, "--seed", -1).status == 2
    assert run_cli("sample", PROMPT, "-n", 0, "-m", chain.model).status == 2
    assert run_cli("train-dvae", chain.data).status == 2  # where to?
    assert run_cli("info", tmp_path / "none").status == 1
    shown = run_cli()
    assert (shown.status, "Usage: dalle" in shown.stdout + shown.stderr) == (2, True)


def test_a_bug_keeps_its_traceback(chain, monkeypatch, tmp_path):
    monkeypatch.setattr("dalle_cli.pipelines.codec.Codec.decode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_cli("decode", chain.drawn, "-m", chain.model, "-o", tmp_path / "x.safetensors")


def test_an_interrupt_is_130(chain, monkeypatch, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dalle_cli.pipelines.codec.Codec.decode", stop)
    result = run_cli("decode", chain.drawn, "-m", chain.model, "-o", tmp_path / "x.safetensors")
    assert (result.status, result.stdout) == (130, "")
    assert list(tmp_path.iterdir()) == []


# The line of DESIGN 5


def test_the_piped_line(chain, tmp_path):
    line = 'dalle sample "$PROMPT" -n 4 | dalle decode | dalle rerank --keep 2 | dalle show -o radish.png'
    bin_ = Path(sys.executable).parent
    env = {**os.environ, "DALLE_MODEL": str(chain.model), "PROMPT": PROMPT, "PATH": f"{bin_}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "radish.png\n"), done.stderr
    assert Image.open(tmp_path / "radish.png").format == "PNG"
    stem = "a-red-circle-on-white"
    made = {f"{stem}.{kind}.safetensors" for kind in ("codes", "images", "best")} | {"radish.png"}
    assert {p.name for p in tmp_path.iterdir()} == made
    np.testing.assert_array_equal(array(tmp_path / f"{stem}.codes.safetensors", "codes"), array(chain.drawn, "codes"))


def test_a_path_that_is_no_utf8_goes_through_the_pipe(chain, tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.codes.safetensors")
    shutil.copy(chain.drawn, name)
    command = [sys.executable, "-m", "dalle_cli", "decode", "-m", str(chain.model)]
    env = {**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=os.fsencode(name) + b"\n", env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == os.fsencode(tmp_path) + b"/caf\xe9.images.safetensors\n"


def test_piped_input(chain, tmp_path):
    source = shutil.copy(chain.drawn, tmp_path / "x.codes.safetensors")
    out = run_ok("decode", "-m", chain.model, stdin=f"a note\n{source}\n")
    assert out == str(tmp_path / "x.images.safetensors")
    assert Path(out).read_bytes() == chain.images.read_bytes()
    for pipe in ("", "\n", "\0\0", "x" * 5000, "\udcff\n"):
        run_bad("decode", "-m", chain.model, stdin=pipe)


# The whole


def test_twice_the_same_chain_is_the_same_bytes(chain, data, recipe, tmp_path):
    again = Chain(tmp_path, data, recipe).make()
    names = [p.relative_to(chain.root) for p in chain.artifacts()]
    assert [p.relative_to(tmp_path) for p in again.artifacts()] == names
    assert len(names) == 11
    for name in names:
        assert (tmp_path / name).read_bytes() == (chain.root / name).read_bytes(), name


def test_bfloat16_everywhere(chain, data, recipe, tmp_path):
    more = ("--config", recipe, "--dtype", "bfloat16", "--set")
    run_ok("train-dvae", data, *more, "dvae.train.steps=2", "-o", tmp_path / "dvae.safetensors")
    shutil.copy(chain.tokenizer, tmp_path)
    run_ok("encode-images", data, "-m", tmp_path, "--dtype", "bfloat16", "-o", tmp_path / "codes")
    captions = (chain.captions, tmp_path / "codes")
    run_ok("train-prior", *captions, *more, "prior.train.steps=2", "-o", tmp_path / "prior.safetensors")
    run_ok("train-clip", data, "-t", chain.tokenizer, *more, "clip.train.steps=2", "-o", tmp_path / "clip.safetensors")
    run_ok("generate", PROMPT, "-n", 2, "-m", tmp_path, "--dtype", "bfloat16", "-o", tmp_path / "a.png")
    assert open_artifact(tmp_path / "prior.safetensors").history[-1]["options"]["dtype"] == "bfloat16"


def test_info(chain):
    text = run_ok("info", chain.prior)
    assert "weights of a prior over codes" in text
    assert "model.n_embd = 16" in text
    assert "made by tokenize > train-dvae > encode-images > train-prior" in text
    about = json.loads(run_ok("info", chain.prior, "--json"))
    prior = loading.prior(open_artifact(chain.prior), CPU)
    assert about["parameters"] == sum(t.numel() for t in prior.state_dict().values())
    assert (about["kind"], about["rows"]) == ("weights.prior.codes", None)
    about = json.loads(run_ok("info", chain.codes, "--json"))
    assert (about["rows"], about["shards"]) == (24, 3)
    assert about["tensors"]["codes"] == {"dtype": "U16", "shape": [24, 4, 4]}
    assert about["bytes"] == sum(p.stat().st_size for p in chain.codes.iterdir())
    lines = run_ok("info", chain.best, "--history").splitlines()
    assert [line.split()[0] for line in lines][-2:] == ["train-clip", "rerank"]
    assert "keep=0" in lines[-1]
    assert json.loads(run_ok("info", chain.best, "--history", "--json"))["history"][0]["stage"] == "tokenize"


def test_info_of_a_bundle_tells_of_each_of_its_weights(chain, monkeypatch):
    monkeypatch.setattr(bundles, "SHIPPED", chain.model.parent)
    for name in (chain.model, chain.model.name):
        about = json.loads(run_ok("info", name, "--json"))
        kinds = {"clip.safetensors": "weights.clip", "dvae.safetensors": "weights.dvae"}
        assert {file: about[file]["kind"] for file in about} == {**kinds, "prior.safetensors": "weights.prior.codes"}
        text = run_ok("info", name)
        assert all(about[file]["path"] in text for file in about)
        heads = [line for line in run_ok("info", name, "--history").splitlines() if line.endswith(".safetensors:")]
        assert heads == [f"{about[file]['path']}:" for file in about]


def test_json_is_one_object(chain):
    assert set(json.loads(run_ok("info", chain.prior, "--json"))) >= {"kind", "config", "history"}


def test_torch_is_left_as_it_was(chain):
    """Every stage has run in this process."""
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert torch.get_default_device().type == "cpu"


def test_a_bundle_with_two_of_a_kind_is_asked_about(chain, tmp_path):
    shutil.copytree(chain.model, tmp_path / "model", ignore=shutil.ignore_patterns("*.run"))
    shutil.copy(chain.dvae, tmp_path / "model/other.safetensors")
    error = run_bad("decode", chain.drawn, "-m", tmp_path / "model", "-o", tmp_path / "x.safetensors")
    assert "dvae.safetensors, other.safetensors" in error
    run_ok("decode", chain.drawn, "-m", tmp_path / "model/other.safetensors", "-o", tmp_path / "x.safetensors")


def test_a_prior_in_training_draws_its_captions(chain):
    """The dVAE lies beside the prior, so that each validation leaves a picture, the same for the same weights."""
    sheets = sorted(chain.prior.with_name("prior.run").glob("samples/*.png"))
    assert sheets
    with Image.open(sheets[-1]) as picture:
        assert min(picture.size) > 32
