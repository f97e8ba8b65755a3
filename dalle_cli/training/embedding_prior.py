"""Training the priors over CLIP embeddings (Ramesh et al. 2022, sec. 2.2).

B batch, T caption length, D embedding width, N pictures; z_i and z_t are of length 1.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dalle_cli import console
from dalle_cli.data.order import Order
from dalle_cli.data.pairs import Ints, Pairs
from dalle_cli.devices import rank
from dalle_cli.diffusion.noise import noise_for
from dalle_cli.errors import DalleError
from dalle_cli.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig
from dalle_cli.models.embedding_prior import EmbeddingPrior, EmbeddingPriorConfig
from dalle_cli.models.embeddings import Principal, off_scale
from dalle_cli.sampling.embeddings import Read, autoregressed, diffused, process_of
from dalle_cli.training.config import TrainConfig, check_drawing
from dalle_cli.training.loop import Batch, mix

VALIDATION_BATCH = 64
AHEAD = 2  # batches that lie ready
MEASURED = 1 << 18  # embeddings, spread over all, that statistics are taken of
CHUNK = 4096
HELD = 0.99  # of the variance, by the components that are drawn (sec. 2.2: less than 1% mean squared error)


@dataclass(frozen=True)
class EmbeddingPriorTrain(TrainConfig):
    """Numbers near the paper's diffusion prior's (app. C), from memory; small recipes say their own."""

    steps: int = 600_000
    batch_size: int = 4096
    lr: float = 1.1e-4
    warmup: int = 1000
    beta2: float = 0.96
    eps: float = 1e-6
    weight_decay: float = 6e-2
    clip_norm: float = 1.0
    ema: float = 0.9999
    caption_dropout: float = 0.1  # sec. 2.2, for guidance
    guidance: float = 1.0  # what the weights are drawn with where nothing else is said; 1 = none
    scale: float = 0.0  # what z_i without its mean is multiplied by for unit variance; 0 = as measured
    drawn_captions: int = 256  # held-out ones that an embedding is drawn for at each validation; 0 = none
    drawn_steps: int = 16  # in which the diffusion prior draws them

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.caption_dropout <= 1:
            raise DalleError(f"expected caption_dropout in [0, 1], found {self.caption_dropout}; correct it")
        check_drawing(guidance=self.guidance)
        for name in ("scale", "drawn_captions"):
            if getattr(self, name) < 0:
                raise DalleError(f"expected {name} of at least 0, found {getattr(self, name)}; raise it")
        if self.parallel == "shard":  # drawing, at each validation, wants whole weights
            raise DalleError('expected parallel = "replicate" for a prior over embeddings, found "shard"; change it')
        if self.drawn_steps < 1:
            raise DalleError(f"expected drawn_steps of at least 1, found {self.drawn_steps}; raise it")


def chunks(pairs: Pairs, places: Ints) -> Iterator[Tensor]:
    """z_i of these places, the first of each, a chunk (n, D) at a time; of very many an even spread."""
    if len(places) > MEASURED:
        places = places[np.linspace(0, len(places) - 1, MEASURED).astype(np.int64)]
    for begin in range(0, len(places), CHUNK):
        part = places[begin : begin + CHUNK]
        _, latents = pairs.draw(part, np.zeros((len(part), 2)))
        yield torch.from_numpy(pairs.embeddings(latents))


def measured(pairs: Pairs, places: Ints, scale: float = 0.0) -> Principal:
    """Mean, principal components, spectrum and scale of the training embeddings."""
    principal = Principal(pairs.width)
    principal.fit(chunks(pairs, places), scale)
    return principal


class EmbeddingPriorTask(ABC):
    """Captions and embeddings joined by id; each epoch draws one of both of each id anew. One subclass a prior."""

    model: DiffusionPrior | EmbeddingPrior

    def __init__(self, train: EmbeddingPriorTrain, pairs: Pairs, seed: int):
        self.options, self.pairs, self.seed = train, pairs, seed
        torch.manual_seed(mix(seed, -1))
        self.places, self.held_out = pairs.split(train.validation)
        self.order = Order(len(self.places), train.batch_size, seed)

    def _measure(self) -> None:
        """Let the model carry the statistics of the training embeddings.

        Warns where a scale that was asked for leaves them far from unit variance.
        """
        found = measured(self.pairs, self.places, self.options.scale)
        self.model.principal.load_state_dict(found.state_dict())
        spread = float(found.scale * found.spectrum.mean().sqrt())  # of all of them
        if off_scale(spread) and rank() == 0:
            fit = f"{float(found.scale) / spread:.4g}"
            console.warn(
                f"with scale {float(found.scale):.4g} the entries of z_i have a standard deviation of {spread:.3g} "
                f"beside noise of 1; {fit} would fit, and scale = 0 finds it"
            )

    def batches(self, start: int) -> Generator[Batch]:
        """What `batch` gives, from update `start` on, made while the model computes."""
        with ThreadPoolExecutor(1) as pool:
            ahead = deque(pool.submit(self.batch, start + i) for i in range(AHEAD))
            for step in count(start + AHEAD):
                ready = ahead.popleft().result()
                ahead.append(pool.submit(self.batch, step))
                yield ready

    def batch(self, step: int) -> Batch:
        """Tokens (B, T), lengths (B,), z_t (B, D), z_i (B, D) and what `_more` adds, a function of seed and step.

        Captions that are dropped have a length of 0. It is drawn here, so parts of a batch need nothing of each other.
        """
        _, rows = self.order.batch(step)
        rng = np.random.default_rng((self.seed, 1, step))
        captions, latents = self.pairs.draw(self.places[rows], rng.random((len(rows), 2)))
        tokens, lengths = self.pairs.tokens(captions)
        lengths[rng.random(len(rows)) < self.options.caption_dropout] = 0
        z_t, z_i = self.pairs.text_embeddings(captions), self.pairs.embeddings(latents)
        arrays = (tokens, lengths, z_t, z_i, *self._more(len(rows), rng))
        return tuple(map(torch.from_numpy, arrays))

    def _more(self, n: int, rng: np.random.Generator) -> tuple[np.typing.NDArray[np.generic], ...]:
        """What else of an update is random."""
        return ()

    def split(self, batch: Batch, parts: int, step: int, generator: torch.Generator) -> list[Batch]:
        """Equal parts."""
        return list(zip(*(x.chunk(parts) for x in batch), strict=True))

    def flops(self) -> float:
        """Of one update."""
        return self.options.batch_size * self.model.flops()

    def _held_out(self, most: int, device: torch.device) -> Iterator[tuple[Read, Tensor, range]]:
        """Held-out captions, the first of each picture, their z_i, and their numbers, a batch at a time."""
        places = self.held_out[:most]
        for begin in range(0, len(places), VALIDATION_BATCH):
            part = places[begin : begin + VALIDATION_BATCH]
            captions, latents = self.pairs.draw(part, np.zeros((len(part), 2)))
            arrays = (*self.pairs.tokens(captions), self.pairs.text_embeddings(captions))
            read = Read(*(torch.from_numpy(a).to(device) for a in arrays))
            z_i = torch.from_numpy(self.pairs.embeddings(latents)).to(device)
            yield read, z_i, range(begin, begin + len(part))

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Of held-out pictures the loss; the cosine of an embedding drawn for the caption with the picture's own.

        Beside that the mean cosine with those of all other pictures, which a prior that does not look at captions
        would reach, and the standard deviation of standardized z_i, which should be 1.
        """
        assert isinstance(model, DiffusionPrior | EmbeddingPrior)
        losses = [
            (self._loss_held_out(model, *batch).detach().item(), len(batch[1]))
            for batch in self._held_out(self.options.max_validation, device)
        ]
        drawn, true = [], []
        for read, z_i, numbers in self._held_out(self.options.drawn_captions, device):
            with torch.autocast(device.type, enabled=False):
                drawn.append(self._draw(model, read, numbers).double())
            true.append(z_i.double())
        n = sum(size for _, size in losses)
        figures = {"loss_held_out": sum(loss * size for loss, size in losses) / n} if n else {}
        return {**figures, **cosines(torch.cat(drawn), torch.cat(true))} if drawn else figures

    @abstractmethod
    def _loss_held_out(self, model: DiffusionPrior | EmbeddingPrior, read: Read, z_i: Tensor, numbers: range) -> Tensor:
        """The loss of held-out pairs, of these numbers, always the same: -> ()."""

    @abstractmethod
    def _draw(self, model: DiffusionPrior | EmbeddingPrior, read: Read, numbers: range) -> Tensor:
        """One embedding of length 1 for each caption: (B, D)."""

    def sheet(self, model: nn.Module, device: torch.device, path: Path) -> None:  # noqa: B027  (of the Task, and empty)
        """An embedding is no picture; `decode` makes one of it."""


