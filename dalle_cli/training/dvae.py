"""Training the dVAE (Ramesh et al. 2021, sec. 2.1 and app. A.2).

Shapes: B batch, S side in pixels, V vocabulary.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dalle_cli import console
from dalle_cli.data.augment import by_name
from dalle_cli.data.datasets import Dataset
from dalle_cli.data.loader import Loader, sequential
from dalle_cli.data.split import split
from dalle_cli.errors import DalleError
from dalle_cli.models.dvae import DVAE, DVAEConfig
from dalle_cli.models.pixels import from_uint8, to_uint8
from dalle_cli.training.config import TrainConfig
from dalle_cli.training.distributed import from_first
from dalle_cli.training.loop import Batch, mix
from dalle_cli.training.schedules import cosine
from dalle_cli.viz.grid import sheet

VALIDATION_BATCH = 32
SHEET_PICTURES = 12
GONE = 1.1  # perplexity of codes that say nothing any more
MANY = 8  # held-out pictures, of which not all look the same
COLLAPSE = 0.05  # share of the vocabulary (or of the codes looked at) below which the codebook is called collapsed


@dataclass(frozen=True)
class DVAETrain(TrainConfig):
    """The paper's numbers (app. A.2), which want 512 pictures a step; small recipes say their own."""

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
    augment: str = "dvae"
    flip: bool = True
    revive_every: int = 100  # vq: updates between revivals of dead codes

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature", "final_temperature", "lr_steps", "revive_every"):
            if getattr(self, name) <= 0:
                raise DalleError(f"expected {name} above 0, found {getattr(self, name)}; raise it")
        by_name(self.augment)

    @property
    def schedule_steps(self) -> int:
        """Updates that the learning rate takes to come down; it stays there."""
        return min(self.lr_steps, self.steps)


class DVAETask:
    """Pictures alone; the validation set is reconstructed from hard codes, as `decode` will see them."""

    def __init__(self, config: DVAEConfig, train: DVAETrain, data: Dataset, seed: int, workers: int):
        self.config, self.options, self.data, self.seed, self.workers = config, train, data, seed, workers
        torch.manual_seed(mix(seed, -1))
        self.model = DVAE(config)
        self.updates, self.rank, self.world = 0, 0, 1
        self.rows, held_out = split(data.ids, train.validation)
        self.held_out = held_out[: train.max_validation]

    def share(self, rank: int, world: int) -> None:
        """From now on this process reads its part of the pictures alone."""
        self.rank, self.world = rank, world

    def batches(self, start: int) -> Generator[Batch]:
        """Pictures (B, 3, S, S) uint8, a function of the seed and the update."""
        o, size = self.options, self.config.image_size
        augment, part = by_name(o.augment, o.flip), o.batch_size // self.world
        loader = Loader(
            self.data, size, augment, part, self.seed, self.workers, self.rows, rank=self.rank, world=self.world
        )
        for batch in loader.batches(start):
            yield (torch.from_numpy(batch.images),)

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The ELBO at this update's temperature and beta, each a function of the update alone (app. A.2)."""
        o = self.options
        self.updates = step + 1
        images = from_uint8(batch[0])
        if step % o.revive_every == 0:
            self.model.revive(images, generator)
            from_first(self.model.quantizer.state_dict().values())  # the same codes are moved everywhere
        temperature = cosine(step, o.temperature, o.final_temperature, o.temperature_steps)
        beta = cosine(step, 0.0, o.beta, o.beta_steps)
        return self.model.loss(images, temperature=temperature, beta=beta, generator=generator)

    def split(self, batch: Batch, parts: int, step: int, generator: torch.Generator) -> list[Batch]:
        """Equal parts; each draws noise of its own."""
        return [(part,) for part in batch[0].chunk(parts)]

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """PSNR in dB of held-out pictures from hard codes, how many codes they use, and the codes' perplexity."""
        assert isinstance(model, DVAE)
        counts = torch.zeros(self.config.n_vocab, dtype=torch.int64)
        psnr: list[Tensor] = []
        for images in self._held_out(len(self.held_out)):
            pixels = from_uint8(images.to(device))
            codes = model.encode(pixels)
            error = (model.decode(codes) - pixels).square().mean((1, 2, 3))
            psnr.append(-10 * error.clamp_min(1e-10).log10().cpu())
            counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
        if not psnr:
            return {}
        share = counts / counts.sum()
        used, perplexity = int((counts > 0).sum()), float(torch.special.entr(share).sum().exp())
        self._check(perplexity, int(counts.sum()))
        return {"psnr_held_out": torch.cat(psnr).mean().item(), "codes_used": used, "code_perplexity": perplexity}

    def _check(self, perplexity: float, n_codes: int) -> None:
        """Warn of a codebook that is hardly in use; one that has come down to a single code ends the run.

        Raises:
            DalleError: after the KL weight's rise, many pictures are all written with the same code.
        """
        n_vocab = self.config.n_vocab
        found = f"expected a codebook in use, found a perplexity of {perplexity:.1f} among {n_vocab} codes"
        if perplexity < GONE and self.updates > self.options.beta_steps and len(self.held_out) >= MANY:
            raise DalleError(f"{found}; set dvae.quantizer = 'fsq', or lower dvae.train.beta or lr")
        if perplexity < COLLAPSE * min(n_vocab, n_codes):
            console.warn(found)

    def _held_out(self, most: int) -> Iterator[Tensor]:
        """The first so many held-out pictures, center-cropped: batches (b, 3, S, S) uint8."""
        size = self.config.image_size
        for _, images in sequential(self.data, size, self.held_out[:most].tolist(), VALIDATION_BATCH, self.workers):
            yield torch.from_numpy(images)

    def sheet(self, model: nn.Module, device: torch.device, path: Path) -> None:
        """Held-out originals above their reconstructions."""
        assert isinstance(model, DVAE)
        first = next(self._held_out(min(SHEET_PICTURES, len(self.held_out))), None)
        if first is None:
            return
        rebuilt = model.reconstruct(from_uint8(first.to(device))).cpu()
        pixels = [*first.numpy(), *to_uint8(rebuilt).numpy()]
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet(pixels, columns=len(first), title="held-out originals, and their reconstructions").save(path)
