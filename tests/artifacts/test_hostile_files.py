"""Files of strangers: what is no file, headers out of all bounds, files that change, and texts for a terminal."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_bad, run_cli

from dalle_cli import console
from dalle_cli.artifacts import digest_file, open_artifact, strict_json, write_artifact
from dalle_cli.artifacts.container import MAX_HEADER, MAX_ROWS_HEADER, read_header
from dalle_cli.artifacts.region import Region
from dalle_cli.artifacts.regular import open_regular, read_regular
from dalle_cli.artifacts.weights import load_tensors, save_tensors
from dalle_cli.errors import LONGEST, DalleError
from dalle_cli.hub import bundles
from dalle_cli.pipelines import loading

ESCAPE = "\x1b[2J\x1b]0;title\x07\x9b31m\r\u202e\x00"


@pytest.fixture
def at_once():
    """A test that waits for a pipe is ended."""

    def late(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=["pipe", "socket", "device", "folder", "link to itself", "link to nowhere", "link to a pipe"])
def no_file(request, at_once):
    """A path that is named like a file, in a short folder, as a socket needs."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path, kind = Path(folder) / "a.safetensors", request.param
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(path))
        elif kind == "folder":
            path.mkdir()
        elif kind == "link to a pipe":
            os.mkfifo(Path(folder) / "pipe")
            path.symlink_to("pipe")
        else:
            path.symlink_to({"device": "/dev/zero", "link to itself": path.name, "link to nowhere": "gone"}[kind])
        yield path


def test_what_is_no_file_is_refused_at_once(no_file):
    for read in (read_header, digest_file, open_regular, Region, lambda path: read_regular(path, 100)):
        with pytest.raises((DalleError, OSError)):
            read(no_file)
    assert run_cli("info", no_file).status == 1


def test_a_bundle_with_what_is_no_file(chain, no_file):
    for name in (chain.tokenizer, chain.prior):
        (no_file.parent / name.name).write_bytes(name.read_bytes())
    no_file.rename(no_file.with_suffix(".json"))
    found = bundles.weights(str(no_file.parent), "weights.prior.codes")
    assert bundles.tokenizer(found).name == "tokenizer.json"


def test_no_more_is_read_than_there_may_be(tmp_path):
    (tmp_path / "a").write_bytes(bytes(11))
    assert len(read_regular(tmp_path / "a", 11)) == 11
    with pytest.raises(DalleError, match="at most 10 bytes, found 11"):
        read_regular(tmp_path / "a", 10)


# Headers


def raw_file(path, header, size=0):
    """A file of a header of any bytes, and `size` bytes after it."""
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    return path


