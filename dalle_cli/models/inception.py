"""Inception-v3 as the Frechet inception distance uses it (Szegedy et al. 2015, arXiv 1512.00567, and pytorch-fid).

Modules have the names of pytorch-fid's checkpoint, so that it loads unchanged. It differs from the network of the paper
as the TensorFlow graph of 2015 does, from which all published scores come: average pools exclude padding from the
mean, the last block uses max pooling, and there are 1008 classes.

Shapes: B batch, C channels, H W, S image side in pixels; pixels are in [0, 1].
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

SIDE = 299
CLASSES = 1008
WIDTHS = (64, 192, 768, 2048)  # features after the first and the second pool, before the last stage, and at the end
ROW, COLUMN = (1, 7), (7, 1)  # kernels
CROSS = (("a", (1, 3)), ("b", (3, 1)))  # two convolutions side by side: suffixes and kernels

Kernel = int | tuple[int, int]
Branch = tuple[str, Sequence[tuple[int, Kernel | None]]]  # a name, and (channels, kernel) per step; None is a CROSS


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, n_in: int, n_out: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(n_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return F.relu(self.bn(self.conv(x)))

    def fuse(self) -> None:
        """Merge the batch norm into the convolution."""
        self.conv = fuse_conv_bn_eval(self.conv, self.bn)
        self.bn = nn.Identity()  # type: ignore[assignment]


def _same(kernel: Kernel) -> Kernel:
    """The padding that keeps the size."""
    return kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)


class InceptionBlock(nn.Module):
    """Branches of convolutions side by side, and a pool, 3 x 3; with `halve` the last step of each has stride 2.

    `n_pool` channels of a 1 x 1 convolution follow the pool; 0 is no convolution.
    """

    def __init__(
        self, n_in: int, branches: Sequence[Branch], n_pool: int = 0, max_pool: bool = False, halve: bool = False
    ):
        super().__init__()
        self.max_pool, self.halve = max_pool, halve
        self.branches: list[list[list[str]]] = []  # the modules of each step of each branch
        for name, steps in branches:
            width, branch = n_in, []
            for i, (channels, kernel) in enumerate(steps):
                step = f"{name}_{i + 1}" if len(steps) > 1 else name
                here = [(step, kernel)] if kernel is not None else [(step + letter, k) for letter, k in CROSS]
                last = halve and i + 1 == len(steps)
                for full, k in here:
                    self.add_module(
                        full, Conv(width, channels, k, 2) if last else Conv(width, channels, k, 1, _same(k))
                    )
                branch.append([full for full, _ in here])
                width = channels
            self.branches.append(branch)
        self.branch_pool = Conv(n_in, n_pool, 1) if n_pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        out = []
        for branch in self.branches:
            h = x
            for (step,) in branch[:-1]:
                h = self.get_submodule(step)(h)
            out += [self.get_submodule(step)(h) for step in branch[-1]]
        if self.halve or self.max_pool:
            pooled = F.max_pool2d(x, 3, stride=2) if self.halve else F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return torch.cat((*out, self.branch_pool(pooled)), 1)


def _block_a(n_in: int, n_pool: int) -> InceptionBlock:
    """At 35 x 35."""
    double: Branch = ("branch3x3dbl", [(64, 1), (96, 3), (96, 3)])
    return InceptionBlock(n_in, [("branch1x1", [(64, 1)]), ("branch5x5", [(48, 1), (64, 5)]), double], n_pool)


def _block_b(n_in: int) -> InceptionBlock:
    """From 35 x 35 to 17 x 17."""
    return InceptionBlock(n_in, [("branch3x3", [(384, 3)]), ("branch3x3dbl", [(64, 1), (96, 3), (96, 3)])], halve=True)


def _block_c(n_in: int, n: int) -> InceptionBlock:
    """At 17 x 17: kernels of 7 x 7 as rows and columns."""
    double: Branch = ("branch7x7dbl", [(n, 1), (n, COLUMN), (n, ROW), (n, COLUMN), (192, ROW)])
    return InceptionBlock(
        n_in, [("branch1x1", [(192, 1)]), ("branch7x7", [(n, 1), (n, ROW), (192, COLUMN)]), double], 192
    )


def _block_d(n_in: int) -> InceptionBlock:
    """From 17 x 17 to 8 x 8."""
    seven: Branch = ("branch7x7x3", [(192, 1), (192, ROW), (192, COLUMN), (192, 3)])
    return InceptionBlock(n_in, [("branch3x3", [(192, 1), (320, 3)]), seven], halve=True)


def _block_e(n_in: int, max_pool: bool) -> InceptionBlock:
    """At 8 x 8: kernels of 3 x 3 as rows beside columns."""
    double: Branch = ("branch3x3dbl", [(448, 1), (384, 3), (384, None)])
    return InceptionBlock(
        n_in, [("branch1x1", [(320, 1)]), ("branch3x3", [(384, 1), (384, None)]), double], 192, max_pool
    )


class InceptionV3(nn.Module):
    """The network; `width` chooses the layer whose features are used."""

    def __init__(self, width: int = 2048) -> None:
        super().__init__()
        self.width = width
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_a(192, 32), _block_a(256, 64), _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b, self.Mixed_6c = _block_c(768, 128), _block_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = _block_c(768, 160), _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b, self.Mixed_7c = _block_e(1280, max_pool=False), _block_e(2048, max_pool=True)
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Images to features: (B, 3, S, S) in [0, 1] -> (B, width) float32."""
        return self.pooled(self.pixels(images))

    def fuse(self) -> "InceptionV3":
        """Prepare for inference, in place: batch norms fused, channels_last. It can no longer be saved or loaded."""
        self.eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, Conv):
                module.fuse()
        return self.to(memory_format=torch.channels_last)  # type: ignore[no-any-return,call-overload]

    @staticmethod
    def pixels(images: Tensor) -> Tensor:
        """Resized as pytorch-fid does, without antialiasing: (B, 3, S, S) in [0, 1] -> (B, 3, 299, 299) in [-1, 1]."""
        images = F.interpolate(images.float(), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        return 2 * images - 1

    def pooled(self, x: Tensor) -> Tensor:
        """(B, 3, 299, 299) in [-1, 1] -> (B, width) float32, the mean over the rest of the image."""
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, stride=2)
        if self.width > 64:
            x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        if self.width > 192:
            x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
            x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        if self.width > 768:
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.float().mean(dim=(2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """Class logits without their bias, as in the code of the Inception score: (B, 2048) -> (B, 1008)."""
        return F.linear(features, self.fc.weight.float())
