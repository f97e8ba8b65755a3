"""float16 with a gradient scale for each block: what would vanish is kept, what overflows stays where it is."""

import json

import pytest
import torch
from conftest import run_ok
from interruptions import Crash, after_update
from torch import nn
from toy_task import WIDTH, Block, LinearBlock, SplitToy, config, train_toy, trainer

from dalle_cli.artifacts import open_artifact
from dalle_cli.artifacts.weights import load_tensors
from dalle_cli.errors import DalleError
from dalle_cli.models.blocks import StackedBlock
from dalle_cli.models.clip import CLIP, CLIPConfig
from dalle_cli.models.decoder import Decoder, DecoderConfig
from dalle_cli.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig
from dalle_cli.models.dvae import DVAE, DVAEConfig
from dalle_cli.models.embedding_prior import AutoregressivePrior, AutoregressivePriorConfig
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.models.upsampler import Upsampler, UpsamplerConfig
from dalle_cli.training import scaling
from dalle_cli.training.blocks import blocks
from dalle_cli.training.scaling import BlockScales

HALF = torch.float16


class Shrink(torch.autograd.Function):
    """Nothing forward, a factor backward: as deep networks have it between blocks."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class Deep(nn.Module):
    """Two blocks; what comes to the first is 2**-40 of what comes to the second."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList([Block(), Block()])

    def loss(self, x):
        h = Shrink.apply(self.blocks[0](x), 2.0**-40)
        return self.blocks[1](h).sum() * 2.0**6


def grads(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def similar(ours, theirs):
    """The cosine of two gradients."""
    ours, theirs = ours.double().flatten(), theirs.double().flatten()
    return (ours @ theirs / (ours.norm() * theirs.norm()).clamp(min=1e-300)).item()


def test_no_one_scale_fits_all_blocks_but_one_for_each_does(monkeypatch):
    monkeypatch.setattr(scaling, "WINDOW", 0)
    torch.manual_seed(0)
    x = torch.randn(4, WIDTH)
    exact = Deep()
    exact.loss(x).backward()
    weights = "inner.weight", "outer.weight"
    for scale in range(-10, 60):
        model = Deep()
        with torch.autocast("cpu", HALF):
            loss = model.loss(x)
        (loss.float() * 2.0**scale).backward()
        first, second = (grads(block) for block in model.blocks)
        vanished = all(first[name].abs().max() == 0 for name in weights)
        overflowed = not all(second[name].isfinite().all() for name in weights)
        assert vanished or overflowed, scale
    model = Deep()
    scales = BlockScales(model)
    scales.attach()
    scales.log2[0] = 20.0  # where 7,000 updates would bring it
    for _ in range(20):
        model.zero_grad()
        model.loss(x).backward()
        scales.unscale()
    assert scales.log2[0].item() == pytest.approx(20.0 + 20 * scaling.RISE)
    assert scaling.MIN <= scales.log2[1] < 10  # this one came down, by itself
    assert scales.lost == [0, 0]
    for ours, theirs in zip(model.blocks, exact.blocks, strict=True):
        assert grads(ours).keys() == grads(theirs).keys()
        for name, grad in grads(theirs).items():
            assert similar(grads(ours)[name], grad) > 0.99, name
            assert (grads(ours)[name].norm() / grad.norm()).item() == pytest.approx(1, abs=0.1)


def prior(**more):
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 16, "n_text_vocab": 9, "n_text": 3, "n_image_vocab": 7, "grid": 3}
    model = Prior(PriorConfig(**sizes, conv_kernel=3, **more))
    batch = torch.randint(0, 9, (4, 3)), torch.tensor([3, 1, 2, 3]), torch.randint(0, 7, (4, 3, 3))
    return model, lambda: model.loss(*batch)[0]


def clip():
    sizes = {f"{tower}_{k}": v for tower in ("text", "vision") for k, v in (("width", 16), ("layers", 2), ("heads", 2))}
    model = CLIP(CLIPConfig(image_size=8, patch_size=4, n_proj=8, n_text=4, n_text_vocab=9, **sizes))
    batch = torch.rand(4, 3, 8, 8), torch.randint(0, 9, (4, 4)), torch.tensor([4, 1, 2, 3])
    return model, lambda: model.loss(*batch)[0]


