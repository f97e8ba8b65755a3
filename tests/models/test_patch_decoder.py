"""The patch transformer equals its slow twin, every condition counts, and a small one learns what embeddings mean."""

import numpy as np
import pytest
import torch
from conftest import COLORS
from planted_weights import randomized
from test_decoder import squares
from toy_task import machine

from dalle_cli.data.pairs import Conditions
from dalle_cli.diffusion.losses import losses
from dalle_cli.diffusion.noise import row_noise
from dalle_cli.diffusion.schedules import flow
from dalle_cli.errors import DalleError
from dalle_cli.models.patch_decoder import PatchDecoder, PatchDecoderConfig, from_patches, to_patches
from dalle_cli.sampling.decoder import CaptionBatch, SamplerConfig, sample_images, to_images, unet_process
from dalle_cli.training.decoder import DecoderTask, DecoderTrain, build, trainable
from dalle_cli.training.denoising import draws
from dalle_cli.training.loop import Trainer
from dalle_cli.training.run import Run
from reference import patch_decoder as reference

SIZES = {"image_size": 8, "patch_size": 4, "n_layer": 2, "n_head": 2, "n_embd": 24, "n_embedding": 6, "n_text": 5,
         "n_text_vocab": 9, "text_layers": 1, "n_timestep": 100}  # fmt: skip


def config(**more):
    return PatchDecoderConfig(**{**SIZES, **more})


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(n=3):
    tokens = torch.randint(1, 9, (n, 5), generator=torch.Generator().manual_seed(2))
    return {"embeddings": randn(n, 6), "given": torch.ones(n, dtype=torch.bool), "tokens": tokens,
            "lengths": torch.full((n,), 4)}  # fmt: skip


def of(model, x=None, t=None, **more):
    x = randn(3, 3, 8, 8, seed=5) if x is None else x
    with torch.no_grad():
        return model.denoise(x, torch.tensor([3, 50, 99]) if t is None else t, **{**inputs(), **more})


def test_equals_the_slow_twin():
    c = config()
    model = randomized(PatchDecoder(c)).double()
    x, t = randn(3, 3, 8, 8, seed=5).double(), torch.tensor([3.0, 50.0, 99.0], dtype=torch.float64)
    conditioning = model.condition(**{k: v.double() if k == "embeddings" else v for k, v in inputs().items()})
    with torch.no_grad():
        found = model(x, t, conditioning).numpy()
        state = {name: p.numpy() for name, p in model.state_dict().items()}
        rest = [part.detach().numpy() for part in (conditioning.added, conditioning.context)]
    expected = reference.forward(state, x.numpy(), t.numpy(), *rest, c.patch_size, c.n_layer, c.n_head)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_patches_and_back():
    x = randn(2, 3, 12, 12)
    np.testing.assert_array_equal(to_patches(x, 4).numpy(), reference.patches(x.numpy(), 4))
    assert torch.equal(from_patches(to_patches(x, 4), 4), x)


@pytest.mark.parametrize(
    "change",
    [
        {"t": torch.tensor([4, 51, 98])},
        {"x": randn(3, 3, 8, 8, seed=6)},
        {"embeddings": randn(3, 6, seed=7)},
        {"given": torch.zeros(3, dtype=torch.bool)},
        {"tokens": inputs()["tokens"].flip(1)},
        {"lengths": torch.zeros(3, dtype=torch.int64)},
    ],
    ids=["timestep", "image", "embedding", "null embedding", "order of the words", "null caption"],
)
def test_every_input_counts(change):
    model = randomized(PatchDecoder(config())).eval()
    assert (of(model) - of(model, **change)).abs().amin(0).max() > 1e-3


def test_a_null_embedding_hides_it():
    model, null = randomized(PatchDecoder(config())).eval(), torch.zeros(3, dtype=torch.bool)
    assert torch.equal(of(model, given=null), of(model, given=null, embeddings=randn(3, 6, seed=8)))


