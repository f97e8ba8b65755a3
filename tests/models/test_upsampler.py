"""The upsampler: what it is told counts, what it is trained on, and a small one learns to enlarge."""

import numpy as np
import pytest
import torch
from PIL import Image
from planted_weights import randomized
from torch.nn import functional as F
from toy_task import machine

from dalle_cli.data import augment
from dalle_cli.data.datasets import open_dataset
from dalle_cli.diffusion.noise import row_noise
from dalle_cli.errors import DalleError
from dalle_cli.models.upsampler import Upsampler, UpsamplerConfig, enlarge
from dalle_cli.sampling.decoder import (
    SamplerConfig,
    enlarge_noised,
    to_images,
    to_signed,
    unet_process,
    upsample,
    upsampler_order,
)
from dalle_cli.training.loop import Trainer
from dalle_cli.training.run import Run
from dalle_cli.training.upsampler import UpsamplerTask, UpsamplerTrain

SIZES = {"image_size": 16, "low_size": 4, "width": 8, "multipliers": (1, 2), "depth": 1, "groups": 4, "dropout": 0.0,
         "n_timestep": 100, "prediction": "x_start"}  # fmt: skip


def config(**more):
    return UpsamplerConfig(**{**SIZES, **more})


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_all_that_it_is_told_counts():
    model = randomized(Upsampler(config(low_noise=0.5))).eval()
    have = {
        "x": randn(2, 3, 16, 16), "t": torch.tensor([3, 60]), "enlarged": randn(2, 3, 16, 16, seed=2),
        "level": torch.tensor([5, 40]),
    }  # fmt: skip
    with torch.no_grad():
        whole = model(**have)
        for name, value in have.items():
            other = model(**{**have, name: value + 1})
            assert (other - whole).abs().flatten(1).amax(1).min() > 1e-3, name
        none = model(**{**have, "level": None})
        torch.testing.assert_close(none, model(**{**have, "level": torch.tensor([-1, -1])}))
        assert (none - whole).abs().max() > 1e-3
    assert not [name for name in Upsampler(config()).state_dict() if name.startswith("low_level")]


def test_there_is_no_attention():
    assert not [name for name in Upsampler(config()).state_dict() if "attention" in name]
    assert not [name for name in Upsampler(UpsamplerConfig(width=32)).state_dict() if "attention" in name]


def test_enlarge():
    low = randn(1, 3, 4, 4).clamp(-1, 1)
    large = enlarge(low, 4)
    assert large.shape == (1, 3, 16, 16)
    assert large.abs().max() <= 1
    picture = Image.fromarray(low[0, 0].numpy()).resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(large[0, 0].numpy(), np.asarray(picture).clip(-1, 1), atol=1e-5)
    flat = torch.full((1, 3, 4, 4), 0.3)
    torch.testing.assert_close(enlarge(flat, 4), torch.full((1, 3, 16, 16), 0.3))


def test_pictures_of_any_size_whatever_the_batch():
    model = randomized(Upsampler(config()), scale=0.2).eval()
    low = (randn(3, 3, 6, 6) / 2).clamp(-1, 1)
    for sampler, eta in (("dpm++", 0.0), ("ddim", 1.0)):
        brush = SamplerConfig(3, sampler, eta=eta)
        whole = upsample(model, low, brush, row_noise(0, range(3), "upsampler"))
        assert whole.shape == (3, 3, 24, 24)
        assert whole.dtype == torch.float32
        alone = upsample(model, low[1:2], brush, row_noise(0, [1], "upsampler"))
        torch.testing.assert_close(alone[0], whole[1], rtol=0, atol=1e-4)
        other = upsample(model, low[1:2].flip(2), brush, row_noise(0, [1], "upsampler"))
        assert (other[0] - whole[1]).abs().max() > 0.03


@pytest.mark.parametrize(("sampler", "spacing"), [("ddpm", "linspace"), ("ddim", None), ("heun", None)])
def test_a_network_of_its_own_for_the_last_step(sampler, spacing):
    """It is called at the last timestep alone, and it counts."""
    model, seen = randomized(Upsampler(config(last=True)), scale=0.2).eval(), []
    low, noise = (randn(2, 3, 4, 4) / 2).clamp(-1, 1), row_noise(0, range(2), "upsampler")
    model.register_forward_pre_hook(lambda _, given: seen.append((float(given[1][0]), given[4])))
    how = SamplerConfig(5, sampler, spacing=spacing)
    whole = upsample(model, low, how, noise)
    end = how.timesteps(unet_process(model.config).schedule).timesteps[-1]
    assert [last for t, last in seen] == [t == pytest.approx(end) for t, _ in seen]
    assert {last for _, last in seen} == {True, False}
    model.last = None
    assert (upsample(model, low, how, noise) - whole).abs().max() > 0.03


