"""The U-Net against its slow twin; tests/importing/test_unets.py has it against `diffusers`."""

import numpy as np
import pytest
import torch
from comparisons import assert_same_value_and_gradient
from planted_weights import randomized

from dalle_cli.errors import DalleError
from dalle_cli.models.kernels import attention as dense_attention
from dalle_cli.models.unet import UNet, UNetAttention, UNetBlock, UNetConfig, sinusoids
from reference import unet as reference

TINY = {"image_size": 8, "width": 8, "depth": 1, "head_width": 4, "groups": 4, "dropout": 0.0}
K = 6  # width of the context


def config(**more):
    return UNetConfig(**{**TINY, "multipliers": (1, 2), "attention": (4,), **more})


def numbers(state):
    return {name: tensor.double().numpy() for name, tensor in state.items()}


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("change", ["", "down", "up"])
@pytest.mark.parametrize("widths", [(8, 16), (8, 8)])
def test_block(scale_shift, change, widths):
    c = config(scale_shift=scale_shift)
    block = randomized(UNetBlock(c, *widths, K, attends=not change, change=change)).double()
    x, time, context = randn(2, widths[0], 6, 4), randn(2, 32, seed=2), randn(2, 3, K, seed=3)
    expected = reference.block(
        {f"b.{k}": v for k, v in numbers(block.state_dict()).items()}, "b", *(a.numpy() for a in (x, time, context)),
        c, change,
    )  # fmt: skip
    for mode in (torch.no_grad, torch.enable_grad):  # attention has a way for each
        with mode():
            np.testing.assert_allclose(block(x, time, context).detach().numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("context", [0, K])
def test_attention(context):
    attention = randomized(UNetAttention(8, 4, 4, context)).double()
    x, told = randn(2, 8, 3, 2), randn(2, 5, K, seed=2)
    state = {f"a.{k}": v for k, v in numbers(attention.state_dict()).items()}
    expected = reference.attention(state, "a", x.numpy(), told.numpy(), 4, 4)
    np.testing.assert_allclose(attention(x, told).detach().numpy(), expected, rtol=0, atol=1e-10)


def test_attention_to_visible_tokens_alone():
    """Each row as if its hidden tokens did not exist."""
    attention = randomized(UNetAttention(8, 4, 4, K)).double()
    x, context = randn(2, 8, 3, 2), randn(2, 5, K, seed=2)
    visible = torch.tensor([[True, False, True, False, False], [True] * 5])
    got = attention(x, context, visible)
    for row in range(2):
        alone = attention(x[row : row + 1], context[row : row + 1, visible[row]])
        torch.testing.assert_close(got[row : row + 1], alone, rtol=0, atol=1e-12)
    assert (got - attention(x, context))[0].abs().max() > 1e-3


def test_attention_over_more_keys_than_queries():
    q, k, v = (randn(2, 3, n, 4, seed=n).requires_grad_() for n in (5, 7, 7))
    ours = dense_attention(q, k, v)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert_same_value_and_gradient(ours, theirs, (q, k, v))


@pytest.mark.parametrize("resample_blocks", [True, False])
@pytest.mark.parametrize(
    "more",
    [{}, {"multipliers": (1, 1, 2), "attention": (4, 2), "depth": 2}, {"multipliers": (2, 3)}],
    ids=["", "three", "wide"],
)
def test_unet(resample_blocks, more):
    c = config(resample_blocks=resample_blocks, **more)
    unet = randomized(UNet(c, 3, K)).double()
    x, t, added, context = randn(2, 3, 8, 8), randn(2, seed=2) * 100, randn(2, 32, seed=3), randn(2, 4, K, seed=4)
    told = [a.numpy() for a in (x, t, added, context)]
    expected = reference.unet(numbers(unet.state_dict()), *told, c)
    assert expected.std() > 0.01
    np.testing.assert_allclose(unet(x, t, added, context).detach().numpy(), expected, rtol=0, atol=1e-9)


def test_weights_and_activations_are_channels_last():
    unet = UNet(config(), 3, K)
    assert unet.down[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not unet.down[0].conv1.weight.is_contiguous()
    seen = []
    for block in (*unet.down, *unet.middle, *unet.up):
        block.register_forward_hook(lambda _m, _i, out: seen.append(out))
    unet(torch.randn(2, 3, 8, 8), torch.tensor([3, 5]), None, torch.randn(2, 4, K))
    assert len(seen) == 10
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in seen)


def test_pictures_of_another_size():
    """Without attention a U-Net is convolutions alone."""
    unet = UNet(config(attention=()), 3)
    assert unet(torch.randn(1, 3, 12, 20), torch.tensor([3])).shape == (1, 6, 12, 20)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"width": 10}, "groups to divide width"),
        ({"attention": (3,)}, "attention at sides among 8, 4"),
        ({"head_width": 3}, "head_width to divide"),
        ({"image_size": 9}, "whose side 2 divides"),
        ({"multipliers": ()}, "multipliers"),
        ({"dropout": 1.0}, "dropout"),
        ({"depth": 0}, "depth"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(wrong, says):
    with pytest.raises(DalleError, match=says):
        config(**wrong)


def test_sinusoids_know_fractions():
    t = torch.tensor([0.0, 0.5, 1.0, 999.0])
    assert sinusoids(t, 8).shape == (4, 8)
    assert len({tuple(row) for row in sinusoids(t, 8).tolist()}) == 4
    assert torch.equal(sinusoids(torch.tensor([7]), 8), sinusoids(torch.tensor([7.0]), 8))
