"""Matrices laid out once for a model that is only run, not trained.

A prior that draws multiplies each with a few rows at a time: what counts is how fast the matrices are read. I inputs, O
outputs of a layer, B images of H x W.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_cli.models.dvae import DVAE
from dalle_cli.models.prior import Prior

POSITIONS = 1024  # that a 1x1 convolution is laid out for
LANES = 32  # torch's product with whole numbers reads beyond the end of matrices whose sizes are no multiples of it


class PackedLinear(nn.Module):
    """A linear layer in one precision: (..., I) of any dtype -> (..., O) in the layer's own.

    On CPU the matrix lies as oneDNN wants it for products with so many rows; others are right too, if slower.
    """

    def __init__(self, linear: nn.Linear, rows: int, dtype: torch.dtype, plain: bool = False) -> None:
        super().__init__()
        weight = linear.weight.detach().to(dtype).contiguous()
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.packed = weight.is_cpu and packs(dtype) and not plain
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self.packed else weight

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        x = x.to(self.weight.dtype)
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


class Int8Linear(nn.Module):
    """A linear layer whose weights are whole numbers of 8 bits, with a scale for each output: (..., I) -> (..., O)."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        self.weight = (weight / scale[:, None]).round().to(torch.int8)
        self.scale = scale.to(dtype)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The product, in the scales' dtype."""
        x = x.to(self.scale.dtype)
        if x.is_cpu and x.dtype == torch.bfloat16 and all(size % LANES == 0 for size in self.weight.shape):
            y: Tensor = torch.ops.aten._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale)
            y = y.view(*x.shape[:-1], -1)
        elif x.dtype == torch.float16:  # sums of whole numbers up to 127 soon exceed its range
            y = F.linear(x, self.weight * self.scale[:, None])
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


class PackedPointwise(nn.Module):
    """A 1x1 convolution in float32 as a packed product, which torch computes by a slower library on CPU.

    (B, I, H, W) -> (B, O, H, W), both channels_last.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        linear = nn.Linear(convolution.in_channels, convolution.out_channels, device="meta")
        linear.weight = nn.Parameter(convolution.weight.detach().flatten(1), requires_grad=False)
        linear.bias = cast(nn.Parameter, convolution.bias)
        self.linear = PackedLinear(linear, POSITIONS, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution."""
        y: Tensor = self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return y


def packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch lays matrices out on CPU: it does so for its own compiler."""
    known = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    if dtype == torch.bfloat16:
        return known and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return known and dtype == torch.float32


def pack(prior: Prior, rows: int, dtype: torch.dtype, int8: bool = False, plain: bool = False) -> Prior:
    """Replace the matrices of the blocks and of the image head, in place; the prior can then be sampled, not trained.

    `rows` is how many are going to be drawn at once. Products are in `dtype`, whatever autocast says; sums along the
    residual path, norms and embeddings stay as they are. The caption's head, which drawing has no use for, is dropped.
    `plain` leaves the layout as it is, for a compiler. A prior that is packed already stays as it is.
    """

    def packed(linear: nn.Linear) -> nn.Module:
        return Int8Linear(linear, dtype) if int8 else PackedLinear(linear, rows, dtype, plain)

    if prior.text_head is None:
        return prior
    for block in prior.blocks:
        for name, layer in block.named_children():
            if isinstance(layer, nn.Linear):
                setattr(block, name, packed(layer))
    prior.image_head = packed(prior.image_head)  # type: ignore[assignment]
    prior.text_head = None  # type: ignore[assignment]
    return prior


def pack_pointwise(dvae: DVAE, dtype: torch.dtype) -> DVAE:
    """Replace the 1x1 convolutions by packed products, in place, where that is faster: in float32 on CPU.

    The decoder's first layer stays: codes are gathered from it.
    """
    if dtype != torch.float32 or not packs(dtype) or next(dvae.parameters()).device.type != "cpu":
        return dvae
    for module in dvae.modules():
        for name, layer in module.named_children():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer is not dvae.decoder[0]:
                setattr(module, name, PackedPointwise(layer))
    return dvae
