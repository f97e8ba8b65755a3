"""Karlo whole: a tiny one, saved by diffusers, imported by the command, against diffusers' own pipeline."""

import numpy as np
import pytest
import torch
from artifact_files import array, strings
from comparisons import assert_equal
from conftest import run_bad, run_cli, run_ok
from karlo_publication import WIDTH, components, in_double, publish, publish_eclipse
from PIL import Image
from stage_runs import lasting_rows
from tensor_lists import n_parameters, published_shapes

from dalle_cli import pipelines
from dalle_cli.artifacts import digest_file, open_artifact
from dalle_cli.artifacts.weights import load_tensors
from dalle_cli.devices import arithmetic
from dalle_cli.diffusion.noise import noise_for, row_noise
from dalle_cli.importing import karlo
from dalle_cli.pipelines.decoder import ImageDecoder
from dalle_cli.pipelines.editing import Editor, SourceImage
from dalle_cli.pipelines.prior import open_prior
from dalle_cli.pipelines.prompts import SamplerInputs, candidates
from dalle_cli.sampling.decoder import upsample
from dalle_cli.sampling.defaults import check_sampling_defaults
from dalle_cli.sampling.embeddings import PromptBatch
from dalle_cli.training.states import StatesOf

PROMPT, N, SEED = "a red bear on the blue grass", 2, 3
STEPS = (25, 25, 7)  # the published ones, which our side has to know from the bundle
CPU = arithmetic("cpu", "float32")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The components, the CLIP, and the folders that both are saved in."""
    parts, whole = components()
    return parts, whole, *publish(parts, whole, tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def bundle(published, tmp_path_factory):
    *_, source, clip = published
    out = tmp_path_factory.mktemp("imported") / "karlo"
    run_ok("import", source, "--clip", clip, "-o", out)
    return out


class Planted:
    """Our noise of N candidates in the order in which their pipeline takes it: by stage, then by step."""

    def __init__(self):
        inputs = SamplerInputs.of(candidates([PROMPT], N))
        stages = zip(
            STEPS, (inputs.indices, range(N), range(N)), ((WIDTH,), (3, 8, 8), (3, 32, 32)),
            ("prior 0", "decoder", "upsampler 32"), strict=True,
        )  # fmt: skip
        self.rest = [(stage, step) for stage in stages for step in range(stage[0])]

    def __call__(self, shape, **_):
        (_, indices, size, name), step = self.rest.pop(0)
        assert tuple(shape) == (N, *size)
        return noise_for(SEED, indices, step, size, name)


def pixels(x):
    """[-1, 1] as their pipeline writes it: in [0, 1]."""
    return ((x + 1) / 2).clamp(0, 1)


@pytest.fixture(scope="module")
def theirs(published):
    """z_i, the small images and the large ones of diffusers' pipeline, the images in [0, 1]."""
    from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline, pipeline_unclip
    from diffusers.schedulers import scheduling_unclip

    parts = {name: in_double(part) if name.endswith("scheduler") else part for name, part in published[0].items()}
    pipeline, planted, seen = UnCLIPPipeline(**parts), Planted(), {}
    pipeline.set_progress_bar_config(disable=True)
    hooks = [
        parts["text_proj"].register_forward_pre_hook(
            lambda _, args, named: seen.update(z=named["image_embeddings"]), with_kwargs=True
        ),
        parts["super_res_first"].register_forward_pre_hook(
            lambda _, args, named: seen.update(large=named["sample"][:, 3:]), with_kwargs=True
        ),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for module in (pipeline_unclip, scheduling_unclip):
            patch.setattr(module, "randn_tensor", planted)
        images = pipeline(PROMPT, num_images_per_prompt=N, output_type="np").images
    for hook in hooks:
        hook.remove()
    assert not planted.rest
    return {**seen, "images": torch.from_numpy(images).permute(0, 3, 1, 2)}


def test_every_stage(bundle, theirs):
    """Each from the stage before it, in floats; the bundle says how it is sampled."""
    z = pipelines.load(bundle).sample(PROMPT, N, seed=SEED)
    np.testing.assert_allclose(z, theirs["z"], rtol=0, atol=1e-4)
    assert np.abs(z[0] - z[1]).max() > 0.1
    decoder = ImageDecoder(str(bundle), CPU, seed=SEED)
    small = torch.from_numpy(decoder.decode_small(z, range(N), [PROMPT] * N))
    ((_, upsampler),) = decoder.upsamplers
    (config,), noise = decoder.upsampler_configs, row_noise(SEED, range(N), "upsampler 32")
    enlarged = torch.nn.functional.interpolate(small, scale_factor=4.0, mode="bicubic", antialias=True)
    assert (pixels(enlarged) - pixels(theirs["large"])).abs().max() < 1e-4
    large = upsample(upsampler, small, config, noise)
    assert (pixels(large) - pixels(2 * theirs["images"] - 1)).abs().max() < 1e-4
    inside = (theirs["images"] > 0.01) & (theirs["images"] < 0.99)
    assert inside.float().mean() > 0.3  # not all is clipped


def test_generate(bundle, theirs, tmp_path):
    """The command's images are theirs, rounded; and so by `sample | decode`."""
    kept = tmp_path / "kept.safetensors"
    run_ok(
        "generate",
        PROMPT,
        "-n",
        N,
        "--keep",
        N,
        "--seed",
        SEED,
        "-m",
        bundle,
        "--images",
        kept,
        "-o",
        tmp_path / "x.png",
    )
    expected = (255 * theirs["images"]).numpy()
    order = [int(name.split("-")[1]) for name in strings(kept, "ids")]
    assert np.abs(array(kept, "images")[np.argsort(order)] - expected).max() < 0.5 + 255 * 1e-4
    z, images = tmp_path / "z.safetensors", tmp_path / "images.safetensors"
    run_ok("sample", PROMPT, "-n", N, "--seed", SEED, "-m", bundle, "-o", z)
    run_ok("decode", z, "--seed", SEED, "-m", bundle, "-o", images)
    assert np.abs(array(images, "images") - expected).max() < 0.5 + 255 * 1e-4
    how = ("-n", N, "--keep", N, "--seed", SEED, "-m", bundle, "-o", tmp_path / "y.png", "--force")
    for option in ("--decoder-guidance", "--guidance"):  # neither of which may do nothing
        other = tmp_path / f"other{option}.safetensors"
        run_ok("generate", PROMPT, *how, "--images", other, option, 1)
        assert np.abs(np.sort(array(other, "images"), 0) - np.sort(expected, 0)).max() > 20


def test_embeddings_of_images_keep_their_length(bundle, published, tmp_path):
    """Those that `vary` starts from, and that `encode-images` writes for `decode`, are CLIP's own."""
    _, whole, *_ = published
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    editor = Editor(str(bundle), CPU)
    mean, std = (
        torch.tensor(x)[:, None, None] for x in (editor.clip.clip.config.pixel_mean, editor.clip.clip.config.pixel_std)
    )
    x = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
    with torch.no_grad():
        expected = whole.visual_projection(whole.vision_model(x[None]).pooler_output)
    assert abs(expected.norm() - 1) > 0.1
    got = editor.embed(SourceImage.read(Image.fromarray(image)))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    run_ok("encode-images", tmp_path, "-m", bundle, "-o", tmp_path / "z.safetensors")
    np.testing.assert_allclose(array(tmp_path / "z.safetensors", "embeddings"), expected, rtol=0, atol=1e-4)
    run_ok("decode", tmp_path / "z.safetensors", "-m", bundle, "--decoder-steps", 3, "-o", tmp_path / "i.safetensors")


def test_the_length_is_kept_on_the_way_to_a_text_diff(bundle, monkeypatch):
    editor, seen = Editor(str(bundle), CPU), []
    image = SourceImage.read(Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)))
    monkeypatch.setattr(editor, "invert", lambda z, *_: torch.zeros(1, 3, 8, 8))
    monkeypatch.setattr(
        editor, "sample", lambda stage, z, *_: seen.append(z) or np.zeros((len(z), 3, 32, 32), np.uint8)
    )
    editor.diff(image, "a red bear", "a blue circle", strength=0.5, n=3)
    z = editor.embed(image)
    torch.testing.assert_close(seen[0].norm(dim=1), z.norm(dim=1).expand(3), rtol=1e-5, atol=0)
    torch.testing.assert_close(seen[0][:1], z, rtol=0, atol=1e-6)
    assert torch.cosine_similarity(seen[0][2:], z) < 0.99


