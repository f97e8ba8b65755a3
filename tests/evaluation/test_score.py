"""log p(codes | caption) of codes, pictures and data sets, and pictures ranked by it."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from artifact_files import array, strings
from conftest import run_bad, run_cli, run_ok
from PIL import Image

from dalle_cli.artifacts import open_artifact, write_artifact
from dalle_cli.data import tokenizer as tokenizers
from dalle_cli.models.pixels import from_uint8
from dalle_cli.pipelines import loading, scoring
from reference import likelihood as reference

CPU = torch.device("cpu")
PROMPTS = ("a red circle on white", "a blue bar on black")


def score(chain, source, out, *more, model=None):
    return run_ok("score", source, "-m", model or chain.model, "-o", out, *more)


@pytest.fixture(scope="module")
def drawn(chain, tmp_path_factory):
    """Five candidates of each of two prompts."""
    path = tmp_path_factory.mktemp("drawn") / "x.codes.safetensors"
    run_ok("sample", *PROMPTS, "-n", 5, "-m", chain.model, "-o", path)
    return path


@pytest.fixture(scope="module")
def pictures(chain, drawn):
    return run_ok("decode", drawn, "-m", chain.model)


@pytest.fixture(scope="module")
def planted(chain, tmp_path_factory):
    """A bundle whose prior gives code k the share 2**-k, roughly, whatever stands before it; and ln of these shares."""
    model = tmp_path_factory.mktemp("planted") / "model"
    shutil.copytree(chain.model, model, ignore=shutil.ignore_patterns("*.run"))
    prior = open_artifact(chain.prior)
    tensors = {name: np.array(prior.headers[0].map(name)) for name in prior.headers[0].tensors}
    tensors["image_head.weight"] *= 0
    tensors["image_head.bias"] = (-math.log(2) * np.arange(20)).astype(np.float32)
    write_artifact(model / "prior.safetensors", prior.kind, tensors, prior.config, prior.history)
    shares = 2.0 ** -np.arange(20)
    return model, np.log(shares / shares.sum())


def encoded(chain, images):
    dvae = loading.dvae(open_artifact(chain.dvae), CPU)
    return dvae.encode(from_uint8(torch.from_numpy(np.array(images)))).numpy()


# ---- what the numbers are


def test_scores_of_a_planted_prior_are_known(chain, planted, drawn, pictures, tmp_path):
    model, known = planted
    made = score(chain, drawn, tmp_path / "a", model=model)
    expected = known[array(drawn, "codes").astype(int)].sum((1, 2))
    np.testing.assert_allclose(array(made, "score"), expected, rtol=1e-6)
    assert expected.std() > 1
    made = score(chain, pictures, tmp_path / "b", model=model)
    again = encoded(chain, array(pictures, "images"))
    np.testing.assert_allclose(array(made, "score"), known[again].sum((1, 2)), rtol=1e-6)
    made = score(chain, drawn, tmp_path / "c", "--by", "contrast", model=model)  # no caption matters to it
    np.testing.assert_allclose(array(made, "score"), 0, atol=1e-4)


def test_scores_are_those_of_a_slow_twin(chain, drawn, tmp_path):
    prior = loading.prior(open_artifact(chain.prior), CPU)
    weights = {name: value.double() for name, value in prior.state_dict().items()}
    tokens, lengths, _ = tokenizers.load(chain.tokenizer).encode_batch(list(PROMPTS), prior.config.n_text)
    made = score(chain, drawn, tmp_path / "a")
    for row, of in ((0, 0), (9, 1)):
        codes = array(drawn, "codes")[row].tolist()
        _, nats = reference.costs(tokens[of].tolist(), int(lengths[of]), codes, weights, vars(prior.config))
        assert array(made, "score")[row] == pytest.approx(-sum(nats), rel=1e-5)


def test_contrast_is_the_score_less_that_without_a_caption(chain, drawn, tmp_path):
    own = array(score(chain, drawn, tmp_path / "a"), "score")
    null = array(score(chain, drawn, tmp_path / "b", "--prompt", ""), "score")  # as short as none
    contrast = array(score(chain, drawn, tmp_path / "c", "--by", "contrast"), "score")
    np.testing.assert_allclose(contrast, own - null, atol=1e-4)
    assert np.abs(contrast).max() > 1e-3
    other = array(score(chain, drawn, tmp_path / "d", "--prompt", PROMPTS[1]), "score")
    np.testing.assert_allclose(other[5:], own[5:], rtol=1e-6)
    assert (other[:5] != own[:5]).all()


def test_batches_are_of_any_size(chain, drawn, tmp_path):
    made = [array(score(chain, drawn, tmp_path / str(n), "--batch-size", n), "score") for n in (1, 3, 64)]
    for other in made[1:]:
        np.testing.assert_allclose(other, made[0], rtol=1e-6)


def test_bfloat16_is_near(chain, drawn, tmp_path):
    exact = array(score(chain, drawn, tmp_path / "a"), "score")
    made = score(chain, drawn, tmp_path / "b", "--dtype", "bfloat16")
    np.testing.assert_allclose(array(made, "score"), exact, rtol=0.02)
    assert open_artifact(made).history[-1]["options"]["dtype"] == "bfloat16"


# ---- what is written


def test_codes_stay_codes(chain, drawn, tmp_path):
    made = score(chain, drawn, tmp_path / "a")
    found = open_artifact(made, "codes")
    for name in ("codes", "prompt", "seed"):
        assert array(made, name).tobytes() == array(drawn, name).tobytes()
    assert strings(made, "ids") == strings(drawn, "ids")
    assert strings(made, "text") == strings(drawn, "text")
    assert found.config == open_artifact(drawn).config
    entry = found.history[-1]
    assert (entry["stage"], entry["options"]) == ("score", {"by": "prior", "prompt": None, "dtype": "float32"})
    assert entry["inputs"] == {"codes": open_artifact(drawn).digest, "prior": open_artifact(chain.prior).digest}
    plain = run_ok("decode", drawn, "-m", chain.model, "-o", tmp_path / "b")
    scored = run_ok("decode", made, "-m", chain.model, "-o", tmp_path / "c")
    assert array(scored, "images").tobytes() == array(plain, "images").tobytes()


def test_images_stay_images(chain, pictures, tmp_path):
    made = score(chain, pictures, tmp_path / "a", "--prompt", "a green bar")
    assert array(made, "images").tobytes() == array(pictures, "images").tobytes()
    assert strings(made, "ids") == strings(pictures, "ids")
    assert set(strings(made, "text")) == {"a green bar"}
    inputs = {"images": pictures, "prior": chain.prior, "dvae": chain.dvae}
    expected = {name: open_artifact(path).digest for name, path in inputs.items()}
    assert open_artifact(made, "images").history[-1]["inputs"] == expected
    run_ok("show", made, "-o", tmp_path / "a.png")
    ranked = run_ok("rerank", made, "-m", chain.model, "-o", tmp_path / "b")  # whose own scores stand there then
    assert (array(ranked, "score") <= 1).all()


def test_a_data_set_becomes_codes(chain, tmp_path):
    folder = shutil.copytree(chain.data, tmp_path / "data")
    (folder / "03.png").write_text("broken")
    (folder / "05.txt").write_text("first\nsecond\n")
    Image.open(folder / "07.png").resize((37, 21)).save(folder / "07.png")
    made = score(chain, folder, tmp_path / "a.safetensors", "--batch-size", 5)
    own = run_ok("encode-images", folder, "-m", chain.dvae, "-o", tmp_path / "own.safetensors")
    assert strings(made, "ids") == strings(own, "ids")
    assert len(strings(made, "ids")) == 23
    assert array(made, "codes").tobytes() == array(own, "codes").tobytes()
    assert array(made, "codes").dtype == np.uint16
    assert open_artifact(made, "codes").config == open_artifact(own).config
    texts = strings(made, "text")
    assert texts[strings(made, "ids").index("05")] == "first"
    assert texts[0] == (folder / "00.txt").read_text().strip()
    assert json.loads((tmp_path / "a.skipped.jsonl").read_text())["id"] == "03"
    again = score(chain, made, tmp_path / "b.safetensors")
    np.testing.assert_allclose(array(again, "score"), array(made, "score"), rtol=1e-6)
    (folder / "00.txt").unlink()  # then no caption is asked for
    made = score(chain, folder, tmp_path / "c.safetensors", "--prompt", "x")
    assert set(strings(made, "text")) == {"x"}
    assert len(strings(made, "text")) == 23


def test_shards_and_what_is_there_already(chain, drawn, tmp_path):
    whole = score(chain, drawn, tmp_path / "one.safetensors")
    parts = score(chain, drawn, tmp_path / "many", "--shard-size", 4)
    assert len(list((tmp_path / "many").iterdir())) == 3
    np.testing.assert_allclose(array(parts, "score"), array(whole, "score"), rtol=1e-6)
    before = {path.name: path.read_bytes() for path in (tmp_path / "many").iterdir()}
    (tmp_path / "many/00001.safetensors").unlink()
    score(chain, drawn, tmp_path / "many", "--shard-size", 4)
    assert {path.name: path.read_bytes() for path in (tmp_path / "many").iterdir()} == before
    from_parts = score(chain, parts, tmp_path / "again.safetensors")
    np.testing.assert_allclose(array(from_parts, "score"), array(whole, "score"), rtol=1e-6)


def test_the_path_or_json_on_stdout(chain, drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(drawn, "x.codes.safetensors")
    result = run_cli("score", "-m", chain.model, stdin="x.codes.safetensors\n")
    assert result.stdout == "x.scored.safetensors\n"
    assert "images 10, mean -" in result.stderr
    told = json.loads(run_ok("score", "x.codes.safetensors", "-m", chain.model, "--json"))
    scores = array(tmp_path / "x.scored.safetensors", "score")
    assert (told["stage"], told["by"], told["images"], told["codes"]) == ("score", "prior", 10, 16)
    assert [row["score"] for row in told["rows"]] == scores.tolist()
    assert [row["id"] for row in told["rows"]] == strings(drawn, "ids")
    assert told["mean"] == pytest.approx(scores.astype(float).mean())
    assert told["best"] == scores.max()


def test_no_rows(chain, drawn, tmp_path):
    config = open_artifact(drawn).config
    columns = {"codes": np.zeros((0, 4, 4), np.uint16), "ids": [], "text": []}
    none = write_artifact(tmp_path / "none", "codes", columns, config, [])
    assert len(open_artifact(score(chain, none, tmp_path / "out"))) == 0


def test_a_long_caption_is_cut_with_one_warning(chain, drawn, tmp_path):
    more = ("--prompt", "word " * 50, "--batch-size", 2)
    result = run_cli("score", drawn, "-m", chain.model, "-o", tmp_path / "a", *more)
    assert result.status == 0
    assert result.stderr.count("captions longer than 24 tokens are cut") == 1


# ---- rerank


def test_rerank_orders_by_the_planted_likelihood(chain, planted, pictures, tmp_path):
    model, known = planted
    made = run_ok("rerank", pictures, "-m", model, "--by", "prior", "-o", tmp_path / "a", "--batch-size", 3)
    expected = known[encoded(chain, array(pictures, "images"))].sum((1, 2))
    for part, text in ((slice(0, 5), PROMPTS[0]), (slice(5, 10), PROMPTS[1])):
        order = np.argsort(-expected[part], kind="stable")
        assert [name for name, of in zip(strings(made, "ids"), strings(made, "text"), strict=True) if of == text] == [
            strings(pictures, "ids")[part][row] for row in order
        ]
        np.testing.assert_allclose(array(made, "score")[part], expected[part][order], rtol=1e-6)
    assert strings(made, "ids") != strings(run_ok("rerank", pictures, "-m", model, "-o", tmp_path / "c"), "ids")
    kept = run_ok("rerank", pictures, "-m", model, "--by", "prior", "--keep", 1, "-o", tmp_path / "b")
    assert strings(kept, "ids") == [strings(made, "ids")[0], strings(made, "ids")[5]]


@pytest.mark.parametrize("by", scoring.BY)
def test_rerank_agrees_with_score(chain, pictures, tmp_path, by):
    scored = score(chain, pictures, tmp_path / "a", "--by", by)
    ranked = run_ok("rerank", pictures, "-m", chain.model, "--by", by, "-o", tmp_path / "b")
    of = dict(zip(strings(scored, "ids"), array(scored, "score"), strict=True))
    np.testing.assert_allclose(array(ranked, "score"), [of[name] for name in strings(ranked, "ids")], rtol=1e-5)
    entry = open_artifact(ranked).history[-1]
    assert entry["options"] == {"keep": 0, "prompt": None, "dtype": "float32", "by": by}
    assert set(entry["inputs"]) == {"images", "prior", "dvae"}


def test_rerank_by_the_codes_that_were_drawn(chain, planted, drawn, pictures, tmp_path):
    model, known = planted
    assert not np.array_equal(encoded(chain, array(pictures, "images")), array(drawn, "codes"))  # so it matters
    (model / "dvae.safetensors").rename(model / "dvae.aside")  # which is not asked for
    made = run_ok("rerank", pictures, "-m", model, "--by", "prior", "--codes", drawn, "-o", tmp_path / "a")
    (model / "dvae.aside").rename(model / "dvae.safetensors")
    scores = dict(zip(strings(drawn, "ids"), known[array(drawn, "codes").astype(int)].sum((1, 2)), strict=True))
    np.testing.assert_allclose(array(made, "score"), [scores[name] for name in strings(made, "ids")], rtol=1e-6)
    for part in (array(made, "score")[:5], array(made, "score")[5:]):
        assert (np.diff(part) <= 0).all()
    inputs = open_artifact(made).history[-1]["inputs"]
    assert (set(inputs), inputs["codes"]) == ({"images", "codes", "prior"}, open_artifact(drawn).digest)
    again = run_ok("rerank", made, "-m", model, "--by", "prior", "--codes", drawn, "-o", tmp_path / "b", "--keep", 2)
    assert strings(again, "ids") == strings(made, "ids")[:2] + strings(made, "ids")[5:7]
    wrong = ("rerank", pictures, "-m", model, "-o", tmp_path / "c", "--codes")
    assert "expected --by prior" in run_bad(*wrong, drawn)
    for codes in (chain.drawn, chain.codes):
        assert "expected the codes that" in run_bad(*wrong, codes, "--by", "prior")


def test_rerank_by_codes_of_which_an_id_has_several_is_refused(chain, tmp_path):
    codes = run_ok(
        *("encode-images", chain.data, "-m", chain.dvae, "--repeats", 2, "--augment", "prior"),
        *("-o", tmp_path / "x.codes.safetensors"),
    )
    images = run_ok("decode", codes, "-m", chain.dvae)
    more = ("-m", chain.model, "--by", "prior", "--prompt", "x", "--codes", codes)
    assert "ids that occur twice" in run_bad("rerank", images, *more)


def test_pictures_of_another_size_are_scored_as_they_are_encoded(chain, planted, tmp_path):
    model, known = planted
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 20, 28), np.uint8)
    columns = {"images": images, "ids": ["a", "b"], "text": ["x", "y"]}
    path = write_artifact(tmp_path / "i.safetensors", "images", columns, {}, [])
    folder = run_ok("export", path, "-o", tmp_path / "folder")
    own = run_ok("encode-images", folder, "-m", chain.dvae, "-o", tmp_path / "own.safetensors")
    expected = known[array(own, "codes").astype(int)].sum((1, 2))
    made = score(chain, path, tmp_path / "scored", model=model)
    np.testing.assert_allclose(array(made, "score"), expected, rtol=1e-6)


# ---- what cannot be


@pytest.fixture(scope="module")
def other(chain, tmp_path_factory):
    """A bundle with another dVAE, and codes that it made."""
    model = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(chain.model, model, ignore=shutil.ignore_patterns("*.run"))
    dvae = open_artifact(chain.dvae)
    tensors = {name: np.array(dvae.headers[0].map(name)) for name in dvae.headers[0].tensors}
    name = next(iter(tensors))
    tensors[name] = tensors[name] * 1.5
    write_artifact(model / "dvae.safetensors", dvae.kind, tensors, dvae.config, dvae.history)
    codes = run_ok("encode-images", chain.data, "-m", model / "dvae.safetensors", "-o", model.parent / "codes")
    return model, codes


def test_another_dvae_is_refused(chain, other, pictures, tmp_path):
    model, codes = other
    out = ("-o", tmp_path / "out")
    for arguments in (("score", pictures), ("score", chain.data), ("rerank", pictures, "--by", "prior")):
        assert "expected the dVAE that" in run_bad(*arguments, "-m", model, *out)
    line = run_bad("score", codes, "--prompt", "x", "-m", chain.model, *out)
    assert "expected the image encoder that" in line
    assert list(tmp_path.iterdir()) == []
    run_ok("score", chain.codes, "--prompt", "x", "-m", model, *out)  # codes need no dVAE


def test_what_cannot_be_scored_is_one_line(chain, drawn, pictures, tmp_path):
    out = ("-m", chain.model, "-o", tmp_path / "out")
    assert "found none in" in run_bad("score", chain.codes, *out)
    assert "expected codes or images, found captions" in run_bad("score", chain.captions, "--prompt", "x", *out)
    assert "expected --by prior or contrast, found 'clip'" in run_bad("score", drawn, "--by", "clip", *out)
    assert "expected --by clip, prior or contrast" in run_bad("rerank", pictures, "--by", "magic", *out)
    assert "no such file" in run_bad("score", tmp_path / "none", *out)
    assert "expected weights.prior.codes" in run_bad("score", drawn, "-m", chain.dvae, "-o", tmp_path / "out")
    assert "expected weights.dvae" in run_bad("score", pictures, "-m", chain.prior, "-o", tmp_path / "out")
    assert "expected -o" in run_bad("score", "{00..01}.tar", "-m", chain.model)
    assert "expected to write codes" in run_bad("score", drawn, "-m", chain.model, "-o", pictures)
    lying = open_artifact(drawn)
    columns = {"ids": strings(drawn, "ids"), "text": strings(drawn, "text")}
    for codes, found in ((array(drawn, "codes") + 20, "below 20"), (array(drawn, "codes")[:, :3, :3], "(4, 4)")):
        path = write_artifact(tmp_path / "lying", "codes", {**columns, "codes": codes}, lying.config, lying.history)
        assert found in run_bad("score", path, *out)
    assert not (tmp_path / "out").exists()