def test_the_enlarged_image_is_not_clamped_where_the_config_says_so():
    low, noise = 3 * randn(2, 3, 4, 4), row_noise(0, range(2), "upsampler")
    for clamp in (True, False):
        model, seen = randomized(Upsampler(config(clamp=clamp, low_noise=0.5)), scale=0.2).eval(), []
        model.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[2]))
        upsample(model, low, SamplerConfig(1), noise)
        torch.testing.assert_close(seen[0], enlarge(low, 4, clamp))
        assert (seen[0].abs().max() > 2) == (not clamp)
        upsample(model, low, SamplerConfig(1), noise, 0.1)
        assert (seen[1] - seen[0]).std() < 0.2  # noised, but the same


def test_chains():
    sizes = {"width": 8, "multipliers": (1,), "groups": 4}
    two, four, sixteen = (UpsamplerConfig(image_size=b, low_size=a, **sizes) for a, b in ((8, 16), (16, 64), (8, 128)))
    assert (two.factor, four.factor, sixteen.factor) == (2, 4, 16)
    assert upsampler_order([four, two], 8) == [1, 0]
    assert upsampler_order([sixteen], 8) == [0]
    assert upsampler_order([], 8) == []
    for wrong, size in (([four], 8), ([two, sixteen], 8), ([two, four], 16)):
        with pytest.raises(DalleError):
            upsampler_order(wrong, size)


# Training


def stripes(folder, n=12):
    """Images of horizontal bars that begin and end at multiples of four pixels."""
    folder.mkdir()
    for i in range(n):
        rows = np.random.default_rng(i).integers(0, 256, (4, 3), dtype=np.uint8)
        pixels = np.repeat(rows, 4, axis=0)[:, None].repeat(16, axis=1)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return open_dataset(folder, need_captions=False)


def task_of(data, c=None, **more):
    options = {"steps": 8, "batch_size": 8, "lr": 3e-3, "ema": 0.9, "validation": 0.0, "grid_images": 0, **more}
    train = UpsamplerTrain(**options)
    return UpsamplerTask(c or config(), train, data, 0, 0), train


def first(task, step=0):
    batches = task.batches(step)
    batch = next(batches)
    batches.close()
    return batch


def test_a_batch(tmp_path):
    data = stripes(tmp_path / "pictures")
    task, _ = task_of(data, crop=2, corruption="none")
    images, noise, _, low, levels, low_noise = batch = first(task)
    assert images.shape == noise.shape == (8, 3, 8, 8)  # crops of half the side
    assert low.shape == (8, 3, 2, 2)
    assert levels.tolist() == [-1] * 8
    assert low_noise.shape == (8, 0)
    for picture, small in zip(images.numpy(), low.numpy(), strict=True):
        expected = augment.area(picture.transpose(1, 2, 0), 2).transpose(2, 0, 1) / 127.5 - 1
        np.testing.assert_allclose(small, expected, atol=1e-5)
    again = first(task)
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))


@pytest.mark.parametrize("corruption", ["blur", "bsr"])
def test_corruption_is_of_seed_row_and_epoch(tmp_path, corruption):
    data = stripes(tmp_path / "pictures")
    task, _ = task_of(data, crop=1, corruption=corruption)
    pictures = np.stack([augment.center(data.read(i), 16).transpose(2, 0, 1) for i in range(4)])
    low, *_ = task._small(pictures, [0, 1, 2, 3], [0] * 4)
    alone, *_ = task._small(pictures[2:3], [2], [0])
    assert torch.equal(alone[0], low[2])
    later, *_ = task._small(pictures, [0, 1, 2, 3], [1] * 4)
    assert torch.equal(later, low) == (corruption == "blur")
    plain, *_ = task_of(data, crop=1, corruption="none")[0]._small(pictures, [0, 1, 2, 3], [0] * 4)
    assert (plain - low).abs().max() > 0.01
    batch = first(task, 3)
    assert torch.equal(first(task, 3)[3], batch[3])


