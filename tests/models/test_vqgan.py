"""The VQGAN against its authors' encoder and decoder, both ways."""

import contextlib
import dataclasses
import io
from typing import Any

import pytest
import torch
from taming.modules.diffusionmodules import model as taming
from torch import Tensor, nn

from dalle_cli.errors import DalleError
from dalle_cli.models.kernels import packs
from dalle_cli.models.packed import pack_pointwise
from dalle_cli.models.vqgan import VQGAN, VQGANConfig

SMALL = VQGANConfig(
    image_size=16, width=32, multipliers=(1, 2, 2), depth=1, attention=(4, 8), n_latent=8, n_embd=6, n_vocab=50
)


def build(**changes: Any) -> VQGAN:
    """A VQGAN none of whose tensors has its initial value, norms included."""
    torch.manual_seed(0)
    model = VQGAN(dataclasses.replace(SMALL, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 20)
    return model.eval()


def published(config: VQGANConfig) -> nn.Module:
    """The authors' encoder and decoder of these sizes, in one module."""
    sizes = {"ch": config.width, "ch_mult": config.multipliers, "num_res_blocks": config.depth, "in_channels": 3}
    sizes |= {"attn_resolutions": config.attention, "resolution": config.image_size, "z_channels": config.n_latent}
    made = nn.Module()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the size of its codes
        made.encoder = taming.Encoder(**sizes, out_ch=3, double_z=False)
        made.decoder = taming.Decoder(**sizes, out_ch=3)
    return made.double().eval()


def expected(model: VQGAN, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features before the codes, codes, and the decoder's output: by the authors' modules, with the model's weights."""
    oracle, state = published(model.config), model.state_dict()
    oracle.load_state_dict({k: v for k, v in state.items() if k.startswith(("encoder.", "decoder."))})
    with torch.no_grad():
        features = model.quant_conv(oracle.encoder(pixels))
        if model.config.quantizer == "gumbel":
            codes, book = model.quantize.proj(features).argmax(1), state["quantize.embed.weight"]
        else:
            book = state["quantize.embedding.weight"]
            codes = torch.cdist(features.permute(0, 2, 3, 1).flatten(1, 2), book[None]).argmin(-1)
            codes = codes.view(len(pixels), model.config.grid, -1)
        z = model.post_quant_conv(book[codes].permute(0, 3, 1, 2))
        return features, codes, oracle.decoder(z)


@pytest.mark.parametrize("quantizer", ["nearest", "gumbel"])
@pytest.mark.parametrize("pixels", ["signed", "unit"])
@pytest.mark.parametrize("multipliers", [(1, 2, 2), (1, 2)])
def test_matches_taming(quantizer: str, pixels: str, multipliers: tuple[int, ...]) -> None:
    model = build(quantizer=quantizer, pixels=pixels, multipliers=multipliers, attention=(8,)).double()
    images = torch.rand(2, 3, 16, 16, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    _, codes, output = expected(model, images if pixels == "unit" else 2 * images - 1)
    assert torch.equal(model.encode(images), codes)
    assert len(codes.unique()) > 3
    shown = (output if pixels == "unit" else (output + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(model.decode(codes), shown, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.reconstruct(images), shown, rtol=0, atol=1e-10)
    assert 0.1 < ((shown > 0) & (shown < 1)).float().mean() < 0.99  # so that the range matters


def test_pixel_range_matters() -> None:
    codes = torch.arange(32).view(2, 4, 4)
    assert not torch.allclose(build().decode(codes), build(pixels="unit").decode(codes), atol=0.1)


def test_attention_matters() -> None:
    model, codes = build(), torch.arange(32).view(2, 4, 4)
    before = model.decode(codes)
    nn.init.zeros_(model.decoder.up[-2].attn[0].proj_out.weight)
    assert not torch.allclose(model.decode(codes), before, atol=1e-3)


@pytest.mark.parametrize("quantizer", ["nearest", "gumbel"])
def test_decoder_alone(quantizer: str) -> None:
    whole, alone = build(quantizer=quantizer), build(quantizer=quantizer, encoder=False)
    own = alone.state_dict().keys()
    assert not any(name.startswith(("encoder.", "quant_conv.", "quantize.proj")) for name in own)
    alone.load_state_dict({name: tensor for name, tensor in whole.state_dict().items() if name in own})
    codes = torch.arange(32).view(2, 4, 4)
    assert torch.equal(alone.decode(codes), whole.decode(codes))
    with pytest.raises(DalleError, match=r"expected a VQGAN with an encoder, found a decoder alone"):
        alone.encode(torch.rand(1, 3, 16, 16))


@pytest.mark.skipif(not packs(torch.float32), reason="no packed matrices in this build of torch")
def test_packed_is_the_same() -> None:
    model, images = build(), torch.rand(2, 3, 16, 16)
    codes, pixels = model.encode(images), model.reconstruct(images)
    pack_pointwise(model, torch.float32)
    assert torch.equal(model.encode(images), codes)
    torch.testing.assert_close(model.decode(codes), pixels, rtol=0, atol=1e-5)


def test_published_sizes() -> None:
    f16 = VQGANConfig()
    assert (f16.reduction, f16.grid) == (16, 16)
    f8 = VQGANConfig(multipliers=(1, 1, 2, 4), attention=(32,), n_vocab=8192, quantizer="gumbel")
    assert (f8.reduction, f8.grid) == (8, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 48}, "width divisible by 32"),
        ({"image_size": 18}, "image_size divisible by 4"),
        ({"attention": (5,)}, "attention at sides among 16, 8, 4"),
        ({"quantizer": "vq"}, "quantizer among nearest, gumbel"),
        ({"pixels": "bytes"}, "pixels among signed, unit"),
        ({"multipliers": ()}, "1 to 8 multipliers"),
        ({"n_vocab": 0}, "n_vocab of at least 1"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DalleError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(DalleError, match=r"S divisible by 4, found \(1, 3, 18, 18\)"):
        build().encode(torch.rand(1, 3, 18, 18))
