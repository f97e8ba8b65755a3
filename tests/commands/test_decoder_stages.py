"""Train decoders and upsamplers, and decode embeddings, from the command line on a tiny chain."""

import json
import shutil
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from artifact_files import array, strings
from comparisons import assert_equal
from conftest import run_bad, run_cli, run_ok
from interruptions import Crash, after_update
from PIL import Image
from planted_weights import randomized
from stage_runs import checkpoints, lasting_rows, rows

from dalle_cli.artifacts import digest_file, open_artifact, write_artifact
from dalle_cli.artifacts.weights import load_tensors, save_tensors
from dalle_cli.data.datasets import open_dataset
from dalle_cli.data.pairs import Conditions
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.models.decoder import Decoder, DecoderConfig
from dalle_cli.models.upsampler import Upsampler, UpsamplerConfig
from dalle_cli.training.decoder import DecoderTask, DecoderTrain, embedding_noise

UNET = """
width = 8
multipliers = [1, 2]
depth = 1
head_width = 4
groups = 4
dropout = 0.1
n_timestep = 40
"""
TRAIN = """
steps = 6
batch_size = 4
lr = 2e-3
ema = 0.5
log_every = 2
validate_every = 3
checkpoint_every = 2
validation = 0.2
grid_images = 3
grid_steps = 2
clip_norm = 10.0
"""
RECIPE = f"""
[decoder]
image_size = 8
attention = [4]
context_width = 8
text_layers = 1
text_heads = 2
{UNET}
[decoder.train]
{TRAIN}
[upsampler_1]
image_size = 16
low_size = 8
low_noise = 0.5
{UNET}
[upsampler_1.train]
crop = 2
{TRAIN}
[upsampler_2]
image_size = 64
low_size = 16
{UNET}
[upsampler_2.train]
corruption = "bsr"
{TRAIN}
"""
KINDS = ("decoder", "upsampler_1", "upsampler_2")


class Unclip(NamedTuple):
    """Paths: pictures, recipe, embeddings of the pictures, captions; and what the tokenizer and the CLIP are."""

    data: object
    recipe: object
    embeddings: object
    captions: object
    tokenizer: object
    encoder: str


@pytest.fixture(scope="module")
def unclip(tmp_path_factory, chain):
    """The inputs of training, beside the tiny chain; read only."""
    root = tmp_path_factory.mktemp("unclip")
    (root / "recipe.toml").write_text(RECIPE)
    embeddings = root / "embeddings.safetensors"
    run_ok("encode-images", chain.data, "-m", chain.clip, "-o", embeddings)
    encoder = open_artifact(embeddings).config["encoder"]
    return Unclip(chain.data, root / "recipe.toml", embeddings, chain.captions, chain.tokenizer, encoder)


def training(unclip, name, out, *more):
    """The arguments that train one of the three."""
    if name == "decoder":
        inputs = (unclip.data, unclip.embeddings, "--captions", unclip.captions)
    else:
        inputs = (unclip.data, "--upsampler", name[-1])
    arguments = ("train-decoder", *inputs, "--config", unclip.recipe, "--dtype", "float32", "-o", out, *more)
    return tuple(map(str, arguments))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, unclip):
    """All three, trained once; read only."""
    folder = tmp_path_factory.mktemp("trained")
    for name in KINDS:
        run_ok(*training(unclip, name, folder / f"{name}.safetensors"))
    return folder


# Training


@pytest.mark.parametrize("name", KINDS)
def test_what_a_run_leaves(trained, unclip, name):
    out = trained / f"{name}.safetensors"
    weights = open_artifact(out, f"weights.{name.split('_')[0]}")
    assert weights.history[-1]["stage"] == "train-decoder"
    found = rows(out)
    assert [row["step"] for row in found if "loss" in row] == [2, 4, 6]
    validations = [row["validation"] for row in found if "validation" in row]
    bins = [f"mse_t{first}_{first + 9}" for first in (0, 10, 20, 30)]
    for figures in validations:
        assert set(figures) == {"mse_held_out", *bins}
        assert np.mean([figures[name] for name in bins]) == pytest.approx(figures["mse_held_out"], rel=0.2)
    assert validations[-1]["mse_held_out"] < 1.05
    assert {"mse", "bits"} <= set(found[0])
    sheets = sorted((trained / f"{name}.run/samples").glob("*.png"))
    assert [p.name for p in sheets] == ["00000003.png", "00000006.png"]
    Image.open(sheets[0]).verify()
    if name == "decoder":
        assert weights.config["encoder"] == unclip.encoder
        assert weights.config["tokenizer"] == digest_file(unclip.tokenizer)
        assert weights.config["model"]["n_text"] == 24
        assert set(weights.history[-1]["inputs"]) == {"dataset", "embeddings", "captions"}
    else:
        assert set(weights.config) == {"model", "train", "sampling"}


