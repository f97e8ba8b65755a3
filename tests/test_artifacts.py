"""Artifacts: what is written is read again, shards read as one, and no broken or lying file does harm."""

import contextlib
import errno
import json
import os
import struct
import subprocess
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dalle_cli import artifacts
from dalle_cli.artifacts import ShardWriter, Strings, digest_bytes, history, open_artifact, write_artifact
from dalle_cli.artifacts.artifact import Rows
from dalle_cli.artifacts.container import check_replaceable, read_header, replace_file
from dalle_cli.artifacts.weights import load_into, load_tensors, save_tensors
from dalle_cli.errors import DalleError

ENTRY = {"stage": "test", "options": {"seed": 1}, "inputs": {"x": "ab"}}
CONFIG = {"n_vocab": 9, "grid": 2}


def codes(n, start=0):
    return (np.arange(start * 4, (start + n) * 4).reshape(n, 2, 2) % 9).astype(np.uint16)


def write_codes(path, n=3, start=0, config=CONFIG, entries=(ENTRY,), **more):
    columns = {"codes": codes(n, start), "ids": [f"id {i}" for i in range(start, start + n)], **more}
    return write_artifact(path, "codes", columns, config, entries)


def read_all(path, *kinds):
    found = open_artifact(path, *kinds)
    for name in found.columns:
        np.asarray(found.array(name)).sum()
    for stem in found.headers[0].table.strings:
        if stem in found:
            list(found.strings(stem))


def refused(path, *kinds):
    with pytest.raises(DalleError) as caught:
        read_all(path, *kinds)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("expected ")
    return str(caught.value)


# What is written is read again


def test_round_trip(tmp_path):
    path = write_codes(tmp_path / "a.safetensors", prompt=np.array([0, 0, 1], np.int32), text=["é", "", "빨간 🟥"])
    found = open_artifact(path, "codes", "captions")
    assert (found.kind, len(found), found.config, found.history) == ("codes", 3, CONFIG, [ENTRY])
    assert isinstance(found.array("codes"), np.memmap)
    assert not found.array("codes").flags.writeable
    np.testing.assert_array_equal(found.array("codes"), codes(3))
    assert list(found.strings("text")) == ["é", "", "빨간 🟥"]
    assert found.strings("ids")[-1] == "id 2"
    assert sorted(found.columns) == ["codes", "prompt"]
    assert "text" in found
    assert "codes" in found
    assert "score" not in found
    assert found.digest == digest_bytes(path.read_bytes())


def test_any_safetensors_reader_opens_it(tmp_path):
    path = write_codes(tmp_path / "a.safetensors")
    tensors = load_file(path)
    np.testing.assert_array_equal(tensors["codes"], codes(3))
    assert sorted(tensors) == ["codes", "ids.bytes", "ids.offsets"]


def test_same_content_is_the_same_bytes(tmp_path):
    write_codes(tmp_path / "a.safetensors", config={"grid": 2, "n_vocab": 9}, text=list("xyz"))
    columns = {"text": list("xyz"), "ids": [f"id {i}" for i in range(3)], "codes": codes(3)}
    write_artifact(tmp_path / "b.safetensors", "codes", columns, {"n_vocab": 9, "grid": 2}, [ENTRY])
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_no_rows(tmp_path):
    found = open_artifact(write_codes(tmp_path / "a.safetensors", n=0))
    assert (len(found), found.array("codes").shape, list(found.strings("ids"))) == (0, (0, 2, 2), [])


def test_columns_that_are_views_are_written_as_they_look(tmp_path):
    wide = np.arange(40, dtype=np.uint16).reshape(5, 2, 4)
    columns = {"codes": wide[::2, :, ::2], "ids": ["a", "b", "c"]}
    path = write_artifact(tmp_path / "a.safetensors", "codes", columns, {}, [])
    np.testing.assert_array_equal(open_artifact(path).array("codes"), wide[::2, :, ::2])


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_strings_round_trip(texts):
    column = Strings.pack(texts)
    assert list(column) == texts
    assert column == texts
    assert column[:] == texts
    assert column.take(range(len(texts))[::-1]) == texts[::-1]
    for i in range(-len(texts), len(texts)):
        assert column[i] == texts[i]
    with pytest.raises(IndexError):
        column[len(texts)]


