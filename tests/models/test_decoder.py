"""The decoder: what it is told counts, nulls are those of training, and a small one learns to paint what it is told."""

import itertools

import numpy as np
import pytest
import torch
from conftest import COLORS
from PIL import Image
from planted_weights import randomized
from toy_task import machine

from dalle_cli.artifacts import open_artifact, write_artifact
from dalle_cli.data.datasets import open_dataset
from dalle_cli.data.pairs import Conditions
from dalle_cli.diffusion.noise import row_noise
from dalle_cli.errors import DalleError
from dalle_cli.models.decoder import Decoder, DecoderConfig
from dalle_cli.sampling.decoder import (
    CaptionBatch,
    SamplerConfig,
    invert,
    sample_images,
    to_images,
    to_signed,
    unet_process,
)
from dalle_cli.training.decoder import DecoderTask, DecoderTrain, loss_of
from dalle_cli.training.denoising import denoising
from dalle_cli.training.loop import Trainer
from dalle_cli.training.run import Run

SIZES = {"image_size": 8, "width": 16, "multipliers": (1, 2), "depth": 1, "attention": (4,), "head_width": 8,
         "groups": 4, "dropout": 0.0, "n_embedding": 6, "context_width": 12, "n_text": 5, "n_text_vocab": 9,
         "text_layers": 1, "text_heads": 2, "n_timestep": 100}  # fmt: skip


def config(**more):
    return DecoderConfig(**{**SIZES, **more})


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def told(n=3):
    """What a batch is told: embeddings, whether they count, tokens and lengths."""
    tokens = torch.randint(1, 9, (n, 5), generator=torch.Generator().manual_seed(2))
    return {"embeddings": randn(n, 6), "given": torch.ones(n, dtype=torch.bool), "tokens": tokens,
            "lengths": torch.full((n,), 4)}  # fmt: skip


@pytest.fixture(scope="module", params=[0, 4], ids=["plain", "sketch"])
def model(request):
    return randomized(Decoder(config(sketch=request.param))).eval()


def of(model, x=None, t=None, **more):
    x = randn(3, 3, 8, 8, seed=5) if x is None else x
    with torch.no_grad():
        return model.denoise(x, torch.tensor([3, 50, 99]) if t is None else t, **{**told(), **more})


