"""Matrices laid out for drawing give what the prior's own give."""

import copy
import dataclasses

import pytest
import torch
from by_keyword import sample_codes
from planted_weights import randomized
from torch import nn

from dalle_cli import devices
from dalle_cli.models.dvae import DVAE, DVAEConfig
from dalle_cli.models.kernels import Int8Linear, PackedConvolution, PackedLinear, PackedPointwise, packs
from dalle_cli.models.packed import pack, pack_convolutions, pack_pointwise
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.models.upsampler import Upsampler, UpsamplerConfig

SMALL = PriorConfig(
    n_layer=3,
    n_head=2,
    n_embd=32,
    n_text_vocab=40,
    n_text=6,
    n_image_vocab=96,
    grid=6,
    conv_kernel=3,
    attention="sparse",
)
TOKENS, LENGTHS = torch.randint(1, 40, (1, 6), generator=torch.Generator().manual_seed(3)), torch.tensor([5])


def build(**changes):
    model = Prior(dataclasses.replace(SMALL, **changes))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.1, generator=generator)
    return model.eval().requires_grad_(False)


def layer(n_in, n_out, bias=True):
    generator = torch.Generator().manual_seed(0)
    made = nn.Linear(n_in, n_out, bias=bias)
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0, 1, generator=generator)
    return made.requires_grad_(False)


def given(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def logits_of(model, codes):
    with torch.inference_mode():
        cache = model.cache(model.prefill(TOKENS, LENGTHS), len(codes))
        rows = [cache.logits, *(model.step(code, cache) for code in codes[:, :-1].unbind(1))]
    return torch.stack(rows, 1)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n_in", "n_out"), [(32, 96), (17, 5), (64, 64)])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
def test_packed_products(dtype, atol, n_in, n_out, bias, plain):
    linear = layer(n_in, n_out, bias)
    made = PackedLinear(linear, 4, dtype, plain)
    for rows in (1, 4, 19):  # of which one is what it was laid out for
        x = given(rows, 1, n_in)
        y = made(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), linear(x), rtol=0, atol=atol)


def test_on_cpu_the_layout_is_another():
    if not packs(torch.float32):
        pytest.skip("this build of torch does not lay matrices out")
    assert PackedLinear(layer(32, 96), 4, torch.float32).weight.layout == torch._mkldnn
    assert PackedLinear(layer(32, 96), 4, torch.float32, plain=True).weight.layout == torch.strided


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n_in", "n_out"), [(32, 96), (17, 5)])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_int8_products_are_those_of_rounded_weights(dtype, rtol, n_in, n_out, bias):
    linear = layer(n_in, n_out, bias)
    made = Int8Linear(linear, dtype)
    assert made.weight.dtype == torch.int8
    steps = linear.weight.abs().amax(1) / 127
    rounded = torch.stack([torch.round(row / step) * step for row, step in zip(linear.weight, steps, strict=True)])
    assert ((rounded - linear.weight).abs() <= steps[:, None] / 2 * 1.001).all()
    x = given(3, 1, n_in)
    expected = x @ rounded.T + (linear.bias if bias else 0)
    torch.testing.assert_close(made(x).float(), expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def test_int8_of_a_row_of_zeros():
    linear = nn.Linear(8, 2).requires_grad_(False)
    linear.weight[1] = 0
    torch.testing.assert_close(Int8Linear(linear, torch.float32)(given(1, 8))[:, 1], linear.bias[1:])


def test_int8_in_float16_does_not_overflow():
    linear = nn.Linear(4096, 2).requires_grad_(False)
    nn.init.constant_(linear.weight, 0.01)
    x = torch.full((1, 4096), 2.0)
    found = Int8Linear(linear, torch.float16)(x)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), linear(x), rtol=2e-3, atol=0)  # 82; of whole numbers it were a million


@pytest.mark.parametrize("block", ["paper", "modern"])
@pytest.mark.parametrize("attention", ["sparse", "full"])
def test_packed_prior_gives_the_same_logits_and_codes(attention, block):
    codes = torch.randint(96, (3, 36), generator=torch.Generator().manual_seed(2))
    plain, fast = (
        build(attention=attention, block=block),
        pack(build(attention=attention, block=block), 3, torch.float32),
    )
    torch.testing.assert_close(logits_of(fast, codes), logits_of(plain, codes), rtol=0, atol=2e-5)
    assert sample_codes(fast, TOKENS, LENGTHS, range(5), 0, batch_size=2, guidance_scale=2.0).equal(
        sample_codes(plain, TOKENS, LENGTHS, range(5), 0, guidance_scale=2.0)
    )


@pytest.mark.parametrize("block", ["paper", "modern"])
@pytest.mark.parametrize(
    ("n", "int8", "atol"), [(1, False, 0.01), (20, False, 0.01), (1, True, 0.02), (20, True, 0.02)]
)
def test_packed_prior_in_fewer_bits_is_close(n, int8, atol, block):
    codes = torch.randint(96, (n, 36), generator=torch.Generator().manual_seed(2))
    exact = logits_of(build(block=block), codes)
    fast = pack(build(block=block), n, torch.bfloat16, int8)
    found = logits_of(fast, codes)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < atol < exact.std()


