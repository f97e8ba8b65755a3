"""`vary`, `interpolate`, `diff` and `reconstruct` from the command line, on a tiny bundle."""

import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from artifact_files import array, strings
from conftest import run_bad, run_cli, run_ok
from PIL import Image
from planted_weights import randomized

from dalle_cli.artifacts import digest_file, open_artifact
from dalle_cli.artifacts.weights import load_tensors, save_tensors
from dalle_cli.data.augment import center
from dalle_cli.models.decoder import Decoder, DecoderConfig
from dalle_cli.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig
from dalle_cli.models.upsampler import Upsampler, UpsamplerConfig

SIZES = {"width": 8, "multipliers": (1, 2), "depth": 1, "groups": 4, "n_timestep": 40, "prediction": "v"}
WIDTH = 16  # of the CLIP's embeddings
STEPS = ("--decoder-steps", 20)
DECODER_STEPS = ("--decoder-steps", 20)


@pytest.fixture(scope="module")
def pca(tmp_path_factory, chain):
    """Embeddings of the data set's pictures."""
    path = tmp_path_factory.mktemp("pca") / "embeddings.safetensors"
    run_ok("encode-images", chain.data, "-m", chain.clip, "-o", path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory, chain, pca):
    """A bundle: CLIP and tokenizer of the chain, a decoder whose every path counts, a prior that has seen a PCA."""
    folder = tmp_path_factory.mktemp("explored") / "model"
    folder.mkdir()
    for path in (chain.clip, chain.tokenizer):
        shutil.copy(path, folder)
    told = open_artifact(chain.captions).config
    known = {"n_embedding": WIDTH, "n_text": told["n_text"], "n_text_vocab": told["n_vocab"]}
    c = DecoderConfig(
        **SIZES, **known, image_size=8, attention=(4,), head_width=4, context_width=8, text_layers=1, text_heads=2
    )
    header = {"train": {}, "encoder": digest_file(chain.clip), "tokenizer": told["tokenizer"]}
    decoder = randomized(Decoder(c), scale=0.15)
    decoder.embedding_time.weight.data *= 8  # so that small ways between embeddings are seen, too
    save = {"model": asdict(c), **header}
    save_tensors(folder / "decoder.safetensors", "weights.decoder", decoder.state_dict(), save, [])
    p = DiffusionPriorConfig(n_layer=1, n_head=1, n_embd=8, n_timestep=5, **known)
    prior = DiffusionPrior(p)
    prior.principal.fit([torch.from_numpy(array(pca, "embeddings").copy())])
    save = {"model": asdict(p), **header}
    save_tensors(folder / "prior.safetensors", "weights.prior.embeddings", prior.state_dict(), save, [])
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory, model):
    """The same with an upsampler to 32 pixels."""
    folder = tmp_path_factory.mktemp("explored") / "large"
    shutil.copytree(model, folder)
    u = UpsamplerConfig(**{**SIZES, "prediction": "x_start"}, image_size=32, low_size=8)
    tensors = randomized(Upsampler(u), scale=0.2).state_dict()
    save_tensors(folder / "up.safetensors", "weights.upsampler", tensors, {"model": asdict(u), "train": {}}, [])
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two pictures that are neither square nor of a model's size, soft and grayish as the decoder's own."""
    folder = tmp_path_factory.mktemp("photos")
    for name, low in (("a", 130), ("b", 60)):
        noise = np.random.default_rng(low).integers(low, low + 60, (5, 7, 3), np.uint8)
        Image.fromarray(noise).resize((70, 50), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    return folder


ARGUMENTS = {
    "vary": (("a",), STEPS),
    "interpolate": (("a", "b"), DECODER_STEPS),
    "diff": (("a", "a red circle", "a blue bar"), DECODER_STEPS),
    "reconstruct": (("a",), STEPS),
}


def command(stage, photos, model, folder, *more):
    """The arguments of a stage, to `folder`; a picture is named by its stem."""
    words, steps = ARGUMENTS[stage]
    words = [photos / f"{word}.png" if len(word) == 1 else word for word in words]
    return stage, *words, *steps, "-m", model, "-o", folder / "x.png", "--images", folder / "x.safetensors", *more


def edit(stage, photos, model, folder, *more):
    """Its pictures, the one that was given first: (N, 3, S, S)."""
    assert run_ok(*command(stage, photos, model, folder, *more)) == str(folder / "x.png")
    return array(folder / "x.safetensors", "images").astype(int)


def original(photos, size, name="a"):
    return center(Image.open(photos / f"{name}.png").convert("RGB"), size).transpose(2, 0, 1).astype(int)


def off(a, b):
    return np.abs(a - b).max()


# ---- each of them


def test_vary(model, photos, tmp_path):
    found = edit("vary", photos, model, tmp_path, "-n", 4)
    assert found.shape == (5, 3, 8, 8)
    assert np.array_equal(found[0], original(photos, 8))
    assert strings(tmp_path / "x.safetensors", "text") == ["original", *(f"variation {k}" for k in (1, 2, 3, 4))]
    assert min(off(found[i], found[j]) for i in range(5) for j in range(i)) > 8
    fewer = edit("vary", photos, model, tmp_path, "-n", 2)
    assert off(fewer, found[:3]) <= 1  # a variation is a function of its number
    half = edit("vary", photos, model, tmp_path, "-n", 4, "--eta", 0.5)
    assert off(half[1:], found[1:]) > 8


@pytest.mark.parametrize("guidance", [1, 1.3])
def test_without_eta_the_image_comes_back(model, photos, tmp_path, guidance):
    found = edit("vary", photos, model, tmp_path, "-n", 2, "--eta", 0, "--decoder-guidance", guidance)
    assert off(found[1], found[0]) <= 10
    assert np.abs(found[1] - found[0]).mean() < 2
    assert off(found[1], found[2]) <= 1


def test_interpolate(model, photos, tmp_path):
    found = edit("interpolate", photos, model, tmp_path, "--steps", 3)
    assert found.shape == (5, 3, 8, 8)
    assert np.array_equal(found[0], original(photos, 8))
    assert np.array_equal(found[4], original(photos, 8, "b"))
    assert strings(tmp_path / "x.safetensors", "text") == ["A: a.png", "0.25", "0.5", "0.75", "B: b.png"]
    away = [np.abs(picture - found[0]).mean() for picture in found]
    assert away == sorted(away)
    middle = edit("interpolate", photos, model, tmp_path, "--steps", 1)
    assert off(middle[1], found[2]) <= 1
    other = edit("interpolate", photos, model, tmp_path, "--steps", 3, "--seed", 3)
    assert np.array_equal(other, found)  # it has noise of its own
    fixed = edit("interpolate", photos, model, tmp_path, "--steps", 3, "--noise", "fixed")
    assert off(fixed[1:4], found[1:4]) > 8
    assert off(fixed[1], fixed[3]) > 3  # embeddings change, the noise does not
    reseeded = edit("interpolate", photos, model, tmp_path, "--steps", 3, "--noise", "fixed", "--seed", 3)
    assert off(fixed[1:4], reseeded[1:4]) > 8


@pytest.mark.parametrize("noise", ["slerped", "fixed"])
def test_from_an_image_to_itself(model, photos, tmp_path, noise):
    """Nothing changes on the way, and with its own noise it is the picture."""
    twice = (photos / "a.png", photos / "a.png", *DECODER_STEPS, "-m", model, "-o", tmp_path / "x.png")
    run_ok("interpolate", *twice, "--steps", 2, "--noise", noise, "--images", tmp_path / "x.safetensors")
    found = array(tmp_path / "x.safetensors", "images").astype(int)
    assert off(found[1], found[2]) <= 1
    assert (off(found[1], found[0]) <= 10) == (noise == "slerped")


def test_diff(model, photos, tmp_path):
    found = edit("diff", photos, model, tmp_path, "--steps", 3, "--strength", 1)
    assert found.shape == (4, 3, 8, 8)
    assert strings(tmp_path / "x.safetensors", "text") == ["original", "theta 0", "theta 0.5", "theta 1"]
    again = edit("vary", photos, model, tmp_path, "-n", 1, "--eta", 0)
    assert off(found[1], again[1]) <= 1
    assert off(found[2], found[1]) > 3
    assert off(found[3], found[2]) > 3
    none = edit("diff", photos, model, tmp_path, "--steps", 2, "--strength", 0)
    assert off(none[1:], again[1:]) <= 1
    one = edit("diff", photos, model, tmp_path, "--steps", 1, "--strength", 0.5)
    assert off(one[1], found[2]) <= 1
    for before, after in (("a blue bar", "a red circle"), ("a red circle", "a green bar"), ("", "a blue bar")):
        words = (photos / "a.png", before, after, *DECODER_STEPS, "-m", model, "-o", tmp_path / "y.png")
        run_ok("diff", *words, "--steps", 3, "--strength", 1, "--images", tmp_path / "y.safetensors")
        other = array(tmp_path / "y.safetensors", "images").astype(int)
        assert off(other[1], found[1]) <= 1
        assert off(other[3], found[3]) > 3, (before, after)


def test_reconstruct(model, photos, tmp_path):
    """All components paint what `decode` paints of the picture's embedding, with the noise of row 0."""
    found = edit("reconstruct", photos, model, tmp_path, "--components", "1,4,16")
    assert found.shape == (4, 3, 8, 8)
    labels = strings(tmp_path / "x.safetensors", "text")
    assert labels[1].startswith("1 of 16 components, ")
    assert labels[3] == "16 of 16 components, 100% of variance"
    folder = tmp_path / "one"
    folder.mkdir()
    shutil.copy(photos / "a.png", folder)
    embedding = run_ok("encode-images", folder, "-m", model / "clip.safetensors", "-o", tmp_path / "z.safetensors")
    more = (*STEPS, "--decoder-sampler", "ddim", "-o", tmp_path / "whole.safetensors")
    whole = array(run_ok("decode", embedding, "-m", model, *more), "images")[0].astype(int)
    assert off(found[3], whole) <= 1
    assert off(found[1], found[3]) > 3
    assert off(found[2], found[3]) > 1
    usual = edit("reconstruct", photos, model, tmp_path)
    assert strings(tmp_path / "x.safetensors", "text")[1:] == [labels_of(8, model), labels_of(16, model)]
    assert off(usual[2], found[3]) <= 1


