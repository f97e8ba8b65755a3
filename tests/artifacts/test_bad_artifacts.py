"""Artifacts and models that are broken, lie or do not belong together: one line that names the file, status 1."""

import shutil
import time

import numpy as np
import pytest
import torch
from conftest import run_bad, run_cli, run_ok, start

from dalle_cli.artifacts import open_artifact, write_artifact
from dalle_cli.artifacts.weights import load_tensors, save_tensors
from dalle_cli.errors import DalleError
from dalle_cli.pipelines import loading


@pytest.fixture
def model(chain, tmp_path):
    """A copy of the bundle, to be broken."""
    return shutil.copytree(chain.model, tmp_path / "model", ignore=shutil.ignore_patterns("*.run"))


def takes(chain):
    """Each stage that reads artifacts: its arguments with `None` where the artifact stands."""
    return {
        "decode": (None, "-m", chain.model),
        "rerank": (None, "-m", chain.model),
        "show": (None,),
        "export": (None,),
        "train-prior captions": (None, chain.codes),
        "train-prior codes": (chain.captions, None),
        "encode-images": (chain.data, "-m", None),
        "sample": ("x", "-m", None),
        "generate": ("x", "-m", None),
    }


KINDS = {
    "decode": ("codes or embeddings", "captions"),
    "rerank": ("images", "drawn"),
    "show": ("images", "codes"),
    "export": ("images", "prior"),
    "train-prior captions": ("captions", "codes"),
    "train-prior codes": ("codes or embeddings", "captions"),
    "encode-images": ("weights.dvae or weights.clip", "prior"),
    "sample": ("weights.prior.codes or weights.prior.embeddings", "dvae"),
    "generate": ("weights.prior.codes or weights.prior.embeddings", "images"),
}


def broken(source, target, how):
    """A broken copy of an artifact."""
    data = source.read_bytes()
    changed = {
        "cut short": data[:-3],
        "cut in the header": data[:40],
        "zero bytes": b"",
        "prose": b"this is no artifact\n" * 30,
        "a lying header": data.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1),
        "of another version": data.replace(b'\\"version\\":1', b'\\"version\\":7', 1),
        "of another program": data.replace(b'"dalle":', b'"malle":', 1),
    }[how]
    assert changed != data
    target.write_bytes(changed)
    return target


HOW = (
    "cut short",
    "cut in the header",
    "zero bytes",
    "prose",
    "a lying header",
    "of another version",
    "of another program",
)


