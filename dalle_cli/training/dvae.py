"""Training the dVAE (Ramesh et al. 2021, sec. 2.1 and app. A.2).

Shapes: B batch, S image side, V vocabulary.
"""

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dalle_cli import console
from dalle_cli.data.datasets import Dataset
from dalle_cli.errors import DalleError
from dalle_cli.models.dvae import DVAE, DVAEConfig
from dalle_cli.models.pixels import from_uint8, to_uint8
from dalle_cli.training.config import ImageTrainConfig, check_at_least, setting
from dalle_cli.training.distributed import broadcast
from dalle_cli.training.options import TrainingOptions
from dalle_cli.training.schedules import cosine
from dalle_cli.training.stage import Trainable, TrainingStage, image_inputs
from dalle_cli.training.task import Batch, EqualParts, ImageTask, seeded
from dalle_cli.viz.grid import image_grid

N_SAMPLES = 12
COLLAPSED_PERPLEXITY = 1.1  # below it, codes carry no information
MIN_IMAGES = 8  # held-out images that a collapse must be seen on
LOW_USAGE = 0.05  # share of the vocabulary (or of the codes seen) below which the codebook counts as hardly used


@dataclass(frozen=True)
class DVAETrain(ImageTrainConfig):
    """The paper's numbers (app. A.2) for 512 images per update; small recipes set their own."""

    steps: int = 3_000_000
    batch_size: int = 512
    lr: float = 1e-4
    final_lr: float = 1.25e-6
    lr_steps: int = 1_200_000
    weight_decay: float = 1e-4
    temperature: float = 1.0
    final_temperature: float = 1 / 16
    temperature_steps: int = 150_000
    beta: float = 6.6
    beta_steps: int = 5000
    augment: str = setting("dvae", deterministic="center")
    flip: bool = setting(True, deterministic=False)
    revive_every: int = 100  # vq: updates between revivals of dead codes

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "lr_steps", "revive_every")
        for name in ("temperature", "final_temperature"):
            if getattr(self, name) <= 0:
                raise DalleError(f"expected {name} above 0, found {getattr(self, name)}; raise it")

    @property
    def schedule_steps(self) -> int:
        """Updates over which the learning rate comes down; it stays at its end."""
        return min(self.lr_steps, self.steps)


class DVAETask(EqualParts, ImageTask):
    """Images alone. The validation reconstructs held-out images from hard codes, as `decode` will see them."""

    options: DVAETrain

    def __init__(self, config: DVAEConfig, train: DVAETrain, data: Dataset, seed: int, workers: int):
        super().__init__(train, data, seed, workers)
        self.config, self.updates = config, 0
        self.model = seeded(seed, lambda: DVAE(config))

    def batches(self, start: int) -> Generator[Batch]:
        """Images (B, 3, S, S) uint8."""
        for batch in self.loaded(start, self.config.image_size):
            yield (torch.from_numpy(batch.images),)

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The ELBO at this update's temperature and beta (app. A.2)."""
        o = self.options
        self.updates = step + 1
        images = from_uint8(batch[0])
        if step % o.revive_every == 0:
            self.model.revive(images, generator)
            broadcast(self.model.quantizer.state_dict().values())  # all processes revive the same codes
        temperature = cosine(step, o.temperature, o.final_temperature, o.temperature_steps)
        beta = cosine(step, 0.0, o.beta, o.beta_steps)
        return self.model.loss(images, temperature=temperature, beta=beta, generator=generator)

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """PSNR in dB of held-out images from hard codes, how many codes they use, and the codes' perplexity."""
        assert isinstance(model, DVAE)
        counts = torch.zeros(self.config.n_vocab, dtype=torch.int64)
        psnr: list[Tensor] = []
        for _, images in self.held_out_images(self.config.image_size):
            pixels = from_uint8(images.to(device))
            codes = model.encode(pixels)
            error = (model.decode(codes) - pixels).square().mean((1, 2, 3))
            psnr.append(-10 * error.clamp_min(1e-10).log10().cpu())
            counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
        if not psnr:
            return {}
        perplexity = float(torch.special.entr(counts / counts.sum()).sum().exp())
        self._check(perplexity, int(counts.sum()))
        used = int((counts > 0).sum())
        return {"psnr_held_out": torch.cat(psnr).mean().item(), "codes_used": used, "code_perplexity": perplexity}

    def _check(self, perplexity: float, n_codes: int) -> None:
        """Warn of a codebook that is hardly used; end the run if it has collapsed to a single code.

        Raises:
            DalleError: after the KL weight's rise, many images are all encoded as the same code.
        """
        n_vocab = self.config.n_vocab
        found = f"expected a codebook in use, found a perplexity of {perplexity:.1f} among {n_vocab} codes"
        if (
            perplexity < COLLAPSED_PERPLEXITY
            and self.updates > self.options.beta_steps
            and len(self.held_out) >= MIN_IMAGES
        ):
            raise DalleError(f"{found}; set dvae.quantizer = 'fsq', or lower dvae.train.beta or lr")
        if perplexity < LOW_USAGE * min(n_vocab, n_codes):
            console.warn(found)

    def samples(self, model: nn.Module, device: torch.device) -> Image.Image | None:
        """Held-out originals above their reconstructions."""
        assert isinstance(model, DVAE)
        for _, images in self.held_out_images(self.config.image_size, N_SAMPLES):
            rebuilt = model.reconstruct(from_uint8(images.to(device))).cpu()
            pixels = [*images.numpy(), *to_uint8(rebuilt).numpy()]
            return image_grid(pixels, columns=len(images), title="held-out originals, and their reconstructions")
        return None


TRAINABLE = Trainable("train-dvae", "weights.dvae", "dvae", DVAEConfig, DVAETrain)


def train_dvae(dataset: str | Path, out: str | Path, *, workers: int = 2, **options: Any) -> dict[str, Any]:
    """Train a dVAE on the images of a data set; the last validation's metrics.

    `options` are the fields of `TrainingOptions`.

    Raises:
        DalleError: a recipe or a data set that does not fit, and as `training.loop.train`.
    """
    o = TrainingOptions(**options)
    data, inputs = image_inputs(dataset, o)
    stage = TrainingStage(TRAINABLE, out, o, inputs)
    return stage.run(lambda: DVAETask(stage.model, stage.train, data, o.seed, workers))
