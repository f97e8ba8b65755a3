"""The stages over CLIP embeddings, from pictures and captions to embeddings that were drawn."""

import json
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import RECIPE, run_bad, run_cli, run_ok
from stage_runs import lasting_rows, rows

from dalle_cli.artifacts import digest_file, open_artifact
from dalle_cli.data.datasets import open_dataset
from dalle_cli.data.tokenizer import load as load_tokenizer
from dalle_cli.pipelines import loading

TRAIN = """
steps = 12
batch_size = 8
lr = 3e-3
warmup = 0
ema = 0.5
log_every = 3
validate_every = 6
checkpoint_every = 4
validation = 0.2
"""
SECTIONS = f"""
[embedding_prior.diffusion]
n_layer = 2
n_head = 2
n_embd = 16
n_timestep = 50

[embedding_prior.diffusion.train]{TRAIN}
[embedding_prior.autoregressive]
n_layer = 2
n_head = 2
n_embd = 16
n_bucket = 16
n_dot = 4

[embedding_prior.autoregressive.train]{TRAIN}
"""
KINDS = ("diffusion", "autoregressive")


class Embedded:
    """Files of the chain over embeddings, under one folder."""

    def __init__(self, chain, root):
        self.chain, self.root = chain, root
        self.recipe, self.captions = root / "recipe.toml", root / "captions.safetensors"
        self.latents = root / "latents"
        self.models = {kind: root / kind for kind in KINDS}

    def training(self, kind, out, *more):
        choice = ("--config", self.recipe, "--set", f"embedding_prior.kind={kind}")
        return ("train-prior", self.captions, self.latents, *choice, "--dtype", "float32", "-o", out, *more)

    def make(self):
        chain = self.chain
        self.recipe.write_text(RECIPE + SECTIONS)
        config = ("--config", self.recipe)
        run_ok("tokenize", chain.data, "-t", chain.tokenizer, "-m", chain.clip, *config, "-o", self.captions)
        run_ok("encode-images", chain.data, "-m", chain.clip, "--shard-size", 10, *config, "-o", self.latents)
        for kind, model in self.models.items():
            model.mkdir()
            for file in (chain.tokenizer, chain.clip):
                shutil.copy(file, model)
            run_ok(*self.training(kind, model / "prior.safetensors"))
        return self


@pytest.fixture(scope="module")
def made(chain, tmp_path_factory):
    return Embedded(chain, tmp_path_factory.mktemp("embedded")).make()


def clip_of(chain):
    return loading.clip(open_artifact(chain.clip), torch.device("cpu"))


def test_encode_images_by_a_clip(chain, made):
    """Each picture's embedding, of length 1, with the CLIP's digest."""
    found = open_artifact(made.latents, "embeddings")
    assert found.config == {"encoder": digest_file(chain.clip)}
    assert found.history[-1]["stage"] == "encode-images"
    assert found.history[-1]["inputs"]["model"] == digest_file(chain.clip)
    data = open_dataset(str(chain.data), need_captions=False)
    assert list(found.strings("ids")) == data.ids
    for row in (0, 13, 23):
        pixels = torch.from_numpy(np.array(data.read(row))).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            z = clip_of(chain).encode_image(pixels)[0]
        np.testing.assert_allclose(found.array("embeddings")[row], z / z.norm(), atol=1e-5)


def test_a_bundle_with_both_encoders_gives_codes(chain, tmp_path):
    """As before there were embeddings; a file says by itself which it is."""
    run_ok("encode-images", chain.data, "-m", chain.model, "--config", chain.recipe, "-o", tmp_path / "a.safetensors")
    assert open_artifact(tmp_path / "a.safetensors").kind == "codes"


def test_tokenize_with_a_clip(chain, made):
    """The same tokens as without, and of each caption its embedding by the CLIP's own tokenizer."""
    found, plain = open_artifact(made.captions, "captions"), open_artifact(chain.captions)
    assert found.config == {**plain.config, "encoder": digest_file(chain.clip)}
    assert np.array_equal(found.array("tokens"), plain.array("tokens"))
    assert "embeddings" not in plain
    z = found.array("embeddings")
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-6)
    bpe = load_tokenizer(chain.tokenizer)
    for row in (0, 9):
        tokens, lengths, _ = bpe.encode_batch([found.strings("text")[row]], 24)
        with torch.no_grad():
            expected = clip_of(chain).encode_text(*(torch.from_numpy(x.astype(np.int64)) for x in (tokens, lengths)))[0]
        np.testing.assert_allclose(z[row], expected / expected.norm(), atol=1e-5)