def test_what_is_packed_is_every_matrix_that_drawing_uses():
    model = pack(build(), 1, torch.float32)
    assert not [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 4 * 3 + 1
    layers = list(model.modules())
    assert pack(model, 7, torch.bfloat16, int8=True) is model
    assert all(now is before for now, before in zip(model.modules(), layers, strict=True))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
@pytest.mark.parametrize(("block", "int8"), [("paper", False), ("modern", True)])
def test_a_step_is_one_program_that_is_given_codes_only(block, int8):
    """CUDA graphs would copy all else that may lie elsewhere at each step, and are not made of what writes to it."""
    model, given_to, graphs = pack(build(block=block), 3, torch.float32, int8, plain=True), [], []
    codes = torch.randint(96, (3, 36), generator=torch.Generator().manual_seed(2))
    expected = logits_of(model, codes)

    def backend(graph, _):
        graphs.append(graph)
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        given_to.extend(n for n in inputs if "_dynamo_static_input_type" not in n.meta["tensor_dict"])
        return graph.forward

    torch._dynamo.reset()
    with torch.inference_mode():
        step = torch.compile(model.step, backend=backend)
        cache = model.cache(model.prefill(TOKENS, LENGTHS), len(codes), static=True)
        position = cache.position
        for _ in range(2):
            rows = [cache.logits, *(step(code, cache) for code in codes[:, :-1].unbind(1))]
            torch.testing.assert_close(torch.stack(rows, 1), expected, rtol=0, atol=2e-5)
            cache.restart()
    assert cache.position is position  # an output of one step would be overwritten by the next
    assert len(graphs) == 1
    assert [tuple(node.meta["example_value"].shape) for node in given_to] == [(3,)]


def test_what_is_compiled_is_for_one_size_of_batch(monkeypatch):
    model, sizes, told = build(), set(), []

    def compiled(step, *_):
        return lambda codes, cache: sizes.add(len(codes)) or step(codes, cache)

    options = {"batch_size": 3, "known": torch.arange(7)[:, None, None].expand(-1, 6, 6), "keep": torch.eye(6) > 0}
    plain = sample_codes(model, TOKENS, LENGTHS, range(7), 0, **options)
    monkeypatch.setattr(devices, "compiled", compiled)
    options |= {"compiled": True, "progress": told.append}
    assert sample_codes(model, TOKENS, LENGTHS, range(7), 0, **options).equal(plain)
    assert sizes == {3}  # the last one's, too, of which one candidate was wanted
    assert sum(told) == 7 * 36


@pytest.mark.slow  # a minute of the compiler's time
@pytest.mark.parametrize(
    ("dtype", "changes"),
    [(torch.float32, {}), (torch.float32, {"attention": "full"}), (torch.bfloat16, {"int8": True})],
)
def test_a_compiled_step_draws_the_same_codes(dtype, changes):
    model = {k: v for k, v in changes.items() if k != "int8"}

    def drawn(compiled):
        fast = pack(build(**model), 4, dtype, changes.get("int8", False), plain=True)
        options = {"guidance_scale": 2.0, "batch_size": 2, "compiled": compiled}
        return sample_codes(fast, TOKENS, LENGTHS, range(3), 0, **options)

    assert (drawn(True) != drawn(False)).float().mean() <= (0 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("quantizer", ["gumbel", "fsq"])
@pytest.mark.parametrize("block", ["bottleneck", "residual"])
def test_packed_pointwise_convolutions_give_the_same_codes_and_pictures(block, quantizer):
    levels = {"fsq_levels": (4, 4, 4), "n_vocab": 64} if quantizer == "fsq" else {"n_vocab": 64}
    config = DVAEConfig(image_size=32, n_groups=3, n_hid=16, n_init=16, quantizer=quantizer, block=block, **levels)
    torch.manual_seed(0)
    plain = DVAE(config).eval().requires_grad_(False)
    state = torch.get_rng_state()
    fast = pack_pointwise(copy.deepcopy(plain), torch.float32)
    assert torch.get_rng_state().equal(state)
    assert any(isinstance(module, PackedPointwise) for module in fast.modules()) == packs(torch.float32)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    codes = plain.encode(images)
    torch.testing.assert_close(fast.features(images), plain.features(images), rtol=0, atol=1e-5)
    assert (fast.encode(images) == codes).float().mean() > 0.99
    torch.testing.assert_close(fast.decode(codes), plain.decode(codes), rtol=0, atol=1e-5)


def test_convolutions_are_packed_where_it_pays_alone():
    dvae = DVAE(DVAEConfig(image_size=32, n_hid=16, n_init=16, n_vocab=64))
    assert not any(isinstance(m, PackedPointwise) for m in pack_pointwise(dvae, torch.bfloat16).modules())


@pytest.mark.skipif(not packs(torch.bfloat16), reason="no packed bfloat16 here")
@pytest.mark.parametrize("resample_blocks", [True, False])
def test_packed_convolutions(resample_blocks):
    """The same numbers as without, whatever the number and the size of the images."""
    sizes = {"image_size": 16, "width": 32, "multipliers": (1, 2), "depth": 1, "attention": (), "groups": 8}
    config = UpsamplerConfig(**sizes, low_size=8, dropout=0.0, last=True, resample_blocks=resample_blocks)
    plain = randomized(Upsampler(config)).eval().requires_grad_(False)
    packed = pack_convolutions(copy.deepcopy(plain), torch.bfloat16)
    assert pack_convolutions(copy.deepcopy(plain), torch.float32).state_dict().keys() == plain.state_dict().keys()
    n_packed = sum(isinstance(module, PackedConvolution) for module in packed.modules())
    assert n_packed == (40 if resample_blocks else 36)
    for rows, side, last in ((2, 16, False), (1, 24, False), (3, 16, True)):
        x = torch.randn(rows, 3, side, side)
        t = torch.arange(rows) * 100
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(packed(x, t, x, last=last), plain(x, t, x, last=last), rtol=0, atol=2e-2)