@pytest.mark.parametrize("stage", KINDS)
def test_artifacts_that_are_not_what_is_needed(chain, tmp_path, stage):
    def fails(path):
        words = [path if word is None else word for word in takes(chain)[stage]]
        error = run_bad(stage.split()[0], *words, "-o", tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()
        return error

    kind, other = KINDS[stage]
    source = getattr(chain, other)
    assert f"expected {kind}, found {open_artifact(source).kind}" in fails(source)
    assert "no such file" in fails(tmp_path / "none.safetensors")
    (tmp_path / "folder").mkdir(exist_ok=True)
    fails(tmp_path / "folder")
    fails(chain.tokenizer)
    kind = kind.split(" or ")[0]
    good = {"codes": chain.drawn, "images": chain.best, "captions": chain.captions}.get(kind)
    good = good or {"weights.dvae": chain.dvae, "weights.prior.codes": chain.prior}[kind]
    for how in HOW:
        assert str(tmp_path) in fails(broken(good, tmp_path / "broken.safetensors", how))


@pytest.mark.parametrize("how", HOW)
def test_info_on_broken_files(chain, tmp_path, how):
    run_bad("info", broken(chain.captions, tmp_path / "a.safetensors", how))


def test_errors_are_one_line_in_a_process_of_its_own(tmp_path):
    child = start("info", tmp_path / "no\nsuch\x1b[31mfile")
    stdout, stderr = child.communicate(timeout=60)
    assert (child.returncode, stdout, len(stderr.splitlines())) == (1, "", 1)


def test_a_broken_file_in_a_bundle_is_named(chain, model, tmp_path):
    broken(chain.dvae, model / "dvae.safetensors", "cut short")
    error = run_bad("decode", chain.drawn, "-m", model, "-o", tmp_path / "x.safetensors")
    assert "dvae.safetensors" in error
    assert "cut short" in error


def test_models(chain, tmp_path):
    assert "DALLE_MODEL" in run_bad("sample", "x", "-o", tmp_path / "x.safetensors")
    assert "no such file" in run_bad("sample", "x", "-m", "none", "-o", tmp_path / "x.safetensors")
    assert "nowhere" in run_bad("sample", "x", env={"DALLE_MODEL": "nowhere"})
    run_bad("train-dvae", chain.data, "--config", chain.recipe, "--device", "warp", "-o", tmp_path / "x.safetensors")
    run_bad("decode", chain.drawn, "-m", chain.model, "--device", "cpu:x", "-o", tmp_path / "x.safetensors")
    run_bad("decode", chain.drawn, "-m", chain.model, "--dtype", "int4", "-o", tmp_path / "x.safetensors")


def test_codes_of_another_dvae(chain, model, tmp_path):
    save_tensors(  # the same but for one number
        *(model / "dvae.safetensors", "weights.dvae"),
        {name: t + (name == "encoder.input.bias") for name, t in load_tensors(open_artifact(chain.dvae)).items()},
        *(open_artifact(chain.dvae).config, open_artifact(chain.dvae).history),
    )
    assert "expected the dVAE that" in run_bad("decode", chain.drawn, "-m", model, "-o", tmp_path / "x.safetensors")
    error = run_bad("generate", "x", "-n", 1, "-m", model, "-o", tmp_path / "x.png")
    assert "expected the dVAE that" in error
    assert open_artifact(chain.dvae).digest[:12] in error


def test_another_tokenizer(chain, model, tmp_path):
    run_ok("train-tokenizer", chain.data, "--set", "tokenizer.vocab_size=270", "-o", model / "tokenizer.json")
    for arguments in (("sample", "x"), ("generate", "x"), ("rerank", chain.images)):
        error = run_bad(*arguments, "-m", model, "-o", tmp_path / "x.safetensors")
        assert "expected the tokenizer of sha256" in error
        assert str(model / "tokenizer.json") in error
    error = run_bad(
        *("train-prior", chain.captions, chain.codes, "-t", model / "tokenizer.json", "--config", chain.recipe),
        *("-o", tmp_path / "x.safetensors"),
    )
    assert "expected the tokenizer that" in error
    for broken_one in (b"", b"{}", b"\xff", b'{"model": {"type": "BPE"}}'):
        (tmp_path / "t.json").write_bytes(broken_one)
        for arguments in (("tokenize", chain.data), ("train-clip", chain.data)):
            run_bad(*arguments, "-t", tmp_path / "t.json", "-o", tmp_path / "x.safetensors")


def test_captions_and_codes_of_different_pictures(chain, tmp_path):
    found = open_artifact(chain.captions)
    columns = {name: np.asarray(found.array(name)) for name in ("tokens", "lengths")}
    columns |= {"ids": [f"other/{i}" for i in range(len(found))], "text": list(found.strings("text"))}
    path = write_artifact(tmp_path / "c.safetensors", "captions", columns, found.config, found.history)
    arguments = ("-t", chain.tokenizer, "--config", chain.recipe, "-o", tmp_path / "x.safetensors")
    assert "no id in common ('other/0' and '00')" in run_bad("train-prior", path, chain.codes, *arguments)


@pytest.mark.parametrize("kind", ["codes", "captions", "weights.dvae", "weights.prior.codes", "weights.clip"])
@pytest.mark.parametrize("lie", ["nothing", "text", "a list", "zero", "huge"])
def test_headers_without_sense(chain, model, tmp_path, kind, lie):
    """Files that are whole but whose config lacks what is needed, or has it in another type or size."""
    source = {"codes": chain.drawn, "captions": chain.captions}.get(kind) or model / {
        "weights.dvae": "dvae.safetensors",
        "weights.prior.codes": "prior.safetensors",
        "weights.clip": "clip.safetensors",
    }.get(kind, "")
    found = open_artifact(source)
    for key in found.config:
        value = {"text": "seven", "a list": [7], "zero": 0, "huge": 10**15}.get(lie)
        config = {k: v for k, v in {**found.config, key: value}.items() if v is not None}
        if kind.startswith("weights"):
            path = save_tensors(
                model / "changed.safetensors", kind, load_tensors(found), config, found.history, force=True
            )
        else:
            columns = {name: np.asarray(found.array(name)) for name in found.columns}
            columns |= {name: list(found.strings(name)) for name in ("ids", "text")}
            path = write_artifact(tmp_path / "changed.safetensors", kind, columns, config, found.history)
        out = ("-o", tmp_path / "out.safetensors", "--force")
        use = {
            "codes": (
                ("decode", path, "-m", chain.model),
                ("train-prior", chain.captions, path, "-t", chain.tokenizer, "--config", chain.recipe),
            ),
            "captions": (("train-prior", path, chain.codes, "-t", chain.tokenizer, "--config", chain.recipe),),
            "weights.dvae": (("encode-images", chain.data, "-m", path), ("decode", chain.drawn, "-m", path)),
            "weights.prior.codes": (("sample", "x", "-n", 1, "-m", path),),
            "weights.clip": (("rerank", chain.images, "-m", path),),
        }[kind]
        for arguments in use:
            result = run_cli(*arguments, *out)  # fine where this stage has no need of the key; else one line
            assert result.status in (0, 1)
            if result.status == 1:
                assert result.stderr.splitlines()[-1].startswith("dalle: error: expected ")


def test_sizes_of_weights_that_are_not_theirs(chain, model):
    found = open_artifact(model / "prior.safetensors")
    tensors = load_tensors(found)
    for change in (
        {"n_embd": 32},
        {"n_layer": 3},
        {"grid": 5},
        {"n_head": 3},
        {"n_text": 4},
        {"what": 1},
        {"grid": "4"},
    ):
        config = {**found.config, "model": {**found.config["model"], **change}}
        save_tensors(model / "prior.safetensors", found.kind, tensors, config, found.history)
        run_bad("sample", "x", "-n", 1, "-m", model, "-o", model / "x.safetensors")
        save_tensors(model / "prior.safetensors", found.kind, tensors, found.config, found.history)


@pytest.mark.parametrize(
    ("name", "size"),
    [("prior", "n_layer"), ("clip", "vision_layers"), ("clip", "text_layers"), ("dvae", "n_blk_per_group")],
)
def test_a_lie_of_a_billion_layers_is_refused_at_once(chain, tmp_path, name, size):
    found = open_artifact(getattr(chain, name))
    config = {**found.config, "model": {**found.config["model"], size: 10**9}}
    path = save_tensors(tmp_path / "lie.safetensors", found.kind, load_tensors(found), config, found.history)
    began = time.monotonic()
    with pytest.raises(DalleError, match=f"{size} 1000000000 beside [0-9]+ tensors"):
        getattr(loading, name)(open_artifact(path), torch.device("cpu"))
    assert time.monotonic() - began < 2


def test_codes_beyond_the_vocabulary(chain, tmp_path):
    found = open_artifact(chain.drawn)
    for codes in (np.full((1, 4, 4), 20, np.uint16), np.full((1, 4, 4), -1, np.int32), np.zeros((1, 5, 5), np.uint16)):
        columns = {"codes": codes, "ids": ["a"]}
        path = write_artifact(tmp_path / "c.safetensors", "codes", columns, found.config, [])
        run_bad("decode", path, "-m", chain.model, "-o", tmp_path / "x.safetensors")
        columns["ids"] = ["00"]
        write_artifact(path, "codes", columns, found.config, [])
        run_bad(
            *("train-prior", chain.captions, path, "-t", chain.tokenizer, "--config", chain.recipe),
            *("--set", "prior.train.validation=0", "-o", tmp_path / "p.safetensors", "--fresh"),
        )
