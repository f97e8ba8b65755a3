"""Artifacts that are broken or lie: each is refused in a line, and none does harm."""

import contextlib
import json
import os
import struct
import tracemalloc

import numpy as np
import pytest
from artifact_files import ENTRY, codes, read_all, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.artifacts import open_artifact, write_artifact
from dalle_cli.errors import DalleError

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
    "a key of metadata twice": raw_file(header('{"kind":"codes","kind":"images","version":1}')),
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
    assert "wrong offsets" in refused(path)


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
    assert "found a device" in refused(tmp_path / "null")


def test_a_header_that_safetensors_refuses(tmp_path):
    """A metadata value that is not text, beside ours."""
    head = {"__metadata__": {"dalle": json.dumps(meta(kind="weights.dvae")), "other": 3}, "w": entry("U8", [2], [0, 2])}
    path = tmp_path / "w.safetensors"
    path.write_bytes(raw_file(head, b"ab"))
    assert "not safetensors (invalid type: integer" in refused(path)


@pytest.mark.parametrize("shape", [[1] * 33, [0, 2**40, 2**40]], ids=["dimensions", "huge but for a zero"])
def test_shapes_that_safetensors_lets_pass(tmp_path, shape):
    offsets = [0, 0 if 0 in shape else 1]
    path = tmp_path / "w.safetensors"
    head = header(meta(kind="weights.dvae"), {"w": ("U8", shape, offsets)})
    path.write_bytes(raw_file(head, b"a"[: offsets[1]]))
    assert "an impossible shape of tensor 'w'" in refused(path)
