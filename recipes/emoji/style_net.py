"""Which style an image is in: a small network, trained on real training images alone.

Shapes: B batch, S side in pixels, K styles; pixels are in [0, 1].
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from prepare import STYLES
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from withheld import Entry, Pixels

from dalle_cli.artifacts.container import replace_file
from dalle_cli.errors import DalleError

SIDE = 64
WIDTHS = (32, 64, 128)
GROUPS = 8
BATCH = 64
PEAK = 2e-3
SHIFT = 1  # pixels: how a style fills its square is part of it


class Residual(nn.Module):
    """Two convolutions beside the identity: (B, C, H, W) -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, width) for _ in range(2))
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        found = x
        for norm, layer in zip(self.norms, self.layers, strict=True):
            found = layer(F.relu(norm(found)))
        return x + found


class StyleNet(nn.Module):
    """Three strided convolutions with a residual each, then the mean and the largest of each channel over places."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *WIDTHS[:-1]), WIDTHS, strict=True):
            layers += [nn.Conv2d(before, after, 5, 2, 2), Residual(after)]
        self.body = nn.Sequential(*layers, nn.GroupNorm(GROUPS, WIDTHS[-1]), nn.ReLU())
        self.head = nn.Linear(2 * WIDTHS[-1], len(STYLES))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [0, 1] -> (B, K) logits."""
        found = self.body(images * 2 - 1)
        logits: Tensor = self.head(torch.cat([found.mean((2, 3)), found.amax((2, 3))], dim=1))
        return logits


def tensor(images: Sequence[Pixels]) -> Tensor:
    """(H, W, 3) uint8 images -> (B, 3, 64, 64) in [0, 1]."""
    lot = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return lot if lot.shape[2:] == (SIDE, SIDE) else F.interpolate(lot, (SIDE, SIDE), mode="area")


def numbers(entries: Sequence[Entry]) -> Tensor:
    """The number of each image's style: (B,) int64."""
    return torch.tensor([STYLES.index(e.style) for e in entries])


def augment(images: Tensor, g: torch.Generator) -> Tensor:
    """Shift, turn round, blur and add noise, so that qk_scale alone does not tell the style.

    (B, 3, S, S) -> the same.
    """
    n = len(images)

    def some(share: float) -> Tensor:
        return torch.rand(n, 1, 1, 1, generator=g) < share

    size = 1 + 0.03 * (2 * torch.rand(n, generator=g) - 1)
    mirror = torch.where(torch.rand(n, generator=g) < 0.5, -1.0, 1.0)
    moves = (2 * torch.rand(n, 2, generator=g) - 1) * 2 * SHIFT / images.shape[-1]
    zero = torch.zeros(n)
    matrix = torch.stack(
        [torch.stack([size * mirror, zero, moves[:, 0]], 1), torch.stack([zero, size, moves[:, 1]], 1)], 1
    )
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    images = 1 - F.grid_sample(1 - images, grid, align_corners=False)  # what comes in at the border is white
    half = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2.0, mode="bilinear")
    images = torch.where(some(0.1), half, images)
    blurred = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = torch.where(some(0.1), blurred, images)
    noise = 0.04 * torch.randn(images.shape, generator=g)
    return torch.where(some(0.2), images + noise, images).clamp(0, 1)


def train(entries: Sequence[Entry], epochs: int, seed: int, say: Callable[[str], None] | None = None) -> StyleNet:
    """A network trained on these images, ready to measure."""
    torch.manual_seed(seed)
    net = StyleNet()
    images, targets = tensor([e.image for e in entries]), numbers(entries)
    per_epoch = max(1, len(entries) // BATCH)
    steps = epochs * per_epoch
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps + 1)
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        turn = torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed * 1000 + epoch))
        rows = turn[place * BATCH : (place + 1) * BATCH]
        seen = augment(images[rows], torch.Generator().manual_seed(seed * 10**6 + step))
        loss = F.cross_entropy(net(seen), targets[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if say and place == per_epoch - 1:
            say(f"epoch {epoch + 1} of {epochs}: loss {float(loss.detach()):.3f}")
    return net.eval().requires_grad_(False)


def named(net: StyleNet, images: Sequence[Pixels]) -> npt.NDArray[np.int64]:
    """The number of the style that each image looks to be in: (B,)."""
    with torch.inference_mode():
        parts = [net(tensor(images[at : at + 256])).argmax(1) for at in range(0, len(images), 256)]
    return torch.cat(parts).numpy()


def save(net: StyleNet, path: Path) -> None:
    """Write the weights."""
    state = {name: value.contiguous() for name, value in net.state_dict().items()}
    replace_file(path, lambda part: save_file(state, str(part), metadata={"styles": " ".join(STYLES)}))


def load(path: Path) -> StyleNet:
    """The network that `save` wrote.

    Raises:
        DalleError: another file.
    """
    net = StyleNet()
    try:
        net.load_state_dict(load_file(str(path)))
    except (OSError, RuntimeError, SafetensorError) as error:
        found = str(error).splitlines()[0]
        raise DalleError(f"expected a network of `measure.py classifier`, found {found} in {path}; make it") from None
    return net.eval().requires_grad_(False)
