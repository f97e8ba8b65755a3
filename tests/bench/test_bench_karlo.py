"""The benchmark of Karlo's U-Net: both sides compute the same of the same weights."""

import torch
from tensor_lists import applied

from bench import cases, karlo
from dalle_cli.importing.unets import unet_tensors

SIZES = cases.QUICK_KARLO_SIZES


def closed_over(subject, name):
    call = subject.update
    return dict(zip(call.__code__.co_freevars, (cell.cell_contents for cell in call.__closure__), strict=True))[name]


def test_both_sides_compute_the_same():
    ours, theirs = karlo.unet(SIZES, packed=False), karlo.diffusers_unet(SIZES, "float32")
    assert ours.parameters == theirs.parameters
    decoder, told = closed_over(ours, "decoder"), closed_over(ours, "conditioning")
    state = closed_over(theirs, "model").state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, tensor in applied(unet_tensors(shapes, unet="x"), state).items():
        decoder.unet.get_parameter(name.removeprefix("x.")).data.copy_(tensor)
    closed_over(theirs, "x").copy_(closed_over(ours, "x"))
    closed_over(theirs, "states").copy_(told.context)
    closed_over(theirs, "added").copy_(told.added)
    assert torch.equal(closed_over(theirs, "mask"), told.visible)
    a, b = ours.update().float(), theirs.update()
    assert (a - b).norm() < 0.05 * b.norm()  # ours is bfloat16
    assert (a - b).norm() < 0.1 * (b[0] - b[1]).norm()
