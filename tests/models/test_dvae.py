import dataclasses
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_cli.errors import DalleError
from dalle_cli.models import dvae
from dalle_cli.models.dvae import DVAE, BottleneckBlock, DVAEConfig, ResidualBlock
from dalle_cli.models.quantizers import gumbel_noise
from reference import dvae as reference

QUANTIZERS = ("gumbel", "vq", "fsq")
SMALL = DVAEConfig(image_size=16, n_groups=3, n_hid=8, n_init=6, n_vocab=27, n_embd=5, fsq_levels=(3, 3, 3))


def build(seed: int = 0, **changes: Any) -> DVAE:
    torch.manual_seed(seed)
    return DVAE(dataclasses.replace(SMALL, **changes))


def pictures(n: int = 2, size: int = 16, seed: int = 1) -> Tensor:
    """Smooth pictures in [0, 1], each value hit."""
    noise = torch.rand((n, 3, 4, 4), generator=seeded(seed))
    return torch.nn.functional.interpolate(noise, size=(size, size), mode="bilinear").clamp(0, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def from_published(side: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The publisher's names to ours: a pure renaming."""
    kinds = {"w": "weight", "b": "bias"}
    renamed = {}
    for name, tensor in state.items():
        stem, kind = name.removeprefix("blocks.").replace("res_path.", "").rsplit(".", 1)
        renamed[f"{side}.{stem.replace('output.conv', 'output')}.{kinds[kind]}"] = tensor
    return renamed


# ---- against the float64 twin


@pytest.mark.parametrize("kernels", [(3, 3, 3, 1), (1, 3, 3, 3)])
@pytest.mark.parametrize("n_in", [8, 16])
@pytest.mark.parametrize("n_layers", [1, 8])
def test_bottleneck_matches_reference(n_in: int, n_layers: int, kernels: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    block = BottleneckBlock(n_in, 16, n_layers, kernels).double()
    x = torch.randn(2, n_in, 5, 7, dtype=torch.double)
    expected = reference.bottleneck(x, block.state_dict(), "", 1 / n_layers**2)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


def test_residual_block_matches_reference() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(32, 3).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    x = torch.randn(2, 32, 5, 7, dtype=torch.double)
    torch.testing.assert_close(block(x), reference.residual(x, block.state_dict(), 2), rtol=0, atol=1e-10)


@pytest.mark.parametrize("n_groups", [2, 3, 4])
def test_encoder_and_decoder_match_reference(n_groups: int) -> None:
    model = build(n_groups=n_groups, n_blk_per_group=1 if n_groups == 4 else 2).double()
    x = pictures().double()
    expected = reference.encoder(x, model.state_dict(), n_groups, model.config.n_blk_per_group)
    torch.testing.assert_close(model.logits(x), expected, rtol=0, atol=1e-10)
    codes = model.encode(x)
    assert torch.equal(codes, expected.argmax(1))
    one_hot = torch.nn.functional.one_hot(codes, 27).permute(0, 3, 1, 2).double()
    output = reference.decoder(one_hot, model.state_dict(), n_groups, model.config.n_blk_per_group)
    shown = ((1 / (1 + torch.exp(-output[:, :3])) - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(model.decode(codes), shown, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.reconstruct(x), shown, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 0.0), (0.5, 6.6), (1 / 16, 1.0)])
def test_gumbel_loss_matches_reference(temperature: float, beta: float) -> None:
    model, x = build().double(), pictures(3).double()
    noise = gumbel_noise(torch.empty(3, 4, 4, 27, dtype=torch.double), seeded(7)).permute(0, 3, 1, 2)
    expected = reference.gumbel_loss(x, noise, model.state_dict(), (3, 2), temperature, beta)
    loss, metrics = model.loss(x, temperature=temperature, beta=beta, generator=seeded(7))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(metrics["kl"], reference.kl(model.logits(x)), rtol=0, atol=1e-10)
    torch.testing.assert_close(loss - metrics["recon"], beta * metrics["kl"] * 16 / (16 * 16 * 3), rtol=0, atol=1e-10)


def test_paper_beta_is_a_192nd_per_code() -> None:
    config = DVAEConfig()
    assert (config.grid, config.reduction) == (32, 8)
    assert config.image_size**2 * 3 / config.grid**2 == 192


def test_initial_weights() -> None:
    model = build(n_hid=64)
    weight = model.encoder.get_parameter("group_3.block_2.conv_1.weight")
    assert weight.std().item() == pytest.approx((256 * 9) ** -0.5, rel=0.05)
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


# ---- likelihood


@pytest.mark.parametrize(("mu", "log_scale"), [(0.0, 0.0), (1.2, -1.0), (-0.4, -3.0)])
def test_logit_laplace_density_integrates_to_one(mu: float, log_scale: float) -> None:
    # over the whole of (0, 1): squeezed pixels cover (eps, 1 - eps), so images run beyond [0, 1] here
    x = torch.linspace(0, 1, 400_001, dtype=torch.double)[1:-1]
    images = ((x - 0.1) / 0.8).view(1, 1, 1, -1).expand(1, 3, 1, -1)
    output = torch.tensor([mu] * 3 + [log_scale] * 3, dtype=torch.double).view(1, 6, 1, 1).expand(1, 6, 1, len(x))
    density = (-dvae.logit_laplace_nll(images, output)[0, 0, 0]).exp()
    assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-4)


def test_logit_laplace_scale_stops_at_the_rounding_of_pixels() -> None:
    images = torch.ones(1, 3, 2, 2)
    exact = torch.cat([dvae.squeeze(images).logit(), torch.full((1, 3, 2, 2), -50.0)], 1)
    assert dvae.logit_laplace_nll(images, exact).min() > -9


def test_shown_inverts_squeeze() -> None:
    images = pictures()
    output = torch.cat([dvae.squeeze(images).logit(), torch.zeros_like(images)], 1)
    torch.testing.assert_close(build().to_images(output), images)
    assert build(likelihood="mse").to_images(torch.tensor([-3.0, 0.0, 3.0])).tolist() == [0, 0.5, 1]


@pytest.mark.parametrize("likelihood", ["l1", "mse"])
def test_plain_likelihoods(likelihood: str) -> None:
    model, x = build(likelihood=likelihood), pictures()
    output = model.decoder(model.quantizer(model.features(x), 1.0, None).vectors)
    error = output - (2 * x - 1)
    expected = error.abs().mean() if likelihood == "l1" else error.square().mean()
    _, metrics = model.loss(x, temperature=1.0, beta=0.0, generator=None)
    torch.testing.assert_close(metrics["recon"], expected)


# ---- the loss's settings


def test_kl_does_not_change_when_the_batch_is_repeated() -> None:
    model, x = build(), pictures()
    once = model.loss(x, temperature=1.0, beta=1.0, generator=None)
    thrice = model.loss(x.repeat(3, 1, 1, 1), temperature=1.0, beta=1.0, generator=None)
    torch.testing.assert_close(once[1]["kl"], thrice[1]["kl"])
    torch.testing.assert_close(once[0], thrice[0])


def test_temperature_beta_and_noise_each_change_the_gumbel_loss() -> None:
    model, x = build(), pictures()

    def loss(temperature: float, beta: float, seed: int) -> float:
        return model.loss(x, temperature=temperature, beta=beta, generator=seeded(seed))[0].item()

    assert loss(1.0, 1.0, 0) == loss(1.0, 1.0, 0)
    assert len({loss(1.0, 1.0, 0), loss(0.5, 1.0, 0), loss(1.0, 2.0, 0), loss(1.0, 1.0, 1)}) == 4


def test_metrics() -> None:
    model, x = build(), pictures()
    _, metrics = model.loss(x, temperature=1.0, beta=1.0, generator=None)
    codes = model.encode(x)
    assert torch.equal(metrics["code_counts"], torch.bincount(codes.flatten(), minlength=27))
    assert metrics["codes_used"] == len(codes.unique())
    share = metrics["code_counts"][metrics["code_counts"] > 0] / codes.numel()
    torch.testing.assert_close(metrics["perplexity"], (-(share * share.log()).sum()).exp())
    assert not any(value.requires_grad for value in metrics.values())


def test_psnr_is_each_pictures_own() -> None:
    images = torch.zeros(2, 3, 4, 4)
    shown = torch.stack([images[0] + 0.1, images[1] + 0.01])
    assert dvae.peak_signal_to_noise(images, shown).item() == pytest.approx(30, abs=1e-3)


@pytest.mark.parametrize("block", ["bottleneck", "residual"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_gradient_reaches_every_parameter(quantizer: str, block: str) -> None:
    model, x, generator = build(quantizer=quantizer, block=block, n_hid=16), pictures(4), seeded()
    with torch.no_grad():  # zero biases and an all-zero code would leave some ReLUs shut at the start
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=generator)
    model.revive(x, generator)
    loss, _ = model(x, temperature=1.0, beta=1.0, generator=generator)
    loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


# ---- shapes, layout, precision


@pytest.mark.parametrize("block", ["bottleneck", "residual"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize(("n_groups", "grid"), [(2, 8), (3, 4), (4, 2)])
def test_shapes(n_groups: int, grid: int, quantizer: str, block: str) -> None:
    model, x = build(n_groups=n_groups, quantizer=quantizer, block=block), pictures()
    assert model.config.grid == grid
    codes = model.encode(x)
    assert codes.shape == (2, grid, grid)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0
    assert codes.max() < 27
    shown = model.decode(codes)
    assert shown.shape == x.shape
    assert shown.dtype == torch.float32
    assert shown.min() >= 0
    assert shown.max() <= 1


@pytest.mark.parametrize("block", ["bottleneck", "residual"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_hard_codes_decode_as_the_training_path_does(quantizer: str, block: str) -> None:
    model, x = build(quantizer=quantizer, block=block), pictures()
    quantized = model.quantizer(model.features(x), 1e-6, None)
    torch.testing.assert_close(
        model.to_images(model.decoder(quantized.vectors)), model.reconstruct(x), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("block", ["bottleneck", "residual"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_autocast_keeps_losses_in_float32(quantizer: str, block: str) -> None:
    model, x = build(quantizer=quantizer, block=block), pictures()
    model.revive(x, seeded())
    exact, _ = model.loss(x, temperature=1.0, beta=1.0, generator=None)
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = model.loss(x, temperature=1.0, beta=1.0, generator=None)
        features = model.features(x)
    loss.backward()
    assert loss.dtype == metrics["recon"].dtype == metrics["kl"].dtype == features.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(loss, exact, rtol=0.1, atol=0.05)


def test_pictures_do_not_influence_each_other() -> None:
    model, x = build(block="residual", quantizer="fsq"), pictures(3)
    assert torch.equal(model.encode(x)[1:2], model.encode(x[1:2]))


def test_convolutions_are_channels_last() -> None:
    model = build(block="residual", quantizer="fsq")
    assert model.encoder.get_parameter("group_1.block_1.conv_1.weight").is_contiguous(memory_format=torch.channels_last)
    seen = []
    model.encoder.get_submodule("group_1").register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    model.encode(pictures())
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


# ---- the publisher's package


@pytest.fixture
def dall_e(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The publisher's package, whose import of requests serves downloads alone."""
    try:
        import requests  # noqa: F401
    except ImportError:
        monkeypatch.setitem(sys.modules, "requests", types.ModuleType("requests"))
    return pytest.importorskip("dall_e")


def test_published_package_is_an_oracle(dall_e: Any) -> None:
    torch.manual_seed(0)
    encoder, decoder = dall_e.Encoder(), dall_e.Decoder()
    assert sum(p.numel() for p in encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in decoder.parameters()) == 43_829_766
    with torch.device("meta"):
        model = DVAE(DVAEConfig())
    state = from_published("encoder", encoder.state_dict()) | from_published("decoder", decoder.state_dict())
    model.load_state_dict(state, strict=True, assign=True)
    x = pictures(1, 64)
    with torch.no_grad():
        expected = encoder(dall_e.map_pixels(x))
        codes = expected.argmax(1)
        torch.testing.assert_close(model.logits(x), expected, rtol=0, atol=1e-4)
        assert torch.equal(model.encode(x), codes)
        output = decoder(torch.nn.functional.one_hot(codes, 8192).permute(0, 3, 1, 2).float())
        h = model.decoder[1:](model.decoder[0](torch.nn.functional.one_hot(codes, 8192).permute(0, 3, 1, 2).float()))
        torch.testing.assert_close(h, output, rtol=0, atol=1e-4)
        shown = dall_e.unmap_pixels(torch.sigmoid(output[:, :3]))
        torch.testing.assert_close(model.decode(codes), shown, rtol=0, atol=1e-4)


# ---- configuration


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"n_hid": 0}, "n_hid"),
        ({"n_hid": 6}, "n_hid"),
        ({"n_groups": 1}, "n_groups"),
        ({"image_size": 18}, "image_size"),
        ({"quantizer": "pq"}, "quantizer"),
        ({"block": "resnet"}, "block"),
        ({"likelihood": "l2"}, "likelihood"),
        ({"quantizer": "fsq", "fsq_levels": (8, 5)}, "n_vocab = 40"),
        ({"quantizer": "fsq", "fsq_levels": (2, 3), "n_vocab": 6}, "fsq_levels"),
    ],
)
def test_bad_configs_are_one_line(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(DalleError, match=word) as error:
        dataclasses.replace(SMALL, **changes)
    assert "\n" not in str(error.value)


def test_config_takes_lists_and_bad_input_is_refused() -> None:
    levels: Any = [3, 3, 3]
    assert dataclasses.replace(SMALL, fsq_levels=levels) == SMALL
    with pytest.raises(DalleError, match="divisible by 4"):
        build().encode(torch.zeros(1, 3, 18, 18))
    with pytest.raises(DalleError, match="gumbel"):
        build(quantizer="vq").logits(pictures())


# ---- it learns


@pytest.mark.parametrize("block", ["bottleneck", "residual"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_overfits_a_few_pictures(quantizer: str, block: str) -> None:
    model = build(quantizer=quantizer, block=block, n_groups=2, n_hid=16, n_init=16, likelihood="mse")
    x, generator = pictures(8), seeded()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    before = model_psnr(model, x)
    for step in range(80):
        if step % 20 == 0:
            model.revive(x, generator)
        loss, _ = model.loss(x, temperature=max(1 - step / 60, 1 / 16), beta=0.0, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model_psnr(model, x) > before + 3


def model_psnr(model: DVAE, x: Tensor) -> float:
    return dvae.peak_signal_to_noise(x, model.reconstruct(x)).item()


@pytest.mark.parametrize("local", [True, False])
def test_a_local_code_depends_on_the_pixels_of_its_place_alone(local):
    torch.manual_seed(0)
    config = DVAEConfig(
        image_size=32, n_groups=3, n_blk_per_group=1, n_hid=16, n_init=16, n_vocab=125, quantizer="fsq",
        fsq_levels=(5, 5, 5), block="residual", likelihood="mse", local_codes=local,
    )  # fmt: skip
    model = DVAE(config)
    images = torch.rand(1, 3, 32, 32)
    changed = images.clone()
    changed[..., :4, :4] = 0
    moved = (model.features(images) - model.features(changed)).abs().amax((0, 1)) > 0
    assert moved[0, 0]
    assert (moved.sum() > 1) != local
