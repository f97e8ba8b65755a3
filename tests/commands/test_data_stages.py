"""Stages that read a data set, tokenize and encode-images: what they write, resume, list and leave out."""

import json
import shutil

import numpy as np
import pytest
import torch
from artifact_files import array, strings
from conftest import run_cli, run_ok, write_pictures

from dalle_cli.artifacts import digest_file, open_artifact
from dalle_cli.data import tokenizer as tokenizers
from dalle_cli.data.augment import center
from dalle_cli.data.datasets import open_dataset
from dalle_cli.hub import bundles
from dalle_cli.models.pixels import from_uint8
from dalle_cli.pipelines import loading

CPU = torch.device("cpu")


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
    assert "images all there already" in run_cli(*decode).stderr


def test_tokenize_counts_what_it_cuts(chain, tmp_path):
    result = run_cli(
        "tokenize", chain.data, "-t", chain.tokenizer, "--set", "tokenizer.length=2", "-o", tmp_path / "c.safetensors"
    )
    assert "cut 24 longer than 2 tokens" in result.stderr
    assert array(tmp_path / "c.safetensors", "lengths").tolist() == [2] * 24


def test_codes_are_the_dvae_of_each_picture(chain, data):
    dvae = loading.dvae(bundles.weights(str(chain.dvae), "weights.dvae"), CPU)
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
    long = [text for text in strings(chain.captions, "text") if len(text) >= 21]
    assert strings(tmp_path / "t.safetensors", "text") == long != []