def test_a_long_header_is_not_parsed(tmp_path, monkeypatch):
    path = raw_file(tmp_path / "a.safetensors", b'{"a":[' + b"[]," * (MAX_HEADER // 3) + b"0]}")
    monkeypatch.setattr(strict_json, "parse", None)
    with pytest.raises(DalleError, match="a header of 8,388,"):
        read_header(path)
    with open(path, "r+b") as file:  # one that says it is longer than the file
        file.write(struct.pack("<Q", 1 << 60))
    with pytest.raises(DalleError, match="cut short or not safetensors"):
        read_header(path)


def test_headers_of_rows_are_short(tmp_path):
    columns, long = {"codes": np.zeros((1, 2, 2), np.uint16), "ids": ["a"]}, {"x": "y" * MAX_ROWS_HEADER}
    with pytest.raises(DalleError, match="a header of 1,0"):
        read_header(write_artifact(tmp_path / "a.safetensors", "codes", columns, long, []))
    read_header(write_artifact(tmp_path / "w.safetensors", "weights.dvae", {"w": np.zeros(1)}, long, []))


BAD = {
    "NaN": '{"a": NaN}',
    "infinite": '{"a": -Infinity}',
    "too large": '{"a": 1e999}',
    "400 digits": '{"a": %s}' % ("9" * 400),
    "twice": '{"a": 1, "a": 1}',
    "twice inside": '{"b": [{"a": 1, "a": 2}]}',
    "deep": "[" * 100_000,
    "deeper": '{"a":' * 100_000,
    "nested": '{"a": %s}' % ("[" * 40 + "]" * 40),
    "a list": "[]",
    "nothing": "",
    "null": "null",
    "lone": '{"a": "\\ud800"}',
    "NUL": "\0",
}


@pytest.mark.parametrize("name", BAD)
def test_json_that_is_none(tmp_path, name):
    with pytest.raises(ValueError, match=r"."):
        strict_json.parse(BAD[name])
    with pytest.raises(ValueError, match=r"."):
        strict_json.parse(BAD[name].encode("utf-8", "surrogatepass"))
    header = json.dumps({"__metadata__": {"dalle": BAD[name]}}).encode()
    with pytest.raises(DalleError):
        read_header(raw_file(tmp_path / "a.safetensors", header))
    assert strict_json.parse('{"a": [1, -2.5, 18446744073709551615, true, null, "é"]}')["a"][2] == 2**64 - 1


@pytest.mark.parametrize("shape", [(2, 3, 0, 0), (2, 3, 0, 5), (2, 3, 5, 0)])
def test_images_have_sides(tmp_path, shape):
    columns = {"images": np.zeros(shape, np.uint8), "ids": ["a", "b"]}
    path = write_artifact(tmp_path / "a.safetensors", "images", columns, {}, [])
    assert "cannot be empty" in run_bad("show", path, "-o", tmp_path / "x.png")
    empty = {"images": np.zeros((0, 3, 4, 4), np.uint8), "ids": []}
    assert len(open_artifact(write_artifact(tmp_path / "b.safetensors", "images", empty, {}, []))) == 0


@pytest.mark.parametrize("shards", [2.0, "2", True, 1 << 61, -1, None, [2], 0, {}])
def test_shards_are_counted_by_integers(tmp_path, shards):
    for i in range(2):
        columns = {"codes": np.zeros((1, 2, 2), np.uint16), "ids": [str(i)]}
        write_artifact(tmp_path / f"{i:05d}.safetensors", "codes", columns, {"shards": shards}, [])
    with pytest.raises(DalleError, match="expected"):
        open_artifact(tmp_path)


@pytest.mark.parametrize("value", [-1, 1 << 31, True, 2.0, "2", None, [2]], ids=str)
def test_integers_of_a_header_are_bounded(tmp_path, value):
    columns = {"codes": np.zeros((1, 2, 2), np.uint16), "ids": ["a"]}
    found = open_artifact(write_artifact(tmp_path / "a.safetensors", "codes", columns, {"grid": value}, []))
    with pytest.raises(DalleError, match=r"expected grid \(int\)"):
        found.require("grid", int)


# Sizes of models

LIES = [
    ("prior", "conv_kernel", 10**9 + 1),
    ("prior", "n_text", 2**40),
    ("prior", "grid", 2**31),
    ("prior", "n_embd", 2**62),
    ("prior", "n_image_vocab", 2**62),
    ("prior", "n_layer", 2000),
    ("prior", "sketch_width", 2**50),
    ("prior", "n_head", 2**63),
    ("dvae", "image_size", 16 * 10**5),
    ("dvae", "image_size", 2**60),
    ("dvae", "n_hid", 2**60),
    ("dvae", "n_blk_per_group", 10**8),
    ("dvae", "fsq_levels", [2**40, 2**40]),
    ("dvae", "fsq_levels", [3] * 100),
    ("clip", "image_size", 2**40),
    ("clip", "patch_size", 1),
    ("clip", "n_proj", 2**62 - 1),
    ("clip", "text_layers", -3),
    ("clip", "pixel_mean", [0.5]),
    ("clip", "pixel_std", [0.0] * 3),
    ("clip", "pixel_std", [0.1] * 7),
    ("clip", "vision_width", 2**31),
]


@pytest.mark.parametrize(("name", "size", "value"), LIES, ids=lambda value: str(value)[:12])
def test_sizes_that_no_model_has(chain, tmp_path, at_once, name, size, value):
    found = open_artifact(getattr(chain, name))
    config = {**found.config, "model": {**found.config["model"], size: value}}
    path = save_tensors(tmp_path / "lie.safetensors", found.kind, load_tensors(found), config, found.history)
    with pytest.raises(DalleError):
        getattr(loading, name)(open_artifact(path), torch.device("cpu"))


NEW = {
    "dvae": ({"kind": "vqgan"}, ("image_size", "width", "multipliers", "depth", "n_latent", "n_embd", "n_vocab")),
    "prior": (
        {"kind": "encoder_decoder"},
        ("n_layer", "n_head", "n_embd", "n_hid", "n_text_vocab", "n_text", "n_image_vocab", "grid"),
    ),
    "autoencoder": ({"kind": "movq"}, ("image_size", "width", "multipliers", "depth", "n_latent")),
    "decoder": (
        {"kind": "patch"},
        (
            "image_size",
            "n_layer",
            "n_head",
            "n_embd",
            "n_embedding",
            "n_text",
            "n_text_vocab",
            "text_layers",
            "n_timestep",
        ),
    ),
    "embedding_prior": (
        {"kind": "diffusion", "captions": "states"},
        ("n_layer", "n_embd", "n_text", "n_embedding", "text_width", "n_timestep"),
    ),
    "upsampler": (
        {},
        ("image_size", "low_size", "width", "multipliers", "depth", "head_width", "n_timestep", "channels"),
    ),
}


@pytest.mark.parametrize("name", NEW)
def test_sizes_of_the_other_models(tmp_path, at_once, name):
    (base, sizes), kind = NEW[name], {"prior": "weights.prior.codes"}.get(name, f"weights.{name}")
    kind = "weights.prior.embeddings" if name == "embedding_prior" else kind
    for size in sizes:
        for value in (2**31, 10**15, 2**62, [2**40] * 4, [1] * 70):
            config = {"model": {**base, size: value}}
            path = save_tensors(tmp_path / "w.safetensors", kind, {"w": torch.zeros(3)}, config, [])
            with pytest.raises(DalleError):
                getattr(loading, name)(open_artifact(path), torch.device("cpu"))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "U16", "U32", "U64"])
