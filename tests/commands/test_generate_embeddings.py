"""`generate` with a prior over embeddings: the four stages in one, each option heeded, the best held and no more."""

import shutil
from dataclasses import asdict

import numpy as np
import pytest
from artifact_files import array, strings
from conftest import run_bad, run_cli, run_ok
from planted_weights import randomized
from test_generate import check_progress, interrupt, most_alive, reported

from dalle_cli.artifacts import digest_file, open_artifact, write_artifact
from dalle_cli.artifacts.weights import save_tensors
from dalle_cli.models.decoder import Decoder, DecoderConfig
from dalle_cli.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig
from dalle_cli.models.embedding_prior import AutoregressivePrior, AutoregressivePriorConfig
from dalle_cli.models.upsampler import Upsampler, UpsamplerConfig
from dalle_cli.pipelines import decoder as decoders
from dalle_cli.pipelines import pipeline
from dalle_cli.pipelines.decoder import ImageDecoder
from dalle_cli.pipelines.prior import EmbeddingPrior

PROMPT, OTHER = "a red circle on white", "a blue bar on black"
KINDS = ("diffusion", "autoregressive")
SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_embedding": 16}
UNET = {"width": 8, "multipliers": (1, 2), "depth": 1, "head_width": 4, "groups": 4, "n_timestep": 40}
SAMPLING = {
    "diffusion": ("--sampler", "ddim", "--steps", 4, "--guidance", 2, "--seed", 5),
    "autoregressive": ("--temperature", 0.9, "--top-k", 12, "--guidance", 2, "--seed", 5),
}


def plant(chain, folder, kind):
    """A bundle of random weights at which every path counts, beside the chain's CLIP and tokenizer."""
    folder.mkdir()
    for path in (chain.tokenizer, chain.clip):
        shutil.copy(path, folder)
    told = open_artifact(chain.captions).config
    text = {"n_text": told["n_text"], "n_text_vocab": told["n_vocab"]}
    facts = {"encoder": digest_file(chain.clip), "tokenizer": told["tokenizer"], "train": {}}
    prior = {
        "diffusion": lambda: DiffusionPrior(DiffusionPriorConfig(**SMALL, **text, n_timestep=30)),
        "autoregressive": lambda: AutoregressivePrior(
            AutoregressivePriorConfig(**SMALL, **text, n_component=6, n_bucket=16)
        ),
    }[kind]()
    reads = {**text, "n_embedding": 16, "context_width": 8, "text_layers": 1, "text_heads": 2}
    made = {
        "drawer": ("weights.prior.embeddings", prior),
        "decoder": ("weights.decoder", Decoder(DecoderConfig(**UNET, **reads, image_size=8, attention=(4,)))),
        "larger": ("weights.upsampler", Upsampler(UpsamplerConfig(**UNET, image_size=16, low_size=8))),
    }
    for name, (sort, model) in made.items():
        header = {"model": asdict(model.config), **(facts if name != "larger" else {"train": {}})}
        save_tensors(folder / f"{name}.safetensors", sort, randomized(model, scale=0.2).state_dict(), header, [])
    return folder


DECODING = ("--decoder-steps", 3, "--decoder-sampler", "ddim", "--eta", 0.5, "--decoder-guidance", 3)


@pytest.fixture(scope="module")
def models(chain, tmp_path_factory):
    root = tmp_path_factory.mktemp("unclip")
    return {kind: plant(chain, root / kind, kind) for kind in KINDS}


def generate(model, folder, *more, n=4, prompts=(PROMPT,)):
    """Few steps, unless others are said; the result and where the pictures are."""
    out, quick = ("-o", folder / "a.png", "--images", folder / "a.safetensors"), []
    for option in ("--decoder-steps", "--upsampler-steps"):
        quick += [] if option in more else [option, 2]
    return run_cli("generate", *prompts, "-n", n, "-m", model, *more, *quick, *out)


