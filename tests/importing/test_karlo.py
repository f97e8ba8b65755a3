"""Karlo whole: a tiny one, saved by diffusers, imported by the command, against diffusers' own pipeline."""

import numpy as np
import pytest
import torch
from conftest import run_ok
from karlo_publication import WIDTH, components, publish

from dalle_cli import pipelines
from dalle_cli.devices import arithmetic
from dalle_cli.diffusion.noise import noise_for
from dalle_cli.pipelines.decoder import ImageDecoder
from dalle_cli.pipelines.prompts import SamplerInputs, candidates

PROMPT, N, SEED = "a red bear on the blue grass", 2, 3
STEPS = (25, 25, 7)  # the published ones, which nothing here says to our side


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The components, and the folders that they are saved in."""
    parts, whole = components()
    return parts, *publish(parts, whole, tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def bundle(published, tmp_path_factory):
    _, karlo, clip = published
    out = tmp_path_factory.mktemp("imported") / "karlo"
    run_ok("import", karlo, "--clip", clip, "-o", out)
    return out


class Planted:
    """Our noise of N candidates in the order in which their pipeline takes it: by stage, then by step."""

    def __init__(self):
        inputs = SamplerInputs.of(candidates([PROMPT], N))
        self.stages = [
            (STEPS[0], inputs.indices, (WIDTH,), "prior 0"),
            (STEPS[1], range(N), (3, 8, 8), "decoder"),
            (STEPS[2], range(N), (3, 32, 32), "upsampler 32"),
        ]
        self.rest = [(stage, step) for stage in self.stages for step in range(stage[0])]

    def __call__(self, shape, **_):
        (_, indices, size, name), step = self.rest.pop(0)
        assert tuple(shape) == (N, *size)
        return noise_for(SEED, indices, step, size, name)


@pytest.fixture(scope="module")
def theirs(published):
    """z_i, the small images and the large ones of diffusers' pipeline, in [0, 1] but for z_i."""
    from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline, pipeline_unclip
    from diffusers.schedulers import scheduling_unclip

    parts, *_ = published
    pipeline, planted, seen = UnCLIPPipeline(**parts), Planted(), {}
    pipeline.set_progress_bar_config(disable=True)
    parts["text_proj"].register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(z=kwargs["image_embeddings"]), with_kwargs=True
    )
    with pytest.MonkeyPatch.context() as patch:
        for module in (pipeline_unclip, scheduling_unclip):
            patch.setattr(module, "randn_tensor", planted)
        images = pipeline(PROMPT, num_images_per_prompt=N, output_type="np").images
    assert not planted.rest
    return seen["z"], torch.from_numpy(images).permute(0, 3, 1, 2)


def test_every_stage(bundle, theirs):
    z, images = theirs
    model = pipelines.load(bundle)
    got = model.sample(PROMPT, N, seed=SEED)
    np.testing.assert_allclose(got, z, rtol=1e-3, atol=1e-3)
    print("z", np.abs(got - z.numpy()).max(), z.abs().max(), z.std(0).min())
    decoder = ImageDecoder(str(bundle), arithmetic("cpu", "float32"), seed=SEED)
    pixels = decoder.decode(z.numpy(), range(N), [PROMPT] * N)
    print("im", np.abs(pixels / 255 - images.numpy()).max(), images.std(), images[0].std())
