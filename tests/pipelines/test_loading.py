"""Weights become models without a second copy of them, in the right dtypes, with everything that no file has."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from planted_weights import randomized

from dalle_cli.artifacts import open_artifact
from dalle_cli.artifacts.weights import ALIGN, save_tensors, stored_as, stream_tensors
from dalle_cli.models.clip import CLIP, CLIPConfig
from dalle_cli.models.decoder import Decoder, DecoderConfig
from dalle_cli.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig
from dalle_cli.models.dvae import DVAE, DVAEConfig
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.models.upsampler import Upsampler, UpsamplerConfig
from dalle_cli.pipelines import loading

CPU = torch.device("cpu")
UNET = {"width": 16, "multipliers": (1, 2), "depth": 1, "attention": (4,), "head_width": 8, "groups": 4}
TEXT = {"n_text_vocab": 20, "n_text": 6}
CONFIGS = {
    Prior: PriorConfig(n_layer=2, n_head=2, n_embd=16, n_image_vocab=30, grid=4, conv_kernel=3, **TEXT),
    DiffusionPrior: DiffusionPriorConfig(n_layer=2, n_head=2, n_embd=16, n_embedding=8, **TEXT),
    CLIP: CLIPConfig(
        n_proj=8, image_size=16, patch_size=8, vision_width=16, vision_layers=2, vision_heads=2, text_width=16,
        text_layers=2, text_heads=2, **TEXT,
    ),
    Decoder: DecoderConfig(
        image_size=8, n_embedding=8, n_extra=2, context_width=16, text_layers=1, text_heads=2, **TEXT, **UNET
    ),
    Upsampler: UpsamplerConfig(image_size=16, low_size=8, **{**UNET, "attention": ()}),
}  # fmt: skip


def stored(model, path, dtype, stream, kind="weights.clip"):
    """The model's weights in a file: as safetensors writes it, or as an import does."""
    tensors = stored_as(model.state_dict(), dtype)
    config = {"model": dataclasses.asdict(model.config)}
    if stream:
        entries = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        stream_tensors(path, kind, entries, tensors.__getitem__, config, [])
    else:
        save_tensors(path, kind, tensors, config, [])
    return open_artifact(path)


@torch.inference_mode()
def outputs(model):
    torch.manual_seed(0)
    tokens, lengths, t = torch.randint(0, 20, (2, 6)), torch.tensor([6, 3]), torch.tensor([900, 20])
    z, small = torch.randn(2, 8), torch.randn(2, 3, 8, 8)
    if isinstance(model, Prior):
        return model(tokens, lengths, torch.randint(0, 30, (2, 4, 4)))
    if isinstance(model, DiffusionPrior):
        return (model(z, t, tokens, lengths, z),)
    if isinstance(model, CLIP):
        return model.encode_image(torch.rand(2, 3, 16, 16)), model.encode_text(tokens, lengths)
    if isinstance(model, Decoder):
        return (model(small, t, model.condition(z, torch.tensor([True, False]), tokens, lengths)),)
    return (model(torch.randn(2, 3, 16, 16), t, torch.randn(2, 3, 16, 16)),)


@pytest.mark.parametrize("stream", [False, True], ids=["saved", "imported"])
@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_a_model_is_what_was_saved(kind, stream, tmp_path):
    model = randomized(kind(CONFIGS[kind])).eval()
    for dtype in ("float32", "bfloat16", "int8"):
        found = loading.load_model(kind, stored(model, tmp_path / dtype, dtype, stream), CPU)
        assert not found.training
        assert not any(p.requires_grad or p.dtype != torch.float32 for p in found.parameters())
        bounds = {"rtol": 0, "atol": {"float32": 0, "bfloat16": 0.1, "int8": 0.2}[dtype]}
        for name, tensor in model.state_dict().items():
            assert found.state_dict()[name].stride() == tensor.stride(), name
            torch.testing.assert_close(found.state_dict()[name], tensor, **bounds)
        if dtype == "float32":
            assert all(torch.equal(a, b) for a, b in zip(outputs(found), outputs(model), strict=True))