def labels_of(n, model):
    spectrum = load_tensors(open_artifact(model / "prior.safetensors"))["principal.spectrum"]
    return f"{n} of 16 components, {float(spectrum[:n].sum() / spectrum.sum()):.0%} of variance"


# ---- all of them alike


@pytest.mark.parametrize("stage", ARGUMENTS)
def test_bytes_seeds_and_batches(model, photos, tmp_path, stage):
    more = {"vary": ("-n", 3), "interpolate": ("--noise", "fixed", "--steps", 3), "diff": ("--steps", 3)}.get(stage, ())
    name = ARGUMENTS[stage][1][0]
    more = (*more, name, 6)
    found = edit(stage, photos, model, tmp_path, *more)
    sheet, kept = ((tmp_path / name).read_bytes() for name in ("x.png", "x.safetensors"))
    edit(stage, photos, model, tmp_path, *more)
    assert ((tmp_path / "x.png").read_bytes(), (tmp_path / "x.safetensors").read_bytes()) == (sheet, kept)
    assert off(edit(stage, photos, model, tmp_path, *more, "--batch-size", 2), found) <= 1
    if stage != "diff":  # which goes from the picture's noise, and adds none
        assert off(edit(stage, photos, model, tmp_path, *more, "--seed", 1)[1:-1], found[1:-1]) > 3
    assert off(edit(stage, photos, model, tmp_path, *more, name, 4)[1:-1], found[1:-1]) > 1
    if stage != "diff":
        assert off(edit(stage, photos, model, tmp_path, *more, "--decoder-guidance", 2)[1:-1], found[1:-1]) > 3