@pytest.mark.parametrize("name", KINDS)
def test_broken_off_and_gone_on(trained, unclip, tmp_path, name):
    out = tmp_path / f"{name}.safetensors"
    for step in (1, 3):
        with after_update(step), pytest.raises(Crash):
            run_cli(*training(unclip, name, out))
    assert checkpoints(out) == ["checkpoint-00000002.safetensors"]
    result = run_cli(*training(unclip, name, out))
    assert result.status == 0
    assert "resuming from update 2" in result.stderr
    assert out.read_bytes() == (trained / out.name).read_bytes()
    assert lasting_rows(out) == lasting_rows(trained / out.name)
    assert "left alone" in run_cli(*training(unclip, name, out)).stderr


def test_weights_of_before_there_were_sketches_are_left_alone(trained, unclip, tmp_path):
    out = tmp_path / "decoder.safetensors"
    found = open_artifact(trained / out.name)
    old = {name: value for name, value in found.config["model"].items() if name != "sketch"}
    assert old != found.config["model"]
    save_tensors(out, found.kind, load_tensors(found), {**found.config, "model": old}, found.history)
    assert "left alone" in run_cli(*training(unclip, "decoder", out)).stderr
    again = run_cli(*training(unclip, "decoder", out, "--set", "decoder.sketch=2"))
    assert again.status == 0
    assert "left alone" not in again.stderr
    assert "sketch" in rows(out)[0]


def stage(*args):
    return tuple(run_cli(*args))


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_are_one(pair, unclip, tmp_path, name):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    more = ("--set", f"{name}.dropout=0.0")
    run_ok(*training(unclip, name, one, *more))
    results = pair(stage, *training(unclip, name, two, *more))
    assert [status for status, _, _ in results] == [0, 0], results
    assert results[1][1:] == ("", "")
    # a bias of keys changes nothing but by rounding, of which AdamW makes whole steps
    keys = ("qkv.bias", "k_proj.bias", "kv.bias")
    found = [{n: t for n, t in load_tensors(open_artifact(p)).items() if not n.endswith(keys)} for p in (two, one)]
    assert_equal(*found, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(*([row for row in rows(p) if "loss" in row] for p in (one, two)), strict=True):
        for figure in ("loss", "grad_norm", "mse", "bits"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-3)


@pytest.mark.parametrize("name", ["decoder", "upsampler_1"])
def test_in_parts_it_is_the_same(trained, unclip, tmp_path, name):
    outs = [tmp_path / f"{parts}.safetensors" for parts in (1, 2)]
    for parts, out in enumerate(outs, 1):
        more = (f"{name}.dropout=0.0", f"{name}.train.accumulate={parts}", f"{name}.train.steps=2")
        run_ok(*training(unclip, name, out, *(part for s in more for part in ("--set", s))))
    first, second = (rows(out)[0] for out in outs)
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    "settings", [("checkpoint_activations=true",), ("save_dtype=bfloat16",), ("optimizer=muon",)], ids=str
)
def test_settings_of_every_training(unclip, tmp_path, settings):
    more = (f"decoder.train.{s}" for s in (*settings, "steps=2"))
    run_ok(*training(unclip, "decoder", tmp_path / "x.safetensors", *(part for s in more for part in ("--set", s))))


def test_float16(unclip, tmp_path):
    """A gradient scale for each block, attention included."""
    run_ok(*training(unclip, "decoder", tmp_path / "x.safetensors", "--dtype", "float16"))
    assert np.isfinite(rows(tmp_path / "x.safetensors")[0]["loss"])