def test_strings_of_half_a_surrogate_pair_are_made_text():
    assert list(Strings.pack(["a\ud800b"])) == ["a?b"]


def test_a_fact_of_the_header(tmp_path):
    found = open_artifact(write_codes(tmp_path / "a.safetensors", config={"grid": 2, "yes": True}))
    assert found.fact("grid", int) == 2
    for name, type_ in (("encoder", str), ("grid", str), ("yes", int)):
        with pytest.raises(DalleError, match=name):
            found.fact(name, type_)


# Shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Rows 0 to 10 in shards of 4, 0, 5 and 2."""
    folder = tmp_path_factory.mktemp("shards") / "codes"
    at = 0
    for i, n in enumerate((4, 0, 5, 2)):
        write_codes(folder / f"{i:05d}.safetensors", n, at, {**CONFIG, "shards": 4})
        at += n
    return folder


INDICES = (
    *(0, 3, 4, 8, 10, -1, -11, np.int64(5)),
    *(slice(None), slice(2, 7), slice(9, 1, -3), slice(-3, None), slice(5, 5)),
    *([3, 4, 3], [-1, 0], [], np.array([10, 2], np.uint8), np.arange(11) % 3 == 0, np.zeros(11, bool)),
)


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_shards_read_as_one(shards, index):
    rows, whole = open_artifact(shards).array("codes"), codes(11)
    expected = whole[np.asarray(index, int) if isinstance(index, list) else index]
    np.testing.assert_array_equal(rows[index], expected)
    assert rows[index].dtype == expected.dtype
    assert rows[index].shape == expected.shape


@pytest.mark.parametrize("index", [11, -12, [0, 11], (0, 1), 1.5, [[0, 1]], [True], "codes"], ids=str)
def test_shards_refuse_what_is_no_row(shards, index):
    with pytest.raises(IndexError):
        open_artifact(shards).array("codes")[index]


def test_shards_are_an_artifact(shards):
    found = open_artifact(shards, "codes")
    assert (len(found), found.config) == (11, CONFIG)
    np.testing.assert_array_equal(np.asarray(found.array("codes")), codes(11))
    np.testing.assert_array_equal(np.array(list(found.array("codes"))), codes(11))
    assert found.array("codes").shape == (11, 2, 2)
    assert np.asarray(found.array("codes"), dtype=np.int64).dtype == np.int64
    ids = found.strings("ids")
    assert [ids[i] for i in (0, 4, -1, -11)] == ["id 0", "id 4", "id 10", "id 0"]
    assert ids[3:6] == ["id 3", "id 4", "id 5"]
    assert list(ids) == [f"id {i}" for i in range(11)]
    for i in (11, -12):
        with pytest.raises(IndexError):
            ids[i]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_rows_index_as_the_whole_does(draw, sizes):
    whole = np.arange(2 * sum(sizes)).reshape(-1, 2)
    rows = Rows(np.split(whole, np.cumsum(sizes)[:-1]))
    n = len(whole)
    bounds = st.none() | st.integers(-9, 9)
    choices = st.builds(slice, bounds, bounds, st.none() | st.integers(-3, 3).filter(bool))
    if n:
        choices |= st.integers(-n, n - 1) | st.lists(st.integers(-n, n - 1), min_size=1).map(np.array)
    index = draw.draw(choices)
    np.testing.assert_array_equal(rows[index], whole[index])


def test_digest_of_shards_is_of_all_of_them(shards, tmp_path):
    write_codes(tmp_path / "00000.safetensors", 4, 0, {**CONFIG, "shards": 1})
    assert open_artifact(tmp_path).digest != open_artifact(tmp_path / "00000.safetensors").digest
    assert open_artifact(shards).digest == open_artifact(shards).digest != open_artifact(tmp_path).digest


