"""Files that are damaged, of something else, or made to do harm: one line, exit 1, nothing run, nothing left behind."""

import builtins
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import time
import zipfile
from pathlib import Path

import msgpack
import pytest
import torch
from conftest import run_bad, run_ok
from planted_publication import FILES, IMPORTER, publish
from safetensors.torch import load_file, save_file

from dalle_cli.artifacts.region import Region
from dalle_cli.errors import DalleError
from dalle_cli.importing import known
from dalle_cli.importing.readers import open_tensors

PRIOR, DVAE, CLIP = FILES["prior"], FILES["dvae"], FILES["clip"]


@pytest.fixture(autouse=True)
def only_planted(monkeypatch):
    monkeypatch.setattr(known, "importers", lambda: iter([IMPORTER]))


@pytest.fixture(scope="module")
def published(chain, tmp_path_factory):
    return publish(chain.model, tmp_path_factory.mktemp("published"))


@pytest.fixture
def source(published, tmp_path):
    """A copy of the publication that a test may harm."""
    return Path(shutil.copytree(published, tmp_path / "source"))


@pytest.fixture
def refused(tmp_path):
    """`dalle import SOURCE`, which must be refused in one line and leave nothing; the line."""

    def run(source):
        before = sorted(tmp_path.rglob("*"))
        line = run_bad("import", source, "-o", tmp_path / "out")
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


# Pickles that want something run


class Calls:
    """What a pickle runs when it is opened carelessly."""

    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
@pytest.mark.parametrize(
    "made",
    [
        lambda mark: Calls(os.system, f"touch {mark}"),
        lambda mark: Calls(builtins.eval, f"open({str(mark)!r}, 'w')"),
        lambda mark: Calls(builtins.exec, f"open({str(mark)!r}, 'w')"),
        lambda mark: {"state_dict": {"net.x": Calls(os.mkdir, str(mark))}},
        lambda mark: {"state_dict": {"net.x": torch.ones(1)}, "callbacks": [{"deep": Calls(os.system, "x")}]},
        lambda mark: {"net.x": torch.ones(1), "net.y": Calls(Path.touch, mark)},
        lambda mark: {"net.x": torch.ones(1), "net.y": Calls(pickle.loads, pickle.dumps(Calls(os.system, "x")))},
        lambda mark: Calls(Path, str(mark)),
    ],
    ids=["system", "eval", "exec", "mkdir", "callback", "touch", "nested", "root"],
)
def test_nothing_of_a_pickle_runs(source, refused, tmp_path, made, zipped):
    mark = tmp_path / "run"
    torch.save(made(mark), source / PRIOR, _use_new_zipfile_serialization=zipped)
    line = refused(source)
    assert not mark.exists()
    assert "tensor" in line
    if b"run" not in line.encode() or "nothing of it was run" not in line:
        assert "found a" in line


def test_names_by_the_oldest_instructions(source, refused, tmp_path):
    """INST and OBJ call while they are read; so does a name put together from two texts."""
    mark = tmp_path / "run"
    command = f"S'touch {mark}'\n".encode()
    for data in (
        b"(" + command + b"ios\nsystem\n.",
        b"(cos\nsystem\n" + command + b"o.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93(" + command + b"tR.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + command + b"\x85\x81.",
    ):
        with zipfile.ZipFile(source / PRIOR, "w") as archive:
            archive.writestr("x/data.pkl", data)
        assert "system in " in refused(source)
        assert not mark.exists()


