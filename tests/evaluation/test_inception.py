"""Inception-v3 of FID: against torch-fidelity's network of the same names, and its pixels against a slow twin."""

import importlib

import fidelity
import pytest
import torch

from dalle_cli.models.inception import CLASSES, WIDTHS, InceptionV3
from reference import evaluation as reference


def randomized(seed=0):
    """Weights that keep activations alive, and batch norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    network = InceptionV3()
    state = {}
    for name, value in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = value
        elif value.ndim > 1:
            fan = value[0].numel()
            state[name] = torch.randn(value.shape, generator=generator) * (2 / fan) ** 0.5
        else:
            low, high = (0.5, 1.5) if name.endswith(("var", "bn.weight")) else (-0.1, 0.1)
            state[name] = torch.rand(value.shape, generator=generator) * (high - low) + low
    network.load_state_dict(state)
    return network.eval()


@pytest.fixture(scope="module")
def network():
    return randomized()


def test_agrees_with_torch_fidelity(network, tmp_path):
    fidelity.importable()
    oracle = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    file = tmp_path / "weights.pth"
    torch.save(network.state_dict(), file)
    names = [str(width) for width in WIDTHS]
    other = oracle.FeatureExtractorInceptionV3("inception", [*names, "logits_unbiased"], str(file))
    pixels = torch.randint(0, 256, (1, 3, 299, 299), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    with torch.inference_mode():
        expected = other(pixels)
        for width, features in zip(WIDTHS, expected, strict=False):
            network.width = width
            found = network.pooled((pixels.float() - 128) / 128)
            assert found.std() > 1e-3
            torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(network.logits(found), expected[-1], rtol=1e-4, atol=1e-4)
    network.width = WIDTHS[-1]


def test_names_and_sizes_are_those_of_the_published_file(network):
    state = network.state_dict()
    assert len(state) == 6 * 94 + 2  # 94 convolutions with batch norm, and the last layer: the file has 566 tensors
    assert state["fc.weight"].shape == (CLASSES, 2048)
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)


def test_pixels_are_resized_without_antialiasing_and_centered(network):
    row = torch.rand(13, generator=torch.Generator().manual_seed(2))
    images = row.expand(1, 3, 13, 13)
    found = network.pixels(images)
    assert found.shape == (1, 3, 299, 299)
    expected = torch.tensor(reference.bilinear(row.double().tolist(), 299)) * 2 - 1
    torch.testing.assert_close(found[0, 1, 100], expected.float(), rtol=0, atol=1e-5)


def test_fused_it_finds_the_same(network):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = network(images)
        fused = randomized().fuse()
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
        torch.testing.assert_close(fused(images), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_last_pool_is_a_maximum_and_the_others_leave_padding_out():
    """What tells this network from torchvision's."""
    network = InceptionV3()
    assert [block.max_pool for block in (network.Mixed_7b, network.Mixed_7c)] == [False, True]
    ones = torch.ones(1, 192, 35, 35)
    with torch.inference_mode():
        pooled = network.Mixed_5b.eval()(ones)[:, -32:]
    assert pooled.amax() > 0
    torch.testing.assert_close(pooled, pooled[..., :1, :1].expand_as(pooled), rtol=0, atol=1e-6)
