"""Every format that publishers use gives the names, shapes, dtypes and numbers that were saved."""

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import hypothesis
import hypothesis.strategies as some
import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dalle_cli.artifacts.region import Region
from dalle_cli.errors import DalleError
from dalle_cli.importing.readers import open_tensors


def tensors():
    torch.manual_seed(0)
    return OrderedDict(
        {
            "a.weight": torch.randn(3, 4),
            "b": torch.randn(5).half(),
            "c.0": torch.randn(6, 2, 2, 1),
            "d": torch.arange(4),
            "e": torch.randn(3, 3).bfloat16(),
            "f": torch.tensor(3.5),
            "g": torch.tensor([True, False]),
            "h": torch.randn(4, 2).double(),
            "i": torch.arange(3, dtype=torch.uint8),
        }
    )


class Net(nn.Module):
    """A module with parts, a parameter, and buffers of both sorts."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(3, 3))
        self.gain = nn.Parameter(torch.randn(3))
        self.register_buffer("mean", torch.randn(2))
        self.register_buffer("mask", torch.ones(2), persistent=False)

    def forward(self, x):
        return self.layers[1](x) * self.gain


def check(path, expected):
    file = open_tensors(Region(path))
    assert file.shapes == {name: tuple(t.shape) for name, t in expected.items()}
    for name, tensor in expected.items():
        assert file.dtype(name) == tensor.dtype
        found = file.read(name)
        file.release()
        assert torch.equal(found, tensor), name
    return file


def test_safetensors(tmp_path):
    save_file(dict(tensors()), str(tmp_path / "x"), metadata={"format": "pt"})
    check(tmp_path / "x", tensors())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torch_tables(tmp_path, zipped, protocol):
    how = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
    torch.save(tensors(), tmp_path / "x", **how)
    check(tmp_path / "x", tensors())
    lightning = {
        "epoch": 3, "global_step": 4.5, "state_dict": tensors(), "callbacks": {Path: {"best": Path("a/b"), 3: [None]}},
        "hyper_parameters": Net(), "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "who": {1, 2}}],
    }  # fmt: skip
    torch.save(lightning, tmp_path / "l", **how)
    check(tmp_path / "l", tensors())
    torch.save({"hparams": {"dim": 8}, "weights": tensors()}, tmp_path / "n", **how)
    check(tmp_path / "n", {f"weights.{name}": t for name, t in tensors().items()})


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
def test_torch_parameters_views_and_shared_storages(tmp_path, zipped):
    base = torch.randn(6, 4)
    table = {
        "turned": base.T, "rows": base[2:4], "part": base[:, 1:3], "again": base, "p": nn.Parameter(torch.randn(3)),
        "q": nn.Parameter(torch.randn(3), requires_grad=False), "empty": torch.empty(0, 3),
    }  # fmt: skip
    table["p"].note = "an attribute"
    torch.save(table, tmp_path / "x", _use_new_zipfile_serialization=zipped)
    check(tmp_path / "x", table)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
def test_whole_modules_without_their_classes(tmp_path, zipped):
    model = Net()
    torch.save(model, tmp_path / "x", _use_new_zipfile_serialization=zipped)
    check(tmp_path / "x", model.state_dict())
    torch.save({"model": model, "step": 3}, tmp_path / "y", _use_new_zipfile_serialization=zipped)
    check(tmp_path / "y", {f"model.{name}": t for name, t in model.state_dict().items()})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(tmp_path):
    model = Net()
    for i, made in enumerate((torch.jit.script(model), torch.jit.trace(model, torch.randn(2, 3)))):
        torch.jit.save(made.half() if i else made, tmp_path / str(i))
        buffers = {**made.state_dict(), "mask": model.mask.to(made.mean.dtype)}  # the archive does not mark it
        check(tmp_path / str(i), buffers)


def packed(value):
    """As flax writes: `flax.serialization.msgpack_serialize`."""

    def extension(array):
        return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True))

    return msgpack.packb(value, default=extension, strict_types=True)


ARRAYS = {
    "model": {
        "encoder": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4), "bias": np.zeros(0, np.float16)},
        "decoder": {"layers": {"0": {"scale": np.array(2.5)}, "1": {"scale": np.arange(5)}}},
    },
    "head": np.array([[True, False]]),
}


def flat(table, prefix=""):
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, torch.from_numpy(np.array(value))


def test_flax(tmp_path):
    (tmp_path / "x").write_bytes(packed({**ARRAYS, "step": 3, "note": "as is", "none": None, "list": [1, -2, 2.5]}))
    check(tmp_path / "x", dict(flat(ARRAYS)))


def test_flax_bfloat16(tmp_path):
    numbers = torch.randn(4, 3).bfloat16()
    inner = msgpack.packb(((4, 3), "bfloat16", numbers.view(torch.int16).numpy().tobytes()), use_bin_type=True)
    (tmp_path / "x").write_bytes(msgpack.packb({"w": msgpack.ExtType(1, inner)}))
    check(tmp_path / "x", {"w": numbers})


def test_flax_chunks(tmp_path):
    """Arrays of over 2**30 bytes are in pieces."""
    whole = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    pieces = np.split(whole.reshape(-1), [10, 20, 30])
    chunked = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 5, "1": 7},
        "chunks": {str(i): piece for i, piece in enumerate(pieces)},
    }
    (tmp_path / "x").write_bytes(packed({"big": chunked, "small": np.ones(2, np.float32)}))
    file = check(tmp_path / "x", {"big": torch.from_numpy(whole), "small": torch.ones(2)})
    assert file.read("big") is file.read("big")  # joined once for all of its slices


KEYS = some.text(max_size=40)
LEAVES = some.one_of(
    some.none(), some.booleans(), some.integers(-(2**63), 2**64 - 1), some.floats(allow_nan=False), some.text(),
    some.builds(
        lambda shape, kind: np.arange(np.prod(shape, dtype=int)).astype(kind).reshape(shape),
        some.lists(some.integers(0, 5), max_size=3), some.sampled_from(["float32", "float16", "int8", "bool"]),
    ),
)  # fmt: skip


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(some.dictionaries(KEYS, some.recursive(LEAVES, lambda v: some.dictionaries(KEYS, v), max_leaves=40)))
def test_flax_files_are_read_as_msgpack_reads_them(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("flax") / "x"
    path.write_bytes(b"\xde\0\0" if not table else packed(table))
    expected = [(name, t) for name, t in flat(arrays_of(table))]
    names = [name for name, _ in expected]
    if not names or len(set(names)) < len(names):
        with pytest.raises(DalleError, match=r"no arrays|two arrays"):
            open_tensors(Region(path))
    else:
        check(path, dict(expected))


def arrays_of(table):
    """The same tables with nothing but arrays in them."""
    return {
        key: arrays_of(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if isinstance(value, (dict, np.ndarray))
    }


def test_the_format_is_told_by_content(tmp_path):
    for head, what in (
        (b"<!DOCTYPE html>", "a web page"), (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (b"\x1f\x8b\x08", "gzip"), (b"GIF89a", "another format"), (b"\x80", "another format"),
    ):  # fmt: skip
        (tmp_path / "model.safetensors").write_bytes(head)
        with pytest.raises(DalleError, match=what):
            open_tensors(Region(tmp_path / "model.safetensors"))
    (tmp_path / "empty").touch()
    with pytest.raises(DalleError, match="0 bytes"):
        Region(tmp_path / "empty")
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(DalleError, match="another zip archive"):
        open_tensors(Region(tmp_path / "z"))


def test_changed_numbers_of_a_zip_are_seen(tmp_path):
    torch.save(tensors(), tmp_path / "x")
    data = bytearray((tmp_path / "x").read_bytes())
    at = data.find(tensors()["a.weight"].numpy().tobytes())
    data[at] ^= 1
    (tmp_path / "x").write_bytes(data)
    file = open_tensors(Region(tmp_path / "x"))
    assert torch.equal(file.read("b"), tensors()["b"])
    with pytest.raises(DalleError, match="changed bytes"):
        file.read("a.weight")


def test_views_read_nothing_before_they_are_used(tmp_path):
    """A file whose numbers are a hole on the disk: opening it and asking for shapes reads no more than its header."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 28], "data_offsets": [0, 1 << 30]}}).encode()
    with open(tmp_path / "x", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 30))
    file = open_tensors(Region(tmp_path / "x"))
    assert file.read("w")[12345:12347].tolist() == [0, 0]


def test_a_pickle_of_anything_plain_is_followed_as_pickle_does():
    from dalle_cli.importing.pickles import Interpreter

    value = {
        "a": [1, -2, 3.5, None, True, 2**70, -(2**70)], "b": ("x", b"bytes", (), (1,), (1, 2), (1, 2, 3, 4)),
        "c": {"d": {1: "one", 2.5: [[]]}}, "long": "ä" * 300, "many": list(range(2000)), "twice": ["s"] * 3,
    }  # fmt: skip
    value["shared"] = value["c"]
    for protocol in (0, 1, 2, 3, 4, 5):
        data = pickle.dumps(value, protocol)
        file = io.BytesIO(data)
        if protocol < 3:  # which know no bytes: these pickles call a codec instead
            value["b"] = value["b"][:1]
            file = io.BytesIO(pickle.dumps(value, protocol))
        assert Interpreter(Named(), file).load() == value


class Named:
    """As much of a region as an interpreter of plain values needs."""

    name = "here"
