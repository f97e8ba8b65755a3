"""Bad input through the command line: status 1, one line that says what to do, and nothing lost."""

import io
import json
import shutil
import signal
import struct
import subprocess
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import run_bad, run_cli, run_ok, start, write_pictures
from PIL import Image

from dalle_cli import load
from dalle_cli.artifacts import open_artifact, write_artifact
from dalle_cli.artifacts.weights import load_tensors, save_tensors
from dalle_cli.errors import DalleError

STAGES = ("train-tokenizer", "tokenize", "train-dvae", "train-clip", "encode-images")


def on_data(chain, stage, data, tmp_path):
    """The arguments of a stage that reads a data set."""
    more = {
        "train-tokenizer": (),
        "tokenize": ("-t", chain.tokenizer),
        "train-dvae": (),
        "train-clip": ("-t", chain.tokenizer),
        "encode-images": ("-m", chain.dvae),
    }
    return (stage, data, *more[stage], "--config", chain.recipe, "-o", tmp_path / "out.safetensors")


@pytest.fixture
def model(chain, tmp_path):
    """A copy of the bundle, to be broken."""
    return shutil.copytree(chain.model, tmp_path / "model", ignore=shutil.ignore_patterns("*.run"))


# Data sets


@pytest.mark.parametrize("stage", STAGES)
def test_no_such_data(chain, tmp_path, stage):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.md").write_text("no picture")
    (tmp_path / "a.xyz").write_text("no data set")
    for data in ("none", "none.tar", "{00..03}.tar", "none.jsonl", "empty", "notes", "a.xyz", "x" * 5000, "none\n"):
        assert str(tmp_path) in run_bad(*on_data(chain, stage, tmp_path / data, tmp_path))
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("stage", ["train-tokenizer", "tokenize", "train-clip"])
def test_a_folder_without_captions(chain, tmp_path, stage):
    folder = write_pictures(tmp_path / "pictures")
    for text in folder.glob("*.txt"):
        text.unlink()
    assert "caption" in run_bad(*on_data(chain, stage, folder, tmp_path))
    run_ok(*on_data(chain, "encode-images", folder, tmp_path))


def png(width, height, rows=b"", depth=8, color=2):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def encoded(image, kind, **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def odd_pictures(folder):
    """Name of each odd picture, whether it can be used, and its bytes in a folder of their own."""
    folder.mkdir()
    red = Image.new("RGB", (20, 20), (200, 20, 20))
    deep = Image.fromarray(np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20))
    frames = [Image.new("RGB", (20, 20), (c, 0, 0)) for c in (0, 128, 255)]
    pictures = {
        "truncated.png": (False, encoded(red, "PNG")[:60]),
        "truncated.jpg": (False, encoded(red, "JPEG")[:300]),
        "zero.png": (False, b""),
        "huge.png": (False, png(20_000, 20_000)),
        "text.png": (False, b"this is no picture\n"),
        "tiny.png": (True, encoded(red.resize((1, 1)), "PNG")),
        "wide.png": (True, encoded(red.resize((300, 2)), "PNG")),
        "animated.png": (True, encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])),
        "animated.webp": (True, encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])),
        "cmyk.jpg": (True, encoded(red.convert("CMYK"), "JPEG")),
        "deep.png": (True, encoded(deep, "PNG")),
        "palette.png": (True, encoded(red.convert("P"), "PNG", transparency=0)),
        "alpha.png": (True, encoded(red.convert("LA"), "PNG")),
    }
    for name, (_, data) in pictures.items():
        (folder / name).write_bytes(data)
        (folder / f"{name.replace('.', '-')}.txt").write_text("unused")
    return {name: good for name, (good, _) in pictures.items()}