def test_incomplete_or_mixed_shards(tmp_path):
    def fill(name, configs, columns=({},) * 9):
        for i, config in enumerate(configs):
            if config is not None:
                write_codes(tmp_path / name / f"{i:05d}.safetensors", 2, 2 * i, config, **columns[i])
        return refused(tmp_path / name)

    def of(n, **more):
        return {**CONFIG, "shards": n, **more}

    assert "expected 3 shards, found 2" in fill("last missing", [of(3), of(3)])
    assert "expected 3 shards, found 2" in fill("first missing", [None, of(3), of(3)])
    assert "expected 2 shards, found 3" in fill("too many", [of(2)] * 3)
    assert "from another" in fill("of two configs", [of(2), of(2, grid=3)])
    assert "other columns" in fill("of two layouts", [of(2), of(2)], [{}, {"text": ["a", "b"]}])
    for lie in ("2", 1.0, -1, None, [1], True):
        fill(f"lying {lie!r}", [of(lie)] * 2)
    (tmp_path / "empty").mkdir()
    assert "folder without shards" in refused(tmp_path / "empty")


def test_shard_writer(tmp_path):
    def writer(rows=5, size=2, out="codes", **config):
        return ShardWriter(tmp_path / out, "codes", rows, size, {**CONFIG, **config}, [ENTRY])

    def fill(w):
        made = list(w.missing())
        for i in made:
            start, stop = w.bounds(i)
            w.write(i, {"codes": codes(stop - start, start), "ids": [str(r) for r in range(start, stop)]})
        return made

    assert fill(writer()) == [0, 1, 2]
    whole = open_artifact(tmp_path / "codes")
    np.testing.assert_array_equal(np.asarray(whole.array("codes")), codes(5))
    digest = whole.digest
    assert fill(writer()) == []
    (tmp_path / "codes/00000.safetensors").unlink()
    (tmp_path / "codes/.00001.safetensors.0123abcd.part").write_bytes(b"cut off")
    assert fill(writer()) == [0]
    assert open_artifact(tmp_path / "codes").digest == digest
    assert not list((tmp_path / "codes").glob(".*"))
    assert fill(writer(seed=1)) == [0, 1, 2]  # other options: nothing of the old stays
    assert fill(writer(rows=3, seed=1)) == [0, 1]
    assert len(open_artifact(tmp_path / "codes")) == 3
    cut = tmp_path / "codes/00001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(DalleError, match="something else"):
        writer(rows=3, seed=1)
    assert fill(writer(rows=0, out="none")) == [0]
    assert len(open_artifact(tmp_path / "none")) == 0
    assert fill(writer(out="one.safetensors")) == [0]
    assert len(open_artifact(tmp_path / "one.safetensors")) == 5
    with pytest.raises(DalleError, match="shards"):
        writer(rows=10**6, size=1)


def test_shards_killed_in_the_first_go_on(tmp_path):
    out = tmp_path / "codes"
    out.mkdir()
    (out / ".00000.safetensors.0123abcd.part").write_bytes(b"cut off")
    writer = ShardWriter(out, "codes", 1, 1, {}, [])
    assert list(writer.missing()) == [0]
    assert list(out.iterdir()) == []


# History and digests


def test_history_holds_each_stage_once(tmp_path):
    first = history("tokenize", {"length": 8}, dataset="d1")
    a = open_artifact(write_codes(tmp_path / "a.safetensors", entries=first))
    second = history("train", {}, dataset="d1", model=a)
    b = open_artifact(write_codes(tmp_path / "b.safetensors", entries=second))
    both = history("sample", {"seed": 0}, one=a, two=b)
    assert [entry["stage"] for entry in both] == ["tokenize", "train", "sample"]
    assert both[-1] == {"stage": "sample", "options": {"seed": 0}, "inputs": {"one": a.digest, "two": b.digest}}
    assert second[-1]["inputs"] == {"dataset": "d1", "model": a.digest}


# Weights


