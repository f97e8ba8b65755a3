"""Drawing and data: each stage on a tiny chain, what it writes, what it says, and on what its result depends."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Chain, run_bad, run_cli, run_ok, write_pictures
from PIL import Image

from dalle_cli import bundle, load
from dalle_cli.artifacts import digest_file, open_artifact, write_artifact
from dalle_cli.data import tokenizer as tokenizers
from dalle_cli.data.augment import center
from dalle_cli.data.datasets import open_dataset
from dalle_cli.models.pixels import from_uint8, to_uint8

PROMPT = "a red circle on white"
CPU = torch.device("cpu")


def array(path, name):
    return np.asarray(open_artifact(path).array(name))


def strings(path, name):
    return list(open_artifact(path).strings(name))


def sample(chain, out, *more, prompts=(PROMPT,)):
    run_ok("sample", *prompts, "-m", chain.model, "-o", out, *more)
    return array(out, "codes")


# Where things are written, and what is said


def test_each_stage_prints_the_path_and_nothing_else(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages = {
        "train-tokenizer": (chain.data, "--set", "tokenizer.vocab_size=260", "-o", "t.json"),
        "tokenize": (chain.data, "-t", chain.tokenizer, "--set", "tokenizer.length=4", "-o", "c.safetensors"),
        "encode-images": (chain.data, "-m", chain.dvae, "-o", "codes"),
        "sample": (PROMPT, "-n", 2, "-m", chain.model),
        "decode": ("a-red-circle-on-white.codes.safetensors", "-m", chain.model),
        "rerank": ("a-red-circle-on-white.images.safetensors", "-m", chain.model, "--keep", 1),
        "show": ("a-red-circle-on-white.best.safetensors",),
        "export": ("a-red-circle-on-white.images.safetensors",),
        "generate": (PROMPT, "-n", 2, "-m", chain.model),
    }
    outputs = ["t.json", "c.safetensors", "codes"]
    outputs += [f"a-red-circle-on-white{end}" for end in (".codes.safetensors", ".images.safetensors")]
    outputs += [f"a-red-circle-on-white{end}" for end in (".best.safetensors", ".png", "", ".png")]
    for (name, arguments), out in zip(stages.items(), outputs, strict=True):
        result = run_cli(name, *arguments)
        assert (result.status, result.stdout) == (0, f"{out}\n"), result.stderr
        assert result.stderr.startswith(f"{out}: ")
        assert "Warning" not in result.stderr
        assert Path(out).exists()
    assert not list(tmp_path.rglob("*.part"))


def test_histories_tell_the_whole_way(chain):
    def stages(path):
        return [entry["stage"] for entry in open_artifact(path).history]

    assert stages(chain.captions) == ["tokenize"]
    assert stages(chain.codes) == ["train-dvae", "encode-images"]
    assert stages(chain.prior) == ["tokenize", "train-dvae", "encode-images", "train-prior"]
    assert stages(chain.best) == [*stages(chain.prior), "sample", "decode", "train-clip", "rerank"]
    text = json.dumps([open_artifact(path).history for path in (chain.prior, chain.best)])
    assert str(chain.root) not in text
    assert str(chain.data) not in text
    last = open_artifact(chain.prior).history[-1]
    assert last["inputs"] == {
        k: open_artifact(p).digest for k, p in (("captions", chain.captions), ("codes", chain.codes))
    }


def test_exit_statuses(chain, tmp_path):
    assert run_cli("--version").status == 0
    assert run_cli("no-such-stage").status == 2
    assert run_cli("sample", "--no-such-option").status == 2
    assert run_cli("sample", PROMPT, "--seed", -1).status == 2
    assert run_cli("sample", PROMPT, "-n", 0, "-m", chain.model).status == 2
    assert run_cli("train-dvae", chain.data).status == 2  # where to?
    assert run_cli("info", tmp_path / "none").status == 1
    shown = run_cli()
    assert (shown.status, "Usage: dalle" in shown.stdout + shown.stderr) == (2, True)


def test_a_bug_keeps_its_traceback(chain, monkeypatch, tmp_path):
    monkeypatch.setattr("dalle_cli.commands.drawing.decode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_cli("decode", chain.drawn, "-m", chain.model, "-o", tmp_path / "x.safetensors")


def test_an_interrupt_is_130(chain, monkeypatch, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dalle_cli.commands.drawing.decode", stop)
    result = run_cli("decode", chain.drawn, "-m", chain.model, "-o", tmp_path / "x.safetensors")
    assert (result.status, result.stdout) == (130, "")
    assert list(tmp_path.iterdir()) == []


# The line of DESIGN 5


def test_the_piped_line(chain, tmp_path):
    line = 'dalle sample "$PROMPT" -n 4 | dalle decode | dalle rerank --keep 2 | dalle show -o radish.png'
    bin_ = Path(sys.executable).parent
    env = {**os.environ, "DALLE_MODEL": str(chain.model), "PROMPT": PROMPT, "PATH": f"{bin_}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "radish.png\n"), done.stderr
    assert Image.open(tmp_path / "radish.png").format == "PNG"
    stem = "a-red-circle-on-white"
    made = {f"{stem}.{kind}.safetensors" for kind in ("codes", "images", "best")} | {"radish.png"}
    assert {p.name for p in tmp_path.iterdir()} == made
    np.testing.assert_array_equal(array(tmp_path / f"{stem}.codes.safetensors", "codes"), array(chain.drawn, "codes"))


def test_a_path_that_is_no_utf8_goes_through_the_pipe(chain, tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.codes.safetensors")
    shutil.copy(chain.drawn, name)
    command = [sys.executable, "-m", "dalle_cli", "decode", "-m", str(chain.model)]
    env = {**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=os.fsencode(name) + b"\n", env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == os.fsencode(tmp_path) + b"/caf\xe9.images.safetensors\n"


def test_piped_input(chain, tmp_path):
    source = shutil.copy(chain.drawn, tmp_path / "x.codes.safetensors")
    out = run_ok("decode", "-m", chain.model, stdin=f"a note\n{source}\n")
    assert out == str(tmp_path / "x.images.safetensors")
    assert Path(out).read_bytes() == chain.images.read_bytes()
    for pipe in ("", "\n", "\0\0", "x" * 5000, "\udcff\n"):
        run_bad("decode", "-m", chain.model, stdin=pipe)


# sample


def test_a_sample_is_a_function_of_seed_prompt_and_index(chain, tmp_path):
    base = sample(chain, tmp_path / "a.safetensors", "-n", 5, "--seed", 3)
    assert len(np.unique(base, axis=0)) > 1
    small = sample(chain, tmp_path / "b.safetensors", "-n", 5, "--seed", 3, "--batch-size", 2)
    np.testing.assert_array_equal(small, base)
    assert digest_file(tmp_path / "b.safetensors") == digest_file(tmp_path / "a.safetensors")
    fewer = sample(chain, tmp_path / "c.safetensors", "-n", 2, "--seed", 3)
    np.testing.assert_array_equal(fewer, base[:2])
    among = sample(chain, tmp_path / "d.safetensors", "-n", 5, "--seed", 3, prompts=("a blue bar on black", PROMPT))
    np.testing.assert_array_equal(among[5:], base)
    assert not np.array_equal(among[:5], base)
    assert not np.array_equal(sample(chain, tmp_path / "e.safetensors", "-n", 5, "--seed", 4), base)


def test_sample_columns(chain, tmp_path):
    out = tmp_path / "a.safetensors"
    sample(chain, out, "-n", 2, "--seed", 7, prompts=("one", "two"))
    found = open_artifact(out, "codes")
    assert array(out, "prompt").tolist() == [0, 0, 1, 1]
    assert array(out, "seed").tolist() == [7] * 4
    assert strings(out, "ids") == ["00000-00000", "00000-00001", "00001-00000", "00001-00001"]
    assert strings(out, "text") == ["one", "one", "two", "two"]
    assert found.config == {"n_vocab": 20, "grid": 4, "encoder": open_artifact(chain.dvae).digest}
    assert array(out, "codes").dtype == np.uint16
    assert array(out, "codes").max() < 20


@pytest.mark.parametrize(
    "setting", [("--temperature", 0.3), ("--temperature", 0), ("--top-k", 1), ("--top-p", 0.2), ("--guidance", 300)]
)
def test_settings_of_sampling_matter(chain, tmp_path, setting):
    base = sample(chain, tmp_path / "a.safetensors", "-n", 4)
    other = sample(chain, tmp_path / "b.safetensors", "-n", 4, *setting)
    assert not np.array_equal(other, base)
    if setting in (("--temperature", 0), ("--top-k", 1)):
        assert (other == other[0]).all()


def test_sample_writes_down_its_settings(chain, tmp_path):
    sample(chain, tmp_path / "a.safetensors", "-n", 1, "--top-k", 5, "--guidance", 2, "--temperature", 0.5)
    options = open_artifact(tmp_path / "a.safetensors").history[-1]["options"]
    assert options == {
        "n": 1, "temperature": 0.5, "top_k": 5, "top_p": 1.0, "guidance": 2.0, "seed": 0, "dtype": "float32"
    }  # fmt: skip


@pytest.mark.parametrize(("name", "ending"), [("sample", ".codes.safetensors"), ("generate", ".png")])
def test_what_is_drawn_is_named_after_the_prompt_or_the_file(chain, tmp_path, monkeypatch, name, ending):
    monkeypatch.chdir(tmp_path)
    Path("My list.txt").write_text("two\n")
    assert run_ok(name, "One!", "Three", "-n", 1, "-m", chain.model) == f"one{ending}"
    assert run_ok(name, "--prompts", "My list.txt", "-n", 1, "-m", chain.model) == f"my-list{ending}"


def test_histories_name_the_dtype_that_auto_came_to(chain, tmp_path):
    for name, source in (("sample", PROMPT), ("decode", chain.drawn), ("rerank", chain.images)):
        made = run_ok(name, source, "-m", chain.model, "--dtype", "auto", "-o", tmp_path / f"{name}.safetensors")
        assert open_artifact(made).history[-1]["options"]["dtype"] in ("float32", "bfloat16")


def test_prompts_from_a_file(chain, tmp_path):
    file = tmp_path / "list.txt"
    file.write_bytes("\ufeffone\r\n\n  two \n빨간\n".encode())
    run_ok("sample", "zero", "--prompts", file, "-n", 1, "-m", chain.model, "-o", tmp_path / "a.safetensors")
    assert strings(tmp_path / "a.safetensors", "text") == ["zero", "one", "two", "빨간"]


def test_long_prompts_are_cut_with_a_warning(chain, tmp_path):
    result = run_cli("sample", "word " * 50, "-n", 1, "-m", chain.model, "-o", tmp_path / "a.safetensors")
    assert result.status == 0
    assert "dalle: warning: 1 prompts are longer than 24 tokens" in result.stderr


# decode and rerank


def test_decode_is_the_dvae(chain):
    dvae = load.dvae(bundle.weights(str(chain.model), "weights.dvae"), CPU)
    codes = torch.from_numpy(array(chain.drawn, "codes").astype(np.int64))
    np.testing.assert_array_equal(array(chain.images, "images"), to_uint8(dvae.decode(codes)).numpy())
    for name in ("ids", "text"):
        assert strings(chain.images, name) == strings(chain.drawn, name)


def test_decode_in_shards_or_batches_is_the_same(chain, tmp_path):
    run_ok("decode", chain.codes, "-m", chain.model, "-o", tmp_path / "one.safetensors")
    run_ok("decode", chain.codes, "-m", chain.model, "-o", tmp_path / "many", "--shard-size", 7, "--batch-size", 3)
    assert len(list((tmp_path / "many").iterdir())) == 4
    np.testing.assert_array_equal(array(tmp_path / "many", "images"), array(tmp_path / "one.safetensors", "images"))
    assert strings(tmp_path / "many", "ids") == strings(chain.codes, "ids")
    assert "text" not in open_artifact(tmp_path / "many")


def test_rerank_orders_each_prompt_by_score(chain, tmp_path):
    sample(chain, tmp_path / "x.codes.safetensors", "-n", 5, prompts=(PROMPT, "a blue bar on black"))
    images = run_ok("decode", tmp_path / "x.codes.safetensors", "-m", chain.model)
    best = Path(run_ok("rerank", images, "-m", chain.model))
    scores, text, ids = array(best, "score"), strings(best, "text"), strings(best, "ids")
    assert text == [PROMPT] * 5 + ["a blue bar on black"] * 5
    for part in (scores[:5], scores[5:]):
        assert (np.diff(part) <= 0).all()
        assert len(np.unique(part)) > 1
    rows = [strings(images, "ids").index(name) for name in ids]
    np.testing.assert_array_equal(array(best, "images"), array(images, "images")[rows])
    assert sorted(rows) == list(range(10))
    kept = Path(run_ok("rerank", images, "-m", chain.model, "--keep", 2, "--batch-size", 3, "-o", tmp_path / "two"))
    assert strings(kept, "ids") == ids[:2] + ids[5:7]
    assert array(kept, "score") == pytest.approx(scores[[0, 1, 5, 6]], abs=1e-6)


def test_scores_are_cosines_of_the_clip(chain):
    clip = load.clip(bundle.weights(str(chain.model), "weights.clip"), CPU)
    bpe = tokenizers.load(chain.tokenizer)
    tokens, lengths, _ = bpe.encode_batch(strings(chain.best, "text"), clip.config.n_text)
    pixels = from_uint8(torch.from_numpy(np.array(array(chain.best, "images"))))
    texts = clip.encode_text(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(lengths.astype(np.int64)))
    own = torch.diagonal(clip.similarity(clip.encode_image(pixels), texts))
    np.testing.assert_allclose(array(chain.best, "score"), own.numpy(), atol=1e-6)


def test_rerank_by_another_prompt(chain, tmp_path):
    other = run_ok(
        "rerank", chain.images, "-m", chain.model, "--prompt", "a blue bar", "-o", tmp_path / "b.safetensors"
    )
    assert set(strings(other, "text")) == {"a blue bar"}
    assert sorted(array(other, "score")) != pytest.approx(sorted(array(chain.best, "score")))
    run_ok("rerank", chain.images, "-m", chain.model, "--prompt", "", "-o", tmp_path / "c.safetensors")


def test_rerank_does_not_replace_its_input(chain, tmp_path):
    source = Path(shutil.copy(chain.best, tmp_path / "x.best.safetensors"))
    assert "over itself" in run_bad("rerank", source, "-m", chain.model, "--keep", 1)
    assert source.read_bytes() == chain.best.read_bytes()


# generate, show, export


def test_generate_is_sample_decode_rerank(chain, tmp_path):
    for name, more in (("a", ()), ("b", ("--batch-size", 3))):
        out = run_ok(
            *("generate", PROMPT, "-n", 4, "--keep", 3, "-m", chain.model, *more),
            *("-o", tmp_path / f"{name}.png", "--images", tmp_path / f"{name}.safetensors"),
        )
        assert out == str(tmp_path / f"{name}.png")
    made = tmp_path / "a.safetensors"
    for column in ("images", "score"):
        np.testing.assert_allclose(array(made, column), array(chain.best, column)[:3], atol=1e-6)
        np.testing.assert_allclose(array(tmp_path / "b.safetensors", column), array(made, column), atol=1e-6)
    assert strings(made, "ids") == strings(chain.best, "ids")[:3]
    shown = run_ok("show", made, "-o", tmp_path / "c.png")
    assert Path(shown).read_bytes() == (tmp_path / "a.png").read_bytes()
    stages = [entry["stage"] for entry in open_artifact(made).history]
    assert stages[-1] == "generate"
    assert set(stages) == {"tokenize", "train-dvae", "encode-images", "train-prior", "train-clip", "sample", "generate"}
    assert max(Counter(stages).values()) == 1


def test_show(chain, tmp_path, monkeypatch):
    result = run_cli("show", chain.best, "-o", tmp_path / "a.png", "--title", "Red", "--terminal")
    assert result.stdout == f"{tmp_path / 'a.png'}\n"
    assert "▀" in result.stderr or "▄" in result.stderr
    whole = Image.open(tmp_path / "a.png")
    run_ok("show", chain.best, "-o", tmp_path / "a.png", "--columns", 1)  # a PNG is replaced
    assert Image.open(tmp_path / "a.png").height > whole.height
    result = run_cli("show", chain.best, "-o", tmp_path / "b.png", "--most", 1)
    assert "pictures 1, of 4" in result.stderr
    (tmp_path / "note.png").write_text("not a picture")
    assert "--force" in run_bad("show", chain.best, "-o", tmp_path / "note.png")
    assert "--force" in run_bad("generate", PROMPT, "-n", 1, "-m", chain.model, "-o", tmp_path / "note.png")
    assert (tmp_path / "note.png").read_text() == "not a picture"
    run_ok("show", chain.best, "-o", tmp_path / "note.png", "--force")


def test_export_is_a_data_set_again(chain, tmp_path):
    folder = Path(run_ok("export", chain.best, "-o", tmp_path / "red"))
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == strings(chain.best, "ids")
    assert {line["caption"] for line in lines} == {PROMPT}
    assert [line["score"] for line in lines] == pytest.approx(array(chain.best, "score").tolist(), abs=1e-6)
    data = open_dataset(folder / "manifest.jsonl", need_captions=True)
    pictures = {name: np.asarray(data.read(i)) for i, name in enumerate(data.ids)}
    for name, pixels in zip(strings(chain.best, "ids"), array(chain.best, "images"), strict=True):
        np.testing.assert_array_equal(pictures[name], pixels.transpose(1, 2, 0))
    again = run_ok("encode-images", folder, "-m", chain.model, "-o", tmp_path / "again")  # the folder is enough
    captions = run_ok("tokenize", folder, "-t", chain.tokenizer, "-o", tmp_path / "captions.safetensors")
    assert set(strings(captions, "ids")) == set(strings(again, "ids")) == set(strings(chain.best, "ids"))
    dvae = load.dvae(bundle.weights(str(chain.model), "weights.dvae"), CPU)
    codes = dict(zip(strings(again, "ids"), array(again, "codes"), strict=True))
    for name, pixels in zip(strings(chain.best, "ids"), array(chain.best, "images"), strict=True):
        expected = dvae.encode(from_uint8(torch.from_numpy(pixels[None].copy())))
        np.testing.assert_array_equal(codes[name], expected[0].numpy())


def test_export_again_and_beside_other_things(chain, tmp_path):
    folder = Path(run_ok("export", chain.images, "-o", tmp_path / "red"))
    one = run_ok("rerank", chain.images, "-m", chain.model, "--keep", 1, "-o", tmp_path / "one.safetensors")
    run_ok("export", one, "-o", folder)
    assert sorted(p.name for p in folder.iterdir()) == ["000000.png", "manifest.jsonl"]
    mine = write_pictures(tmp_path / "mine")
    shutil.copy(mine / "00.png", mine / "000000.png")
    (mine / "manifest.jsonl").write_text('{"image": "000000.png", "caption": "mine"}\n')
    before = {p.name: p.read_bytes() for p in mine.iterdir()}
    assert "--force" in run_bad("export", chain.images, "-o", mine)
    assert {p.name: p.read_bytes() for p in mine.iterdir()} == before
    (tmp_path / "file").write_text("")
    run_bad("export", chain.images, "-o", tmp_path / "file")


# tokenize and encode-images


def test_captions_hold_what_the_tokenizer_makes(chain):
    bpe = tokenizers.load(chain.tokenizer)
    texts = strings(chain.captions, "text")
    assert strings(chain.captions, "ids") == [f"{i:02d}" for i in range(24)]
    assert texts[0] == "a red circle on white"
    tokens, lengths, _ = bpe.encode_batch(texts, 24)
    np.testing.assert_array_equal(array(chain.captions, "tokens"), tokens)
    np.testing.assert_array_equal(array(chain.captions, "lengths"), lengths)
    assert open_artifact(chain.captions).config == {"n_vocab": bpe.vocab_size, "n_text": 24, "tokenizer": bpe.digest}


def test_several_captions_of_a_picture_are_rows_of_one_id(chain, data, tmp_path):
    rows = [{"image": str(data / f"{i:02d}.png"), "caption": [f"one {i}", f"two {i}"], "id": f"p{i}"} for i in range(3)]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run_ok(
        "tokenize", manifest, "-t", chain.tokenizer, "--set", "tokenizer.length=24", "-o", tmp_path / "c.safetensors"
    )
    assert strings(out, "ids") == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert strings(out, "text")[:2] == ["one 0", "two 0"]


def test_what_is_done_is_said_to_be_done(chain, tmp_path):
    captions = shutil.copy(chain.captions, tmp_path / "c.safetensors")
    more = ("-t", chain.tokenizer, "--config", chain.recipe)
    before = digest_file(captions)
    assert "captions all there already" in run_cli("tokenize", chain.data, *more, "-o", captions).stderr
    assert digest_file(captions) == before
    assert "captions 24" in run_cli("tokenize", chain.data, *more, "-o", tmp_path / "new.safetensors").stderr
    images = shutil.copy(chain.images, tmp_path / "i.safetensors")
    decode = ("decode", chain.drawn, "-m", chain.model, "-o", images)
    assert "pictures all there already" in run_cli(*decode).stderr


def test_tokenize_counts_what_it_cuts(chain, tmp_path):
    result = run_cli(
        "tokenize", chain.data, "-t", chain.tokenizer, "--set", "tokenizer.length=2", "-o", tmp_path / "c.safetensors"
    )
    assert "cut 24 longer than 2 tokens" in result.stderr
    assert array(tmp_path / "c.safetensors", "lengths").tolist() == [2] * 24


def test_codes_are_the_dvae_of_each_picture(chain, data):
    dvae = load.dvae(bundle.weights(str(chain.dvae), "weights.dvae"), CPU)
    pictures = open_dataset(data, need_captions=False)
    pixels = np.stack([center(pictures.read(i), 16).transpose(2, 0, 1) for i in range(24)])
    np.testing.assert_array_equal(
        array(chain.codes, "codes"), dvae.encode(from_uint8(torch.from_numpy(pixels))).numpy()
    )
    assert strings(chain.codes, "ids") == pictures.ids
    assert len(list(chain.codes.iterdir())) == 3


@pytest.mark.parametrize("options", [(), ("--augment", "prior", "--repeats", 2, "--seed", 5)], ids=["plain", "repeats"])
def test_encode_images_resumes_at_the_missing_shard(chain, tmp_path, options):
    def encode(out, *more):
        return run_cli("encode-images", chain.data, "-m", chain.dvae, "--shard-size", 10, *options, "-o", out, *more)

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert encode(whole, "--batch-size", 4, "--workers", 0).status == 0
    assert encode(out).status == 0
    names = sorted(p.name for p in whole.iterdir())
    before = {name: (out / name).stat().st_ino for name in names}
    for gone in (names[0], names[-1]):
        (out / gone).unlink()
    assert encode(out).status == 0
    after = {name: (out / name).stat().st_ino for name in names}
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes()
        if name not in (names[0], names[-1]):
            assert after[name] == before[name]  # the very same file
    assert "all there already" in encode(out).stderr
    assert {name: (out / name).stat().st_ino for name in names} == after


def test_repeats_are_crops_of_their_own(chain, tmp_path):
    big = write_pictures(tmp_path / "big", size=40)
    out = run_ok(
        "encode-images", big, "-m", chain.dvae, "--augment", "prior", "--repeats", 3, "-o", tmp_path / "c.safetensors"
    )
    codes, ids = array(out, "codes"), strings(out, "ids")
    assert ids == [f"{i:02d}" for i in range(24)] * 3
    assert not np.array_equal(codes[:24], codes[24:48])
    other = run_ok(
        "encode-images", big, "-m", chain.dvae, "--augment", "prior", "--seed", 1, "-o", tmp_path / "d.safetensors"
    )
    assert not np.array_equal(array(other, "codes"), codes[:24])


def test_broken_pictures_are_listed_and_stop_nothing(chain, tmp_path):
    mixed = write_pictures(tmp_path / "mixed")
    (mixed / "05.png").write_bytes((mixed / "05.png").read_bytes()[:50])
    (mixed / "13.png").write_bytes(b"")
    (mixed / "24.png").write_text("prose")
    out = tmp_path / "codes"

    def encode():
        return run_cli("encode-images", mixed, "-m", chain.dvae, "--shard-size", 10, "-o", out)

    result = encode()
    assert result.status == 0
    assert "3 skipped (3 unreadable)" in result.stderr
    listed = [json.loads(line) for line in (tmp_path / "codes.skipped.jsonl").read_text().splitlines()]
    assert [row["id"] for row in listed] == ["05", "13", "24"]
    good = [i for i in range(24) if i not in (5, 13)]
    assert strings(out, "ids") == [f"{i:02d}" for i in good]
    np.testing.assert_array_equal(array(out, "codes"), array(chain.codes, "codes")[good])
    (out / "00001.safetensors").unlink()  # the list of a resumed run still names what lies in the other shards
    assert encode().status == 0
    assert len((tmp_path / "codes.skipped.jsonl").read_text().splitlines()) == 3
    write_pictures(mixed)
    (mixed / "24.png").unlink()
    assert encode().status == 0  # mended: other data, so all is new, and nothing is listed
    assert not (tmp_path / "codes.skipped.jsonl").exists()
    np.testing.assert_array_equal(array(out, "codes"), array(chain.codes, "codes"))


def test_filters_of_the_recipe_are_heeded(chain, tmp_path):
    out = run_ok(
        "encode-images", chain.data, "-m", chain.dvae, "--set", "data.max_pixels=100", "-o", tmp_path / "c.safetensors"
    )
    assert len(open_artifact(out)) == 0
    result = run_cli(
        *("tokenize", chain.data, "-t", chain.tokenizer, "--set", "data.min_caption_chars=21"),
        *("-o", tmp_path / "t.safetensors"),
    )
    assert "short caption" in result.stderr
    assert all(len(text) >= 21 for text in strings(tmp_path / "t.safetensors", "text"))


# The whole


def test_twice_the_same_chain_is_the_same_bytes(chain, data, recipe, tmp_path):
    again = Chain(tmp_path, data, recipe).make()
    names = [p.relative_to(chain.root) for p in chain.artifacts()]
    assert [p.relative_to(tmp_path) for p in again.artifacts()] == names
    assert len(names) == 11
    for name in names:
        assert (tmp_path / name).read_bytes() == (chain.root / name).read_bytes(), name


def test_bfloat16_everywhere(chain, data, recipe, tmp_path):
    more = ("--config", recipe, "--dtype", "bfloat16", "--set")
    run_ok("train-dvae", data, *more, "dvae.train.steps=2", "-o", tmp_path / "dvae.safetensors")
    shutil.copy(chain.tokenizer, tmp_path)
    run_ok("encode-images", data, "-m", tmp_path, "--dtype", "bfloat16", "-o", tmp_path / "codes")
    captions = (chain.captions, tmp_path / "codes")
    run_ok("train-prior", *captions, *more, "prior.train.steps=2", "-o", tmp_path / "prior.safetensors")
    run_ok("train-clip", data, "-t", chain.tokenizer, *more, "clip.train.steps=2", "-o", tmp_path / "clip.safetensors")
    run_ok("generate", PROMPT, "-n", 2, "-m", tmp_path, "--dtype", "bfloat16", "-o", tmp_path / "a.png")
    assert open_artifact(tmp_path / "prior.safetensors").history[-1]["options"]["dtype"] == "bfloat16"


def test_info(chain):
    text = run_ok("info", chain.prior)
    assert "weights of a prior over codes" in text
    assert "model.n_embd = 16" in text
    assert "made by tokenize > train-dvae > encode-images > train-prior" in text
    about = json.loads(run_ok("info", chain.prior, "--json"))
    prior = load.prior(open_artifact(chain.prior), CPU)
    assert about["parameters"] == sum(t.numel() for t in prior.state_dict().values())
    assert (about["kind"], about["rows"]) == ("weights.prior.codes", None)
    about = json.loads(run_ok("info", chain.codes, "--json"))
    assert (about["rows"], about["shards"]) == (24, 3)
    assert about["tensors"]["codes"] == {"dtype": "U16", "shape": [24, 4, 4]}
    assert about["bytes"] == sum(p.stat().st_size for p in chain.codes.iterdir())
    lines = run_ok("info", chain.best, "--history").splitlines()
    assert [line.split()[0] for line in lines][-2:] == ["train-clip", "rerank"]
    assert "keep=0" in lines[-1]
    assert json.loads(run_ok("info", chain.best, "--history", "--json"))["history"][0]["stage"] == "tokenize"


def test_a_bundle_with_two_of_a_kind_is_asked_about(chain, tmp_path):
    shutil.copytree(chain.model, tmp_path / "model", ignore=shutil.ignore_patterns("*.run"))
    shutil.copy(chain.dvae, tmp_path / "model/other.safetensors")
    error = run_bad("decode", chain.drawn, "-m", tmp_path / "model", "-o", tmp_path / "x.safetensors")
    assert "dvae.safetensors, other.safetensors" in error
    run_ok("decode", chain.drawn, "-m", tmp_path / "model/other.safetensors", "-o", tmp_path / "x.safetensors")


def test_pictures_of_another_size_are_scored(chain, tmp_path):
    columns = {"images": np.zeros((2, 3, 24, 24), np.uint8), "ids": ["a", "b"], "text": ["x", "y"]}
    path = write_artifact(tmp_path / "i.safetensors", "images", columns, {}, [])
    run_ok("rerank", path, "-m", chain.model)


def test_a_prior_in_training_draws_its_captions(chain):
    """The dVAE lies beside the prior, so that each validation leaves a picture, the same for the same weights."""
    from PIL import Image

    sheets = sorted(chain.prior.with_name("prior.run").glob("samples/*.png"))
    assert sheets
    with Image.open(sheets[-1]) as picture:
        assert min(picture.size) > 32
