"""Sampling: sample, decode, rerank, generate, show and export on a tiny chain, and what each result depends on."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from artifact_files import array, strings
from conftest import run_bad, run_cli, run_ok, write_pictures
from PIL import Image

from dalle_cli.artifacts import digest_file, open_artifact, write_artifact
from dalle_cli.data import tokenizer as tokenizers
from dalle_cli.data.datasets import open_dataset
from dalle_cli.hub import bundles
from dalle_cli.models.pixels import from_uint8, to_uint8
from dalle_cli.pipelines import loading

PROMPT = "a red circle on white"
CPU = torch.device("cpu")


def sample(chain, out, *more, prompts=(PROMPT,)):
    run_ok("sample", *prompts, "-m", chain.model, "-o", out, *more)
    return array(out, "codes")


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
def test_what_is_sampled_is_named_after_the_prompt_or_the_file(chain, tmp_path, monkeypatch, name, ending):
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
    assert "dalle: warning: prompts of more than 24 tokens, which were cut: 1" in result.stderr


# decode and rerank


def test_decode_is_the_dvae(chain):
    dvae = loading.dvae(bundles.weights(str(chain.model), "weights.dvae"), CPU)
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
    clip = loading.clip(bundles.weights(str(chain.model), "weights.clip"), CPU)
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


def test_images_of_another_size_are_scored(chain, tmp_path):
    columns = {"images": np.zeros((2, 3, 24, 24), np.uint8), "ids": ["a", "b"], "text": ["x", "y"]}
    path = write_artifact(tmp_path / "i.safetensors", "images", columns, {}, [])
    run_ok("rerank", path, "-m", chain.model)


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
    assert "images 1, of 4" in result.stderr
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
    dvae = loading.dvae(bundles.weights(str(chain.model), "weights.dvae"), CPU)
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