CHANGES = {
    "the timestep": {"t": torch.tensor([4, 51, 98])},
    "the noised picture": {"x": randn(3, 3, 8, 8, seed=6)},
    "the embedding": {"embeddings": randn(3, 6, seed=7)},
    "whether it counts": {"given": torch.zeros(3, dtype=torch.bool)},
    "a token": {"tokens": told()["tokens"].clone().fill_(3)},
    "the length": {"lengths": torch.full((3,), 3)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_all_that_it_is_told_counts(model, name):
    change = (of(model, **CHANGES[name]) - of(model)).abs().flatten(1).amax(1)
    assert change.min() > 1e-3, name


PATHS = {
    "z_i beside the timestep": "embedding_time",
    "z_i as tokens": "embedding_tokens",
    "the caption beside the timestep": "text_time",
    "the caption as tokens": "text.norm",
}


@pytest.mark.parametrize("name", PATHS)
def test_each_path_by_itself(name):
    """With all other ways cut, the embedding or the caption still reaches the picture by this one."""
    model = randomized(Decoder(config())).eval()
    for path in set(PATHS.values()) - {PATHS[name]}:
        for p in model.get_submodule(path).parameters():
            p.data.zero_()
    if name == "the caption beside the timestep":  # which reads the states that are tokens too
        model = randomized(Decoder(config())).eval()
        for block in (*model.unet.down, *model.unet.middle, *model.unet.up):
            if getattr(block, "attention", None) is not None:
                block.attention.context_kv.weight.data.zero_()
        model.embedding_time.weight.data.zero_()
    other = {"embeddings": randn(3, 6, seed=7)} if "z_i" in name else {"tokens": told()["tokens"].clone().fill_(3)}
    unlike = {"tokens": told()["tokens"].clone().fill_(3)} if "z_i" in name else {"embeddings": randn(3, 6, seed=7)}
    assert (of(model, **other) - of(model)).abs().max() > 1e-3
    torch.testing.assert_close(of(model, **unlike), of(model))


def by_the_sketch_alone():
    """A decoder all of whose other ways from embedding and caption are cut."""
    model = randomized(Decoder(config(sketch=4))).eval()
    for path in ("embedding_time", "embedding_tokens", "text_time"):
        for p in model.get_submodule(path).parameters():
            p.data.zero_()
    for block in (*model.unet.down, *model.unet.middle, *model.unet.up):
        if getattr(block, "attention", None) is not None:
            block.attention.context_kv.weight.data.zero_()
    return model


def test_the_sketch_by_itself():
    """Both reach the picture by it; without it neither does."""
    model = by_the_sketch_alone()
    others = {"embeddings": randn(3, 6, seed=7)}, {"tokens": told()["tokens"].clone().fill_(3)}
    for other in (*others, {"given": torch.zeros(3, dtype=torch.bool)}):
        assert (of(model, **other) - of(model)).abs().flatten(1).amax(1).min() > 1e-3
    for p in model.sketch.parameters():
        p.data.zero_()
    for other in others:
        torch.testing.assert_close(of(model, **other), of(model))


def test_nulls(model):
    """A null is one and the same, whatever it stands in place of; and rows do not see each other."""
    null = {"given": torch.tensor([True, False, True]), "lengths": torch.tensor([4, 4, 0])}
    whole = of(model, **null)
    other = told()
    other["embeddings"][1], other["tokens"][2] = randn(6, seed=9), 7
    torch.testing.assert_close(of(model, **{**other, **null}), whole)
    torch.testing.assert_close(of(model)[0], whole[0])
    assert (of(model) - whole)[1:].abs().flatten(1).amax(1).min() > 1e-3


def test_what_lies_beyond_a_caption_is_not_seen(model):
    other = told()["tokens"]
    other[:, 4] = (other[:, 4] + 1) % 9
    torch.testing.assert_close(of(model, tokens=other), of(model))


def test_the_length_of_an_embedding_does_not_count(model):
    torch.testing.assert_close(of(model, embeddings=told()["embeddings"] * 7), of(model), rtol=1e-4, atol=1e-4)
    plain = randomized(Decoder(config(unit_variance=False))).eval()
    assert (of(plain, embeddings=told()["embeddings"] * 7) - of(plain)).abs().max() > 1e-3


def test_without_captions():
    model = randomized(Decoder(config(n_text=0))).eval()
    assert not [name for name in model.state_dict() if name.startswith("text")]
    none = {"tokens": torch.zeros(3, 0, dtype=torch.int64), "lengths": torch.zeros(3, dtype=torch.int64)}
    assert of(model, **none).shape == (3, 6, 8, 8)


def test_what_does_not_fit(model):
    with pytest.raises(DalleError, match="embeddings of 6 numbers, found 7"):
        of(model, embeddings=randn(3, 7))
    with pytest.raises(DalleError, match="captions of 5 tokens, found 4"):
        of(model, tokens=torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(DalleError, match="text_heads to divide"):
        config(text_heads=5)
    for sketch in (3, 16, -1):
        with pytest.raises(DalleError, match=f"sketch to divide image_size 8, found {sketch}"):
            config(sketch=sketch)


# Painting


def painted(model, brush, rows=range(3), **more):
    have = {**told(), **more}
    rows = list(rows)
    sampled = sample_images(
        model, have["embeddings"][rows], CaptionBatch(have["tokens"][rows], have["lengths"][rows]), brush,
        row_noise(5, rows, "decoder"), have["given"][rows],
    )  # fmt: skip
    assert sampled.dtype == torch.float32
    return to_images(sampled)


def differs(a, b):
    return (a.int() - b.int()).abs().max().item()


@pytest.fixture(scope="module", params=[0, 4], ids=["plain", "sketch"])
def soft(request):
    """A model that predicts pictures, grayish ones, so that nothing is hidden by black and white."""
    return randomized(Decoder(config(prediction="x_start", sketch=request.param)), scale=0.2).eval()


def test_guidance(soft):
    plain = painted(soft, SamplerConfig(4))
    assert torch.equal(painted(soft, SamplerConfig(4, guidance=1.0)), plain)
    assert differs(painted(soft, SamplerConfig(4, guidance=3.0)), plain) > 3
    # guidance 0 is what nulls alone give, those that training drops to
    nulls = {"given": torch.zeros(3, dtype=torch.bool), "lengths": torch.zeros(3, dtype=torch.int64)}
    null = painted(soft, SamplerConfig(4), **nulls)
    assert differs(painted(soft, SamplerConfig(4, guidance=0.0)), null) <= 1
    assert differs(null, plain) > 3
    for one in nulls:  # each of both nulls counts
        assert differs(painted(soft, SamplerConfig(4), **{one: nulls[one]}), null) > 1
    assert differs(painted(soft, SamplerConfig(4, guidance=3.0), **nulls), null) <= 1


def test_guidance_of_a_decoder_of_states():
    """It is relative to the null caption given, the states and z_t of "", beside a null embedding."""
    sizes = {"captions": "states", "text_width": 10, "prediction": "x_start"}
    model = randomized(Decoder(config(**sizes)), scale=0.2).eval()
    null = CaptionBatch(randn(1, 5, 10, seed=3), torch.tensor([2]), randn(1, 6, seed=4))
    captions = CaptionBatch(randn(3, 5, 10), torch.full((3,), 4), randn(3, 6, seed=2), null)
    other = null._replace(text=null.text + 1, z_t=null.z_t - 1)

    def sampled(captions, guidance, given=None):
        noise = row_noise(5, range(3), "decoder")
        return sample_images(model, randn(3, 6, seed=6), captions, SamplerConfig(4, guidance=guidance), noise, given)

    none = torch.zeros(3, dtype=torch.bool)
    of_null = CaptionBatch(*captions.nulls[:3], null)
    torch.testing.assert_close(sampled(captions, 0.0), sampled(of_null, 1.0, none), rtol=0, atol=1e-5)
    plain, guided = sampled(captions, 1.0), sampled(captions, 3.0)
    assert (guided - plain).abs().max() > 0.05
    for part in ({"text": other.text}, {"z_t": other.z_t}, {"lengths": null.lengths + 1}):
        changed = captions._replace(null=null._replace(**part))
        assert torch.equal(sampled(changed, 1.0), plain)
        assert (sampled(changed, 3.0) - guided).abs().max() > 1e-3, part


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 1.0), ("dpm++", 0.0), ("heun", 0.0)])
def test_a_picture_does_not_depend_on_its_batch(soft, sampler, eta, guidance):
    brush = SamplerConfig(4, sampler, guidance, eta)
    whole = painted(soft, brush)
    parts = torch.cat([painted(soft, brush, [0]), painted(soft, brush, [1, 2])])
    assert differs(whole, parts) <= 1
    assert differs(whole[:1], whole[1:2]) > 3


