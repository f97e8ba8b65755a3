"""Kandinsky 2.2: a tiny one, saved by diffusers, imported by the command, part by part against diffusers' own."""

import shutil

import numpy as np
import pytest
import torch
from artifact_files import array
from conftest import run_bad, run_ok
from kandinsky_publication import SIDE, components, publish
from karlo_publication import WIDTH, publish_eclipse
from tensor_lists import check_covers, n_parameters, published_shapes

from dalle_cli import pipelines
from dalle_cli.artifacts import open_artifact
from dalle_cli.devices import arithmetic
from dalle_cli.diffusion.noise import noise_for, row_noise
from dalle_cli.errors import DalleError
from dalle_cli.importing.kandinsky import CODEBOOK, EXPECTED, decoder_schedule, movq_sizes, movq_tensors
from dalle_cli.models.movq import MOVQ
from dalle_cli.options import DecoderOptions
from dalle_cli.pipelines import loading
from dalle_cli.pipelines.decoder import ImageDecoder
from dalle_cli.pipelines.prompts import SamplerInputs, candidates
from dalle_cli.sampling.decoder import sample_images
from dalle_cli.sampling.defaults import sampling_defaults

CPU = torch.device("cpu")
PROMPT, N, SEED = "a red bear on the blue grass", 2, 3
FILES = ("autoencoder", "clip", "decoder", "prior")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    parts = components()
    return parts, publish(parts, tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def bundle(published, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "kandinsky"
    run_ok("import", published[1], "-o", out)
    return out


def weights(bundle, name):
    return open_artifact(bundle / f"{name}.safetensors")


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_bundle(bundle):
    names = [*(f"{name}.safetensors" for name in FILES), "README.md", "clip-tokenizer.json"]
    assert sorted(path.name for path in bundle.iterdir()) == sorted(names)
    assert sampling_defaults(weights(bundle, "decoder")) == {
        "steps": 50, "guidance": 4.0, "sampler": "ddpm", "spacing": "leading+1", "variance": "fixed_small", "clip": 0.0,
    }  # fmt: skip
    assert sampling_defaults(weights(bundle, "prior"))["clip"] == 10
    assert weights(bundle, "decoder").config["encoder"] == weights(bundle, "clip").digest
    assert "apache-2.0" in (bundle / "README.md").read_text()


def test_the_null_embedding(published, bundle):
    """That of an image that is zero for the network, which is neither black nor nothing."""
    encoder = published[0]["image_encoder"]
    with torch.no_grad():
        expected = encoder(torch.zeros(1, 3, 16, 16)).image_embeds[0]
    null = loading.decoder(weights(bundle, "decoder"), CPU).null_embedding
    torch.testing.assert_close(null, expected, rtol=0, atol=1e-5)
    clip = loading.clip(weights(bundle, "clip"), CPU)
    mean = torch.tensor(clip.config.pixel_mean)[:, None, None]
    gray, black = (clip.encode_image(color.expand(1, 3, 16, 16))[0] for color in (mean, torch.zeros_like(mean)))
    torch.testing.assert_close(null, gray, rtol=0, atol=1e-5)
    assert (null - black).abs().max() > 0.1


def test_the_movq_both_ways(published, bundle):
    theirs, ours = published[0]["movq"], loading.autoencoder(weights(bundle, "autoencoder"), CPU)
    assert ours.config.image_size == 2 * SIDE
    images, z = randn(2, 3, 24, 16), randn(2, 4, 8, 12)
    with torch.no_grad():
        latents, decoded = theirs.encode(images).latents, theirs.decode(z, force_not_quantize=True).sample
    assert latents.shape == (2, 4, 12, 8)
    assert decoded.shape == (2, 3, 16, 24)
    torch.testing.assert_close(ours.encode(images), latents, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.decode(z), decoded, rtol=0, atol=1e-4)
    assert min(latents.std(), decoded.std()) > 0.1
    with pytest.raises(DalleError, match="S divisible by 2"):
        ours.encode(randn(1, 3, 9, 9))


def test_norms_read_the_latents(bundle):
    """Each position's scale and shift are those of its own latents: without them the output is another."""
    ours = loading.autoencoder(weights(bundle, "autoencoder"), CPU)
    z = randn(1, 4, 8, 8)
    whole = ours.decode(z)
    norm = ours.decoder.norm_out
    norm.scale.weight.zero_()
    flat = ours.decode(z)
    assert (flat - whole).abs().max() > 0.01
    norm.shift.weight.zero_()
    assert (ours.decode(z) - flat).abs().max() > 0.01


class Planted:
    """Our noise of N candidates in the order in which a pipeline of theirs takes it."""

    def __init__(self, indices, size, name):
        self.indices, self.size, self.name, self.step = indices, size, name, 0

    def __call__(self, shape, **_):
        assert tuple(shape) == (N, *self.size)
        self.step += 1
        return noise_for(SEED, self.indices, self.step - 1, self.size, self.name)


def test_the_prior_whole(published, bundle):
    """Prompts to embeddings, against diffusers' pipeline with our noise."""
    from diffusers import KandinskyV22PriorPipeline
    from diffusers.pipelines.kandinsky2_2 import pipeline_kandinsky2_2_prior
    from diffusers.schedulers import scheduling_unclip

    names = ("prior", "image_encoder", "text_encoder", "tokenizer")
    scheduler = published[0]["prior_scheduler"]
    pipeline = KandinskyV22PriorPipeline(
        **{name: published[0][name] for name in names}, scheduler=scheduler, image_processor=None
    )
    pipeline.set_progress_bar_config(disable=True)
    planted = Planted(SamplerInputs.of(candidates([PROMPT], N)).indices, (WIDTH,), "prior 0")
    with pytest.MonkeyPatch.context() as patch:
        for module in (pipeline_kandinsky2_2_prior, scheduling_unclip):
            patch.setattr(module, "randn_tensor", planted)
        expected = pipeline(PROMPT, num_images_per_prompt=N).image_embeds
    assert planted.step == 25
    # diffusers' schedule in float32 scales the last step by 1 - 5e-4
    np.testing.assert_allclose(pipelines.load(bundle).sample(PROMPT, N, seed=SEED), expected, rtol=1e-3, atol=1e-4)


def test_the_decoder_whole(published, bundle):
    """Embeddings to images by way of latents, against diffusers' pipeline with our noise."""
    from diffusers import KandinskyV22Pipeline
    from diffusers.pipelines.kandinsky2_2 import pipeline_kandinsky2_2
    from diffusers.schedulers import scheduling_ddpm

    pipeline = KandinskyV22Pipeline(**{name: published[0][name] for name in ("unet", "scheduler", "movq")})
    pipeline.set_progress_bar_config(disable=True)
    z, decoder = 2 * randn(N, WIDTH), ImageDecoder(str(bundle), arithmetic("cpu", "float32"), seed=SEED)
    null = decoder.decoder.null_embedding.expand(N, WIDTH)
    planted = Planted(range(N), (4, SIDE, SIDE), "decoder")
    sizes = {"height": 2 * SIDE, "width": 2 * SIDE, "num_inference_steps": 50}
    with pytest.MonkeyPatch.context() as patch:
        for module in (pipeline_kandinsky2_2, scheduling_ddpm):
            patch.setattr(module, "randn_tensor", planted)
        images = pipeline(z, null, **sizes, output_type="np").images
    expected, ours = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(decoder.decode_small(z, range(N)))
    assert decoder.size == ours.shape[-1] == 2 * SIDE
    assert (((ours + 1) / 2).clamp(0, 1) - expected).abs().max() < 1e-3
    assert ((expected > 0.01) & (expected < 0.99)).float().mean() > 0.3
    assert "autoencoder" in decoder.inputs


def test_inversion_is_in_latents(bundle):
    """From the noise that it finds, ddim samples the image's latents again; from other noise it does not."""
    options = DecoderOptions(decoder_sampler="ddim", decoder_guidance=1.0, decoder_steps=20)
    decoder = ImageDecoder(str(bundle), arithmetic("cpu", "float32"), options)
    images, z = (255 * torch.rand(1, 3, 2 * SIDE, 2 * SIDE)).byte(), randn(1, WIDTH)
    latents = decoder.autoencoder[1].encode(images / 127.5 - 1)
    start, noise, null = decoder.invert(images.numpy(), z, 10), row_noise(1, [0], "decoder"), decoder._captions([""])
    found = [sample_images(decoder.decoder, z, null, decoder.config, noise, start=x) for x in (start, None)]
    again, other = ((x - latents).abs().mean() / latents.abs().mean() for x in found)
    assert again < 0.05
    assert other > 0.5


def test_commands(bundle, tmp_path):
    """Generate ranks by the publication's own CLIP; vary starts from its embedding of an image."""
    image, kept, varied = tmp_path / "a.png", tmp_path / "a.safetensors", tmp_path / "b.png"
    few = ("--decoder-steps", 3, "--no-terminal", "-m", bundle)
    run_ok("generate", PROMPT, "-n", 2, "--keep", 1, "-o", image, "--images", kept, "--steps", 2, *few)
    assert array(kept, "images").shape == (1, 3, 2 * SIDE, 2 * SIDE)
    (clip,) = [made["inputs"]["clip"] for made in open_artifact(kept).history if made["stage"] == "generate"]
    assert clip == weights(bundle, "clip").digest
    run_ok("vary", image, "-n", 1, "-o", varied, *few)
    assert image.read_bytes() != varied.read_bytes()


def test_every_tensor_of_the_movq():
    shapes = published_shapes("kandinsky22_movq")
    assert n_parameters(shapes) == 67_832_495
    sizes = movq_sizes(shapes, {}, 64)
    assert (sizes.image_size, sizes.multipliers, sizes.depth, sizes.attention) == (512, (1, 2, 2, 4), 2, (64,))
    with torch.device("meta"):
        model = MOVQ(sizes)
    used = {name: shape for name, shape in shapes.items() if name != CODEBOOK.replace("\\", "")}
    assert len(used) == len(shapes) - 1
    check_covers(model, movq_tensors(shapes), used)


def test_other_schedules():
    betas = {"beta_start": 0.00085, "beta_end": 0.012}
    assert decoder_schedule({**EXPECTED, **betas})[1]["spacing"] == "leading"
    for wrong, says in (
        ({"beta_schedule": "scaled_linear"}, "expected beta_schedule 'linear'"),
        ({"thresholding": True}, "expected thresholding False"),
        ({"beta_start": None}, "expected beta_start, beta_end"),
        ({"steps_offset": 2}, "steps_offset of 0 or 1"),
    ):
        with pytest.raises(DalleError, match=says):
            decoder_schedule({**EXPECTED, **betas, **wrong})


def test_half_of_the_files(published, tmp_path):
    """One repository without the other."""
    for name in ("unet", "movq", "scheduler"):
        shutil.copytree(published[1] / name, tmp_path / "half" / name)
    assert "expected text_encoder/config.json" in run_bad("import", tmp_path / "half", "-o", tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_prior_in_its_place(published, bundle, tmp_path):
    """ECLIPSE's, of one pass; the CLIP that it names comes from the same files as the decoder's."""
    parts, source = published
    eclipse, out = publish_eclipse(parts["prior"], tmp_path / "eclipse"), tmp_path / "made"
    run_ok("import", source, "--prior", eclipse, "-o", out)
    assert weights(out, "prior").config["encoder"] == weights(out, "clip").digest == weights(bundle, "clip").digest
    assert sampling_defaults(weights(out, "prior"))["steps"] == 1
    run_ok("generate", PROMPT, "-n", 1, "-m", out, "--decoder-steps", 2, "-o", tmp_path / "x.png")