def test_editing_commands(bundle, tmp_path):
    for name in "ab":
        noise = np.random.default_rng(ord(name)).integers(60, 190, (5, 5, 3), np.uint8)
        Image.fromarray(noise).resize((32, 32), Image.Resampling.BICUBIC).save(tmp_path / f"{name}.png")
    a, b, few = tmp_path / "a.png", tmp_path / "b.png", ("--decoder-steps", 3, "-m", bundle)
    run_ok("vary", a, "-n", 2, *few, "-o", tmp_path / "v.png")
    run_ok("interpolate", a, b, "--steps", 2, *few, "-o", tmp_path / "i.png")
    run_ok("diff", a, "a red bear", "a blue bear", "--steps", 2, *few, "-o", tmp_path / "d.png")
    said = run_bad("reconstruct", a, *few, "-o", tmp_path / "r.png")
    assert "expected a prior with principal components" in said


def test_a_prior_in_its_place(published, bundle, tmp_path):
    """ECLIPSE's, beside the files of Karlo without its own; both also work apart, with one CLIP."""
    parts, _, source, clip = published
    eclipse = publish_eclipse(parts["prior"], tmp_path / "eclipse")
    narrow = publish_eclipse(parts["prior"], tmp_path / "narrow", WIDTH - 1)
    both, alone = tmp_path / "both", tmp_path / "alone"
    run_ok("import", source, "--prior", eclipse, "--clip", clip, "-o", both)
    run_ok("import", eclipse, "--clip", clip, "-o", alone)
    prior = open_artifact(both / "prior.safetensors")
    assert prior.config["sampling"] == {"steps": 1, "guidance": 1.0, "best_of": 1}
    for name in ("clip", "decoder", "upsampler"):
        assert digest_file(both / f"{name}.safetensors") == digest_file(bundle / f"{name}.safetensors")
    got = pipelines.load(both).sample(PROMPT, N)
    np.testing.assert_array_equal(pipelines.load(alone).sample(PROMPT, N), got)
    assert np.isfinite(got).all()
    assert np.abs(got[0] - got[1]).max() > 1e-3  # each from noise of its own
    run_ok("generate", PROMPT, "-n", 1, "-m", both, "--decoder-steps", 2, "-o", tmp_path / "x.png")
    card = (both / "README.md").read_text()
    assert "ECLIPSE" in card
    assert "openrail++" in card
    cases = {
        "expected weights.prior.embeddings alone for --prior": ("import", source, "--prior", clip, "--clip", clip),
        "expected a prior over embeddings of 16 numbers, found one over 15": (
            "import",
            source,
            "--prior",
            narrow,
            "--clip",
            clip,
        ),
        "expected no --prior for ECLIPSE": ("import", eclipse, "--prior", eclipse, "--clip", clip),
    }
    for expected, words in cases.items():
        assert expected in run_bad(*words, "-o", tmp_path / "none")
        assert not (tmp_path / "none").exists()