def test_images_without_an_embedding(unclip, tmp_path):
    table = open_artifact(unclip.embeddings)
    columns = {"embeddings": table.array("embeddings")[:14], "ids": list(table.strings("ids"))[:14]}
    some = write_artifact(tmp_path / "some.safetensors", "embeddings", columns, table.config, [])
    config = ("--config", unclip.recipe, "--set", "decoder.train.steps=1", "-o", tmp_path / "x.safetensors")
    result = run_cli("train-decoder", unclip.data, some, *config)
    assert "10 of 24 images have no embedding and are left out" in result.stderr
    columns["ids"] = [f"other{i}" for i in range(14)]
    none = write_artifact(tmp_path / "none.safetensors", "embeddings", columns, table.config, [])
    assert "no id in common" in run_bad("train-decoder", unclip.data, none, *config)


def test_arguments_that_do_not_go_together(unclip, tmp_path):
    config = ("--config", unclip.recipe, "-o", tmp_path / "x.safetensors")
    assert "EMBEDDINGS" in run_bad("train-decoder", unclip.data, *config)
    assert "images alone" in run_bad("train-decoder", unclip.data, unclip.embeddings, "--upsampler", 1, *config)
    assert "expected embeddings, found captions" in run_bad("train-decoder", unclip.data, unclip.captions, *config)
    for setting, says in (
        ("upsampler_2.train.crop=32", "lower crop"),
        ("upsampler_2.train.corruption=magic", "corruption"),
        ("upsampler_2.train.blur_sigma=0", "blur_sigma"),
        ("upsampler_2.low_size=48", "whole number of times"),
        ("upsampler_2.low_noise=1.0", "low_noise"),
    ):
        arguments = ("train-decoder", unclip.data, "--upsampler", 2, *config, "--set", setting)
        assert says in run_bad(*arguments)
    for setting, says in (
        ("decoder.n_text=3", "as the inputs have it"),
        ("decoder.train.caption_dropout=2", "caption_dropout"),
        ("decoder.train.embedding_noise=-1", "embedding_noise"),
        ("decoder.train.grid_steps=0", "grid_steps"),
        ("decoder.prediction=magic", "prediction"),
        ("decoder.schedule=magic", "schedule"),
    ):
        arguments = (*training(unclip, "decoder", tmp_path / "x.safetensors"), "--set", setting)
        assert says in run_bad(*arguments)


# What a batch holds


def batch_of(unclip, step=0, **more):
    data = open_dataset(unclip.data, need_captions=False)
    told = Conditions(open_artifact(unclip.embeddings), open_artifact(unclip.captions))
    sizes = {"image_size": 8, "width": 8, "multipliers": (1, 2), "depth": 1, "attention": (4,), "head_width": 4}
    known = {"n_embedding": told.width, "n_text": told.n_text, "n_text_vocab": told.n_vocab}
    c = DecoderConfig(**sizes, **known, groups=4, context_width=8, text_layers=1, text_heads=2)
    task = DecoderTask(c, DecoderTrain(batch_size=200, **more), data, told, 0, 0)
    batches = task.batches(step)
    batch = next(batches)
    batches.close()
    return task, batch


def test_a_batch_joins_by_id_and_drops(unclip):
    task, (images, noise, t, embeddings, given, tokens, lengths) = batch_of(unclip, validation=0.0)
    table = open_artifact(unclip.embeddings)
    of = {row.tobytes(): name for row, name in zip(table.array("embeddings"), table.strings("ids"), strict=True)}
    written = open_artifact(unclip.captions)
    caption = dict(zip(written.strings("ids"), written.array("tokens"), strict=True))
    for i in range(len(images)):
        name = of[embeddings[i].numpy().tobytes()]
        row = list(task.data.ids).index(name)
        small = np.asarray(task.data.read(row).resize((8, 8), Image.Resampling.BOX))
        assert np.abs(small.transpose(2, 0, 1).astype(int) - images[i].numpy()).max() <= 1
        assert tokens[i].tolist() == caption[name].tolist()
    assert (noise.mean().abs(), (noise.std() - 1).abs()) < (torch.tensor(0.02), torch.tensor(0.02))
    assert t.min() >= 0
    assert t.max() < 1000
    assert len(set(t.tolist())) > 100
    assert 5 <= (~given).sum() <= 40  # of 200: 10%
    assert 75 <= (lengths == 0).sum() <= 125  # 50%
    both = ((~given) & (lengths == 0)).sum()
    assert 1 <= both < (~given).sum()
    other = batch_of(unclip, 1, validation=0.0)[1]
    assert not torch.equal(other[1], noise)
    none = batch_of(unclip, validation=0.0, embedding_dropout=0.0, caption_dropout=0.0)[1]
    assert none[4].all()
    assert (none[6] > 0).all()
    assert torch.equal(none[1], noise)


