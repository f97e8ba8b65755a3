"""Writing artifacts is all or nothing, shard by shard too, and replaces nothing else."""

import errno
import subprocess

import numpy as np
import pytest
import torch
from artifact_files import CONFIG, ENTRY, codes, write_codes

from dalle_cli.artifacts import ShardWriter, open_artifact, write_artifact
from dalle_cli.artifacts.container import replace_file
from dalle_cli.artifacts.weights import save_tensors
from dalle_cli.errors import DalleError

# Shard by shard


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