LISTS = {
    "prior": "karlo_prior", "decoder": "karlo_decoder", "text_proj": "karlo_text_proj",
    "super_res_first": "karlo_super_res_first", "super_res_last": "karlo_super_res_first",
}  # fmt: skip


class Published:
    """The files of Karlo by their tensors' names and shapes."""

    def __init__(self):
        self.files = {f"{name}/{file}": 1 for name in LISTS for file in ("config.json", karlo.WEIGHTS)}

    def tensors(self, name):
        self.shapes = published_shapes(LISTS[name.split("/")[0]])
        return self

    def json(self, name):
        of_prior = {"prediction_type": "sample", "clip_sample_range": 5.0}
        return {
            "prior/config.json": {"num_attention_heads": 32},
            "decoder/config.json": {"sample_size": 64, "attention_head_dim": 64},
            "super_res_first/config.json": {"sample_size": 256},
            "prior_scheduler/scheduler_config.json": of_prior,
            "decoder_scheduler/scheduler_config.json": {"variance_type": "learned_range"},
            "super_res_scheduler/scheduler_config.json": {},
        }[name]


def test_every_published_tensor():
    """3.3 billion parameters on the meta device: all tensors, of all files, make exactly our models."""
    made = karlo.plan(Published())
    total = 0
    for part in made.parts:
        with torch.device("meta"):
            model = part.model(part.sizes)
        prefixed = len(set(part.sources)) == 2 and part.kind == "weights.upsampler"
        shapes = {
            f"{file}:{name}" if prefixed else name: shape
            for file in part.sources for name, shape in Published().tensors(file).shapes.items()
        }  # fmt: skip
        origins = part.tensors(shapes)
        assert {name for origin in origins.values() for name in origin.names} == shapes.keys()
        assert origins.keys() == model.state_dict().keys()
        assert n_parameters(shapes) == sum(t.numel() for t in model.state_dict().values())
        total += n_parameters(shapes)
        check_sampling_defaults(part.kind, dict(part.sampling), part.file)
    assert total == 1_022_030_080 + 885_439_686 + 7_878_400 + 2 * 691_579_523
    assert [part.file.removesuffix(".safetensors") for part in made.parts] == ["prior", "decoder", "upsampler"]
    decoder, upsampler = made.parts[1:]
    expected = {"steps": 25, "guidance": 8.0, "sampler": "ddpm", "spacing": "linspace", "variance": "learned_range"}
    assert decoder.sampling == {**expected, "clip": 1.0}
    assert upsampler.sampling == {
        "steps": 7, "sampler": "ddpm", "spacing": "linspace", "variance": "fixed_small", "clip": 1.0,
    }  # fmt: skip
    assert (decoder.sizes.image_size, upsampler.sizes.low_size, upsampler.sizes.image_size) == (64, 64, 256)