def test_embeddings_go_embedding_noise_as_far_as_is_said_and_nothing_else_changes(unclip):
    plain, off = (batch_of(unclip, validation=0.0, embedding_noise=most)[1] for most in (0.0, 2.0))
    assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(plain, off, strict=True)) if i != 3)
    rms = plain[3].square().mean(1).sqrt()
    far = (off[3] - plain[3]).square().mean(1).sqrt() / rms  # of each what was sampled, U[0, 2], times some 1
    assert abs(float(far.mean()) - 1) < 0.15
    assert float(far.min()) < 0.2
    assert 1.6 < float(far.max()) < 4
    z = torch.randn(4, 6)
    whole = embedding_noise(z, 0.5, 3, 7, range(4))
    parts = [
        embedding_noise(z[rows], 0.5, 3, 7, slots) for rows, slots in ((slice(2), range(2)), (slice(2, 4), range(2, 4)))
    ]
    assert torch.equal(torch.cat(parts), whole)  # as among two processes
    torch.testing.assert_close(embedding_noise(100 * z, 0.5, 3, 7, range(4)), 100 * whole)
    assert not torch.equal(embedding_noise(z, 0.5, 3, 8, range(4)), whole)
    assert not torch.equal(embedding_noise(z, 0.5, 4, 7, range(4)), whole)


# Painting


def planted(folder, unclip, chain, upsamplers=()):
    """A bundle of models whose weights are sampled so that all paths count, as if they had been trained."""
    folder.mkdir(parents=True)
    shutil.copy(unclip.tokenizer, folder)
    sizes = {"width": 8, "multipliers": (1, 2), "depth": 1, "groups": 4, "n_timestep": 40, "prediction": "x_start"}
    told = open_artifact(unclip.captions).config
    c = DecoderConfig(
        **sizes, image_size=8, attention=(4,), head_width=4, context_width=8, text_layers=1, text_heads=2,
        n_embedding=16, n_text=told["n_text"], n_text_vocab=told["n_vocab"],
    )  # fmt: skip
    header = {"model": asdict(c), "train": {}, "encoder": unclip.encoder, "tokenizer": told["tokenizer"]}
    model = randomized(Decoder(c), scale=0.2)
    save_tensors(folder / "decoder.safetensors", "weights.decoder", model.state_dict(), header, [])
    for low, high, *noise in upsamplers:
        u = UpsamplerConfig(**sizes, image_size=high, low_size=low, low_noise=noise[0] if noise else 0.0)
        tensors = randomized(Upsampler(u), scale=0.2).state_dict()
        path = folder / f"up{high}.safetensors"
        sampling = {"low_noise": noise[1]} if noise else {}
        save_tensors(path, "weights.upsampler", tensors, {"model": asdict(u), "sampling": sampling}, [])
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, unclip, chain):
    return planted(tmp_path_factory.mktemp("planted") / "small", unclip, chain)


@pytest.fixture(scope="module")
def large(tmp_path_factory, unclip, chain):
    return planted(tmp_path_factory.mktemp("planted") / "large", unclip, chain, [(16, 64), (8, 16)])


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, unclip):
    """Embeddings with captions, as `sample` will write them."""
    table = open_artifact(unclip.embeddings)
    columns = {"embeddings": np.array(table.array("embeddings")[:5]), "ids": [f"{i}" for i in range(5)]}
    columns["text"] = ["a red circle", "a blue bar", "", "a red circle", "a green square"]
    path = tmp_path_factory.mktemp("sampled") / "five.embeddings.safetensors"
    return write_artifact(path, "embeddings", columns, table.config, table.history)


