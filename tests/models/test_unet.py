"""The U-Net: against its slow twin, and against `diffusers` in the layout of published unCLIP weights."""

import numpy as np
import pytest
import torch
from comparisons import assert_same_value_and_gradient
from planted_weights import randomized

from dalle_cli.errors import DalleError
from dalle_cli.models.local_attention import batched_attention
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


def test_attention_over_more_keys_than_queries():
    q, k, v = (randn(2, 3, n, 4, seed=n).requires_grad_() for n in (5, 7, 7))
    ours = batched_attention(q, k, v, q.new_zeros(()))
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


# Parity with `diffusers`

TIMES = ("time_embedding.linear_1", "time_embedding.linear_2")
INNER = {"norm1": "norm1", "conv1": "conv1", "time_emb_proj": "time", "norm2": "norm2", "conv2": "conv2",
         "conv_shortcut": "shortcut"}  # fmt: skip


def places(c):
    """Their blocks by ours: `down.0` -> (`down_blocks.0.resnets.0`, `down_blocks.0.attentions.0`)."""
    levels, each = len(c.multipliers), c.depth + 1
    found = {"middle.0": ("mid_block.resnets.0", "mid_block.attentions.0"), "middle.1": ("mid_block.resnets.1", "")}
    for level in range(levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        for j in range(c.depth):
            found[f"down.{level * each + j}"] = (f"{down}.resnets.{j}", f"{down}.attentions.{j}")
        for j in range(each):
            found[f"up.{level * (each + 1) + j}"] = (f"{up}.resnets.{j}", f"{up}.attentions.{j}")
        if level + 1 < levels:
            found[f"down.{level * each + c.depth}"] = (f"{down}.downsamplers.0", "")
            found[f"up.{level * (each + 1) + each}"] = (f"{up}.upsamplers.0", "")
    return found


def ours(theirs, c):
    """Their state dict in our names."""
    state = {name: theirs[name] for part in (*TIMES, "conv_in", "conv_out") for name in theirs if f"{part}." in name}
    state |= {name.replace("conv_norm_out", "norm_out"): t for name, t in theirs.items() if "conv_norm_out" in name}
    for own, (resnet, attention) in places(c).items():
        for name, inner in INNER.items():
            for end in ("weight", "bias"):
                if f"{resnet}.{name}.{end}" in theirs:
                    state[f"{own}.{inner}.{end}"] = theirs[f"{resnet}.{name}.{end}"]
        if f"{attention}.to_q.weight" not in theirs:
            continue
        for end in ("weight", "bias"):
            state[f"{own}.attention.norm.{end}"] = theirs[f"{attention}.group_norm.{end}"]
            state[f"{own}.attention.out.{end}"] = theirs[f"{attention}.to_out.0.{end}"]
            for name, parts in {"qkv": ("to_q", "to_k", "to_v"), "context_kv": ("add_k_proj", "add_v_proj")}.items():
                state[f"{own}.attention.{name}.{end}"] = torch.cat([theirs[f"{attention}.{p}.{end}"] for p in parts])
    return state


def test_the_published_decoders_layout():
    """`UNet2DConditionModel` as in kakaobrain/karlo-v1-alpha's decoder, all sizes small."""
    diffusers = pytest.importorskip("diffusers")
    c = config(image_size=16, multipliers=(1, 2, 3, 4), attention=(8, 4, 2), depth=3)
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=3, out_channels=6, block_out_channels=(8, 16, 24, 32), layers_per_block=3,
        down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
        cross_attention_dim=K, attention_head_dim=4, class_embed_type="identity", norm_num_groups=4,
        resnet_time_scale_shift="scale_shift", norm_eps=1e-5,
    )  # fmt: skip
    randomized(theirs).eval()
    unet = UNet(c, 3, K)
    unet.load_state_dict(ours(theirs.state_dict(), c))
    x, added, context = randn(2, 3, 16, 16).float(), randn(2, 32).float(), randn(2, 5, K).float()
    t = torch.tensor([3, 700])
    with torch.no_grad():
        expected = theirs(x, t, context, class_labels=added).sample
        got = unet(x, t, added, context)
    assert expected.std() > 0.05
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_published_upsamplers_layout():
    """`UNet2DModel` as in the same repository's super_res_first, all sizes small."""
    diffusers = pytest.importorskip("diffusers")
    c = config(multipliers=(1, 2, 3), attention=(), depth=2, scale_shift=False, learned_variance=False)
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        sample_size=8, in_channels=6, out_channels=3, block_out_channels=(8, 16, 24), layers_per_block=2,
        down_block_types=("ResnetDownsampleBlock2D",) * 3, up_block_types=("ResnetUpsampleBlock2D",) * 3,
        add_attention=False, norm_num_groups=4, norm_eps=1e-5,
    )  # fmt: skip
    randomized(theirs).eval()
    unet = UNet(c, 6)
    unet.load_state_dict(ours(theirs.state_dict(), c))
    x, t = randn(2, 6, 8, 8).float(), torch.tensor([3, 700])
    with torch.no_grad():
        expected = theirs(x, t).sample
        got = unet(x, t)
    assert expected.std() > 0.05
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_sinusoids_know_fractions():
    t = torch.tensor([0.0, 0.5, 1.0, 999.0])
    assert sinusoids(t, 8).shape == (4, 8)
    assert len({tuple(row) for row in sinusoids(t, 8).tolist()}) == 4
    assert torch.equal(sinusoids(torch.tensor([7]), 8), sinusoids(torch.tensor([7.0]), 8))
