"""One publication as a folder, a tar, a compressed tar: the same files, the same bundle, byte by byte."""

import gzip
import io
import os
import shutil
import tarfile

import pytest
import torch
from conftest import run_bad, run_ok
from planted_publication import FILES, IMPORTER, publish
from safetensors.torch import load_file

from dalle_cli.artifacts import digest_bytes, digest_file, open_artifact
from dalle_cli.errors import DalleError
from dalle_cli.importing import known
from dalle_cli.importing.source import CombinedSource, open_source, size_in_words


@pytest.fixture(scope="module")
def published(chain, tmp_path_factory):
    return publish(chain.model, tmp_path_factory.mktemp("published"))


@pytest.fixture(autouse=True)
def only_planted(monkeypatch):
    monkeypatch.setattr(known, "importers", lambda: iter([IMPORTER]))


def tar_of(folder, path, mode, top=""):
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:
        tar.add(folder, top or ".")
    return path


def sources(published, folder):
    """The publication in every form that a person may have it in."""
    return {
        "folder": published,
        "tar": tar_of(published, folder / "a.tar", "w"),
        "tar with a folder": tar_of(published, folder / "b.tar", "w", "1.3B"),
        "tar.gz": tar_of(published, folder / "c.tar.gz", "w:gz", "1.3B"),
        "tar.gz by another name": tar_of(published, folder / "d.bin", "w:gz"),
    }


def bundle(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_form_gives_the_same_files(published, tmp_path):
    for name, path in sources(published, tmp_path).items():
        source = open_source(str(path), tmp_path / "scratch")
        expected = {p.relative_to(published).as_posix(): p for p in published.rglob("*") if p.is_file()}
        assert source.files == {name: path.stat().st_size for name, path in expected.items()}, name
        for file, place in expected.items():
            assert source.data(file) == place.read_bytes()
            assert source.digest(file) == digest_file(place)
        assert source.tensors(FILES["prior"]) is source.tensors(FILES["prior"])
        assert source.origin(FILES["prior"]) == ("", "")
        shutil.rmtree(tmp_path / "scratch", ignore_errors=True)


def test_every_form_gives_the_same_bundle(published, tmp_path):
    (tmp_path / "in").mkdir()
    made = []
    for i, path in enumerate(sources(published, tmp_path / "in").values()):
        run_ok("import", path, "-o", tmp_path / str(i))
        made.append(bundle(tmp_path / str(i)))
    assert all(files == made[0] for files in made)
    assert sorted(p.name for p in tmp_path.iterdir()) == [*map(str, range(len(made))), "in"]


def test_a_tar_is_read_where_it_is(published, tmp_path):
    """Nothing is unpacked: the tensors are views of the archive."""
    path = tar_of(published, tmp_path / "a.tar", "w")
    source = open_source(str(path), tmp_path / "scratch")
    source.tensors(FILES["clip"]).read("net.logit_scale")
    assert os.listdir(tmp_path) == ["a.tar"]


def test_one_file_alone(published, tmp_path):
    source = open_source(str(published / FILES["prior"]), tmp_path)
    assert list(source.files) == ["pytorch_model.bin"]
    assert source.tensors("pytorch_model.bin").shapes
    with pytest.raises(DalleError, match=r"expected other\.json in .*, found pytorch_model\.bin"):
        source.json("other.json")


def test_hidden_files_are_left_and_links_followed_as_in_a_hub_cache(published, tmp_path):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (tmp_path / "blob").write_text('{"a": 1}')
    (folder / "config.json").symlink_to(tmp_path / "blob")
    (folder / "gone.json").symlink_to(tmp_path / "nowhere")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").touch()
    (folder / ".hidden").touch()
    source = open_source(str(folder), tmp_path)
    assert source.files == {"config.json": 8}
    assert source.json("config.json") == {"a": 1}


@pytest.mark.parametrize("text", ["[1]", "{", "{'a': 1}", "\xff", "[" * 100_000, ""])
def test_json_that_is_no_object(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DalleError, match=r"expected a JSON object, found something else in config\.json"):
        open_source(str(tmp_path / "config.json"), tmp_path).json("config.json")


def test_small_files_have_a_bound(tmp_path):
    with open(tmp_path / "vocab.json", "wb") as file:
        file.truncate((1 << 26) + 1)
    source = open_source(str(tmp_path), tmp_path)
    with pytest.raises(DalleError, match=r"expected at most 67,108,864 bytes .*, found 67,108,865"):
        source.json("vocab.json")
    assert source.data("vocab.json", 1 << 27)[:2] == b"\0\0"


def test_several_sources_as_one(tmp_path):
    for folder, names in (("a", ("x", "both")), ("b", ("y", "both"))):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text(folder)
    a, b = (open_source(str(tmp_path / name), tmp_path) for name in "ab")
    b.repository, b.revision = "me/more", "f" * 40
    whole = CombinedSource([a, b])
    assert sorted(whole.files) == ["both", "more/both", "more/y", "x", "y"]
    assert [whole.data(name) for name in ("x", "y", "both", "more/both")] == [b"a", b"b", b"a", b"b"]
    assert whole.digest("more/both") == digest_bytes(b"b")
    assert [whole.origin(name) for name in ("x", "more/y")] == [("", ""), ("me/more", "f" * 40)]
    assert CombinedSource([a], ("x",)).files == {"both": 1}
    with pytest.raises(DalleError, match="expected gone in"):
        whole.fetch(["gone"])


def test_a_compressed_tar_of_something_else(tmp_path):
    for name, data in (("a", gzip.compress(b"hello")), ("b", gzip.compress(bytes(10_000)))):
        (tmp_path / name).write_bytes(data)
        run_bad("import", tmp_path / name, "-o", tmp_path / "out")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as tar:
        tar.addfile(tarfile.TarInfo("planted.json"))
    (tmp_path / "c.tar.xz").write_bytes(stream.getvalue())
    assert "known publication" in run_bad("import", tmp_path / "c.tar.xz", "-o", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c.tar.xz"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(published, tmp_path, dtype):
    """Matrices in the dtype; vectors, among them means and deviations, are never rounded."""
    run_ok("import", published, "-o", tmp_path / "plain")
    run_ok("import", published, "--dtype", dtype, "-o", tmp_path / "cast")
    for name in ("prior", "dvae", "clip"):
        plain, cast = (load_file(str(tmp_path / folder / f"{name}.safetensors")) for folder in ("plain", "cast"))
        for key, tensor in plain.items():
            wanted = getattr(torch, dtype) if tensor.ndim >= 2 and tensor.is_floating_point() else tensor.dtype
            assert torch.equal(cast[key], tensor.to(wanted)), key
            assert cast[key].dtype == wanted
    assert open_artifact(tmp_path / "cast" / "clip.safetensors").history[0]["options"]["dtype"] == dtype


def test_sizes_in_words():
    assert [size_in_words(n) for n in (12, 34_500, 1_700_000, 4_090_000_000)] == [
        "12 bytes", "34.5 kB", "1.7 MB", "4.1 GB",
    ]  # fmt: skip