def test_tokenize_takes_no_clip_from_the_environment(chain, tmp_path):
    """The variable names what draws; it must not change what captions are."""
    out = tmp_path / "captions.safetensors"
    command = ("tokenize", chain.data, "-t", chain.tokenizer, "--config", chain.recipe, "-o", out)
    run_ok(*command, env={"DALLE_MODEL": str(chain.model)})
    assert out.read_bytes() == chain.captions.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_say_what_they_are_of(chain, made, kind):
    weights = open_artifact(made.models[kind] / "prior.safetensors", "weights.prior.embeddings")
    model = weights.config["model"]
    assert weights.config["tokenizer"] == digest_file(chain.tokenizer)
    assert weights.config["encoder"] == digest_file(chain.clip)
    assert (model["kind"], model["n_embedding"], model["n_text"]) == (kind, 16, 24)
    assert [entry["stage"] for entry in weights.history][-1] == "train-prior"
    assert set(weights.history[-1]["inputs"]) == {"captions", "embeddings"}
    figures = rows(made.models[kind] / "prior.safetensors")[-1]["validation"]
    assert figures.keys() == {"loss_held_out", "cosine", "cosine_others"}
    assert "left alone" in run_cli(*made.training(kind, made.models[kind] / "prior.safetensors")).stderr