def test_odd_pictures_never_stop_a_run(chain, tmp_path):
    odd = odd_pictures(tmp_path / "odd")
    names = [name for name in odd if name not in ("truncated.jpg", "animated.webp")]  # ids are without suffix
    for name in set(odd) - set(names):
        (tmp_path / "odd" / name).rename(tmp_path / "odd" / f"2-{name}")
    result = run_cli("encode-images", tmp_path / "odd", "-m", chain.dvae, "-o", tmp_path / "c.safetensors")
    assert result.status == 0
    assert "5 skipped (4 unreadable, 1 oversized)" in result.stderr
    assert "Warning" not in result.stderr
    expected = sorted(f"{'' if name in names else '2-'}{name.rpartition('.')[0]}" for name, good in odd.items() if good)
    assert list(open_artifact(tmp_path / "c.safetensors").strings("ids")) == expected


def test_odd_captions_never_stop_a_run(chain, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    captions = {
        "00": "café".encode("latin-1"),
        "01": b"a\0null",
        "02": b"word " * 10_000,
        "03": b"",
        "04": b" \n\t\n",
        "05": "\ufeff빨간 🟥".encode(),
        "06": b"\0\0",
    }
    for name, data in captions.items():
        (folder / f"{name}.txt").write_bytes(data)
    result = run_cli(*on_data(chain, "tokenize", folder, tmp_path))
    assert result.status == 0
    assert "cut 1 longer than 24 tokens" in result.stderr
    assert "4 skipped (3 without caption, 1 caption is not UTF-8)" in result.stderr
    found = open_artifact(tmp_path / "out.safetensors")
    assert list(found.strings("ids"))[:4] == ["01", "02", "05", "07"]
    assert found.strings("text")[0] == "anull"
    assert found.strings("text")[2] == "빨간 🟥"
    for text in folder.glob("*.txt"):
        text.write_bytes(b"\xe9")
    assert "not UTF-8" in run_bad(*on_data(chain, "tokenize", folder, tmp_path))
    assert len(open_artifact(tmp_path / "out.safetensors")) == 20  # what was there stays


# Artifacts of another kind, broken, or of another model


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
    "decode": ("codes", "captions"),
    "rerank": ("images", "drawn"),
    "show": ("images", "codes"),
    "export": ("images", "prior"),
    "train-prior captions": ("captions", "codes"),
    "train-prior codes": ("codes", "captions"),
    "encode-images": ("weights.dvae", "prior"),
    "sample": ("weights.prior.codes", "dvae"),
    "generate": ("weights.prior.codes", "images"),
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
    good = {"codes": chain.drawn, "images": chain.best, "captions": chain.captions}.get(kind)
    good = good or {"weights.dvae": chain.dvae, "weights.prior.codes": chain.prior}[kind]
    for how in HOW:
        assert str(tmp_path) in fails(broken(good, tmp_path / "broken.safetensors", how))


@pytest.mark.parametrize("how", HOW)
def test_info_on_broken_files(chain, tmp_path, how):
    run_bad("info", broken(chain.captions, tmp_path / "a.safetensors", how))


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
        save_tensors(model / "prior.safetensors", found.kind, load_tensors(found), config, found.history)
        run_bad("sample", "x", "-n", 1, "-m", model, "-o", model / "x.safetensors")
        save_tensors(model / "prior.safetensors", found.kind, load_tensors(found), found.config, found.history)


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
        getattr(load, name)(open_artifact(path), torch.device("cpu"))
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


# Settings


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
    error = run_bad(*on_data(chain, "train-dvae", chain.data, tmp_path), "--set", setting)
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
        *(("tokenize", s) for s in ("tokenizer.length=0", "tokenizer.length=70000")),
        ("train-tokenizer", "tokenizer.vocab_size=10"),
    ],
)
def test_settings_of_other_stages(chain, tmp_path, stage, setting):
    if stage == "train-prior":
        arguments = (stage, chain.captions, chain.codes, "-t", chain.tokenizer, "--config", chain.recipe)
        run_bad(*arguments, "-o", tmp_path / "out.safetensors", "--set", setting)
    else:
        run_bad(*on_data(chain, stage, chain.data, tmp_path), "--set", setting)
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


# Where to write