def test_noise_conditioning(tmp_path):
    data = stripes(tmp_path / "pictures")
    task, _ = task_of(data, config(low_noise=0.5), crop=1, corruption="none", batch_size=60)
    plain, _ = task_of(data, crop=1, corruption="none", batch_size=60)
    *_, low, levels, noise = first(task)
    assert torch.equal(low, first(plain)[3])
    assert -1 <= levels.min() < 8
    assert 40 < levels.max() < 50  # half of the timesteps
    assert noise.shape == low.shape
    assert noise.std() == pytest.approx(1, abs=0.1)


def test_the_enlarged_image_is_clamped_before_it_is_noised():
    """Each row is its clean image, clamped, and enlarged noise, at its level."""
    c = config(low_noise=0.5)
    low, noise, levels = randn(4, 3, 4, 4).clamp(-1, 1), randn(4, 3, 4, 4, seed=2), torch.tensor([-1, 0, 30, 49])
    found = enlarge_noised(unet_process(c), low, 4, levels, noise)
    kept = unet_process(c).schedule.alphas_cumprod[levels.clamp(min=0)].float()[:, None, None, None]
    bicubic = {"scale_factor": 4.0, "mode": "bicubic", "antialias": True}
    clean, rough = (F.interpolate(x, **bicubic) for x in (low, noise))
    assert clean.abs().max() > 1
    expected = kept.sqrt() * clean.clamp(-1, 1) + (1 - kept).sqrt() * rough
    torch.testing.assert_close(found[1:], expected[1:])
    torch.testing.assert_close(found[0], clean[0].clamp(-1, 1))
    assert found[3].abs().max() > 1  # the noise itself is whole
    task = object.__new__(UpsamplerTask)
    task.config, task.process = c, unet_process(c)
    seen = []
    task.predict(lambda x, t, beside, level: seen.append((beside, level)), (low, levels, noise))(None, None)
    assert torch.equal(seen[0][0], found)
    assert torch.equal(seen[0][1], levels)


def test_sampling_with_the_noise_that_was_trained():
    model = randomized(Upsampler(config(low_noise=0.5)), scale=0.2).eval()
    low, seen = (randn(2, 3, 4, 4) / 2).clamp(-1, 1), []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[2:4]))
    noise = row_noise(0, range(2), "upsampler")
    for share, level in ((0.0, -1), (0.25, 24), (0.5, 49)):
        upsample(model, low, SamplerConfig(2), noise, share)
        beside, levels = seen[-1]
        assert levels.tolist() == [level] * 2
        expected = enlarge_noised(unet_process(model.config), low, 4, levels, noise(-1, (3, 4, 4)))
        torch.testing.assert_close(beside, expected, atol=1e-5, rtol=0)
    for share in (0.6, -0.1):
        with pytest.raises(DalleError, match=r"low_noise in \[0, 0.5\], as the upsampler was trained with"):
            upsample(model, low, SamplerConfig(2), noise, share)
    with pytest.raises(DalleError, match=r"low_noise in \[0, 0.0\]"):
        upsample(randomized(Upsampler(config())), low, SamplerConfig(2), noise, 0.1)


def test_crops_that_do_not_fit(tmp_path):
    data = stripes(tmp_path / "pictures")
    with pytest.raises(DalleError, match="lower crop"):
        task_of(data, crop=8)
    with pytest.raises(DalleError, match="whose side 4 divides"):
        task_of(data, config(multipliers=(1, 1, 1), low_size=8), crop=8)


def test_a_small_one_learns_to_enlarge(tmp_path):
    """The planted answer: what it draws of small pictures it has never seen is, made small again, those pictures."""
    data = stripes(tmp_path / "pictures", 24)
    task, train = task_of(data, crop=1, corruption="none", steps=100, batch_size=12, lr=8e-3)
    trainer = Trainer(task, train, Run(tmp_path / "x.safetensors", "weights.upsampler", {}, []), machine(), 0)
    batches = task.batches(0)
    for _ in range(train.steps):
        trainer.update(next(batches))
    batches.close()
    low = np.random.default_rng(99).integers(0, 256, (6, 3, 4, 1), dtype=np.uint8).repeat(4, axis=3)
    noise = row_noise(0, range(6), "upsampler")
    got = upsample(trainer.ema.model, to_signed(torch.from_numpy(low)), SamplerConfig(8), noise)
    small = to_images(got).numpy().reshape(6, 3, 4, 4, 4, 4).mean((3, 5))
    assert np.abs(small - low).mean() < 25
    assert np.abs(small - low[::-1]).mean() > 50