def cosines(drawn: Tensor, true: Tensor) -> dict[str, float]:
    """Mean cosine of N drawn embeddings with their own true ones and, from 2 on, with those of all others: (N, D)."""
    own, n = (drawn * true).sum(-1), len(drawn)
    others = ((drawn @ true.sum(0)) - own) / max(n - 1, 1)
    return {"cosine": float(own.mean())} | ({"cosine_others": float(others.mean())} if n > 1 else {})


class DiffusionPriorTask(EmbeddingPriorTask):
    """The diffusion prior: mean squared error of z_i, standardized, at a timestep drawn evenly."""

    model: DiffusionPrior

    def __init__(self, config: DiffusionPriorConfig, train: EmbeddingPriorTrain, pairs: Pairs, seed: int):
        super().__init__(train, pairs, seed)
        self.model = DiffusionPrior(config)
        self.process = process_of(self.model)
        self._measure()

    def _more(self, n: int, rng: np.random.Generator) -> tuple[np.typing.NDArray[np.generic], ...]:
        """Timesteps (B,) int64 and noise (B, D)."""
        t = rng.integers(0, self.model.config.n_timestep, n)
        return t, rng.standard_normal((n, self.model.config.n_embedding), dtype=np.float32)

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch."""
        tokens, lengths, z_t, z_i, t, noise = batch
        return self._loss(self.model, Read(tokens, lengths, z_t), z_i, t, noise)

    def _loss(
        self, model: DiffusionPrior, read: Read, z_i: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x_start = model.principal.standardize(z_i)
        return model.loss(self.process.noised(x_start, t, noise), t, *read, x_start)

    def _loss_held_out(self, model: DiffusionPrior | EmbeddingPrior, read: Read, z_i: Tensor, numbers: range) -> Tensor:
        """At timesteps that are spread evenly over the pictures, always the same."""
        assert isinstance(model, DiffusionPrior)
        golden = (5**0.5 - 1) / 2  # multiples of it fill [0, 1) evenly, however many there are
        t = torch.tensor([int(number * golden % 1 * model.config.n_timestep) for number in numbers])
        noise = noise_for(self.seed, numbers, 0, z_i.shape[1:], "validation").to(z_i.device)
        return self._loss(model, read, z_i, t.to(z_i.device), noise)[0]

    def _draw(self, model: DiffusionPrior | EmbeddingPrior, read: Read, numbers: range) -> Tensor:
        assert isinstance(model, DiffusionPrior)
        steps = min(self.options.drawn_steps, model.config.n_timestep)
        return torch.cat(list(diffused(model, read, numbers, self.seed, steps=steps, best_of=1)))


class AutoregressivePriorTask(EmbeddingPriorTask):
    """The autoregressive prior: nats a bucket."""

    model: EmbeddingPrior

    def __init__(self, config: EmbeddingPriorConfig, train: EmbeddingPriorTrain, pairs: Pairs, seed: int):
        super().__init__(train, pairs, seed)
        self.model = EmbeddingPrior(config)
        self._measure()
        self._measure_ranges()

    def _measure_ranges(self) -> None:
        """Extremes of the components, and how dot products with captions are distributed."""
        self.model.forget()
        for part in chunks(self.pairs, self.places):
            self.model.measure(part)
        dots = []
        places = self.places[np.linspace(0, len(self.places) - 1, min(len(self.places), MEASURED)).astype(np.int64)]
        for begin in range(0, len(places), CHUNK):
            part_places = places[begin : begin + CHUNK]
            captions, latents = self.pairs.draw(part_places, np.zeros((len(part_places), 2)))
            dots.append((self.pairs.embeddings(latents) * self.pairs.text_embeddings(captions)).sum(-1))
        self.model.measure_dots(torch.from_numpy(np.concatenate(dots)))

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch."""
        tokens, lengths, z_t, z_i = batch
        return self._loss(self.model, Read(tokens, lengths, z_t), z_i)

    def _loss(self, model: EmbeddingPrior, read: Read, z_i: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        dots = model.quantize_dot((z_i * read.z_t).sum(-1))
        return model.loss(*read, dots, model.quantize(z_i))

    def _loss_held_out(self, model: DiffusionPrior | EmbeddingPrior, read: Read, z_i: Tensor, numbers: range) -> Tensor:
        assert isinstance(model, EmbeddingPrior)
        return self._loss(model, read, z_i)[0]

    def _draw(self, model: DiffusionPrior | EmbeddingPrior, read: Read, numbers: range) -> Tensor:
        assert isinstance(model, EmbeddingPrior)
        return torch.cat(list(autoregressed(model, read, numbers, self.seed)))