def pictures(model, folder, *more):
    """By candidate, of whatever rank."""
    result = generate(model, folder, *more)
    assert result.status == 0, result.stderr
    images, ids = array(folder / "a.safetensors", "images").astype(int), strings(folder / "a.safetensors", "ids")
    return images[np.argsort(ids)]


@pytest.fixture(scope="module")
def piped(models, tmp_path_factory):
    """The stages one after another: 12 candidates of two prompts, the best three of each by their small images."""
    folders = {}
    for kind, model in models.items():
        folder = folders[kind] = tmp_path_factory.mktemp(kind)
        sampled, images, small, best = (folder / f"{n}.safetensors" for n in ("sampled", "images", "small", "best"))
        run_ok("sample", PROMPT, OTHER, "-n", 6, "-m", model, *SAMPLING[kind], "-o", sampled)
        run_ok("decode", sampled, "-m", model, *DECODING, "--upsampler-steps", 2, "--seed", 5, "-o", images)
        alone = shutil.copytree(model, folder / "alone", ignore=shutil.ignore_patterns("larger*"))
        run_ok("decode", sampled, "-m", alone, *DECODING, "--seed", 5, "-o", small)
        run_ok("rerank", small, "-m", alone, "--keep", 3, "-o", best)
    return folders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [5, 64, "auto"])
def test_generate_is_the_four_stages(models, piped, tmp_path, monkeypatch, kind, batch_size):
    if batch_size == 5:
        monkeypatch.setattr(pipeline, "AT_ONCE", 2)
    more = (*SAMPLING[kind], *DECODING, "--keep", 3, "--batch-size", batch_size)
    result = generate(models[kind], tmp_path, *more, n=6, prompts=(PROMPT, OTHER))
    assert (result.status, result.stdout) == (0, f"{tmp_path / 'a.png'}\n"), result.stderr
    made, best = tmp_path / "a.safetensors", piped[kind] / "best.safetensors"
    assert strings(made, "ids") == strings(best, "ids")
    assert strings(made, "text") == strings(best, "text") == [PROMPT] * 3 + [OTHER] * 3
    np.testing.assert_allclose(array(made, "score"), array(best, "score"), atol=1e-3)
    every = piped[kind] / "images.safetensors"  # all of them enlarged, of which those are picked
    picked = [strings(every, "ids").index(name) for name in strings(made, "ids")]
    np.testing.assert_allclose(array(made, "images").astype(int), array(every, "images")[picked].astype(int), atol=2)


def test_only_what_is_kept_is_enlarged(models, tmp_path, monkeypatch):
    enlarged, upsample = [], decoders.upsample
    monkeypatch.setattr(
        decoders, "upsample", lambda model, low, *a: enlarged.append(len(low)) or upsample(model, low, *a)
    )
    assert generate(models["diffusion"], tmp_path, "--keep", 2, n=8, prompts=(PROMPT, OTHER)).status == 0
    assert sum(enlarged) == 4


def test_a_candidate_is_the_same_among_few(models, tmp_path):
    many = pictures(models["diffusion"], tmp_path)
    assert generate(models["diffusion"], tmp_path, n=2).status == 0
    few, ids = array(tmp_path / "a.safetensors", "images").astype(int), strings(tmp_path / "a.safetensors", "ids")
    assert np.abs(few[np.argsort(ids)] - many[:2]).max() <= 2


