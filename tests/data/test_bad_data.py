"""Data sets that are missing, odd or broken: a bad sample is counted and named, a data set that is none refused."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from conftest import run_bad, run_cli, run_ok, write_pictures
from PIL import Image
from stage_runs import reading

from dalle_cli.artifacts import open_artifact

STAGES = ("train-tokenizer", "tokenize", "train-dvae", "train-clip", "encode-images")


@pytest.mark.parametrize("stage", STAGES)
def test_no_such_data(chain, tmp_path, stage):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.md").write_text("no picture")
    (tmp_path / "a.xyz").write_text("no data set")
    for data in ("none", "none.tar", "{00..03}.tar", "none.jsonl", "empty", "notes", "a.xyz", "x" * 5000, "none\n"):
        assert str(tmp_path) in run_bad(*reading(chain, stage, tmp_path / data, tmp_path))
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("stage", ["train-tokenizer", "tokenize", "train-clip"])
def test_a_folder_without_captions(chain, tmp_path, stage):
    folder = write_pictures(tmp_path / "pictures")
    for text in folder.glob("*.txt"):
        text.unlink()
    assert "caption" in run_bad(*reading(chain, stage, folder, tmp_path))
    run_ok(*reading(chain, "encode-images", folder, tmp_path))


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
    result = run_cli(*reading(chain, "tokenize", folder, tmp_path))
    assert result.status == 0
    assert "cut 1 longer than 24 tokens" in result.stderr
    assert "4 skipped (3 without caption, 1 caption is not UTF-8)" in result.stderr
    found = open_artifact(tmp_path / "out.safetensors")
    assert list(found.strings("ids"))[:4] == ["01", "02", "05", "07"]
    assert found.strings("text")[0] == "anull"
    assert found.strings("text")[2] == "빨간 🟥"
    for text in folder.glob("*.txt"):
        text.write_bytes(b"\xe9")
    assert "not UTF-8" in run_bad(*reading(chain, "tokenize", folder, tmp_path))
    assert len(open_artifact(tmp_path / "out.safetensors")) == 20  # what was there stays


def test_what_is_no_file_in_a_folder_of_images(chain, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "p0.json")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "gone.png").symlink_to("/nowhere")
    (folder / "folder.png").mkdir()
    result = run_cli(*reading(chain, "encode-images", folder, tmp_path))
    assert result.status == 0, result
    assert "4 skipped" in result.stderr
    assert "expected " in run_bad(*reading(chain, "encode-images", folder / "pipe.png", tmp_path))
