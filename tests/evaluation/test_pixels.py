"""Pixels between files and models: nothing is rescaled, each value stands for itself."""

import torch

from dalle_cli.models.pixels import from_uint8, to_uint8


def test_every_value_comes_back():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    pixels = from_uint8(values)
    assert (pixels.dtype, pixels.min().item(), pixels.max().item()) == (torch.float32, 0.0, 1.0)
    assert torch.equal(to_uint8(pixels), values)


def test_no_picture_is_rescaled():
    """A dark picture stays dark and a flat one flat; what lies outside [0, 1] is cut, and bfloat16 is taken."""
    pixels = torch.tensor([0.0, 0.25, 0.5]).view(1, 3, 1, 1)
    assert to_uint8(pixels).flatten().tolist() == [0, 64, 128]
    beside = torch.cat([pixels, torch.ones(1, 3, 1, 1)])
    assert torch.equal(to_uint8(beside)[:1], to_uint8(pixels))
    assert to_uint8(torch.tensor([-1.0, 2.0])).tolist() == [0, 255]
    assert to_uint8(pixels.bfloat16()).flatten().tolist() == [0, 64, 128]