def test_a_decoder_without_captions():
    model = randomized(PatchDecoder(config(n_text=0)))
    none = {"tokens": torch.zeros(3, 0, dtype=torch.int64)}
    assert of(model, **none).shape == (3, 3, 8, 8)
    assert not [name for name, _ in model.named_parameters() if name.startswith("text")]


@pytest.mark.parametrize(
    "wrong", [{"patch_size": 3}, {"n_embd": 20}, {"n_layer": 0}, {"kind": "unet"}, {"text_layers": 0}]
)
def test_refusals(wrong):
    with pytest.raises(DalleError, match=r"expected .*found"):
        config(**wrong)


def test_flow_schedule_is_a_straight_path():
    """x_s = (1 - s) x + s noise, divided by its norm, has these shares of data and noise."""
    schedule, s = flow(50), torch.arange(1, 51, dtype=torch.float64) / 50
    ratio = (schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)).sqrt()
    torch.testing.assert_close(ratio, (1 - s) / s, rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction", ["x_start", "epsilon", "v"])
def test_velocity_loss_is_that_of_v(prediction):
    """Whatever a network predicts, the loss is the squared error of the v that follows from it."""
    c = config(schedule="cosine", prediction=prediction)
    process, t = unet_process(c), torch.tensor([30, 50, 60])
    x_start, noise, output = (randn(3, 3, 8, 8, seed=i).double() for i in range(3))
    x = process.add_noise(x_start, t, noise)
    a = process.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    guess = {"x_start": output, "epsilon": (x - (1 - a).sqrt() * output) / a.sqrt(),
             "v": a.sqrt() * x - (1 - a).sqrt() * output}[prediction]  # fmt: skip
    guessed_noise = (x - a.sqrt() * guess) / (1 - a).sqrt()
    v, guessed = a.sqrt() * noise - (1 - a).sqrt() * x_start, a.sqrt() * guessed_noise - (1 - a).sqrt() * guess
    found = losses(process, output, x_start, x, t, noise, velocity=True).total
    torch.testing.assert_close(found, (guessed - v).square().flatten(1).mean(1), rtol=1e-9, atol=0)


def test_timesteps_from_a_logistic_normal():
    t = draws(0, 0, range(4000), 1000, 1, 1, (-0.8, 0.8)).t.double()
    logit = (t.clamp(0.5) / 1000).logit()
    assert t.min() >= 0
    assert t.max() < 1000
    assert abs(logit.mean() + 0.8) < 0.05
    assert abs(logit.std() - 0.8) < 0.05
    assert draws(0, 0, range(4000), 1000, 1, 1).t.double().mean() == pytest.approx(500, abs=20)


def test_the_recipe_chooses_the_network():
    assert trainable({"kind": "patch"}).model is PatchDecoderConfig
    assert trainable({"width": 8}).model.__name__ == "DecoderConfig"
    assert isinstance(build(config()), PatchDecoder)


def test_it_learns_the_color_of_an_embedding(tmp_path):
    """The planted answer: each embedding stands for one color."""
    data, embeddings = squares(tmp_path / "images")
    train = DecoderTrain(
        steps=150, batch_size=16, lr=4e-3, ema=0.9, validation=0.0, velocity_loss=True, timestep_std=1.0,
        optimizer="muon", caption_dropout=0.0,
    )  # fmt: skip
    task = DecoderTask(config(n_text=0), train, data, Conditions(embeddings), 0, 0)
    trainer = Trainer(task, train, Run(tmp_path / "x.safetensors", "weights.decoder", {}, []), machine(), 0)
    batches = task.batches(0)
    for _ in range(train.steps):
        trainer.update(next(batches))
    batches.close()
    z = torch.eye(6)[: len(COLORS)]
    none = CaptionBatch(torch.zeros(len(z), 0).long(), torch.zeros(len(z)).long())
    sampler, noise = SamplerConfig(10, "ddim", 2.0), row_noise(0, range(len(z)), "decoder")
    images = to_images(sample_images(task.model.eval(), z, none, sampler, noise))
    wanted = torch.tensor(list(COLORS.values()), dtype=torch.float32)
    assert (images.float().mean((2, 3)) - wanted).abs().max() < 25