def decode(source, model, out, *more):
    run_ok("decode", source, "-m", model, "-o", out, "--decoder-steps", 3, *more)
    return array(out, "images").astype(int)


def test_decode_samples_images(model, sampled, tmp_path):
    whole = decode(sampled, model, tmp_path / "a.safetensors")
    assert whole.shape == (5, 3, 8, 8)
    found = open_artifact(tmp_path / "a.safetensors", "images")
    assert strings(tmp_path / "a.safetensors", "ids") == ["0", "1", "2", "3", "4"]
    assert strings(tmp_path / "a.safetensors", "text")[1] == "a blue bar"
    last = found.history[-1]
    expected = {
        "decoder_steps": 3,
        "decoder_sampler": "dpm++",
        "decoder_guidance": 1.0,
        "eta": 0.0,
        "seed": 0,
        "dtype": "float32",
    }
    assert last["options"] == expected
    assert set(last["inputs"]) == {"embeddings", "decoder"}
    one = decode(sampled, model, tmp_path / "b.safetensors", "--batch-size", 2)
    assert np.abs(one - whole).max() <= 1
    shards = decode(sampled, model, tmp_path / "folder", "--shard-size", 2)
    assert np.abs(shards - whole).max() <= 1
    result = run_cli("decode", sampled, "-m", model, "-o", tmp_path / "folder", "--decoder-steps", 3, "--shard-size", 2)
    assert "all there already" in result.stderr
    for more in (
        ("--seed", 1),
        ("--decoder-guidance", 3),
        ("--decoder-sampler", "ddpm"),
        ("--decoder-sampler", "ddim", "--eta", 1),
    ):
        other = decode(sampled, model, tmp_path / "c.safetensors", *more)
        assert np.abs(other - whole).max() > 3, more
    result = run_cli("decode", "-m", model, stdin=f"{sampled}\n")
    assert result.stdout == f"{sampled.parent}/five.images.safetensors\n"


def test_embedding_and_caption_count(model, sampled, tmp_path):
    whole = decode(sampled, model, tmp_path / "a.safetensors")
    table = open_artifact(sampled)
    columns = {"embeddings": np.array(table.array("embeddings")), "ids": strings(sampled, "ids")}
    plain = write_artifact(tmp_path / "plain.safetensors", "embeddings", columns, table.config, [])
    uncaptioned = decode(plain, model, tmp_path / "b.safetensors")
    change = np.abs(uncaptioned - whole).reshape(5, -1).max(1)
    assert change[2] <= 1  # an empty caption is none
    assert change[[0, 1, 3, 4]].min() > 1
    columns["embeddings"] = columns["embeddings"][::-1]
    turned = write_artifact(tmp_path / "turned.safetensors", "embeddings", columns, table.config, [])
    change = np.abs(decode(turned, model, tmp_path / "c.safetensors") - uncaptioned).reshape(5, -1).max(1)
    assert change[[0, 1, 3, 4]].min() > 1
    assert change[2] <= 1  # the one in the middle


def test_a_chain_of_upsamplers(model, large, sampled, tmp_path):
    """2 and 4 times as large: 8 pixels to 64, in the order of sizes whatever the files' names."""
    pictures = decode(sampled, large, tmp_path / "a.safetensors", "--upsampler-steps", 2)
    assert pictures.shape == (5, 3, 64, 64)
    last = open_artifact(tmp_path / "a.safetensors").history[-1]
    assert last["options"]["upsampler_steps"] == 2
    assert list(last["inputs"]) == ["decoder", "embeddings", "upsampler_1", "upsampler_2"]
    assert last["inputs"]["upsampler_1"] == digest_file(large / "up16.safetensors")
    again = decode(sampled, large, tmp_path / "b.safetensors", "--upsampler-steps", 2, "--batch-size", 3)
    assert np.abs(again - pictures).max() <= 2
    other = decode(sampled, large, tmp_path / "c.safetensors", "--upsampler-steps", 3)
    assert np.abs(other - pictures).max() > 3
    assert len(bundles.whole(list(large.glob("up*.safetensors")))) == 2


