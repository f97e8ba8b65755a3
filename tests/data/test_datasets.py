"""Folders, manifests and tars, here and by fsspec, open as the same data set; what is bad is counted and named."""

import csv
import io
import json
import os
import sys
import tarfile
import uuid

import fsspec
import numpy as np
import pytest
from PIL import Image

from dalle_cli.data.datasets import open_dataset
from dalle_cli.data.filters import Filters
from dalle_cli.data.skips import BadSample, SkipLog
from dalle_cli.errors import DalleError


def picture(color=0, size=(4, 4), kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, (color, 0, 0)).save(file, kind)
    return file.getvalue()


def fill(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def tar_bytes(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            data = data if isinstance(data, bytes) else data.encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def skipped(dataset):
    return dict(dataset.skipped.entries())


def reds(dataset):
    return [np.asarray(dataset.read(i))[0, 0, 0] for i in range(len(dataset))]


def error(source, need_captions=True, **options):
    with pytest.raises(DalleError) as caught:
        open_dataset(source, need_captions=need_captions, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


FILES = {
    "b/two.PNG": picture(2),
    "b/two.txt": "second\nline",
    "a/one.jpeg": picture(1, kind="JPEG"),
    "a/one.txt": " first ",
    "two.webp": picture(3, kind="WEBP"),
    "two.txt": "third",
    ".hidden/x.png": picture(),
    "._two.png": b"resource fork",
    "notes.md": "not a picture",
}


def test_folder(tmp_path):
    dataset = open_dataset(fill(tmp_path, FILES), need_captions=True)
    assert dataset.ids == ["a/one", "b/two", "two"]
    assert dataset.captions == [("first",), ("second",), ("third",)]
    assert np.abs(np.array(reds(dataset), int) - [1, 2, 3]).max() <= 2
    assert len(dataset) == 3
    assert dataset.skipped.count == 0
    assert open_dataset(tmp_path, need_captions=True, all_lines=True).captions[1] == ("second", "line")


def test_folder_without_need_of_captions_reads_none(tmp_path):
    dataset = open_dataset(
        fill(tmp_path, {"a.png": picture(), "b.png": picture(), "b.txt": b"\xff"}), need_captions=False
    )
    assert dataset.ids == ["a", "b"]
    assert dataset.captions == [(), ()]
    assert dataset.skipped.count == 0


def test_folder_counts_what_it_leaves_out(tmp_path):
    files = {
        name: picture() for name in ("none.png", "empty.png", "latin.png", "nul.png", "long.png", "a.jpg", "a.png")
    }
    texts = {"empty.txt": " \n", "latin.txt": "Käfer".encode("latin-1"), "nul.txt": "a\0b", "long.txt": "w " * 10_000}
    fill(tmp_path, files | texts | {"a.txt": "a"})
    os.symlink(tmp_path / "gone.png", tmp_path / "link.png")
    os.symlink(tmp_path, tmp_path / "circle")
    dataset = open_dataset(tmp_path, need_captions=True)
    assert dataset.ids == ["a", "long", "nul"]
    assert dataset.captions[2] == ("ab",)
    assert skipped(dataset) == {
        "none": "without caption",
        "empty": "without caption",
        "latin": "caption is not UTF-8",
        "a.png": "duplicate id: a",
        "link.png": "unreadable: No such file or directory",
    }
    expected = "5 skipped (2 without caption, 1 caption is not UTF-8, 1 duplicate id, 1 unreadable)"
    assert dataset.skipped.summary() == expected


def test_file_name_that_is_not_utf8(tmp_path):
    fill(tmp_path, {"a.png": picture()})
    try:
        with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as file:
            file.write(picture())
    except OSError:
        pytest.skip("the file system takes only UTF-8")
    dataset = open_dataset(tmp_path, need_captions=False)
    assert dataset.ids == ["a"]
    assert list(skipped(dataset).values()) == ["file name is not UTF-8"]


def test_bad_pictures_are_refused_when_read(tmp_path):
    big = io.BytesIO()
    Image.new("1", (9000, 9000)).save(big, "PNG")
    good = picture()
    dataset = open_dataset(
        fill(
            tmp_path,
            {"cut.png": good[:-30], "text.png": "text", "none.png": b"", "big.png": big.getvalue(), "z.png": good},
        ),
        need_captions=False,
    )
    reasons = []
    for i in range(4):
        with pytest.raises(BadSample) as caught:
            dataset.read(i)
        reasons.append(str(caught.value).partition(":")[0])
    assert reasons == ["oversized", "unreadable", "unreadable", "unreadable"]
    os.remove(tmp_path / "z.png")
    with pytest.raises(BadSample, match="unreadable: No such file"):
        dataset.read(4)


def test_filters_reach_captions_and_pictures(tmp_path):
    fill(tmp_path, {"a.png": picture(), "a.txt": "a", "b.png": picture(size=(30, 10)), "b.txt": "a bee"})
    dataset = open_dataset(tmp_path, need_captions=True, filters=Filters(min_caption_chars=3, max_aspect=2.0))
    assert dataset.ids == ["b"]
    assert skipped(dataset) == {"a": "short caption"}
    with pytest.raises(BadSample, match="aspect ratio"):
        dataset.read(0)


ROWS = [
    {"image": "p/a.png", "caption": "first"},
    {"image": "p/b.png", "caption": ["second", " more "]},
    {"image": "p/gone.png", "caption": "x"},
    {"image": "p/a.png", "caption": "first again"},
    {"image": "p/c.png", "caption": ""},
    {"caption": "no image"},
    {"image": "p/c.png", "caption": "other file", "id": "p/a"},
    {"image": "p/d.png", "caption": 7},
    {"image": "p/c.png", "caption": "named", "id": 12},
]
PICTURES = {f"p/{name}.png": picture(i + 1) for i, name in enumerate("abcd")}


def test_jsonl(tmp_path):
    fill(tmp_path, PICTURES)
    lines = [json.dumps(row).encode() for row in ROWS] + [b"", b"{broken", b"[1]", '{"image":"ü"}'.encode("latin-1")]
    lines.append(b'{"image": "p/d.png", "caption": "\\ud83d"}')
    fill(tmp_path, {"list.jsonl": b"\xef\xbb\xbf" + b"\n".join(lines)})
    dataset = open_dataset(tmp_path / "list.jsonl", need_captions=True)
    assert dataset.ids == ["12", "p/a", "p/b"]
    assert reds(dataset) == [3, 1, 2]
    assert dataset.captions == [("named",), ("first", "first again"), ("second", "more")]
    assert set(dataset.skipped.entries()) == {
        ("p/gone", "missing"),
        ("p/c", "without caption"),
        ("line 6", "no image in row"),
        ("p/a", "duplicate id: p/c.png"),
        ("p/d", "caption is not text"),
        ("p/d", "caption is not UTF-8"),
        ("line 11", "malformed row"),
        ("line 12", "malformed row"),
        ("line 13", "caption is not UTF-8"),
    }
    assert open_dataset(tmp_path / "list.jsonl", need_captions=False).ids == ["12", "p/a", "p/b", "p/c", "p/d"]


@pytest.mark.parametrize("need_captions", [True, False])
def test_a_folder_with_a_manifest_is_read_through_it(tmp_path, need_captions):
    """With the manifest's ids, whether captions are needed or not: else codes and captions would share none."""
    rows = [{"image": "p/a.png", "id": "one", "caption": "cat"}, {"image": "p/b.png", "id": "two", "caption": "dog"}]
    fill(tmp_path, PICTURES | {"manifest.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    fill(tmp_path, {"p/a.txt": "another caption"})
    through, direct = (open_dataset(p, need_captions=need_captions) for p in (tmp_path, tmp_path / "manifest.jsonl"))
    assert through.ids == direct.ids == ["one", "two"]
    assert through.captions == direct.captions == ([("cat",), ("dog",)] if need_captions else [(), ()])
    assert through.digest == direct.digest
    (tmp_path / "manifest.jsonl").rename(tmp_path / "p/manifest.jsonl")  # below the top it is a file like any other
    assert "p/a" in open_dataset(tmp_path, need_captions=False).ids


@pytest.mark.parametrize(("suffix", "dialect"), [("csv", "excel"), ("tsv", "excel-tab")])
@pytest.mark.parametrize("names", [("file_name", "text"), ("PATH", "Title"), ("file", "caption")])
def test_csv_and_tsv(tmp_path, suffix, dialect, names):
    fill(tmp_path, PICTURES)
    with open(tmp_path / f"list.{suffix}", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, dialect)
        writer.writerows([names, ("p/a.png", 'a "cat",\n\ttwo lines'), ("p/b.png", "w " * 10_000), ("p/c.png", "")])
    with open(tmp_path / f"list.{suffix}", "ab") as file:
        file.write(("p/d.png" + {"csv": ",", "tsv": "\t"}[suffix] + "Käfer\n").encode("latin-1"))
    dataset = open_dataset(tmp_path / f"list.{suffix}", need_captions=True)
    assert dataset.ids == ["p/a", "p/b"]
    assert dataset.captions[0] == ('a "cat", two lines',)
    assert skipped(dataset) == {"p/c": "without caption", "p/d": "caption is not UTF-8"}


def test_csv_field_too_large_costs_one_row(tmp_path):
    fill(tmp_path, PICTURES | {"l.csv": "image,caption\np/a.png," + "x" * 200_000 + "\np/b.png,good\n"})
    dataset = open_dataset(tmp_path / "l.csv", need_captions=True)
    assert dataset.ids == ["p/b"]
    assert skipped(dataset) == {"line 2": "malformed row"}


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    fill(tmp_path, PICTURES)
    table = pyarrow.table({"file_name": ["p/a.png", "p/b.png"], "caption": [["one", "two"], []], "other": [1, 2]})
    parquet.write_table(table, tmp_path / "list.parquet")
    dataset = open_dataset(tmp_path / "list.parquet", need_captions=True)
    assert dataset.ids == ["p/a"]
    assert dataset.captions == [("one", "two")]
    assert "found not" not in error(fill(tmp_path, {"bad.parquet": "no"}) / "bad.parquet")


def test_parquet_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not installed
    assert "pip install 'dalle-cli[parquet]'" in error(fill(tmp_path, {"list.parquet": "x"}) / "list.parquet")


def test_paths_never_leave_in_ids(tmp_path):
    fill(tmp_path, {"x/list.jsonl": json.dumps({"image": "../a.png"}) + "\n", "a.png": picture()})
    with open(tmp_path / "x/list.jsonl", "a") as file:
        file.write(json.dumps({"image": str(tmp_path / "a.png")}) + "\n")
    ids = open_dataset(tmp_path / "x/list.jsonl", need_captions=False).ids
    assert ids == sorted(["a", str(tmp_path / "a").lstrip("/")])


def shard(start, n=3):
    out = []
    for i in range(start, start + n):
        out += [(f"{i:06d}.png", picture(i)), (f"{i:06d}.json", json.dumps({"caption": f"json {i}"}))]
        out += [(f"{i:06d}.txt", f"text {i}")] if i % 2 else []
    return out


EXPECTED = ["json 0", "text 1", "json 2", "text 3", "json 4", "text 5"]


@pytest.mark.parametrize("source", ["{00000..00001}.tar", "0000{0,1}.tar", "", "{00000..00001}.{tar,}"])
def test_tars(tmp_path, source):
    fill(tmp_path, {"00000.tar": tar_bytes(shard(0)), "00001.tar": tar_bytes(shard(3)), "00000_stats.json": "{}"})
    if source.endswith(",}"):
        assert "00000." in error(f"{tmp_path}/{source}")
        return
    dataset = open_dataset(f"{tmp_path}/{source}", need_captions=True)
    assert dataset.ids == [f"{i:06d}" for i in range(6)]
    assert [c[0] for c in dataset.captions] == EXPECTED
    assert reds(dataset) == list(range(6))
    assert open_dataset(f"{tmp_path}/{source}", need_captions=False).captions == [()] * 6


def test_keys_with_folders_and_long_names(tmp_path):
    long = "deep/" * 30 + "x"
    members = [
        (f"./{long}.jpg", picture(5)),
        (f"{long}.txt", "deep"),
        ("a/b.c.png", picture()),
        ("a/b.png", picture(1)),
    ]
    members += [("a/b.json", '{"text": ["one", "two"]}'), (".png", picture()), ("a/b.jpg", picture())]
    dataset = open_dataset(fill(tmp_path, {"x.tar": tar_bytes(members)}) / "x.tar", need_captions=True)
    assert dataset.ids == ["a/b", long]
    assert dataset.captions == [("one", "two"), ("deep",)]
    assert reds(dataset) == [1, 5]
    assert skipped(dataset) == {"x.tar": "duplicate id: a/b"}


def test_repeated_keys_take_the_name_of_their_tar(tmp_path):
    fill(tmp_path, {"00000.tar": tar_bytes(shard(0, 2)), "00001.tar": tar_bytes(shard(1, 2))})
    dataset = open_dataset(tmp_path, need_captions=True)
    assert dataset.ids == ["00000/000000", "00000/000001", "00001/000001", "00001/000002"]
    assert dataset.skipped.count == 0
    assert reds(dataset) == [0, 1, 1, 2]


@pytest.mark.parametrize(("cut", "n"), [(512 + 20, 0), (3 * 512 + 100, 1), (5 * 512, 1), (10 * 512 + 7, 2)])
def test_truncated_tar_keeps_what_can_be_read(tmp_path, cut, n):
    whole = tar_bytes(shard(1, 4))
    fill(tmp_path, {"x.tar": whole[:cut], "y.tar": whole})
    complete = open_dataset(tmp_path / "y.tar", need_captions=False)
    fill(tmp_path, {"00000.tar": tar_bytes([("first.png", picture(9))]), "00001.tar": whole[:cut]})
    dataset = open_dataset(str(tmp_path / "{00000..00001}.tar"), need_captions=False)
    assert dataset.ids == [*complete.ids[:n], "first"]
    assert reds(dataset) == [*range(1, n + 1), 9]
    assert list(skipped(dataset)) == ["00001.tar"]
    assert skipped(dataset)["00001.tar"].startswith("truncated tar")


def test_tar_errors(tmp_path):
    members = tar_bytes(shard(0))
    packed = __import__("gzip").compress(members)
    fill(tmp_path, {"gz.tar": packed, "text.tar": "words " * 500, "zero.tar": b"", "0.tar": members})
    assert "compressed" in error(tmp_path / "gz.tar")
    assert "expected a tar" in error(tmp_path / "text.tar")
    assert "expected" in error(tmp_path / "zero.tar")
    assert "1.tar, found no such file" in error(str(tmp_path / "{0..1}.tar"))
    for braces in ("{1..0}", "{x}", "{0..9999999999}", "{0..9999}{0..9999}"):
        assert "correct" in error(f"{tmp_path}/{braces}.tar")
    assert "without caption" in error(fill(tmp_path, {"b.tar": tar_bytes([("a.png", picture())])}) / "b.tar")


def test_bad_captions_in_tars(tmp_path):
    members = [(f"{name}.png", picture()) for name in "abcd"]
    members += [("a.txt", "ü".encode("latin-1")), ("b.json", "{"), ("c.json", "[]"), ("d.txt", "good")]
    dataset = open_dataset(fill(tmp_path, {"x.tar": tar_bytes(members)}) / "x.tar", need_captions=True)
    assert dataset.ids == ["d"]
    assert skipped(dataset) == {"a": "caption is not UTF-8", "b": "caption is not JSON", "c": "caption is not JSON"}


@pytest.fixture
def memory():
    root = f"memory://{uuid.uuid4().hex}"
    fs = fsspec.filesystem("memory")

    def put(files):
        for name, data in files.items():
            fs.pipe_file(f"{root}/{name}", data if isinstance(data, bytes) else data.encode())
        return root

    return put


def test_remote_is_the_same_as_local(tmp_path, memory):
    sets = {
        "folder": ({f"folder/{name}": data for name, data in FILES.items()}, "folder"),
        "tars": ({"t/0.tar": tar_bytes(shard(0)), "t/1.tar": tar_bytes(shard(3))}, "t/{0..1}.tar"),
        "tar folder": ({"u/0.tar": tar_bytes(shard(0))}, "u"),
        "list": (PICTURES | {"l.jsonl": "\n".join(json.dumps(r) for r in ROWS)}, "l.jsonl"),
        "csv": (PICTURES | {"l.csv": "image,caption\np/a.png,x\n"}, "l.csv"),
    }
    for name, (files, source) in sets.items():
        here = open_dataset(fill(tmp_path / name, files) / source, need_captions=True)
        there = open_dataset(f"{memory(files)}/{source}", need_captions=True)
        assert there.ids == here.ids
        assert there.captions == here.captions
        assert reds(there) == reds(here)
        assert there.digest == here.digest
        assert there.skipped.entries() == here.skipped.entries()


def test_remote_errors(memory):
    root = memory({"empty/readme.md": "x"})
    assert "found no such file or folder" in error(f"{root}/nothing")
    assert "found none" in error(f"{root}/empty", need_captions=False)
    assert "nosuchprotocol" in error("nosuchprotocol://x/a.tar")


def test_fsspec_is_imported_for_urls_only(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert len(open_dataset(fill(tmp_path, FILES), need_captions=True)) == 3


def test_nothing_usable_is_one_line(tmp_path):
    assert "no such file or folder" in error(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "found none" in error(tmp_path / "empty")
    fill(
        tmp_path,
        {"bare/a.png": picture(), "bare/list.csv": "image\n", "w.zip": "x", "n.csv": "a,b\n1,2\n", "e.jsonl": ""},
    )
    assert "found 1 images and no .txt; give the manifest list.csv" in error(tmp_path / "bare")
    os.remove(tmp_path / "bare/list.csv")
    assert "write the caption of a.png to a.txt" in error(tmp_path / "bare")
    assert "w.zip" in error(tmp_path / "w.zip")
    assert "expected a column image" in error(tmp_path / "n.csv")
    assert "found a, b" in error(tmp_path / "n.csv")
    assert "found none" in error(tmp_path / "e.jsonl")
    fill(tmp_path, {"bare/a.txt": b"\xff"})
    assert "found 1 skipped (1 caption is not UTF-8)" in error(tmp_path / "bare")


def test_digest_tells_data_apart(tmp_path):
    fill(tmp_path, FILES)
    digest = open_dataset(tmp_path, need_captions=True).digest
    assert digest == open_dataset(tmp_path, need_captions=True).digest
    assert len(digest) == 64
    fill(tmp_path, {"two.txt": "other"})
    changed = open_dataset(tmp_path, need_captions=True).digest
    fill(tmp_path, {"two.webp": picture(200, size=(50, 50), kind="WEBP")})
    assert len({digest, changed, open_dataset(tmp_path, need_captions=True).digest}) == 3


def test_skip_log(tmp_path):
    log = SkipLog()
    log.write(tmp_path / "x.skipped.jsonl")
    assert log.summary() == ""
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        log.add("b", "oversized: 20000x20000")
        log.add("a\udcff", "unreadable:\nmany lines")
        log.add("빨간", "unreadable: x")
    log.write(tmp_path / "x.skipped.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "x.skipped.jsonl").read_text().splitlines()]
    assert rows == [
        {"id": "a\\udcff", "reason": "unreadable: many lines"},
        {"id": "b", "reason": "oversized: 20000x20000"},
        {"id": "빨간", "reason": "unreadable: x"},
    ]
    assert log.summary() == "3 skipped (2 unreadable, 1 oversized)"
    assert log.count == 3
    again = SkipLog()
    again.load(tmp_path / "x.skipped.jsonl")
    again.load(tmp_path / "absent.jsonl")
    assert again.entries() == log.entries()
    assert len(list(tmp_path.iterdir())) == 1
