"""Inception-v3 as the Frechet inception distance knows it (Szegedy et al. 2015, arXiv 1512.00567, and pytorch-fid).

Modules are named as in pytorch-fid's checkpoint, so that it loads as it is. Against the network of the paper, average
pools leave the padding out of the mean, the last block pools by maximum, and there are 1008 classes: so was the
TensorFlow graph of 2015 that all published figures go back to.

Shapes: B batch, C channels, H W, S image side in pixels; pixels are in [0, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

SIDE = 299
CLASSES = 1008
WIDTHS = (64, 192, 768, 2048)  # features after the first and the second pool, before the last stage, and at the end


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(n_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return F.relu(self.bn(self.conv(x)))

    def fuse(self) -> None:
        """Let the convolution do what batch norm does, which is then gone."""
        self.conv = fuse_conv_bn_eval(self.conv, self.bn)
        self.bn = nn.Identity()  # type: ignore[assignment]


def _wide(n_in: int, n_out: int) -> Conv:
    return Conv(n_in, n_out, (1, 7), padding=(0, 3))


def _tall(n_in: int, n_out: int) -> Conv:
    return Conv(n_in, n_out, (7, 1), padding=(3, 0))


def _mean_pool(x: Tensor) -> Tensor:
    """The mean of 3 x 3 pixels; at the edges, of those that are there."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """At 35 x 35: 1 x 1, 5 x 5, twice 3 x 3, pool."""

    def __init__(self, n_in: int, n_pool: int):
        super().__init__()
        self.branch1x1 = Conv(n_in, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(n_in, 48, 1), Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(n_in, 64, 1)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = Conv(64, 96, 3, padding=1), Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(n_in, n_pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch1x1(x), five, three, self.branch_pool(_mean_pool(x))), 1)


class BlockB(nn.Module):
    """From 35 x 35 to 17 x 17."""

    def __init__(self, n_in: int):
        super().__init__()
        self.branch3x3 = Conv(n_in, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(n_in, 64, 1)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = Conv(64, 96, 3, padding=1), Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)), 1)


class BlockC(nn.Module):
    """At 17 x 17: kernels of 7 x 7 as rows and columns."""

    def __init__(self, n_in: int, n_hid: int):
        super().__init__()
        self.branch1x1 = Conv(n_in, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(n_in, n_hid, 1), _wide(n_hid, n_hid)
        self.branch7x7_3 = _tall(n_hid, 192)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(n_in, n_hid, 1), _tall(n_hid, n_hid)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = _wide(n_hid, n_hid), _tall(n_hid, n_hid)
        self.branch7x7dbl_5 = _wide(n_hid, 192)
        self.branch_pool = Conv(n_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 768, H, W)."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat((self.branch1x1(x), seven, double, self.branch_pool(_mean_pool(x))), 1)


class BlockD(nn.Module):
    """From 17 x 17 to 8 x 8."""

    def __init__(self, n_in: int):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(n_in, 192, 1), Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(n_in, 192, 1), _wide(192, 192)
        self.branch7x7x3_3, self.branch7x7x3_4 = _tall(192, 192), Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat((three, seven, F.max_pool2d(x, 3, stride=2)), 1)


class BlockE(nn.Module):
    """At 8 x 8: kernels of 3 x 3 as rows beside columns; pools by mean, or by maximum in the last block."""

    def __init__(self, n_in: int, max_pool: bool):
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = Conv(n_in, 320, 1)
        self.branch3x3_1 = Conv(n_in, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = self._cross()
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(n_in, 448, 1), Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = self._cross()
        self.branch_pool = Conv(n_in, 192, 1)

    @staticmethod
    def _cross() -> tuple[Conv, Conv]:
        return Conv(384, 384, (1, 3), padding=(0, 1)), Conv(384, 384, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 2048, H, W)."""
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _mean_pool(x)
        three = torch.cat((self.branch3x3_2a(three), self.branch3x3_2b(three)), 1)
        double = torch.cat((self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)), 1)
        return torch.cat((self.branch1x1(x), three, double, self.branch_pool(pooled)), 1)


class InceptionV3(nn.Module):
    """The whole network; `width` says after which stage features are taken."""

    def __init__(self, width: int = 2048) -> None:
        super().__init__()
        self.width = width
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c = BlockC(768, 128), BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, max_pool=False), BlockE(2048, max_pool=True)
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures to features: (B, 3, S, S) in [0, 1] -> (B, width) float32."""
        return self.pooled(self.pixels(images))

    def fuse(self) -> "InceptionV3":
        """Ready to look at pictures, no longer to be saved or loaded: batch norms fused, channels_last; in place."""
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
        """(B, 3, 299, 299) in [-1, 1] -> (B, width) float32, the mean over what is left of the picture."""
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
        """Class logits without their bias, as the Inception score's own code has them: (B, 2048) -> (B, 1008)."""
        return F.linear(features, self.fc.weight.float())