def test_components_are_counted_where_the_recipe_does_not(made, tmp_path):
    weights = open_artifact(made.models["autoregressive"] / "prior.safetensors")
    n = weights.config["model"]["n_component"]
    z = np.asarray(open_artifact(made.latents).array("embeddings"))
    spectrum = np.linalg.eigvalsh(np.cov(z.T))[::-1]
    few = (np.cumsum(spectrum) < 0.99 * spectrum.sum()).sum() + 1
    assert abs(n - few) <= 1  # few are of all pictures, n of those to train on
    out = tmp_path / "prior.safetensors"
    run_ok(*made.training("autoregressive", out, "--set", "embedding_prior.autoregressive.n_component=2"))
    assert open_artifact(out).config["model"]["n_component"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_given_again(made, tmp_path, kind):
    """Interrupted through the command line, and gone on with: the bytes of a run never stopped."""
    from interruptions import after_update

    out = tmp_path / "prior.safetensors"

    def stop():
        import os
        import signal

        os.kill(os.getpid(), signal.SIGINT)

    with after_update(6, stop):
        assert run_cli(*made.training(kind, out)).status == 130
    assert not out.exists()
    run_ok(*made.training(kind, out))
    whole = made.models[kind] / "prior.safetensors"
    assert out.read_bytes() == whole.read_bytes()
    assert lasting_rows(out) == lasting_rows(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_sample(chain, made, tmp_path, kind):
    """An artifact of embeddings that says what was drawn, the same whatever is drawn beside it."""
    out = tmp_path / "drawn.safetensors"
    prompts = ("a red circle on white", "a blue bar on black")
    common = ("-m", made.models[kind], "--seed", 5, "--guidance", 2)
    assert run_ok("sample", *prompts, "-n", 3, *common, "-o", out) == str(out)
    drawn = open_artifact(out, "embeddings")
    assert drawn.config == {"encoder": digest_file(chain.clip)}
    assert list(drawn.strings("ids")) == [f"{p:05d}-{k:05d}" for p in range(2) for k in range(3)]
    assert list(drawn.strings("text")) == [text for text in prompts for _ in range(3)]
    assert drawn.array("prompt").tolist() == [0, 0, 0, 1, 1, 1]
    assert drawn.array("seed").tolist() == [5] * 6
    z = np.array(drawn.array("embeddings"))
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-6)
    entry = drawn.history[-1]
    own = {"sampler": "ddpm", "steps": 50} if kind == "diffusion" else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert entry["options"] == {"n": 3, "guidance": 2.0, "seed": 5, "dtype": "float32", **own}
    assert entry["inputs"]["clip"] == digest_file(chain.clip)
    run_ok("sample", prompts[1], "-n", 2, "--batch-size", 1, *common, "-o", tmp_path / "some.safetensors")
    some = np.array(open_artifact(tmp_path / "some.safetensors").array("embeddings"))
    np.testing.assert_allclose(some, z[3:5], atol=1e-5)
    run_ok("sample", *prompts, "-n", 3, *common[:-1], 1, "-o", tmp_path / "plain.safetensors")
    assert np.abs(np.array(open_artifact(tmp_path / "plain.safetensors").array("embeddings")) - z).max() > 1e-4
    run_ok("sample", *prompts, "-n", 3, *common, "-o", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()


def test_sampler_and_steps(made, tmp_path, monkeypatch):
    """They reach the sampler, and the history; the output is named after the prompt."""
    from dalle_cli.diffusion import samplers

    monkeypatch.chdir(tmp_path)
    command = ("sample", "a red circle on white", "-n", 2, "-m", made.models["diffusion"], "--force")
    for sampler, steps in (("ddim", 4), ("dpm++", 9), ("heun", 3)):
        with mock.patch.object(samplers, "sample", wraps=samplers.sample) as called:
            out = run_ok(*command, "--sampler", sampler, "--steps", steps)
        assert (called.call_args.args[0], called.call_args.args[4]) == (sampler, steps)
        assert out == "a-red-circle-on-white.embeddings.safetensors"
        options = open_artifact(out).history[-1]["options"]
        assert (options["sampler"], options["steps"]) == (sampler, steps)


def test_z_t_of_the_prompt_is_used(made, tmp_path):
    """With another text side the same prompt draws other embeddings, though its tokens are the same."""
    from dalle_cli.pipelines.clip import ClipScorer

    command = ("sample", "a red circle on white", "-n", 2, "-m", made.models["diffusion"], "-o")
    run_ok(*command, tmp_path / "a.safetensors")
    original = ClipScorer.encode_texts
    with mock.patch.object(ClipScorer, "encode_texts", lambda self, texts: -original(self, texts)):
        run_ok(*command, tmp_path / "b.safetensors")
    one, other = (np.array(open_artifact(tmp_path / f"{n}.safetensors").array("embeddings")) for n in "ab")
    assert np.abs(one - other).max() > 1e-4


def test_options_of_the_other_kind_are_refused(chain, made, tmp_path):
    out = ("-o", tmp_path / "x.safetensors")
    diffusion, autoregressive = (("sample", "red", "-n", 1, "-m", made.models[kind], *out) for kind in KINDS)
    assert "found --temperature" in run_bad(*diffusion, "--temperature", 0.5)
    assert "found --steps" in run_bad(*autoregressive, "--steps", 5)
    assert "no --image for a prior over embeddings" in run_bad(*diffusion, "--image", chain.data / "00.png")
    assert "no --int8" in run_bad(*autoregressive, "--int8")
    assert "no --compile" in run_bad(*diffusion, "--compile")
    assert "no --steps for a prior over codes" in run_bad("sample", "red", "-m", chain.model, *out, "--steps", 5)
    assert "found 'euler'" in run_bad(*diffusion, "--sampler", "euler")
    assert "1 to 50 steps" in run_bad(*diffusion, "--steps", 51)


def test_another_clip_is_refused(chain, made, tmp_path):
    """By its digest, in the captions, beside the prior, and where there is none."""
    other = tmp_path / "other"
    other.mkdir()
    config = ("--config", chain.recipe, "--set", "clip.train.steps=3", "--dtype", "float32")
    run_ok("train-clip", chain.data, "-t", chain.tokenizer, *config, "-o", other / "clip.safetensors")
    shutil.copy(chain.tokenizer, other)
    run_ok("encode-images", chain.data, "-m", other / "clip.safetensors", "-o", tmp_path / "z.safetensors")
    training = ("--config", made.recipe, "-o", tmp_path / "prior.safetensors")
    assert "embedded by one CLIP" in run_bad("train-prior", made.captions, tmp_path / "z.safetensors", *training)
    assert "tokenize -m CLIP" in run_bad("train-prior", chain.captions, made.latents, *training)
    shutil.copy(made.models["diffusion"] / "prior.safetensors", other)
    sample = ("sample", "red", "-n", 1, "-o", tmp_path / "x.safetensors", "-m")
    assert "expected the CLIP that" in run_bad(*sample, other)
    assert "copy it there" in run_bad(*sample, other / "prior.safetensors")


def test_recipes_are_checked(made, tmp_path):
    training = ("train-prior", made.captions, made.latents, "--config", made.recipe, "-o", tmp_path / "x.safetensors")
    cases = {
        "embedding_prior.kind=gan": "among diffusion, autoregressive, found 'gan'",
        "embedding_prior.kin=diffusion": "did you mean 'kind'",
        "embedding_prior.diffusion.n_layr=2": "did you mean 'n_layer'",
        "embedding_prior.diffusion.n_embedding=7": "expected embedding_prior.diffusion.n_embedding = 16",
        "embedding_prior.diffusion.kind=autoregressive": "kind = diffusion",
        "embedding_prior.diffusion.train.lrr=1": "did you mean 'lr'",
        "embedding_prior.diffusion=3": "expected a table [embedding_prior.diffusion], found 3",
        "embedding_prior=3": "expected a table [embedding_prior], found 3",
    }
    for setting, said in cases.items():
        assert said in run_bad(*training, "--set", setting)


def test_info(made):
    told = json.loads(run_ok("info", made.models["diffusion"] / "prior.safetensors", "--json"))
    assert told["kind"] == "weights.prior.embeddings"
