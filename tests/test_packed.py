"""Matrices laid out for drawing give what the prior's own give."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from dalle_cli.models.dvae import DVAE, DVAEConfig
from dalle_cli.models.packed import Int8Linear, PackedLinear, PackedPointwise, pack, pack_pointwise, packs
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.sampling.autoregressive import sample_codes

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
    assert pack(model, 1, torch.float32) is model


@pytest.mark.slow  # a minute of the compiler's time
@pytest.mark.parametrize("attention", ["sparse", "full"])
def test_a_compiled_step_draws_the_same_codes(attention):
    plain = sample_codes(build(attention=attention), TOKENS, LENGTHS, range(3), 0, guidance_scale=2.0)
    fast = pack(build(attention=attention), 6, torch.float32, plain=True)
    assert sample_codes(fast, TOKENS, LENGTHS, range(3), 0, guidance_scale=2.0, compiled=True).equal(plain)


@pytest.mark.parametrize("quantizer", ["gumbel", "fsq"])
@pytest.mark.parametrize("block", ["bottleneck", "residual"])
def test_packed_pointwise_convolutions_give_the_same_codes_and_pictures(block, quantizer):
    levels = {"fsq_levels": (4, 4, 4), "n_vocab": 64} if quantizer == "fsq" else {"n_vocab": 64}
    config = DVAEConfig(image_size=32, n_groups=3, n_hid=16, n_init=16, quantizer=quantizer, block=block, **levels)
    torch.manual_seed(0)
    plain = DVAE(config).eval().requires_grad_(False)
    fast = pack_pointwise(copy.deepcopy(plain), torch.float32)
    assert any(isinstance(module, PackedPointwise) for module in fast.modules()) == packs(torch.float32)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    codes = plain.encode(images)
    torch.testing.assert_close(fast.features(images), plain.features(images), rtol=0, atol=1e-5)
    assert (fast.encode(images) == codes).float().mean() > 0.99
    torch.testing.assert_close(fast.decode(codes), plain.decode(codes), rtol=0, atol=1e-5)


def test_convolutions_are_packed_where_it_pays_alone():
    dvae = DVAE(DVAEConfig(image_size=32, n_hid=16, n_init=16, n_vocab=64))
    assert not any(isinstance(m, PackedPointwise) for m in pack_pointwise(dvae, torch.bfloat16).modules())