@pytest.mark.parametrize(
    ("kind", "base", "more"),
    [
        ("diffusion", (), ("--seed", 1)),
        ("diffusion", (), ("--steps", 3)),
        ("diffusion", (), ("--sampler", "ddim")),
        ("diffusion", (), ("--guidance", 5)),
        ("diffusion", ("--guidance", 5, "--steps", 2), ("--guidance-from", 0.9)),
        ("diffusion", ("--guidance", 5), ("--guidance-to", 0.5)),
        ("diffusion", (), ("--decoder-steps", 3)),
        ("diffusion", (), ("--decoder-sampler", "heun")),
        ("diffusion", (), ("--decoder-guidance", 5)),
        ("diffusion", ("--decoder-sampler", "ddim"), ("--eta", 1)),
        ("diffusion", (), ("--upsampler-steps", 3)),
        ("autoregressive", (), ("--temperature", 3)),
        ("autoregressive", (), ("--top-k", 1)),
        ("autoregressive", (), ("--top-p", 0.1)),
    ],
    ids=str,
)
def test_each_option_changes_the_image(models, tmp_path, kind, base, more):
    plain = pictures(models[kind], tmp_path, *base)
    assert plain.shape == (4, 3, 16, 16)
    changed = np.abs(pictures(models[kind], tmp_path, *base, *more) - plain).reshape(4, -1).max(1)
    assert changed.max() > 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_history_tells_how_and_by_what(models, tmp_path, kind):
    model = models[kind]
    assert generate(model, tmp_path, *SAMPLING[kind], *DECODING, "--keep", 1).status == 0
    sampled, made = open_artifact(tmp_path / "a.safetensors").history[-2:]
    said = {"diffusion": {"sampler": "ddim", "steps": 4}, "autoregressive": {"temperature": 0.9, "top_k": 12}}[kind]
    said |= {"top_p": 1.0} if kind == "autoregressive" else {}
    assert sampled["stage"] == "sample"
    assert sampled["options"] == {"n": 4, "guidance": 2.0, "seed": 5, "dtype": "float32", **said}
    assert made["stage"] == "generate"
    painted = {"decoder_steps": 3, "decoder_sampler": "ddim", "decoder_guidance": 3.0, "eta": 0.5, "seed": 5}
    assert made["options"] == {"keep": 1, "dtype": "float32", "upsampler_steps": 2, "ranked_size": 8, **painted}
    files = {"decoder": "decoder", "upsampler_1": "larger", "clip": "clip"}
    assert made["inputs"] == {name: digest_file(model / f"{file}.safetensors") for name, file in files.items()}
    ours = {"model": digest_file(model / "drawer.safetensors"), "clip": digest_file(model / "clip.safetensors")}
    assert sampled["inputs"] == ours


# Memory


def test_nothing_of_the_others_is_alive(models, tmp_path, monkeypatch):
    """Embeddings and images of whole batches: no more are alive of 40 candidates than of 12."""

    def alive(n):
        run = lambda: generate(models["diffusion"], tmp_path, "--keep", 2, "--batch-size", 4, n=n)  # noqa: E731
        most, total = most_alive(monkeypatch, EmbeddingPrior, ImageDecoder, run, "decode_small")
        assert total == 2 * n / 4
        return most

    assert alive(12) == alive(40) <= 4  # of this batch, and of the one before it


def test_an_interrupt_keeps_the_best_so_far(models, tmp_path, monkeypatch):
    interrupt(monkeypatch, ImageDecoder, 3, "decode_small")
    result = generate(models["diffusion"], tmp_path, "--keep", 2, "--batch-size", 4, n=12)
    assert (result.status, result.stdout) == (130, f"{tmp_path / 'a.png'}\n")
    assert "interrupted: these are the best of the first 8 of 12" in result.stderr
    assert open_artifact(tmp_path / "a.safetensors").history[-1]["options"]["seen"] == 8
    assert len(strings(tmp_path / "a.safetensors", "ids")) == 2


def test_progress_tells_of_decoded_candidates_and_the_best(models, tmp_path, monkeypatch):
    calls = reported(monkeypatch)
    assert generate(models["diffusion"], tmp_path, "--keep", 2, "--batch-size", 5, n=12).status == 0
    enlarging = calls.index((2, {"unit": "images"}))
    assert [n for n, _ in calls[1:enlarging] if n] == [5, 5, 2]
    assert calls[enlarging + 1 :] == [(2, {})]
    check_progress(calls[:enlarging], tmp_path / "a.safetensors")


# Which system, and what it has no use for