@pytest.fixture(scope="module")
def inputs(bundle, data, tmp_path_factory):
    """Captions in the tokens of Karlo's CLIP, and embeddings of the images as long as it gives them."""
    folder = tmp_path_factory.mktemp("inputs")
    captions, embeddings = folder / "captions.safetensors", folder / "embeddings.safetensors"
    length = ("--set", "tokenizer.length=77")
    run_ok("tokenize", data, "-t", bundle / "clip-tokenizer.json", "-m", bundle, *length, "-o", captions)
    run_ok("encode-images", data, "-m", bundle, "-o", embeddings)
    return captions, embeddings


def training(**settings):
    values = {"batch_size": 8, "warmup": 1, "validation": 0.25, "log_every": 5, "drawn_steps": 3, **settings}
    return [word for k, v in values.items() for word in ("--set", f"embedding_prior.diffusion.train.{k}={v}")]


def test_fine_tuning_the_prior(bundle, inputs, tmp_path):
    """From its weights on, with its statistics; captions are states of its CLIP."""
    still, tuned = tmp_path / "still.safetensors", tmp_path / "prior.safetensors"
    how = ("--init", bundle, "--dtype", "float32")
    run_ok("train-prior", *inputs, *how, *training(steps=1, lr=0.0), "-o", still)
    before, same = (load_tensors(open_artifact(path)) for path in (bundle / "prior.safetensors", still))
    assert_equal(same, before)
    run_ok("train-prior", *inputs, *how, *training(steps=30, lr=3e-3, ema=0.5), "-o", tuned)
    first, last = (lasting_rows(path)[-1]["validation"] for path in (still, tuned))
    assert last["loss_held_out"] < 0.5 * first["loss_held_out"]
    assert -1 <= last["cosine"] <= 1
    after = load_tensors(open_artifact(tuned))
    assert all(torch.equal(after[name], before[name]) for name in ("principal.mean", "principal.std"))
    assert open_artifact(tuned).config["sampling"] == open_artifact(bundle / "prior.safetensors").config["sampling"]
    for name in ("clip.safetensors", "clip-tokenizer.json"):
        (tmp_path / name).write_bytes((bundle / name).read_bytes())
    z = pipelines.load(tuned).sample(PROMPT, N, steps=3)
    assert np.isfinite(z).all()
    found = run_cli("doctor", tuned, *inputs)
    assert found.status in (0, 1)
    assert "scale of z_i before noise" in found.stdout + found.stderr


def test_states_in_training_are_those_of_sampling(bundle, inputs):
    captions = open_artifact(inputs[0])
    states = StatesOf.find(captions, bundle)
    texts = captions.strings("text")[:3]
    read = [torch.from_numpy(captions.array(name)[:3].astype(np.int64)) for name in ("tokens", "lengths")]
    prior = open_prior(open_artifact(bundle / "prior.safetensors"), CPU, str(bundle))
    got, expected = states(PromptBatch(*read, torch.zeros(3, WIDTH))), prior.prompt_batch(texts)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    dropped = states(PromptBatch(read[0], torch.zeros_like(read[1]), torch.zeros(3, WIDTH)))
    for one, null, other in zip(dropped, states.null, prior.prompt_batch([""]), strict=True):
        torch.testing.assert_close(one[1:2], other, rtol=0, atol=1e-5)
        torch.testing.assert_close(null, other, rtol=0, atol=1e-5)


def test_training_that_cannot_be(bundle, inputs, data, tmp_path):
    short = tmp_path / "short.safetensors"
    words = ("-t", bundle / "clip-tokenizer.json", "-m", bundle, "--set", "tokenizer.length=20", "-o", short)
    run_ok("tokenize", data, *words)
    lone = tmp_path / "lone" / "prior.safetensors"
    lone.parent.mkdir()
    lone.write_bytes((bundle / "prior.safetensors").read_bytes())
    once = (*training(steps=1), "--set", "embedding_prior.diffusion.time=false")
    out = ("-o", tmp_path / "out" / "prior.safetensors")
    assert "n_text = 77" in run_bad("train-prior", short, inputs[1], "--init", bundle, *training(steps=1), *out)
    assert "whose states the model takes" in run_bad("train-prior", *inputs, "--init", lone, *training(steps=1), *out)
    assert "expected a prior with timesteps to train" in run_bad("train-prior", *inputs, *once, *out)