def dvae(block):
    sizes = {"image_size": 16, "n_groups": 3, "n_blk_per_group": 1, "n_hid": 16, "n_init": 16, "n_vocab": 9}
    model = DVAE(DVAEConfig(**sizes, block=block, quantizer="gumbel", likelihood="mse"))
    images = torch.rand(4, 3, 16, 16)
    return model, lambda: model.loss(images, temperature=1.0, beta=1.0, generator=None)[0]


STREAM = {"n_layer": 3, "n_head": 2, "n_embd": 16, "n_text_vocab": 9, "n_text": 3, "n_embedding": 8}
CAPTIONS = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 0], [1, 0, 0]]), torch.tensor([3, 3, 0, 1])


def diffusion_prior(block):
    model = DiffusionPrior(DiffusionPriorConfig(**STREAM, block=block))
    x, z_t, x_start = torch.randn(3, 4, 8)
    return model, lambda: model.loss(x, torch.tensor([3, 99, 500, 0]), *CAPTIONS, z_t, x_start)[0]


def autoregressive_prior(block):
    model = AutoregressivePrior(AutoregressivePriorConfig(**STREAM, n_component=4, n_bucket=5, n_dot=3, block=block))
    z_t, dots, buckets = torch.randn(4, 8), torch.randint(0, 3, (4,)), torch.randint(0, 5, (4, 4))
    return model, lambda: model.loss(*CAPTIONS, z_t, dots, buckets)[0]


UNET = {"image_size": 16, "width": 16, "multipliers": (1, 2), "depth": 1, "groups": 4, "dropout": 0.0}


def decoder(**more):
    sizes = {"n_embedding": 8, "n_extra": 2, "context_width": 16, "n_text": 3, "n_text_vocab": 9, "text_layers": 2}
    model = Decoder(DecoderConfig(**UNET, **sizes, text_heads=2, attention=(8,), head_width=8, **more))
    x, z, given = torch.randn(4, 3, 16, 16), torch.randn(4, 8), torch.tensor([True, True, False, True])
    return model, lambda: model.denoise(x, torch.tensor([3, 99, 500, 0]), z, given, *CAPTIONS).square().mean()


def upsampler():
    model = Upsampler(UpsamplerConfig(**UNET, low_size=8, low_noise=0.5))
    x, low = torch.randn(2, 4, 3, 16, 16)
    level = torch.tensor([-1, 5, 40, 0])
    return model, lambda: model(x, torch.tensor([3, 99, 500, 0]), low, level).square().mean()