@pytest.fixture(scope="module")
def both(chain, models, tmp_path_factory):
    """A bundle with both priors, the dVAE and the decoder."""
    folder = tmp_path_factory.mktemp("both") / "model"
    shutil.copytree(models["diffusion"], folder)
    shutil.copy(chain.dvae, folder)
    shutil.copy(chain.prior, folder)
    return folder


def test_of_both_systems_it_is_the_codes_unless_said(chain, models, both, tmp_path):
    def made(model, *more):
        run_ok("generate", PROMPT, "-n", 2, "-m", model, *more, "-o", tmp_path / "a.png", "--images", tmp_path / "a")
        return array(tmp_path / "a", "images").tobytes()

    codes = made(chain.model)
    assert made(both) == made(both, "--latents", "codes") == codes
    steps = ("--decoder-steps", 2, "--upsampler-steps", 2, "--steps", 3)
    painted = made(models["diffusion"], *steps)
    assert made(both, "--latents", "embeddings", *steps) == painted != codes


@pytest.mark.parametrize(
    "more",
    [
        *(("--steps", 3), ("--sampler", "ddim"), ("--decoder-steps", 3), ("--decoder-sampler", "ddim")),
        *(("--decoder-guidance", 2), ("--eta", 0.5), ("--upsampler-steps", 3)),
    ],
    ids=str,
)
def test_codes_have_no_use_for_it(chain, tmp_path, more):
    line = run_bad("generate", PROMPT, "-n", 1, "-m", chain.model, *more, "-o", tmp_path / "a.png")
    assert f"expected no {more[0]} for a prior over codes" in line


@pytest.mark.parametrize("name", ["--image", "--keep-rows", "--mask", "--int8", "--compile"])
def test_embeddings_have_no_use_for_it(chain, models, tmp_path, name):
    value = {"--image": (chain.data / "00.png",), "--mask": (chain.data / "00.png",), "--keep-rows": (2,)}.get(name, ())
    command = ("generate", PROMPT, "-n", 1, "-m", models["diffusion"], name, *value, "-o", tmp_path / "a.png")
    assert f"expected no {name} for a prior over embeddings" in run_bad(*command)
    assert not list(tmp_path.iterdir())


def test_what_else_is_refused(chain, models, tmp_path):
    def refused(*more, model=models["diffusion"]):
        return run_bad("generate", PROMPT, "-n", 2, "-m", model, *more, "-o", tmp_path / "a.png")

    assert "found --temperature" in refused("--temperature", 0.5)
    assert "found --steps" in refused("--steps", 3, model=models["autoregressive"])
    assert "expected --latents among codes, embeddings, found 'pixels'" in refused("--latents", "pixels")
    assert "expected weights.prior.codes, found none" in refused("--latents", "codes")
    assert "expected weights.prior.embeddings, found none" in refused("--latents", "embeddings", model=chain.model)
    assert "sampler among" in refused("--decoder-sampler", "magic")
    assert "eta with the sampler ddim alone" in refused("--eta", 0.5)
    assert "1 to 40 steps" in refused("--decoder-steps", 41)
    assert "1 to 30 steps" in refused("--steps", 31)


def test_weights_that_are_missing_or_of_another_clip(chain, models, tmp_path):
    def refused(change):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(models["diffusion"], folder)
        change(folder)
        return run_bad("generate", PROMPT, "-n", 2, "-m", folder, "-o", tmp_path / "a.png")

    def of_another(folder):
        weights = open_artifact(folder / "decoder.safetensors")
        tensors = {name: np.array(weights.headers[0].map(name)) for name in weights.headers[0].tensors}
        config = {**weights.config, "encoder": "1" * 64}
        write_artifact(folder / "decoder.safetensors", weights.kind, tensors, config, [], force=True)

    assert "expected weights.decoder, found none" in refused(lambda f: (f / "decoder.safetensors").unlink())
    assert "expected weights.clip, found none" in refused(lambda f: (f / "clip.safetensors").unlink())
    assert "expected the CLIP that" in refused(of_another)