def test_outputs_that_would_replace_something_else(chain, tmp_path):
    """Refused before the work is done, and what lay there stays."""
    mine = tmp_path / "mine.txt"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    stages = {
        "sample": ("x", "-n", 1, "-m", chain.model),
        "decode": (chain.drawn, "-m", chain.model),
        "rerank": (chain.images, "-m", chain.model),
        "show": (chain.images,),
        "generate": ("x", "-n", 1, "-m", chain.model),
        "tokenize": (chain.data, "-t", chain.tokenizer),
        "encode-images": (chain.data, "-m", chain.dvae),
        "train-tokenizer": (chain.data,),
        "export": (chain.images,),
    }
    for stage, arguments in stages.items():
        for target in (mine, folder):
            mine.write_text("mine")
            run_bad(stage, *arguments, "-o", target)
        run_bad(stage, *arguments, "-o", mine / "below")
    assert mine.read_text() == "mine"
    assert [p.name for p in folder.iterdir()] == ["mine.txt"]
    run_bad("generate", "x", "-n", 1, "-m", chain.model, "-o", tmp_path / "x.png", "--images", mine)
    assert not (tmp_path / "x.png").exists()


def test_a_full_disk(chain, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no leave to mount a small disk")
    try:
        first = run_ok("sample", "x", "-n", 2, "-m", chain.model, "-o", disk / "x.codes.safetensors")
        run_ok("decode", first, "-m", chain.model)
        kept = {p.name: p.read_bytes() for p in disk.iterdir()}
        error = run_bad("sample", "x", "-n", 9000, "--batch-size", 9000, "-m", chain.model, "-o", first)
        assert "o space left" in error
        for stage in ("train-dvae", "train-clip"):
            assert "o space left" in run_bad(*on_data(chain, stage, chain.data, disk))
            shutil.rmtree(disk / "out.run")
        (disk / "fill").write_bytes(bytes(190_000 - sum(map(len, kept.values()))))
        run_bad("export", chain.codes, "-o", disk / "export")
        run_bad("decode", chain.codes, "-m", chain.model, "-o", disk / "images")
        shown = {p.name: p.read_bytes() for p in disk.iterdir() if p.is_file() and p.name != "fill"}
        assert shown == kept
        assert not list(disk.rglob("*.part"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_file_that_may_not_be_read_or_written(chain, tmp_path, monkeypatch):
    def refuse(path, *more, **options):
        if str(path).endswith("secret.toml"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *more, **options)

    import builtins

    original = builtins.open
    (tmp_path / "secret.toml").write_text("")
    monkeypatch.setattr(io, "open", refuse)
    assert "Permission denied" in run_bad(
        "train-dvae", chain.data, "--config", tmp_path / "secret.toml", "-o", tmp_path / "x.safetensors"
    )


# Ctrl-C


def test_control_c_keeps_finished_shards(chain, tmp_path):
    """In a process of its own: 130, no traceback, whole shards, and the same command goes on."""
    data = tmp_path / "many"
    data.mkdir()
    for i in range(1000):
        shutil.copy(chain.data / f"{i % 24:02d}.png", data / f"{i:04d}.png")
    out = tmp_path / "codes"
    arguments = ("encode-images", data, "-m", chain.dvae, "--shard-size", 2, "--batch-size", 1, "-o", out)
    child = start(*arguments)
    while not out.is_dir() or len(list(out.glob("0*.safetensors"))) < 3:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=60)
    assert (child.returncode, stdout) == (130, "")
    assert "Traceback" not in stderr
    assert not list(out.glob(".*"))
    kept = {p.name: p.stat().st_ino for p in out.iterdir()}
    assert 3 <= len(kept) < 500
    run_ok(*arguments)
    assert {name: (out / name).stat().st_ino for name in kept} == kept
    assert len(open_artifact(out)) == 1000


def test_errors_are_one_line_in_a_process_of_its_own(tmp_path):
    child = start("info", tmp_path / "no\nsuch\x1b[31mfile")
    stdout, stderr = child.communicate(timeout=60)
    assert (child.returncode, stdout, len(stderr.splitlines())) == (1, "", 1)


def test_torch_is_left_as_it_was():
    assert torch.get_default_dtype() == torch.float32


def test_json_is_one_object(chain):
    assert set(json.loads(run_ok("info", chain.prior, "--json"))) >= {"kind", "config", "history"}