@pytest.mark.parametrize("stream", [False, True], ids=["saved", "imported"])
@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_bfloat16_matrices_stay_so_and_give_the_same(kind, stream, tmp_path):
    """Held in bfloat16, or held in float32 and rounded by autocast: the same products, half the memory."""
    artifact = stored(randomized(kind(CONFIGS[kind])), tmp_path / "a.safetensors", "bfloat16", stream)
    wide, narrow = loading.load_model(kind, artifact, CPU), loading.load_model(kind, artifact, CPU, torch.bfloat16)
    halves = {name for name, p in narrow.named_parameters() if p.dtype == torch.bfloat16}
    assert all(narrow.get_parameter(name).ndim >= 2 for name in halves)
    sizes = {name: p.numel() for name, p in narrow.named_parameters() if p.ndim >= 2}
    assert sum(sizes[name] for name in halves) > 0.5 * sum(sizes.values()), sorted(sizes.keys() - halves)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(outputs(narrow), outputs(wide), strict=True):
            assert torch.equal(a, b)


def test_numbers_that_no_file_has_are_there(tmp_path):
    sizes = {"n_groups": 2, "n_hid": 8, "n_blk_per_group": 1, "n_init": 8, "image_size": 16, "n_vocab": 20}
    model = DVAE(DVAEConfig(quantizer="fsq", fsq_levels=(5, 4), block="residual", likelihood="l1", **sizes)).eval()
    found = loading.dvae(stored(model, tmp_path / "a.safetensors", "float32", True, "weights.dvae"), CPU)
    pixels = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(found.encode(pixels), model.encode(pixels))
    assert {n: b.tolist() for n, b in found.named_buffers()} == {n: b.tolist() for n, b in model.named_buffers()}


def test_matrices_of_an_import_are_used_where_the_file_is_mapped(tmp_path):
    model = randomized(Prior(CONFIGS[Prior]))
    artifact = stored(model, tmp_path / "a.safetensors", "float32", True)
    infos = artifact.headers[0].tensors
    assert all(info.start % ALIGN == 0 for name, info in infos.items() if name.endswith("qkv.weight"))
    found = loading.load_model(Prior, artifact, CPU)
    before = artifact.path.read_bytes()
    with torch.no_grad():
        found.blocks[0].qkv.weight += 1  # a private copy: the file stays as it is
    assert artifact.path.read_bytes() == before


def peak(path, code):
    """How much memory a process holds at most by `code`, beyond what its imports take, in MiB."""
    program = f"""
import sys, torch
from dalle_cli.artifacts import open_artifact
from dalle_cli.pipelines import loading
from dalle_cli.models.prior import Prior, PriorConfig
def most():  # of this process alone: getrusage's number begins with that of the process which started it
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
with torch.device("meta"):  # which takes memory once, as products do
    Prior(PriorConfig(n_layer=1, n_head=1, n_embd=8, grid=4, conv_kernel=3))
torch.ones(8, 8) @ torch.ones(8, 8)
before = most()
{code}
print(most() - before)
"""
    return float(subprocess.run([sys.executable, "-c", program, path], check=True, capture_output=True).stdout)


@pytest.mark.parametrize(
    ("written", "loaded", "most"),
    [("float32", "float32", 1.2), ("bfloat16", "float32", 2.7)],
)
def test_loading_holds_the_weights_once(written, loaded, most, tmp_path):
    """By the size of the file: float32 made of bfloat16 takes twice as much, and one tensor more at a time."""
    config = PriorConfig(n_layer=4, n_head=8, n_embd=1024, n_text_vocab=2000, n_text=16, n_image_vocab=2000, grid=8)
    path = tmp_path / "a.safetensors"
    size = stored(Prior(config), path, written, True).path.stat().st_size / 2**20
    load = f"model = loading.load_model(Prior, open_artifact(sys.argv[1]), torch.device('cpu'), torch.{loaded})"
    assert peak(path, f"{load}\nprint(sum(float(p.sum()) for p in model.parameters()), file=sys.stderr)") < most * size