def pickled(data, **members):
    """A torch archive with this pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x/data.pkl", data)
        for name, value in members.items():
            archive.writestr(f"x/data/{name}", value)
    return stream.getvalue()


def stored(offset, shape, stride, numel=4, kind=b"FloatStorage", key=b"0"):
    """The instructions that make a tensor of a storage."""
    numbers = [b"(" + b"".join(b"J" + struct.pack("<i", n) for n in values) + b"t" for values in (shape, stride)]
    reference = b"(S'storage'\nctorch\n" + kind + b"\nS'" + key + b"'\nS'cpu'\nJ" + struct.pack("<i", numel) + b"tQ"
    begin = b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + b"J" + struct.pack("<i", offset)
    return begin + numbers[0] + numbers[1] + b"\x89}tR"


TABLE = b"\x80\x02}S'w'\n%ss."
BOMBS = {
    "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "long text": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.",
    "long number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "digits": b"\x80\x02I" + b"9" * 4000 + b"\n0}.",
    "tuple as key": b"\x80\x02}q\x00)q\x01"
    + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(1, 64)) + b"0h\x00h@Ns.",
    "tables of tables": b"\x80\x02}q\x01"
    + b"".join(b"}q%cS'a'\nh%csS'b'\nh%cs" % (i + 1, i, i) for i in range(1, 64)) + b".",
    "a table in itself": b"\x80\x02}q\x01S'a'\nh\x01s.",
    "marks": b"\x80\x02" + b"(" * 1000 + b"t" * 2000 + b".",
    "nothing on the stack": b"\x80\x02R.",
    "no end": b"\x80\x02}",
    "many instructions": b"\x80\x02" + b"]0" * 600_000 + b"}.",
    "extension": b"\x80\x02\x82\x01.",
    "out of band": b"\x80\x05\x97.",
    "unknown": b"\x80\x02\xff.",
    "beyond its storage": TABLE % stored(0, [5], [1]),
    "beyond its storage by an offset": TABLE % stored(1, [4], [1]),
    "beyond its storage by a stride": TABLE % stored(0, [2], [4]),
    "negative": TABLE % stored(-1, [4], [1]),
    "negative stride": TABLE % stored(3, [4], [-1]),
    "repeated by a stride of nothing": TABLE % stored(0, [1 << 15, 1 << 15], [0, 0]),
    "huge": TABLE % stored(0, [1 << 30, 1 << 30, 1 << 30], [0, 0, 0]),
    "no such storage": TABLE % stored(0, [4], [1], key=b"1"),
    "a storage with a path": TABLE % stored(0, [4], [1], key=b"../data.pkl"),
    "another size": TABLE % stored(0, [4], [1], numel=8),
    "another kind": TABLE % stored(0, [4], [1], kind=b"DoubleStorage"),
    "no kind": TABLE % stored(0, [4], [1], kind=b"ObjectStorage"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_are_bombs_or_lies(tmp_path, name):
    (tmp_path / "x").write_bytes(pickled(BOMBS[name], **{"0": bytes(16)}))
    began = time.monotonic()
    with pytest.raises(DalleError, match=r"expected .*, found "):
        open_tensors(Region(tmp_path / "x"))
    assert time.monotonic() - began < 20


def test_the_pickle_made_by_hand_is_one_that_is_read(tmp_path):
    (tmp_path / "x").write_bytes(pickled(TABLE % stored(0, [2, 2], [2, 1]), **{"0": struct.pack("<4f", 1, 2, 3, 4)}))
    assert open_tensors(Region(tmp_path / "x")).read("w").tolist() == [[1, 2], [3, 4]]


def test_archives_that_are_compressed_or_another_way_round(tmp_path):
    data, numbers = TABLE % stored(0, [4], [1]), bytes(16)
    for change, what in (({"x/byteorder": b"big"}, "little-endian"), ({"y/data.pkl": data}, "another zip archive")):
        with zipfile.ZipFile(tmp_path / "x", "w") as archive:
            for name, value in {"x/data.pkl": data, "x/data/0": numbers, **change}.items():
                archive.writestr(name, value)
        with pytest.raises(DalleError, match=what):
            open_tensors(Region(tmp_path / "x"))
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", data)
    with pytest.raises(DalleError, match="compressed"):
        open_tensors(Region(tmp_path / "x"))


# msgpack


def nested(depth, leaf=b"\xc0"):
    return b"\x81\xa1a" * depth + leaf


ARRAY = msgpack.packb(((2, 2), "float32", bytes(16)))
MSGPACKS = {
    "nested tables": nested(100_000),
    "nested lists": b"\x81\xa1a" + b"\x91" * 100_000 + b"\xc0",
    "long list": b"\x81\xa1a\xdd\xff\xff\xff\xff" + b"\xc0" * 2_000_000,
    "long table": b"\xdf\xff\xff\xff\xff\xa1a\xc0",
    "long text": b"\x81\xdb\xff\xff\xff\xff",
    "long bytes": b"\x81\xa1a\xc6\xff\xff\xff\xff",
    "long array": b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
    "a key twice": b"\x82\xa1a\xc0\xa1a\xc0",
    "a key that is no text": b"\x81\x01\xc0",
    "bytes behind": msgpack.packb({"a": msgpack.ExtType(1, ARRAY)}) + b"\xc0",
    "no arrays": msgpack.packb({"a": 1}),
    "unused byte": b"\x81\xa1a\xc1",
    "text that is none": b"\x81\xa1\xff\xc0",
    "array of another layout": msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([1, 2]))}),
    "array without numbers": msgpack.packb({"a": msgpack.ExtType(1, ARRAY[:-1])}),
    "array with too many": msgpack.packb({"a": msgpack.ExtType(1, ARRAY + b"\0")}),
    "array of objects": msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((1,), "object", bytes(8))))}),
    "array of a shape of texts": msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb((("x",), "int8", b"")))}),
    "array of a negative shape": msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((-2, -2), "int8", bytes(4))))}),
    "array in a shape": msgpack.packb({"a": msgpack.ExtType(1, b"\x93" + b"\x91" * 50_000)}),
    "chunks that are none": msgpack.packb({"a": {"__msgpack_chunked_array__": True, "shape": 3, "chunks": None}}),
    "chunks of another size": msgpack.packb(
        {
            "a": {
                "__msgpack_chunked_array__": True, "shape": {"0": 1 << 40},
                "chunks": {"0": msgpack.ExtType(1, ARRAY)},
            }
        }
    ),
    "names that meet": msgpack.packb({"a": {"b": msgpack.ExtType(1, ARRAY)}, "a.b": msgpack.ExtType(1, ARRAY)}),
}  # fmt: skip


@pytest.mark.parametrize("name", MSGPACKS)
def test_msgpack_bombs_and_lies(tmp_path, name):
    (tmp_path / "x").write_bytes(MSGPACKS[name])
    began = time.monotonic()
    with pytest.raises(DalleError, match=r"expected .*, found "):
        open_tensors(Region(tmp_path / "x"))
    assert time.monotonic() - began < 20


# safetensors


def headed(header, size=16):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(size)


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


@pytest.mark.parametrize(
    "data",
    [
        headed({"a": entry()}, 15), headed({"a": entry()}, 17), headed({"a": entry(shape=(2, 3))}),
        headed({"a": entry(offsets=(4, 20))}, 20), headed({"a": entry(offsets=(16, 0))}),
        headed({"a": entry(dtype="F7")}), headed({"a": entry(shape=(-2, -2))}), headed({"a": entry(shape=("2", 2))}),
        headed({"a": entry(), "b": entry()}), headed({"a": {}}), headed({"a": None}), headed(b"{" + b"[" * 100_000),
        headed(b'{"a": 1, "a": 2}'), headed(b"{\xff}"), headed({"a": entry(shape=[1 << 62, 1 << 62, 0])}),
        (1 << 40).to_bytes(8, "little") + b"{}", (99_999_999).to_bytes(8, "little") + b"{}", b"\x02\0\0\0\0\0\0\0{",
        headed({"a": entry(shape=[1] * 40 + [4])}), headed({"a": entry(offsets=("0", 16))}),
    ],
)  # fmt: skip
def test_safetensors_that_lie(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(DalleError, match=r"expected .*, found "):
        open_tensors(Region(tmp_path / "x"))


# Every format, cut and changed anywhere


def written(kind, path):
    tensors = {f"layer.{i}.weight": torch.arange(6.0).view(2, 3) + i for i in range(3)}
    if kind == "safetensors":
        save_file(tensors, str(path))
    elif kind == "flax":
        table = {k: msgpack.ExtType(1, msgpack.packb(((2, 3), "float32", bytes(24)))) for k in tensors}
        path.write_bytes(msgpack.packb(table))
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["safetensors", "zip", "older", "flax"])
def test_a_file_that_is_cut_or_changed_anywhere_is_one_line_or_none(tmp_path, kind):
    """Of a changed file either an error of ours, or tensors of a sound shape; never another exception."""
    path = tmp_path / "x"
    data = written(kind, path)
    generator = torch.Generator().manual_seed(0)

    def tried(changed):
        path.write_bytes(changed)
        try:
            file = open_tensors(Region(path))
            for name in file.shapes:
                assert tuple(file.read(name).shape) == file.shapes[name]
        except DalleError:
            return False
        return True

    assert tried(data)
    for at in sorted({*range(0, len(data), max(1, len(data) // 150)), len(data) - 1}):
        assert not tried(data[:at]), f"{kind} cut at {at} of {len(data)}"
    for _ in range(300):
        changed = bytearray(data)
        for at in torch.randint(0, len(data), (2,), generator=generator).tolist():
            changed[at] = int(torch.randint(0, 256, (1,), generator=generator))
        tried(bytes(changed))


# Publications that are not whole


def changed_prior(source, change):
    table = torch.load(source / PRIOR, weights_only=True)
    change(table["state_dict"])
    torch.save(table, source / PRIOR)


def test_a_missing_tensor(source, refused):
    changed_prior(source, lambda table: table.pop("net.blocks.1.qkv.weight"))
    line = refused(source)
    assert "tensors for blocks.1.qkv.weight of prior.safetensors" in line
    assert "found none" in line


def test_an_unexpected_tensor(source, refused):
    changed_prior(source, lambda table: table.update({"net.blocks.9.qkv.weight": torch.ones(1)}))
    assert "no such tensor" in refused(source)
    tensors = load_file(str(source / CLIP))
    save_file({**tensors, "net.position_ids": torch.arange(3)}, str(source / CLIP))
    changed_prior(source, lambda table: table.pop("net.blocks.9.qkv.weight"))
    changed_prior(source, lambda table: table.update({"extra.b": torch.ones(1), "extra.a": torch.ones(1)}))
    line = refused(source)
    assert "expected only tensors of Planted, found 'extra." in line
    assert "' and 1 more in" in line
    changed_prior(source, lambda table: [table.pop(f"extra.{x}") for x in "ab"])
    run_ok("import", source, "-o", source.parent / "ignored")


def test_another_shape(source, refused):
    changed_prior(source, lambda table: table.update({"net.blocks.1.qkv.weight": torch.ones(3, 3)}))
    line = refused(source)
    assert "expected [48, 16] for blocks.1.qkv.weight" in line
    assert "found [3, 3]" in line


def test_nothing_is_written_before_the_whole_plan_fits(source, refused, monkeypatch):
    """The last part is wrong: not even the first one was begun."""
    changed_prior(source, lambda table: table.pop("net.blocks.1.qkv.weight"))
    monkeypatch.setattr("dalle_cli.importing.bundle.stream_tensors", lambda *_, **__: pytest.fail("written"))
    refused(source)


@pytest.mark.parametrize(
    ("file", "how"),
    [
        *((file, how) for file in (PRIOR, DVAE, CLIP, "planted.json") for how in ("cut", "gone", "empty")),
        ("words.json", "gone"),
    ],
)
def test_a_file_that_is_cut_gone_or_empty(source, refused, file, how):
    path = source / file
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if how == "cut" else 0])
    refused(source)


def test_numbers_that_a_dtype_cannot_hold(source, tmp_path):
    changed_prior(source, lambda table: table["net.blocks.1.qkv.weight"].fill_(1e6))
    line = run_bad("import", source, "--dtype", "float16", "-o", tmp_path / "out")
    assert "found larger ones in blocks.1.qkv.weight" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    assert "expected --dtype bfloat16" in run_bad("import", source, "--dtype", "int4", "-o", tmp_path / "out")


def test_a_source_of_something_else(refused, tmp_path, chain):
    (tmp_path / "notes.txt").write_text("hello")
    line = refused(tmp_path / "notes.txt")
    assert "a known publication (Planted)" in line
    assert "found notes.txt" in line
    (tmp_path / "empty").mkdir()
    assert "found no files" in refused(tmp_path / "empty")
    assert "found no such file" in refused(tmp_path / "nowhere")
    assert "a known publication" in refused(chain.model)  # a bundle of ours is none


# Tars


def tarred(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for member, data in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def link(name, kind, to="/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize(
    "member",
    [
        "../out/evil", "a/../../evil", "/tmp/evil", "a\\..\\evil", "c:/evil", link("a", tarfile.SYMTYPE),
        link("a", tarfile.LNKTYPE), link("a", tarfile.CHRTYPE), link("a", tarfile.FIFOTYPE),
        link("..", tarfile.DIRTYPE),
    ],
    ids=lambda member: member if isinstance(member, str) else f"{member.name}-{member.type.decode()}",
)  # fmt: skip
def test_a_tar_that_leads_out_of_itself(tmp_path, refused, member, mode):
    path = tarred(tmp_path / "x.tar", [("planted.json", b"{}"), (member, b"")], mode)
    line = refused(path)
    assert "expected plain files in the tar" in line


def test_tars_that_are_cut_or_grow(tmp_path, refused, source):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(source, "top")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(source, "top")
    for name in ("x.tar", "x.tar.gz"):
        whole = (tmp_path / name).read_bytes()
        for share in (0.05, 0.3, 0.7):
            (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
            refused(tmp_path / name)
    tarred(tmp_path / "bomb", [("planted.json", bytes(40 << 20))], "w:gz")
    assert "grows" in refused(tmp_path / "bomb")
    tarred(tmp_path / "twice", [("planted.json", b"{}"), ("planted.json", b"[]")])
    assert "a file twice" in refused(tmp_path / "twice")
    (tmp_path / "gz").write_bytes(b"\x1f\x8b" + bytes(100))
    refused(tmp_path / "gz")


def test_what_lies_at_the_output_stays(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    for force in ((), ("--force",)):
        assert "found diary.txt" in run_bad("import", source, "-o", out, *force)
    (out / "diary.txt").rename(out / "README.md")
    assert "give --force" in run_bad("import", source, "-o", out)
    (out / "README.md").rename(tmp_path / "file")
    assert "found a file" in run_bad("import", source, "-o", tmp_path / "file")
    run_ok("import", source, "-o", out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert "give --force" in run_bad("import", source, "-o", out)
    changed_prior(source, lambda table: table.pop("net.blocks.1.qkv.weight"))
    run_bad("import", source, "-o", out, "--force")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out", "source"]