def test_guidance_reaches_a_diff(model, photos, tmp_path):
    plain = edit("diff", photos, model, tmp_path, "--steps", 1, "--strength", 1)
    guided = edit("diff", photos, model, tmp_path, "--steps", 1, "--strength", 1, "--decoder-guidance", 1.3)
    assert off(plain[1], guided[1]) > 1


@pytest.mark.parametrize("stage", ARGUMENTS)
def test_upsamplers(large, photos, tmp_path, stage):
    few = (ARGUMENTS[stage][1][0], 4)
    found = edit(stage, photos, large, tmp_path, *few, "--upsampler-steps", 2)
    assert found.shape[1:] == (3, 32, 32)
    assert np.array_equal(found[0], original(photos, 32))
    last = open_artifact(tmp_path / "x.safetensors").history[-1]
    assert last["options"]["upsampler_steps"] == 2
    assert last["inputs"]["upsampler_1"] == digest_file(large / "up.safetensors")
    other = edit(stage, photos, large, tmp_path, *few, "--upsampler-steps", 3)
    assert off(other[1:-1], found[1:-1]) > 3


def test_only_the_decoder_varies(large, photos, tmp_path):
    """Eta is no option of the upsamplers: without it the larger pictures differ by their own first noise alone."""
    found = edit("vary", photos, large, tmp_path, "-n", 2, "--eta", 0, "--decoder-steps", 4)
    assert off(found[1], found[2]) > 1
    again = edit("vary", photos, large, tmp_path, "-n", 2, "--eta", 0, "--decoder-steps", 4)
    assert np.array_equal(again, found)