MODELS = {
    "prior": prior,
    "modern prior": lambda: prior(block="modern"),
    "clip": clip,
    "dvae": lambda: dvae("residual"),
    "paper's dvae": lambda: dvae("bottleneck"),
    "diffusion prior": lambda: diffusion_prior("paper"),
    "modern diffusion prior": lambda: diffusion_prior("modern"),
    "autoregressive prior": lambda: autoregressive_prior("paper"),
    "decoder": decoder,
    "decoder with shifts and convolutions between": lambda: decoder(scale_shift=False, resample_blocks=False),
    "upsampler": upsampler,
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_keeps_gradients_that_float16_would_lose(name):
    """A loss of a 2**-24th: each parameter has the float32 gradient, which plain float16 has for none in a block."""
    torch.manual_seed(0)
    model, loss = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():  # what starts at nought or at one would have no gradient or a plain one
            parameter += 0.1 * torch.randn_like(parameter)
    (loss() * 2.0**-24).backward()
    exact = {name: g for name, g in grads(model).items() if not name.endswith("k_proj.bias")}  # whose gradient is 0
    model.zero_grad()
    with torch.autocast("cpu", HALF):
        (loss() * 2.0**-24).backward()
    plain = grads(model)
    inside = [name for name in exact if name.startswith(tuple(f"{block}." for block in blocks(model)))]
    assert all(similar(plain[p], exact[p]) < 0.9 for p in inside)
    model.zero_grad()
    scales = BlockScales(model)
    scales.log2.fill_(22.0)
    scales.attach()
    (loss() * 2.0**-24).backward()
    assert not torch.equal(grads(model)[inside[-1]], plain[inside[-1]])
    scales.unscale()
    assert scales.lost == [0] * len(blocks(model))
    for name, grad in exact.items():
        assert similar(grads(model)[name], grad) > 0.998, name
        assert (grads(model)[name].norm() / grad.norm()).item() == pytest.approx(1, abs=0.05)


class TwoInputs(StackedBlock):
    """A block with a second input, positional or by name, and one that is no tensor."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.time = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, time, places=None):
        return x + self.inner(x) * self.time(time)


def input_gradients(scaled, by_name=False, overflows=False):
    torch.manual_seed(0)
    model, x, time = nn.ModuleList([TwoInputs()]), *torch.randn(2, 4, WIDTH)
    inputs = x.requires_grad_(), time.requires_grad_()
    if scaled:
        BlockScales(model).attach()
    if overflows:
        plant(model[0].inner)
        plant(model[0].time)
    y = model[0](x, time=time, places=3) if by_name else model[0](x, time, 3)
    y.sum().backward()
    return [t.grad for t in inputs]


@pytest.mark.parametrize("by_name", [False, True])
def test_the_gradient_of_every_input_of_a_block_is_unscaled(by_name):
    exact, ours = input_gradients(False), input_gradients(True, by_name)
    torch.testing.assert_close(ours, exact, rtol=5e-3, atol=5e-3)


def test_a_block_that_overflows_gives_its_second_input_no_gradient():
    first, second = input_gradients(True, overflows=True)
    assert torch.equal(first, torch.ones_like(first))  # of the path around the block
    assert not second.any()


def test_only_the_blocks_are_in_float16(tmp_path):
    loop = trainer(tmp_path, config(), arithmetic=HALF)
    seen = {}
    watched = {"first": loop.model.first, "last": loop.model.last, "block": loop.model.blocks[0]}
    for name, module in {**watched, "inner": loop.model.blocks[0].inner}.items():
        module.register_forward_hook(lambda m, inputs, out, name=name: seen.update({name: out.dtype}))
    loop.update(loop.task.batch(0))
    assert seen == {"first": torch.float32, "last": torch.float32, "block": torch.float32, "inner": HALF}
    assert {p.dtype for p in loop.model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in loop.model.parameters()} == {torch.float32}


# Overflow


def plant(branch):
    """Let the gradient within a layer be infinite, as an overflow would have it."""
    return branch.register_full_backward_hook(lambda m, grads_in, grads_out: (torch.full_like(grads_in[0], torch.inf),))


class Past(Block):
    """A block through whose branch no gradient comes: only what runs past it."""

    def forward(self, x):
        return x + (super().forward(x) - x).detach()


def three_blocks(tmp_path, middle=Block):
    class Three(SplitToy):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            torch.manual_seed(2)
            self.model.blocks.insert(1, middle())

    return trainer(tmp_path, config(lr=0.1), Three, arithmetic=HALF)


def test_an_overflow_stays_in_its_block(tmp_path):
    plain, hit, cut = (three_blocks(tmp_path, middle) for middle in (Block, Block, Past))
    plant(hit.model.blocks[1].inner)
    before = {name: p.clone() for name, p in hit.model.named_parameters()}
    batch = hit.task.batch(0)
    for loop in (plain, hit, cut):
        loop.update(batch)
    assert [round(x, 3) for x in hit.scales.log2.tolist()] == [13.001, 12.5, 13.001]
    after = dict(hit.model.named_parameters())
    for name, parameter in plain.model.named_parameters():
        if name.startswith("blocks.1."):
            assert torch.equal(after[name], before[name]), name  # not updated this time
        elif name.startswith(("blocks.2.", "last")):
            assert torch.equal(after[name], parameter), name  # as if nothing had been
        else:
            assert not torch.equal(after[name], before[name]), name
            grad = dict(cut.model.named_parameters())[name].grad
            torch.testing.assert_close(after[name].grad, grad, rtol=2e-3, atol=1e-5)
    assert after["blocks.1.inner.weight"].grad is None


def test_a_block_recovers(tmp_path):
    loop = three_blocks(tmp_path)
    planted = plant(loop.model.blocks[1].inner)
    loop.update(loop.task.batch(0))
    planted.remove()
    before = loop.model.blocks[1].inner.weight.clone()
    loop.update(loop.task.batch(1))
    assert not torch.equal(loop.model.blocks[1].inner.weight, before)
    assert loop.scales.log2[1].item() == pytest.approx(12.501)
    assert loop.scales.lost == [0, 0, 0]
    assert all(torch.isfinite(p).all() for p in loop.model.parameters())


def moved(monkeypatch, outcomes, start):
    """The logarithm of a scale after each of some updates, of which True were finite; and whether it was kept."""
    model = nn.ModuleList([LinearBlock(1, 1)])
    scales = BlockScales(model)
    scales.log2.fill_(start)
    seen = []
    for finite in outcomes:
        model[0].weight.grad = torch.full((1, 1), 8.0 if finite else torch.nan)
        scale = scales.log2.exp2().item()
        scales.unscale()
        assert (model[0].weight.grad is not None) == finite
        if finite:
            assert model[0].weight.grad.item() == pytest.approx(8 / scale)
        seen.append(scales.log2.item())
    return seen


def test_scales_move_as_the_papers(monkeypatch):
    """Times 2**(1/1000), over the root of 2 and no more than once in 125 updates, from 2**7 to 2**24."""
    assert moved(monkeypatch, [True, False, True], 13.0) == pytest.approx([13.001, 12.501, 12.502], abs=1e-5)
    assert moved(monkeypatch, [True, True], 23.9995) == [24.0, 24.0]
    lost = moved(monkeypatch, [False] * 127, 13.0)
    assert lost == [12.5] * 125 + [12.0] * 2
    assert moved(monkeypatch, [False], 7.2) == [7.0]


def test_a_block_that_never_has_a_finite_gradient(monkeypatch):
    with pytest.raises(DalleError, match=r"finite gradients in 0, found none for 126 updates .*--dtype float32"):
        moved(monkeypatch, [False] * 127, 7.2)
    moved(monkeypatch, [*[False] * 120, True, *[False] * 120], 7.2)


# Runs


def test_a_run_in_float16_goes_on_as_the_very_same(tmp_path):
    """The scales go on from where they were: others would round other bits."""
    c = config(accumulate=2, checkpoint_activations=True, clip_norm=1.0)
    whole = train_toy(tmp_path / "whole", c, arithmetic=HALF, dropout=0.1)
    with after_update(6), pytest.raises(Crash):
        train_toy(tmp_path / "cut", c, arithmetic=HALF, dropout=0.1)
    assert train_toy(tmp_path / "cut", c, arithmetic=HALF, dropout=0.1) == whole
    for folder in ("cut", "whole"):
        ends = load_tensors(open_artifact(tmp_path / folder / "toy.run/checkpoint-00000012.safetensors"))
        assert ends["loop/scales/log2"].tolist() == pytest.approx([13.012, 13.012], abs=1e-4)


def test_what_scales_remember(monkeypatch):
    scales, again = (BlockScales(nn.ModuleList([LinearBlock(1, 1), LinearBlock(1, 1)])) for _ in range(2))
    for planted in (torch.nan, 1.0, torch.nan):
        for block, value in zip(scales.blocks.values(), (1.0, planted), strict=True):
            block.weight.grad = torch.full((1, 1), value)
        scales.unscale()
    again.load(scales.state())
    assert (again.since, again.lost) == (scales.since, scales.lost) == ([128, 2], [0, 1])
    assert torch.equal(again.log2, scales.log2)
    again.load({})  # a checkpoint from before there were any


def test_float16_from_the_command_line(chain, tmp_path):
    command = ("train-prior", chain.captions, chain.codes, "-t", chain.tokenizer, "--config", chain.recipe)
    more = ("--set", "prior.train.steps=40", "--set", "prior.train.log_every=10", "--set", "prior.train.lr=1e-2")
    out = run_ok(*command, "--dtype", "fp16", *more, "-o", tmp_path / "a.safetensors")
    assert out == str(tmp_path / "a.safetensors")
    assert open_artifact(tmp_path / "a.safetensors").history[-1]["options"]["dtype"] == "float16"
    logged = [json.loads(line) for line in (tmp_path / "a.run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in logged if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
