"""Kandinsky 2.2: a tiny one, saved by diffusers, imported by the command, part by part against diffusers' own."""

import pytest
import torch
from conftest import run_bad, run_ok
from kandinsky_publication import SIDE, components, publish
from tensor_lists import check_covers, n_parameters, published_shapes

from dalle_cli.artifacts import open_artifact
from dalle_cli.errors import DalleError
from dalle_cli.importing.kandinsky import CODEBOOK, EXPECTED, decoder_schedule, movq_sizes, movq_tensors
from dalle_cli.models.movq import MOVQ
from dalle_cli.pipelines import loading
from dalle_cli.sampling.defaults import sampling_defaults

CPU = torch.device("cpu")
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
    black, gray = (clip.encode_image(torch.zeros(1, 3, 16, 16) + level)[0] for level in (0.0, 0.46))
    assert (null - black).abs().max() > 10 * (null - gray).abs().max()
    assert null.abs().max() > 0.1


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
        (tmp_path / name).symlink_to(published[1] / name)
    assert "expected one file of CLIP's weights" in run_bad("import", tmp_path, "-o", tmp_path / "made")
