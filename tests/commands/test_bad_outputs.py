"""Places that cannot be written to, full disks and Ctrl-C: nothing that was there is lost."""

import builtins
import io
import shutil
import signal
import subprocess
import time

import pytest
from conftest import run_bad, run_ok, start
from stage_runs import reading

from dalle_cli.artifacts import open_artifact


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
            assert "o space left" in run_bad(*reading(chain, stage, chain.data, disk))
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

    original = builtins.open
    (tmp_path / "secret.toml").write_text("")
    monkeypatch.setattr(io, "open", refuse)
    assert "Permission denied" in run_bad(
        "train-dvae", chain.data, "--config", tmp_path / "secret.toml", "-o", tmp_path / "x.safetensors"
    )


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
