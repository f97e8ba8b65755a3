"""Layers whose weights are laid out once for inference, in the order in which a CPU reads them fastest.

Sampling multiplies each matrix by only a few rows at a time, so the time to read the matrix decides.
I inputs and O outputs of a layer, B images of H x W.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

POSITIONS = 1024  # rows that the layout of a 1x1 convolution is chosen for
LANES = 32  # torch's int8 product reads past the end of a matrix whose sizes are no multiples of it


class PackedLinear(nn.Module):
    """A linear layer in one precision: (..., I) of any dtype -> (..., O) in the layer's own.

    On CPU, oneDNN chooses the layout of the matrix for products with `rows` rows. Other numbers of rows give the same
    result, more slowly. `plain` keeps the ordinary layout, which a compiler needs.
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
    """A linear layer with int8 weights and one scale per output: (..., I) -> (..., O)."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        weight = (weight / scale[:, None]).round().to(torch.int8)
        self.n_out, self.n_pad = len(weight), 0
        if weight.is_cpu and dtype == torch.bfloat16:  # zeros up to a size that torch's product can read
            self.n_pad = -weight.shape[1] % LANES
            rest = -self.n_out % LANES
            weight, scale = F.pad(weight, (0, self.n_pad, 0, rest)), F.pad(scale, (0, rest))
        self.weight, self.scale = weight, scale.to(dtype)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The product, in the scales' dtype."""
        x = x.to(self.scale.dtype)
        if x.is_cpu and x.dtype == torch.bfloat16:
            x = F.pad(x, (0, self.n_pad)) if self.n_pad else x
            y: Tensor = torch.ops.aten._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale)
            y = y.view(*x.shape[:-1], -1)[..., : self.n_out]
        elif x.dtype == torch.float16:  # sums of values up to 127 soon exceed its range
            y = F.linear(x, self.weight * self.scale[:, None])
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


class PackedPointwise(nn.Module):
    """A 1x1 float32 convolution as a packed matrix product; on CPU torch uses a slower library for it.

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


class PackedConvolution(nn.Module):
    """A convolution whose weight has the layout that the CPU's library wants, not rearranged anew in each call.

    (B, I, H, W) -> (B, O, H, W), both channels_last, in `dtype` regardless of autocast. The layout is that for the
    first input; those of other sizes are computed, too.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, convolution: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        bias = convolution.bias
        self.register_buffer("weight", convolution.weight.detach().to(dtype), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype), persistent=False)
        self.geometry = [convolution.padding, convolution.stride, convolution.dilation]
        self.groups, self.packed = convolution.groups, False

    def forward(self, x: Tensor) -> Tensor:
        """The convolution."""
        x = x.to(self.weight.dtype)
        if not self.packed:
            sizes = (*self.geometry, self.groups, x.shape)
            self.weight, self.packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *sizes), True
        how: tuple[object, ...] = (*self.geometry, self.groups, "none", [], "")
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *how)
        return y


def packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch can pack matrices on CPU (the operator exists for torch.compile)."""
    known = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    if dtype == torch.bfloat16:
        return known and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return known and dtype == torch.float32