def test_weights_round_trip(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.randn(2).bfloat16(), "s": torch.tensor(1.5), "e": torch.zeros(0, 3)}
    path = save_tensors(tmp_path / "w.safetensors", "weights.dvae", tensors, {"model": {}}, [])
    found = open_artifact(path, "weights.dvae")
    assert len(found) == 0
    for name, tensor in load_tensors(found).items():
        assert tensor.dtype == tensors[name].dtype
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=0)
    with pytest.raises(DalleError, match="BF16"):
        found.array("b")


def test_weights_that_are_not_those_of_the_model(tmp_path):
    def load(**state):
        path = save_tensors(tmp_path / "w.safetensors", "weights.dvae", state, {}, [])
        module = torch.nn.Linear(2, 3)
        load_into(module, open_artifact(path))
        return module

    weight, bias = torch.ones(3, 2), torch.ones(3)
    torch.testing.assert_close(load(weight=weight.bfloat16(), bias=bias).weight, weight)
    for state in (
        {"weight": weight},
        {"weight": weight, "bias": bias, "more": bias + 1},
        {"weight": weight.T, "bias": bias},
    ):
        with pytest.raises(DalleError, match="expected the weights"):
            load(**state)


# Reading does not read more than it must


def sparse(path, size=1 << 30, kind="weights.prior.codes"):
    """A weights file of one tensor of zeros that takes no room on the disk."""
    meta = {"kind": kind, "version": 1, "config": {}, "history": []}
    head = {
        "__metadata__": {"dalle": json.dumps(meta)},
        "w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
    }
    raw = json.dumps(head).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + size)
    return path


def test_a_large_file_is_opened_without_reading_it(tmp_path):
    path = sparse(tmp_path / "large.safetensors")
    began = time.perf_counter()
    tracemalloc.start()
    found = open_artifact(path)
    tensor = found.array("w")
    assert tensor[1 << 29] == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    print(f"1 GB opened in {1000 * (time.perf_counter() - began):.1f} ms")