def test_weights_of_a_dtype_that_is_none_of_ours(chain, tmp_path, dtype):
    raw = chain.prior.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + n])
    at, per = 0, {"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}[dtype]
    for name, info in header.items():
        if name != "__metadata__":
            size = per * int(np.prod(info["shape"]))
            header[name] = {"dtype": dtype, "shape": info["shape"], "data_offsets": [at, at + size]}
            at += size
    found = open_artifact(raw_file(tmp_path / "a.safetensors", json.dumps(header).encode(), at))
    for load in (load_tensors, lambda f: loading.prior(f, torch.device("cpu"))):
        with pytest.raises(DalleError, match=f"of {dtype}"):
            load(found)


# Files that change


def codes(path, value, rows=4):
    columns = {"codes": np.full((rows, 2, 2), value, np.uint16), "ids": [f"{i}" for i in range(rows)]}
    return write_artifact(path, "codes", columns, {}, [], force=True)


@pytest.mark.parametrize("how", ["replaced", "written again", "cut", "gone"])
def test_a_file_that_changes_after_it_was_opened(tmp_path, how):
    found = open_artifact(path := codes(tmp_path / "a.safetensors", 1))
    before = found.array("codes")
    if how == "replaced":
        os.replace(codes(tmp_path / "b.safetensors", 2), path)
    elif how == "written again":
        path.write_bytes(codes(tmp_path / "b.safetensors", 2).read_bytes())
        os.utime(path, ns=(0, 1))
    elif how == "cut":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
    with pytest.raises(DalleError, match="expected the file that was opened, found a changed one"):
        _ = found.digest
    if how != "written again":  # which only the digest finds
        with pytest.raises(DalleError, match="found a changed one"):
            found.array("codes")
    if how == "replaced":
        assert before.max() == 1  # the map is of the file that was opened


def test_weights_that_change_after_they_were_opened(chain, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(chain.prior.read_bytes())
    found = open_artifact(path)
    path.unlink()
    path.write_bytes(chain.prior.read_bytes() + b"\0")
    for load in (load_tensors, lambda f: loading.prior(f, torch.device("cpu"))):
        with pytest.raises(DalleError, match="found a changed one"):
            load(found)


# Terminals


def test_messages_are_one_short_printable_line(capsys):
    error = str(DalleError(f"expected this,\nfound {ESCAPE} {'x' * 10_000_000}; mend it"))
    assert error.isprintable()
    assert len(error) <= LONGEST + 10
    assert error.endswith("; mend it")
    assert "\\x1b[2J" in error
    console.error(ESCAPE + "a\nb")
    console.warn(ESCAPE)
    console.emit(f"a\n\tb {ESCAPE} é 👩‍🎨")
    console.emit_json({"a": ESCAPE})
    out, err = capsys.readouterr()
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in (out + err).replace("\n", "").replace("\t", ""))
    assert "a\n\tb " in out
    assert "é 👩‍🎨" in out
    assert json.loads(out.splitlines()[-1])["a"] == ESCAPE


def test_info_of_a_header_full_of_escapes(tmp_path):
    columns = {"codes": np.zeros((1, 2, 2), np.uint16), "ids": ["a"], ESCAPE: np.zeros(1, np.uint8)}
    history = [{"stage": ESCAPE, "options": {ESCAPE: ESCAPE}, "inputs": {"x": ESCAPE}}]
    path = write_artifact(tmp_path / "a.safetensors", "codes", columns, {"encoder": ESCAPE}, history)
    for more in ((), ("--history",), ("--json",)):
        result = run_cli("info", path, *more)
        assert result.status == 0, result
        assert result.stdout.replace("\n", "").replace("\u202e", "").isprintable()


CUT = """
import os, sys
sys.argv = ["dalle", "info", {path!r}]
from dalle_cli import cut_files
cut_files.explain()
{read}
os.truncate({path!r}, 5000)
print({sum})
"""


@pytest.mark.parametrize("how", ["columns", "weights"])
def test_a_file_that_is_cut_while_it_is_mapped(tmp_path, how):
    if how == "columns":
        path = codes(tmp_path / "a.safetensors", 1, rows=100_000)
        read = f"from dalle_cli.artifacts import open_artifact\ncolumn = open_artifact({str(path)!r}).array('codes')"
    else:
        path = save_tensors(tmp_path / "a.safetensors", "weights.dvae", {"w": torch.ones(100_000)}, {}, [])
        read = (
            "import torch\nfrom pathlib import Path\nfrom dalle_cli.artifacts.region import Region\n"
            f"column = Region(Path({str(path)!r})).tensor(0, torch.uint8, (400_000,))"
        )
    code = CUT.format(path=str(path), read=read, sum="column.sum()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done
    assert done.stderr == (
        "dalle: error: expected a file that stays as it is while it is read, found 5,000 bytes left of "
        f"{path}; run again with a whole one\n"
    )