def test_low_noise_is_passed_to_the_upsamplers_trained_with_it(unclip, chain, sampled, tmp_path):
    """By default as their weights say; a value given wins; the history says what changed the images."""

    def made(folder, *more):
        images = decode(sampled, folder, tmp_path / "x.safetensors", "--upsampler-steps", 2, *more)
        return images, open_artifact(tmp_path / "x.safetensors").history[-1]["options"].get("low_noise")

    sizes = [(16, 32), (8, 16, 0.5, 0.0)]
    silent = planted(tmp_path / "silent", unclip, chain, sizes)
    noisy = planted(tmp_path / "noisy", unclip, chain, [sizes[0], (8, 16, 0.5, 0.25)])
    none, some, default = made(silent), made(silent, "--low-noise", 0.25), made(noisy)
    assert none[1] is None
    assert some[1] == default[1] == [0.25, 0.0]  # of 8 to 16 pixels, and of 16 to 32, which was trained without
    assert np.abs(some[0] - none[0]).max() > 3
    assert (default[0] == some[0]).all()
    off = made(noisy, "--low-noise", 0)
    assert off[1] is None
    assert (off[0] == none[0]).all()
    assert np.abs(made(silent, "--low-noise", 0.5)[0] - some[0]).max() > 3
    assert "--low-noise in [0, 0.5]" in run_bad("decode", sampled, "-m", silent, "--low-noise", 0.6)
    without = planted(tmp_path / "without", unclip, chain, [(8, 16)])
    assert "for --low-noise, found none" in run_bad("decode", sampled, "-m", without, "--low-noise", 0.1)


def test_upsamplers_that_do_not_follow(unclip, chain, sampled, tmp_path):
    gap = planted(tmp_path / "gap", unclip, chain, [(16, 64)])
    assert "upsamplers from 8 pixels on, found one from 16" in run_bad("decode", sampled, "-m", gap)
    twice = planted(tmp_path / "twice", unclip, chain, [(8, 16), (8, 32)])
    assert "one upsampler from 8 pixels, found 2" in run_bad("decode", sampled, "-m", twice)
    with pytest.raises(DalleError, match=r"one file of weights\.upsampler"):
        bundles.whole(list(twice.glob("up*.safetensors")))


def test_what_decode_refuses(chain, model, sampled, tmp_path):
    assert "no --decoder-guidance for codes" in run_bad(
        "decode", chain.drawn, "-m", chain.model, "--decoder-guidance", 2
    )
    assert "expected weights.decoder" in run_bad("decode", sampled, "-m", chain.model)
    table = open_artifact(sampled)
    columns = {"embeddings": np.array(table.array("embeddings")), "ids": strings(sampled, "ids")}
    other = write_artifact(tmp_path / "other.safetensors", "embeddings", columns, {"encoder": "1" * 64}, [])
    assert "expected the CLIP" in run_bad("decode", other, "-m", model)
    assert "sampler among" in run_bad("decode", sampled, "-m", model, "--decoder-sampler", "magic")
    assert "1 to 40 steps" in run_bad("decode", sampled, "-m", model, "--decoder-steps", 41)
    lone = shutil.copy(model / "decoder.safetensors", tmp_path / "decoder.safetensors")
    assert "tokenizer" in run_bad("decode", sampled, "-m", lone)


def test_a_trained_bundle_samples_images(trained, unclip, sampled, tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    for path in (*trained.glob("*.safetensors"), unclip.tokenizer):
        shutil.copy(path, folder)
    assert decode(sampled, folder, tmp_path / "a.safetensors", "--upsampler-steps", 2).shape == (5, 3, 64, 64)
    stages = [entry["stage"] for entry in open_artifact(tmp_path / "a.safetensors").history]
    assert stages[-1] == "decode"
    assert stages.count("train-decoder") == 3
    json.dumps(open_artifact(tmp_path / "a.safetensors").history)
