"""The decoder of a bundle: sampled as its weights say; commands with a decoder of latents."""

import numpy as np
import pytest
from conftest import run_bad, run_ok
from kandinsky_publication import SIDE, WIDTH, components, publish
from PIL import Image

from dalle_cli.artifacts import open_artifact
from dalle_cli.artifacts.weights import load_tensors, save_tensors
from dalle_cli.errors import DalleError
from dalle_cli.options import DecoderOptions
from dalle_cli.pipelines import load
from dalle_cli.pipelines.decoder import decoder_config, upsampler_config
from dalle_cli.sampling.decoder import SamplerConfig

KARLO = {"steps": 25, "sampler": "ddpm", "spacing": "linspace", "guidance": 8.0, "clip": 1.0}
PROMPT = "a red circle"


def test_a_decoder_is_sampled_as_its_weights_say():
    assert decoder_config(DecoderOptions(), {}) == SamplerConfig(20, "dpm++", 1.0)
    assert decoder_config(DecoderOptions(), KARLO) == SamplerConfig(**KARLO)
    given = DecoderOptions(decoder_steps=50, decoder_sampler="ddim", decoder_guidance=2.0, eta=0.5)
    assert decoder_config(given, KARLO) == SamplerConfig(50, "ddim", 2.0, 0.5, "linspace")
    noisy = {"sampler": "ddim", "eta": 0.3}
    assert decoder_config(DecoderOptions(), noisy).eta == 0.3
    assert decoder_config(DecoderOptions(decoder_sampler="heun"), noisy).eta == 0  # that of ddim alone
    with pytest.raises(DalleError, match="eta with the sampler ddim alone"):
        decoder_config(DecoderOptions(eta=0.5), KARLO)


def test_an_upsampler_is_sampled_as_its_weights_say():
    """The decoder's sampler is an option of upsamplers whose weights name none."""
    own = {"steps": 7, "sampler": "ddpm", "spacing": "linspace", "variance": "fixed_small", "low_noise": 0.2}
    expected = SamplerConfig(7, "ddpm", spacing="linspace", variance="fixed_small")
    chosen = DecoderOptions(decoder_sampler="ddim", eta=0.5, decoder_guidance=3.0)
    for options in (DecoderOptions(), chosen):
        assert upsampler_config(options, own) == expected
    assert upsampler_config(DecoderOptions(upsampler_steps=3), own).steps == 3
    assert upsampler_config(DecoderOptions(), {}) == SamplerConfig(10, "dpm++")
    assert upsampler_config(chosen, {}) == SamplerConfig(10, "ddim", eta=0.5)


# A decoder of latents


@pytest.fixture(scope="module")
def kandinsky(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kandinsky")
    run_ok("import", publish(components(), folder / "published"), "-o", folder / "bundle")
    return folder / "bundle"


def test_commands_with_a_decoder_of_latents(kandinsky, tmp_path):
    out = ("-m", kandinsky, "-o", tmp_path / "a.png", "--images", tmp_path / "a.safetensors")
    run_ok("generate", PROMPT, "-n", 3, "--keep", 1, "--steps", 2, "--decoder-steps", 3, *out)
    by_stage = {entry["stage"]: entry for entry in open_artifact(tmp_path / "a.safetensors").history}
    sampled, made = by_stage["sample"], by_stage["generate"]
    assert (sampled["options"]["guidance"], made["options"]["decoder_guidance"]) == (4.0, 4.0)
    assert made["inputs"].keys() == {"decoder", "autoencoder", "clip"}
    assert made["options"].keys() & {"upsampler_steps", "ranked_size"} == set()
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    run_ok("vary", tmp_path / "image.png", "-n", 2, "--decoder-steps", 2, "--decoder-guidance", 1, *out, "--force")
    made = open_artifact(tmp_path / "a.safetensors")
    assert made.array("images").shape == (3, 3, 2 * SIDE, 2 * SIDE)
    assert "autoencoder" in made.history[-1]["inputs"]
    assert load(str(kandinsky)).decode(np.ones((1, WIDTH), np.float32), decoder_steps=1).shape[-1] == 2 * SIDE


def test_an_autoencoder_that_is_missing_or_of_other_latents(kandinsky, tmp_path):
    for path in kandinsky.iterdir():
        if path.name != "autoencoder.safetensors":
            (tmp_path / path.name).symlink_to(path)
    command = ("generate", PROMPT, "-m", tmp_path, "-o", tmp_path / "a.png")
    assert "expected weights.autoencoder, found none" in run_bad(*command)
    theirs = open_artifact(kandinsky / "autoencoder.safetensors")
    config = {**theirs.config, "model": {**theirs.config["model"], "n_latent": 3}}
    save_tensors(tmp_path / "autoencoder.safetensors", theirs.kind, load_tensors(theirs), config, [])
    assert "autoencoder" in run_bad(*command)