OPTIONS = {
    "vary": {"n": 8, "eta": 1.0},
    "interpolate": {"n": 8, "noise": "slerped"},
    "diff": {"from": "a red circle", "to": "a blue bar", "strength": 0.5, "n": 5},
    "reconstruct": {"components": [8, 16]},
}


@pytest.mark.parametrize("stage", ARGUMENTS)
def test_history(model, photos, tmp_path, stage):
    edit(stage, photos, model, tmp_path)
    last = open_artifact(tmp_path / "x.safetensors").history[-1]
    common = {
        "decoder_steps": 20,
        "decoder_sampler": "ddim",
        "decoder_guidance": 1.0,
        "eta": 0.0,
        "seed": 0,
        "dtype": "float32",
    }
    assert last["stage"] == stage
    assert last["options"] == {**common, **OPTIONS[stage]}
    a, b = (digest_file(photos / f"{name}.png") for name in "ab")
    pictures = {"a": a, "b": b} if stage == "interpolate" else {"image": a}
    weights = {"clip": digest_file(model / "clip.safetensors"), "decoder": digest_file(model / "decoder.safetensors")}
    prior = {"prior": digest_file(model / "prior.safetensors")} if stage == "reconstruct" else {}
    assert last["inputs"] == {**pictures, **prior, **weights}
    stages = [entry["stage"] for entry in open_artifact(tmp_path / "x.safetensors").history]
    assert "train-clip" in stages


@pytest.mark.parametrize("stage", ARGUMENTS)
def test_the_image_grid(model, photos, tmp_path, monkeypatch, stage):
    """The pictures of the artifact, drawn as `show` draws them; by name in the working folder."""
    few = (ARGUMENTS[stage][1][0], 4)
    edit(stage, photos, model, tmp_path, *few)
    title = ("--title", '"a red circle" to "a blue bar"') if stage == "diff" else ()
    run_ok("show", tmp_path / "x.safetensors", "-o", tmp_path / "show.png", *title)
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "show.png").read_bytes()
    monkeypatch.chdir(tmp_path)
    words = command(stage, photos, model, tmp_path)
    at = words.index("-o")
    result = run_cli(*words[:at], *few, "--columns", 2, "--terminal")
    name = f"{'a-b' if stage == 'interpolate' else 'a'}.{stage}.png"
    assert (result.status, result.stdout) == (0, f"{name}\n"), result.stderr
    assert Image.open(name).size[0] < Image.open("x.png").size[0]
    assert "\x1b[" in result.stderr


def test_fifty_steps_or_as_many_as_there_are(model, photos, tmp_path):
    run_ok("vary", photos / "a.png", "-n", 1, "-m", model, "-o", tmp_path / "x.png", "--images", tmp_path / "x")
    assert open_artifact(tmp_path / "x").history[-1]["options"]["decoder_steps"] == 40


# ---- what cannot be


