"""Training an upsampler on crops of images beside their corrupted small ones (Ramesh et al. 2022, sec. 2.1).

Shapes: B batch, S side of a crop, s side of the small one; f = S / s.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dalle_cli.data import degrade, loader
from dalle_cli.data.augment import Augment, Pixels
from dalle_cli.data.datasets import Dataset
from dalle_cli.diffusion.noise import row_noise
from dalle_cli.errors import DalleError
from dalle_cli.models.upsampler import Upsampler, UpsamplerConfig, enlarge
from dalle_cli.sampling.decoder import SamplerConfig, enlarge_noised, to_images, to_signed, upsample
from dalle_cli.training.config import check_at_least, check_share, setting
from dalle_cli.training.denoising import DenoisingTask, DenoisingTrain, Draws, Predict
from dalle_cli.training.options import TrainingOptions
from dalle_cli.training.stage import Trainable, TrainingStage, image_inputs
from dalle_cli.training.task import Batch, seeded
from dalle_cli.viz.grid import image_grid

_DEGRADE = 4  # the last word of a seed, as in data/loader.py


@dataclass(frozen=True)
class UpsamplerTrain(DenoisingTrain):
    """The paper's numbers for the first upsampler (table 3); small recipes set their own."""

    steps: int = 1_000_000
    batch_size: int = 1024
    crop: int = 4  # an image's side is this many times that of a crop
    corruption: str = setting("blur", deterministic="none")  # of the small image; or "bsr", for the second, or "none"
    blur_sigma: float = 0.6  # pixels of the small image; from memory, not in the paper
    corruption_strength: float = 1.0  # share of the ranges of "bsr"
    low_noise: float = setting(0.0, affects="sampling")  # sampling default that the weights record; 0 = none
    grid_images: int = setting(4, affects="nothing")

    def __post_init__(self) -> None:
        super().__post_init__()
        degrade.by_name(self.corruption, self.blur_sigma, self.corruption_strength)
        check_at_least(self, 1, "crop")
        check_share(self, "low_noise")


class UpsamplerTask(DenoisingTask):
    """Images alone: each crop is denoised beside the small image made of it."""

    config: UpsamplerConfig
    options: UpsamplerTrain
    model: Upsampler
    validation_batch = 16

    def __init__(self, config: UpsamplerConfig, train: UpsamplerTrain, data: Dataset, seed: int, workers: int):
        super().__init__(config, train, data, seed, workers)
        if config.image_size % (train.crop * config.factor):
            found = f"crops of a {train.crop}th of {config.image_size} pixels"
            raise DalleError(f"expected crops that {config.factor} divides, found {found}; lower crop")
        self.side = config.image_size // train.crop
        config.check_side(self.side)
        self.model = seeded(seed, lambda: Upsampler(config))
        self.degrade = degrade.by_name(train.corruption, train.blur_sigma, train.corruption_strength)

    def augmentation(self) -> Augment:
        """Crops of augmented images."""
        return degrade.crops(super().augmentation(), self.config.image_size)

    def conditioning(self, batch: loader.Batch, own: Draws, pool: ThreadPoolExecutor) -> Batch:
        """The small images, and the noise that is added to them."""
        return self._small(batch.images, batch.rows.tolist(), batch.epochs.tolist(), pool.map)

    def held_out_conditioning(self, rows: list[int], images: Tensor) -> Batch:
        """The same, as of the first epoch."""
        return self._small(images.numpy(), rows, [0] * len(rows))

    def _small(
        self, images: Pixels, rows: Sequence[int], epochs: Sequence[int], mapped: Callable[..., Any] = map
    ) -> Batch:
        """Small images in [-1, 1], the timesteps that they are noised to, -1 for none, and noise.

        -> (B, 3, s, s), (B,), (B, 3, s, s) or (B, 0) if there never is any. Each is a function of (seed, row, epoch)
        and the image.
        """
        c = self.config
        small, most = images.shape[-1] // c.factor, int(c.low_noise * c.n_timestep)

        def make(image: Pixels, row: int, epoch: int) -> tuple[Pixels, int, NDArray[np.float32]]:
            rng = np.random.default_rng([self.seed, row, epoch, _DEGRADE])
            low = self.degrade(np.ascontiguousarray(image.transpose(1, 2, 0)), small, rng).transpose(2, 0, 1)
            if not most:
                return low, -1, np.zeros(0, np.float32)
            return low, int(rng.integers(-1, most)), rng.standard_normal(low.shape, dtype=np.float32)

        low, levels, noise = zip(*mapped(make, images, rows, epochs), strict=True)
        return to_signed(torch.from_numpy(np.stack(low))), torch.tensor(levels), torch.from_numpy(np.stack(noise))

    def predict(self, model: Any, conditioning: Sequence[Tensor]) -> Predict:
        """The upsampler beside the enlarged small images, with their noise."""
        low, level, noise = conditioning
        factor = self.config.factor
        clamp = self.config.clamp
        if noise.numel():
            beside = enlarge_noised(self.process, low, factor, level, noise, clamp)
        else:
            beside = enlarge(low, factor, clamp)
        return lambda x, t: model(x, t, beside, level)

    def samples(self, model: nn.Module, device: torch.device) -> Image.Image | None:
        """Held-out images made small, enlarged by the model, and as they are."""
        assert isinstance(model, Upsampler)
        o, f = self.options, self.config.factor
        for rows, images, (signed, *_) in self.held_out_batches(o.grid_images):
            low = to_images(signed)
            noise = row_noise(self.seed, rows, "upsampler")
            larger = to_images(upsample(model, to_signed(low), SamplerConfig(o.grid_steps), noise, o.low_noise))
            shown = low.repeat_interleave(f, 2).repeat_interleave(f, 3)
            pixels = [*shown.numpy(), *larger.cpu().numpy(), *images.numpy()]
            return image_grid(pixels, columns=len(rows), title="held-out images: small, enlarged, and as they are")
        return None


TRAINABLES = tuple(
    Trainable("train-decoder", "weights.upsampler", f"upsampler_{number}", UpsamplerConfig, UpsamplerTrain)
    for number in (1, 2)
)


def train_upsampler(
    dataset: str | Path, number: int, out: str | Path, *, workers: int = 2, **options: Any
) -> dict[str, Any]:
    """Train the recipe's first or second upsampler on the images of a data set; the last validation's metrics.

    `options` are the fields of `TrainingOptions`.

    Raises:
        DalleError: a recipe or a data set that does not fit, and as `training.loop.train`.
    """
    o = TrainingOptions(**options)
    data, inputs = image_inputs(dataset, o)
    inputs.settings["upsampler"] = number
    stage = TrainingStage(TRAINABLES[number - 1], out, o, inputs)
    if stage.model.last:
        raise DalleError("expected an upsampler of one U-Net to train, found one with another for the last step")
    if stage.train.low_noise > stage.model.low_noise:
        found = f"{stage.train.low_noise} and {stage.model.low_noise}"
        raise DalleError(f"expected train.low_noise no more than low_noise, found {found}; change one of them")
    return stage.run(lambda: UpsamplerTask(stage.model, stage.train, data, o.seed, workers))