def test_brushes():
    for wrong, says in (({"sampler": "magic"}, "among"), ({"steps": 0}, "1 step"), ({"eta": 0.5}, "ddim alone")):
        with pytest.raises(DalleError, match=says):
            SamplerConfig(**wrong)


def test_eta_and_steps_count(soft):
    plain = painted(soft, SamplerConfig(4, "ddim"))
    assert differs(painted(soft, SamplerConfig(4, "ddim", eta=1.0)), plain) > 3
    assert differs(painted(soft, SamplerConfig(6, "ddim")), plain) > 1


def test_inversion_is_the_way_back():
    """From the noise that it finds, ddim paints the picture again; from other noise, or told another, it does not."""
    model = randomized(Decoder(config(prediction="v")), scale=0.15).eval()
    rows = told()["embeddings"], CaptionBatch(told()["tokens"], told()["lengths"])
    pictures = to_images(randn(3, 3, 8, 8) / 4)
    brush, noise = SamplerConfig(20, "ddim"), row_noise(1, range(3), "decoder")
    start = invert(model, to_signed(pictures), *rows, brush, iterations=10)

    def sampled(*rows, **more):
        return to_images(sample_images(model, *rows, brush, noise, **more))

    assert differs(sampled(*rows, start=start), pictures) <= 10
    assert differs(sampled(*rows), pictures) > 60
    assert differs(sampled(rows[0].flip(0), *rows[1:], start=start), pictures) > 12


# Training


def squares(folder, per_color=2):
    """Images all of one color, and embeddings that tell which."""
    folder.mkdir()
    ids, rows = [], []
    for k, (number, color) in itertools.product(range(per_color), enumerate(COLORS)):
        name = f"{color}{k}"
        Image.new("RGB", (8, 8), COLORS[color]).save(folder / f"{name}.png")
        ids.append(name)
        rows.append(np.eye(6, dtype=np.float32)[number])
    path = folder.parent / "embeddings.safetensors"
    write_artifact(path, "embeddings", {"embeddings": np.stack(rows), "ids": ids}, {"encoder": "0" * 64}, [])
    return open_dataset(folder, need_captions=False), open_artifact(path)