@pytest.mark.parametrize("stage", ARGUMENTS)
def test_bad_input_is_one_line(chain, model, photos, tmp_path, stage):
    bad, words = tmp_path / "bad", command(stage, photos, model, tmp_path)
    bad.mkdir()
    (bad / "text.png").write_text("no picture")
    for name, found in (("text.png", "unreadable"), ("none.png", "No such file"), (".", "directory")):
        line = run_bad(stage, bad / name, *words[2:])
        assert found in line
        assert line.endswith(f"check {'A' if stage == 'interpolate' else 'IMAGE'}")
    if stage == "interpolate":
        assert run_bad(stage, words[1], bad / "text.png", *words[3:]).endswith("check B")
    assert "1 to 40 steps" in run_bad(*words, ARGUMENTS[stage][1][0], 41)
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "decoder.safetensors").unlink()
    assert "expected weights.decoder" in run_bad(*words, "-m", bare)
    mine = bad / "text.png"
    assert "expected to write a PNG" in run_bad(*words, "-o", mine)
    assert "choose another" in run_bad(*words, "--images", mine)
    copy = shutil.copy(photos / "a.png", tmp_path / "copy.png")
    assert "written over itself" in run_bad(stage, copy, *words[2:], "-o", copy)
    assert not (tmp_path / "x.png").exists()
    assert mine.read_text() == "no picture"


@pytest.mark.parametrize("stage", ARGUMENTS)
def test_another_clip(chain, model, photos, tmp_path, stage):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    clip = open_artifact(other / "clip.safetensors")
    tensors = {name: tensor + 1 for name, tensor in load_tensors(clip).items()}
    save_tensors(other / "clip.safetensors", clip.kind, tensors, clip.config, clip.history)
    line = run_bad(*command(stage, photos, other, tmp_path))
    assert "expected the CLIP that" in line
    (other / "clip.safetensors").unlink()
    assert "expected weights.clip" in run_bad(*command(stage, photos, other, tmp_path))


def test_a_decoder_alone_has_its_clip_beside_it(model, photos, tmp_path):
    whole = edit("vary", photos, model, tmp_path)
    assert np.array_equal(edit("vary", photos, model / "decoder.safetensors", tmp_path), whole)
    line = run_bad(*command("reconstruct", photos, model / "decoder.safetensors", tmp_path))
    assert "expected weights.prior.embeddings, found weights.decoder" in line


def test_numbers_and_words_out_of_range(model, photos, tmp_path):
    def refused(stage, *more):
        return run_bad(*command(stage, photos, model, tmp_path, *more))

    assert "--noise slerped or fixed, found 'white'" in refused("interpolate", "--noise", "white")
    for strength in (-0.1, 1.1, "nan"):
        assert "expected --strength from 0 to 1" in refused("diff", "--strength", strength)
    for components in ("0", "17", "4,17", "-1"):
        assert "expected --components from 1 to 16" in refused("reconstruct", "--components", components)
    for components in ("", "four", "4,,8", "1.5"):
        assert "as 8,32,128" in refused("reconstruct", "--components", components)
    words = ("-m", model, "-o", tmp_path / "x.png", *DECODER_STEPS)
    assert "tells apart" in run_bad("diff", photos / "a.png", "a bar", "a bar", *words)
    assert "found an empty one" in run_bad("diff", photos / "a.png", "a bar", " ", *words)
    for stage, option, value in (("vary", "--eta", 1.5), ("vary", "-n", 0), ("diff", "--decoder-guidance", -1)):
        assert run_cli(*command(stage, photos, model, tmp_path, option, value)).status == 2
    assert not (tmp_path / "x.png").exists()


def test_without_principal_components(model, photos, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "prior.safetensors").unlink()
    line = run_bad(*command("reconstruct", photos, bare, tmp_path))
    assert "expected weights.prior.embeddings, found none" in line
    assert "`dalle train-prior CAPTIONS EMBEDDINGS` makes one" in line
    prior = open_artifact(model / "prior.safetensors")
    config = {**prior.config, "encoder": "1" * 64}
    save_tensors(bare / "prior.safetensors", prior.kind, load_tensors(prior), config, [])
    assert "expected the CLIP that" in run_bad(*command("reconstruct", photos, bare, tmp_path))