# Writing is all or nothing


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = write_codes(tmp_path / "a.safetensors")
    before = path.read_bytes()

    def full(part):
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    def stopped(part):
        part.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(DalleError, match=r"No space left on device; nothing was changed"):
        replace_file(path, full)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, stopped)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no leave to mount a small disk")
    try:
        path = write_codes(disk / "a.safetensors")
        before = path.read_bytes()
        with pytest.raises(DalleError, match=r"[Nn]o space left"):
            write_codes(path, n=20_000)
        with pytest.raises(DalleError, match=r"[Nn]o space left"):
            save_tensors(disk / "w.safetensors", "weights.dvae", {"w": torch.zeros(50_000)}, {}, [])
        assert path.read_bytes() == before
        assert [p.name for p in disk.iterdir()] == ["a.safetensors"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file/a.safetensors", tmp_path / ("x" * 300) / "a.safetensors"):
        with pytest.raises(DalleError, match="nothing was changed"):
            replace_file(path, lambda part: part.write_bytes(b""))


def test_only_an_artifact_of_the_kind_is_replaced(tmp_path):
    path = write_codes(tmp_path / "a.safetensors")
    write_codes(path, n=1)
    other = tmp_path / "note.txt"
    other.write_text("mine")
    columns = {"images": np.zeros((1, 3, 2, 2), np.uint8), "ids": ["a"]}
    for target in (path, other):
        with pytest.raises(DalleError, match="--force"):
            write_artifact(target, "images", columns, {}, [])
    assert other.read_text() == "mine"
    write_artifact(path, "images", columns, {}, [], force=True)
    assert open_artifact(path).kind == "images"
    with pytest.raises(DalleError, match="folder"):
        write_artifact(tmp_path, "images", columns, {}, [], force=True)


def test_shards_do_not_replace_other_things(tmp_path):
    def writer(out, kind="codes", force=False):
        return ShardWriter(out, kind, 1, 1, {}, [], force)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/note.txt").write_text("mine")
    with pytest.raises(DalleError, match=r"note\.txt"):
        writer(tmp_path / "mine")
    writer(tmp_path / "mine", force=True)
    write_codes(tmp_path / "codes/00000.safetensors")
    writer(tmp_path / "codes")
    with pytest.raises(DalleError, match="found codes"):
        writer(tmp_path / "codes", "images")
    with pytest.raises(DalleError, match="folder for shards, found a file"):
        writer(tmp_path / "mine/note.txt", force=True)
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(DalleError, match="found a folder"):
        writer(tmp_path / "x.safetensors")


def test_wrong_kinds(tmp_path):
    path = write_codes(tmp_path / "a.safetensors")
    assert "expected images or captions, found codes" in refused(path, "images", "captions")
    check_replaceable(path, "codes")


# Broken and malicious files


META = {"kind": "codes", "version": 1, "config": {}, "history": []}
SPEC = {  # name: dtype, shape, offsets
    "codes": ("U16", [2, 2, 2], [0, 16]),
    "ids.bytes": ("U8", [2], [16, 18]),
    "ids.offsets": ("I64", [3], [18, 42]),
}
BODY = codes(2).tobytes() + b"ab" + np.array([0, 1, 2], np.int64).tobytes()


def raw_file(header, body=BODY, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def header(meta=META, tensors=SPEC, **changes):
    """The header of a good file, with some entries changed; None leaves one out."""
    entries = {n: {"dtype": d, "shape": s, "data_offsets": o} for n, (d, s, o) in tensors.items()}
    entries |= {"__metadata__": {"dalle": meta if isinstance(meta, str) else json.dumps(meta)}}
    return {
        k: v
        for k, v in {**entries, **{k.replace("_dot_", "."): v for k, v in changes.items()}}.items()
        if v is not None
    }


def entry(dtype="U16", shape=(2, 2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": offsets}


def offsets(*values):
    return codes(2).tobytes() + b"ab" + np.array(values, np.int64).tobytes()


def meta(**changes):
    return {k: v for k, v in {**META, **changes}.items() if v is not None}


GOOD = raw_file(header())
DEEP = "[" * 100_000 + "]" * 100_000
HUGE = 2**63

BROKEN = {
    "zero bytes": b"",
    "seven bytes": b"1234567",
    "no header": GOOD[:8],
    "half a header": GOOD[:100],
    "a byte less": GOOD[:-1],
    "a byte more": GOOD + b"\0",
    "text": b"this is not an artifact at all, it is prose\n" * 9,
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "header length 0": raw_file(header(), length=0),
    "header length beyond the end": raw_file(header(), length=10_000),
    "header length 2**64 - 1": raw_file(header(), length=2**64 - 1),
    "header length too short": raw_file(header(), length=50),
    "header is no JSON": raw_file(b"x" * 64),
    "header is a list": raw_file(b"[]"),
    "header is not UTF-8": raw_file(b'{"\xff": 1}'),
    "header is deep": raw_file(DEEP.encode()),
    "header is NaN": raw_file(b"NaN"),
    "number of 5000 digits": raw_file(b'{"a": ' + b"9" * 5000 + b"}"),
    "a key twice": raw_file(json.dumps(header()).replace('"ids.bytes"', '"codes"', 1).encode()),
    "metadata twice": raw_file((json.dumps(header())[:-1] + ', "__metadata__": {}}').encode()),
    "half a surrogate pair": raw_file(json.dumps(header(meta(kind="codes", config={"a": "\ud800"}))).encode()),
    "no metadata": raw_file(header(__metadata__=None)),
    "metadata is a list": raw_file(header(__metadata__=[])),
    "metadata of another program": raw_file(header(__metadata__={"format": "pt"})),
    "metadata is an object": raw_file(header(__metadata__={"dalle": META})),
    "metadata is no JSON": raw_file(header("kind: codes")),
    "metadata is a number": raw_file(header("3")),
    "metadata is deep": raw_file(header('{"kind":"codes","version":1,"config":{"a":' + DEEP + "}}")),
    "metadata is rather deep": raw_file(
        header('{"kind":"codes","version":1,"config":{"a":' + "[" * 200 + "]" * 200 + "}}")
    ),
    "a key of metadata twice": raw_file(header('{"kind":"codes","kind":"images","version":1}')),
    "no kind": raw_file(header(meta(kind=None))),
    "kind is a number": raw_file(header(meta(kind=3))),
    "unknown kind": raw_file(header(meta(kind="sculptures"))),
    "no version": raw_file(header(meta(version=None))),
    "version too new": raw_file(header(meta(version=99))),
    "version is text": raw_file(header(meta(version="1"))),
    "version is true": raw_file(header(meta(version=True))),
    "version is negative": raw_file(header(meta(version=-1))),
    "config is a list": raw_file(header(meta(config=[1]))),
    "history is an object": raw_file(header(meta(history={"a": 1}))),
    "history of numbers": raw_file(header(meta(history=[1, 2]))),
    "history without stages": raw_file(header(meta(history=[{}]))),
    "history whose options are a list": raw_file(header(meta(history=[{**ENTRY, "options": []}]))),
    "history whose inputs are numbers": raw_file(header(meta(history=[{**ENTRY, "inputs": {"a": 1}}]))),
    "tensor is a number": raw_file(header(codes=3)),
    "tensor without dtype": raw_file(header(codes={"shape": [2, 2, 2], "data_offsets": [0, 16]})),
    "unknown dtype": raw_file(header(codes=entry("U17"))),
    "dtype is a list": raw_file(header(codes=entry(["U16"]))),
    "dtype is an object": raw_file(header(codes=entry({}))),
    "shape is text": raw_file(header(codes=entry(shape="222"))),
    "shape is an object": raw_file(header(codes=entry(shape={"2": 2}))),
    "shape is negative": raw_file(header(codes=entry(shape=[-2, -2, 2]))),
    "shape of floats": raw_file(header(codes=entry(shape=[2.0, 2, 2]))),
    "shape of bools": raw_file(header(tensors={}, **{"codes": entry("U8", [True, 1, 1], [0, 1])}), b"a"),
    "shape and bytes differ": raw_file(header(codes=entry(shape=[2, 2, 3]))),
    "shape overflows": raw_file(header(codes=entry(shape=[2**32, 2**32, 2]))),
    "shape overflows to the bytes": raw_file(header(codes=entry(shape=[2**62, 4, 2 + 2**61]))),
    "shape huge but for a zero": raw_file(header(codes=entry(shape=[0, HUGE, HUGE], offsets=[0, 0]))),
    "shape huge but for a zero, as a product": raw_file(header(codes=entry(shape=[0, 2**40, 2**40], offsets=[0, 0]))),
    "shape of 5000 dimensions": raw_file(header(codes=entry(shape=[1] * 5000, offsets=[0, 2]))),
    "shape of many huge numbers": raw_file(header(codes=entry(shape=[10**4000] * 500))),
    "offsets are one": raw_file(header(codes=entry(offsets=[0]))),
    "offsets are three": raw_file(header(codes=entry(offsets=[0, 8, 16]))),
    "offsets are text": raw_file(header(codes=entry(offsets="ab"))),
    "offsets are bools": raw_file(header(codes=entry("U8", [1, 1, 1], [False, True]))),
    "offsets are floats": raw_file(header(codes=entry(offsets=[0.0, 16.0]))),
    "offsets are negative": raw_file(header(codes=entry(offsets=[-16, 0]))),
    "offsets run backwards": raw_file(header(codes=entry(offsets=[16, 0]))),
    "offsets beyond the end": raw_file(header(codes=entry(offsets=[1000, 1016]))),
    "offsets huge": raw_file(header(codes=entry(offsets=[2**70, 2**70 + 16]))),
    "a gap": raw_file(header(ids_dot_bytes=entry("U8", [2], [17, 19])), BODY + b"\0"),
    "an overlap": raw_file(header(ids_dot_bytes=entry("U8", [2], [15, 17]))),
    "two in one place": raw_file(header(seed=entry("I64", [2], [0, 16]))),
    "no codes": raw_file(header(codes=None)),
    "codes of two dimensions": raw_file(header(codes=entry(shape=[2, 4]))),
    "codes of float": raw_file(header(codes=entry("F16"))),
    "no ids": raw_file(header(tensors={"codes": SPEC["codes"]}), BODY[:16]),
    "ids without bytes": raw_file(header(ids_dot_bytes=None, ids_dot_offsets=entry("I64", [3], [16, 40])), BODY[:40]),
    "ids without offsets": raw_file(header(ids_dot_offsets=None), BODY[:18]),
    "ids of one row more": raw_file(header(ids_dot_offsets=entry("I64", [4], [18, 50])), BODY + bytes(8)),
    "ids with another part": raw_file(header(ids_dot_more=entry("U8", [0], [42, 42]))),
    "a column of other length": raw_file(header(seed=entry("I64", [3], [42, 66])), BODY + bytes(24)),
    "a scalar among columns": raw_file(header(x=entry("I64", [], [42, 50])), BODY + bytes(8)),
    "string offsets beyond the end": raw_file(header(), offsets(0, 1, 3)),
    "string offsets before the end": raw_file(header(), offsets(0, 1, 1)),
    "string offsets from 1": raw_file(header(), offsets(1, 1, 2)),
    "string offsets backwards": raw_file(header(), offsets(0, 3, 2)),
    "string offsets negative": raw_file(header(), offsets(0, -1, 2)),
    "string offsets that wrap": raw_file(header(), offsets(0, HUGE - 1, 2)),
}


def test_the_good_file_is_good(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD)
    found = open_artifact(path, "codes")
    np.testing.assert_array_equal(found.array("codes"), codes(2))
    assert list(found.strings("ids")) == ["a", "b"]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path, name):
    path = tmp_path / "a.safetensors"
    path.write_bytes(BROKEN[name])
    tracemalloc.start()
    message = refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(message) < 500
    assert peak < 64 << 20


def test_string_offsets_that_wrap_around_every_difference(tmp_path):
    lies = np.array([0, HUGE - 1, -HUGE, -1, 2], dtype=np.int64)
    tensors = {
        "codes": ("U16", [4, 1, 1], [0, 8]),
        "ids.bytes": ("U8", [2], [8, 10]),
        "ids.offsets": ("I64", [5], [10, 50]),
    }
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_file(header(tensors=tensors), bytes(8) + b"ab" + lies.tobytes()))
    assert "offsets that lie" in refused(path)


def test_pictures_have_three_channels(tmp_path):
    path = tmp_path / "a.safetensors"
    write_artifact(path, "images", {"images": np.zeros((1, 5, 2, 2), np.uint8), "ids": ["a"]}, {}, [])
    assert "3 channels" in refused(path)


@pytest.mark.parametrize("cut", range(0, len(GOOD), 37))
def test_cut_short_anywhere(tmp_path, cut):
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD[:cut])
    refused(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_flipped_byte_is_refused_or_harmless(tmp_path_factory, draw):
    """Whatever byte of the header changes: a DalleError, or a file that can be read to its end."""
    at = draw.draw(st.integers(0, len(GOOD) - len(BODY) - 1))
    data = bytearray(GOOD)
    data[at] ^= draw.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(data)
    with contextlib.suppress(DalleError):
        read_all(path)


def test_what_is_no_file(tmp_path):
    assert "no such file" in refused(tmp_path / "none.safetensors")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / "none.safetensors/a"):
        refused(path)
    assert "without shards" in refused(tmp_path)
    os.symlink("/dev/null", tmp_path / "null")
    assert "only 0 bytes" in refused(tmp_path / "null")


def test_every_kind_has_a_row_in_the_table():
    for name, kind in artifacts.KINDS.items():
        assert kind.name == name
        assert kind.about
        assert kind.rows == bool(kind.columns)


def test_a_header_that_safetensors_refuses(tmp_path):
    """A metadata value that is no text is nothing to us; the library that loads weights will not have it."""
    head = {"__metadata__": {"dalle": json.dumps(meta(kind="weights.dvae")), "other": 3}, "w": entry("U8", [2], [0, 2])}
    path = tmp_path / "w.safetensors"
    path.write_bytes(raw_file(head, b"ab"))
    assert read_header(path).kind == "weights.dvae"
    with pytest.raises(DalleError, match="expected whole tensors"):
        load_tensors(open_artifact(path))