def task_of(data, embeddings, prediction="epsilon", sketch=0, **more):
    options = {"steps": 8, "batch_size": 8, "lr": 3e-3, "ema": 0.9, "validation": 0.0, "grid_images": 0, **more}
    train = DecoderTrain(**options)
    c = config(n_text=0, prediction=prediction, sketch=sketch)
    return DecoderTask(c, train, data, Conditions(embeddings), 0, 0), train


def test_the_loss_of_a_sketch():
    """It is added to the noise's, of pictures made small, and neither loss is the other's business."""
    c = config(sketch=2)
    model, process_ = randomized(Decoder(c)), unet_process(c)
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    batch = (images, torch.tensor([3, 50, 99]), randn(3, 3, 8, 8))
    total, figures = loss_of(model, process_, *batch, list(told().values()), DecoderTrain())
    small = images.numpy().astype(float).reshape(3, 3, 2, 4, 2, 4).mean((3, 5)) / 127.5 - 1
    sketch = model.condition(*told().values()).sketch.detach().numpy()
    assert figures["sketch"].item() == pytest.approx(((sketch - small) ** 2).mean(), rel=1e-5)
    noise, _ = denoising(process_, lambda x, t: model.denoise(x, t, **told()), *batch, DecoderTrain())
    assert total.item() == pytest.approx(noise.item() + figures["sketch"].item(), rel=1e-5)
    weight = model.sketch[0].weight
    assert torch.autograd.grad(noise, weight, allow_unused=True) == (None,)
    assert torch.autograd.grad(figures["sketch"], weight)[0].abs().max() > 0


def test_a_sketch_becomes_the_mean_picture(tmp_path):
    """The planted answer: of an embedding that is beside red pictures and blue ones alike, purple."""
    data, embeddings = squares(tmp_path / "pictures")
    ids = list(embeddings.strings("ids"))
    rows = np.eye(6, dtype=np.float32)[[int(name.startswith(("green", "yellow"))) for name in ids]]
    in_twos = tmp_path / "in-twos.safetensors"
    write_artifact(in_twos, "embeddings", {"embeddings": rows, "ids": ids}, {"encoder": "0" * 64}, [])
    task, train = task_of(data, open_artifact(in_twos), "v", sketch=2, steps=200, batch_size=16, lr=6e-3)
    trainer = Trainer(task, train, Run(tmp_path / "x.safetensors", "weights.decoder", {}, []), machine(), 0)
    batches = task.batches(0)
    for _ in range(train.steps):
        trainer.update(next(batches))
    batches.close()
    none = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        found = trainer.ema.model.condition(torch.eye(6)[:2], torch.ones(2, dtype=torch.bool), *none).sketch
    for sketch, names in zip((found + 1) * 127.5, (("red", "blue"), ("green", "yellow")), strict=True):
        mean = np.mean([COLORS[name] for name in names], axis=0)
        assert np.abs(sketch.numpy() - mean[:, None, None]).max() < 20, names


@pytest.mark.parametrize("prediction", ["x_start", pytest.param("v", marks=pytest.mark.slow)])
def test_a_small_one_learns_the_colors(tmp_path, prediction):
    """The planted answer: an embedding that was seen beside red pictures paints a red one."""
    data, embeddings = squares(tmp_path / "pictures")
    task, train = task_of(data, embeddings, prediction, steps=120, batch_size=16, lr=6e-3)
    trainer = Trainer(task, train, Run(tmp_path / "x.safetensors", "weights.decoder", {}, []), machine(), 0)
    batches = task.batches(0)
    for _ in range(train.steps):
        trainer.update(next(batches))
    batches.close()
    names = list(COLORS)
    rows = torch.eye(6)[[0, 1, 2, 3] * 2]
    none = CaptionBatch(torch.zeros(8, 0, dtype=torch.int64), torch.zeros(8, dtype=torch.int64))
    for brush in (SamplerConfig(12), SamplerConfig(12, guidance=2.0), SamplerConfig(25, "ddpm")):
        pictures = to_images(sample_images(trainer.ema.model, rows, none, brush, row_noise(1, range(8), "decoder")))
        for number, picture in enumerate(pictures.numpy()):
            mean = picture.reshape(3, -1).mean(1)
            near = min(names, key=lambda name, m=mean: np.abs(m - COLORS[name]).sum())
            assert near == names[number % 4], (brush, number, mean)
            assert np.abs(mean - COLORS[near]).max() < (40 if prediction == "x_start" else 80)
