"""Training the priors over CLIP embeddings (Ramesh et al. 2022, sec. 2.2).

B batch, T caption length, D embedding width, N images; z_i and z_t, of image and text, have length 1 unless a diffusion
prior's config says that z_i keep their own.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_cli import config as recipes
from dalle_cli import console
from dalle_cli.data.pairs import Ints, Pairs
from dalle_cli.devices import rank
from dalle_cli.diffusion.noise import noise_for
from dalle_cli.errors import DalleError
from dalle_cli.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig
from dalle_cli.models.embedding_prior import AutoregressivePrior, AutoregressivePriorConfig
from dalle_cli.models.embeddings import MeanStd, Principal, off_scale
from dalle_cli.sampling.embeddings import PromptBatch, prior_process, sample_autoregressive, sample_diffusion
from dalle_cli.training import warm_start
from dalle_cli.training.config import TrainConfig, check_among, check_at_least, check_sampling, check_share, setting
from dalle_cli.training.options import TrainingOptions
from dalle_cli.training.rounding import sampling_autocast
from dalle_cli.training.stage import StageInputs, Trainable, TrainingStage
from dalle_cli.training.states import StatesOf
from dalle_cli.training.task import Batch, EqualParts, PairTask, seeded

MEASURED = 1 << 18  # embeddings, spread over all, that statistics are taken of
CHUNK = 4096
HELD = 0.99  # share of the variance that the components hold (sec. 2.2: less than 1% mean squared error)
GOLDEN = (5**0.5 - 1) / 2  # whose multiples, modulo 1, fill [0, 1) evenly however many there are
SECTION = "embedding_prior"
KINDS = ("diffusion", "autoregressive")


@dataclass(frozen=True)
class EmbeddingPriorTrain(TrainConfig):
    """Numbers near the paper's diffusion prior's (app. C), from memory; small recipes set their own."""

    steps: int = 600_000
    batch_size: int = 4096
    lr: float = 1.1e-4
    warmup: int = 1000
    beta2: float = 0.96
    eps: float = 1e-6
    weight_decay: float = 6e-2
    clip_norm: float = 1.0
    ema: float = 0.9999
    caption_dropout: float = setting(0.1, deterministic=0.0)  # sec. 2.2, for guidance
    guidance: float = setting(1.0, affects="sampling")  # sampling default that the weights record; 1 = none
    scale: float = 0.0  # factor of z_i without its mean, for unit variance; 0 = as measured
    drawn_captions: int = 256  # held-out ones that an embedding is sampled for at each validation; 0 = none
    drawn_steps: int = 16  # of the diffusion prior's sampler there

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "caption_dropout")
        check_sampling(self, "guidance")
        check_at_least(self, 0, "scale", "drawn_captions")
        check_at_least(self, 1, "drawn_steps")
        if self.parallel == "shard":  # sampling, at each validation, needs whole weights
            raise DalleError('expected parallel = "replicate" for a prior over embeddings, found "shard"; change it')


def spread(places: Ints) -> Iterator[Ints]:
    """The places in chunks; of very many an even spread."""
    if len(places) > MEASURED:
        places = places[np.linspace(0, len(places) - 1, MEASURED).astype(np.int64)]
    for begin in range(0, len(places), CHUNK):
        yield places[begin : begin + CHUNK]


def chunks(pairs: Pairs, places: Ints) -> Iterator[Tensor]:
    """z_i of these places, the first of each, a chunk (n, D) at a time."""
    for part in spread(places):
        yield torch.from_numpy(pairs.embeddings(pairs.draw(part)[1]))


def measured(pairs: Pairs, places: Ints, scale: float = 0.0) -> Principal:
    """Mean, principal components, spectrum and scale of the training embeddings."""
    principal = Principal(pairs.width)
    principal.fit(chunks(pairs, places), scale)
    return principal


class EmbeddingPriorTask(EqualParts, PairTask, ABC):
    """Captions and embeddings joined by id; one subclass per prior."""

    model: DiffusionPrior | AutoregressivePrior

    def __init__(self, train: EmbeddingPriorTrain, pairs: Pairs, seed: int):
        super().__init__(train, pairs, seed)
        self.options = train

    def _measure(self) -> None:
        """Give the model the statistics of the training embeddings.

        Warns if the recipe's scale leaves them far from unit variance.
        """
        if isinstance(self.model.principal, MeanStd):
            self.model.principal.fit(chunks(self.pairs, self.places))
            return
        found = measured(self.pairs, self.places, self.options.scale)
        self.model.principal.load_state_dict(found.state_dict())
        std = float(found.scale * found.spectrum.mean().sqrt())
        if off_scale(std) and rank() == 0:
            fit = f"{float(found.scale) / std:.4g}"
            console.warn(
                f"with scale {float(found.scale):.4g} the entries of z_i have a standard deviation of {std:.3g} "
                f"beside noise of 1; {fit} would fit, and scale = 0 finds it"
            )

    def captions(self, read: PromptBatch) -> PromptBatch:
        """Captions as the model takes them, of tokens, lengths (0 is null) and z_t."""
        return read

    def batch(self, step: int) -> Batch:
        """Tokens (B, T), lengths (B,), z_t (B, D), z_i (B, D), and the columns of `_more`.

        Dropped captions have length 0. Everything random is drawn here, so parts of a batch are independent.
        """
        captions, latents, rng = self.drawn(self.order, 1, step)
        tokens, lengths = self.pairs.tokens(captions)
        lengths[rng.random(len(lengths)) < self.options.caption_dropout] = 0
        z_t, z_i = self.pairs.text_embeddings(captions), self.pairs.embeddings(latents)
        return tuple(map(torch.from_numpy, (tokens, lengths, z_t, z_i, *self._more(len(lengths), rng))))

    def _more(self, n: int, rng: np.random.Generator) -> tuple[np.typing.NDArray[np.generic], ...]:
        """What else of an update is random."""
        return ()

    def flops(self) -> float:
        """Of one update."""
        return self.options.batch_size * self.model.flops()

    def _held_out(self, n: int, device: torch.device) -> Iterator[tuple[PromptBatch, Tensor, range]]:
        """Held-out captions, the first of each image, their z_i, and their numbers, a batch at a time."""
        for numbers, captions, latents in self.held_out_rows(n):
            arrays = (
                *self.pairs.tokens(captions),
                self.pairs.text_embeddings(captions),
                self.pairs.embeddings(latents),
            )
            *read, z_i = (torch.from_numpy(a).to(device) for a in arrays)
            yield PromptBatch(*read), z_i, numbers

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """On held-out images: the loss, and the cosine of an embedding sampled for the caption with the image's own.

        `cosine_others` is the mean cosine with the embeddings of all other images, which a prior that ignores captions
        would reach.
        """
        assert isinstance(model, DiffusionPrior | AutoregressivePrior)
        losses = [
            (self._held_out_loss(model, *batch).detach().item(), len(batch[1]))
            for batch in self._held_out(self.options.max_validation, device)
        ]
        sampled, true = [], []
        for read, z_i, numbers in self._held_out(self.options.drawn_captions, device):
            with sampling_autocast(model, device):
                sampled.append(self._sample(model, self.captions(read), numbers).double())
            true.append(z_i.double() if self.pairs.normalized else F.normalize(z_i.double(), dim=-1))
        n = sum(size for _, size in losses)
        metrics = {"loss_held_out": sum(loss * size for loss, size in losses) / n} if n else {}
        return {**metrics, **cosines(torch.cat(sampled), torch.cat(true))} if sampled else metrics

    @abstractmethod
    def _held_out_loss(self, model: Any, read: PromptBatch, z_i: Tensor, numbers: range) -> Tensor:
        """The loss of held-out pairs with these numbers, always the same: -> ()."""

    @abstractmethod
    def _sample(self, model: Any, read: PromptBatch, numbers: range) -> Tensor:
        """One embedding of length 1 for each caption: (B, D)."""

    def samples(self, model: nn.Module, device: torch.device) -> None:
        """An embedding is no image."""


def cosines(sampled: Tensor, true: Tensor) -> dict[str, float]:
    """Mean cosine of N sampled embeddings with their own true ones, and if N > 1 with those of all others: (N, D)."""
    own, n = (sampled * true).sum(-1), len(sampled)
    others = ((sampled @ true.sum(0)) - own) / max(n - 1, 1)
    return {"cosine": float(own.mean())} | ({"cosine_others": float(others.mean())} if n > 1 else {})


class DiffusionPriorTask(EmbeddingPriorTask):
    """The diffusion prior: mean squared error of z_i, standardized, at a random timestep."""

    model: DiffusionPrior

    def __init__(
        self, config: DiffusionPriorConfig, train: EmbeddingPriorTrain, pairs: Pairs, seed: int,
        states: StatesOf | None = None,
    ):  # fmt: skip
        """`states` is for a prior that takes captions as states of CLIP.

        Raises: DalleError for a prior of one pass, which has no timestep to be trained at.
        """
        if not config.time:
            raise DalleError("expected a prior with timesteps to train, found one without; set time = true")
        super().__init__(train, pairs if config.normalized else pairs.unnormalized(), seed)
        self.states = states
        self.model = seeded(seed, lambda: DiffusionPrior(config))
        self.process = prior_process(self.model)
        self._measure()

    def _more(self, n: int, rng: np.random.Generator) -> tuple[np.typing.NDArray[np.generic], ...]:
        """Timesteps (B,) int64 and noise (B, D)."""
        t = rng.integers(0, self.model.config.n_timestep, n)
        return t, rng.standard_normal((n, self.model.config.n_embedding), dtype=np.float32)

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch."""
        tokens, lengths, z_t, z_i, t, noise = batch
        return self._loss(self.model, PromptBatch(tokens, lengths, z_t), z_i, t, noise)

    def captions(self, read: PromptBatch) -> PromptBatch:
        """Captions as the model takes them: as they are, or the states of their tokens and a z_t of its own length."""
        return read if self.states is None else self.states(read)

    @property
    def null(self) -> PromptBatch | None:
        """The null caption of a model that takes states; None of one that takes tokens."""
        return None if self.states is None else self.states.null

    def _loss(
        self, model: DiffusionPrior, read: PromptBatch, z_i: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x_start = model.principal.standardize(z_i)
        return model.loss(self.process.add_noise(x_start, t, noise), t, *self.captions(read), x_start)

    def _held_out_loss(self, model: Any, read: PromptBatch, z_i: Tensor, numbers: range) -> Tensor:
        """At timesteps spread evenly over the images."""
        t = torch.tensor([int(number * GOLDEN % 1 * model.config.n_timestep) for number in numbers])
        noise = noise_for(self.seed, numbers, 0, z_i.shape[1:], "validation").to(z_i.device)
        return self._loss(model, read, z_i, t.to(z_i.device), noise)[0]

    def _sample(self, model: Any, read: PromptBatch, numbers: range) -> Tensor:
        steps = min(self.options.drawn_steps, model.config.n_timestep)
        z = torch.cat(list(sample_diffusion(model, read, numbers, self.seed, steps=steps, best_of=1)))
        return z if self.pairs.normalized else F.normalize(z, dim=-1)


class AutoregressivePriorTask(EmbeddingPriorTask):
    """The autoregressive prior: nats per bucket."""

    model: AutoregressivePrior

    def __init__(self, config: AutoregressivePriorConfig, train: EmbeddingPriorTrain, pairs: Pairs, seed: int):
        super().__init__(train, pairs, seed)
        self.model = seeded(seed, lambda: AutoregressivePrior(config))
        self._measure()
        self._measure_ranges()

    def _measure_ranges(self) -> None:
        """Extremes of the components, and the distribution of dot products with captions."""
        self.model.forget()
        for part in chunks(self.pairs, self.places):
            self.model.measure(part)
        dots = []
        for places in spread(self.places):
            captions, latents = self.pairs.draw(places)
            dots.append((self.pairs.embeddings(latents) * self.pairs.text_embeddings(captions)).sum(-1))
        self.model.measure_dots(torch.from_numpy(np.concatenate(dots)))

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch."""
        tokens, lengths, z_t, z_i = batch
        return self._loss(self.model, PromptBatch(tokens, lengths, z_t), z_i)

    def _loss(self, model: AutoregressivePrior, read: PromptBatch, z_i: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        dots = model.quantize_dot((z_i * read.z_t).sum(-1))
        return model.loss(*read, dots, model.quantize(z_i))

    def _held_out_loss(self, model: Any, read: PromptBatch, z_i: Tensor, numbers: range) -> Tensor:
        return self._loss(model, read, z_i)[0]

    def _sample(self, model: Any, read: PromptBatch, numbers: range) -> Tensor:
        return torch.cat(list(sample_autoregressive(model, read, numbers, self.seed)))


# The stage


@dataclass(frozen=True)
class PriorChoice:
    """Which prior over embeddings the recipe trains; each kind has a table of its own."""

    kind: str = "diffusion"

    def __post_init__(self) -> None:
        check_among(self, "kind", KINDS)


TRAINABLES = {
    kind: Trainable("train-prior", "weights.prior.embeddings", f"{SECTION}.{kind}", model, EmbeddingPriorTrain)
    for kind, model in zip(KINDS, (DiffusionPriorConfig, AutoregressivePriorConfig), strict=True)
}


def chosen(table: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind of prior that a recipe chooses, and the table of its numbers.

    Raises:
        DalleError: an unknown kind or key.
    """
    body = table.get(SECTION, {})
    if not isinstance(body, dict):
        raise DalleError(f"expected a table [{SECTION}], found {body!r}")
    own = {key: value for key, value in body.items() if key not in KINDS}
    kind = recipes.build(PriorChoice, own, SECTION, KINDS).kind
    numbers = body.get(kind, {})
    if not isinstance(numbers, dict):
        raise DalleError(f"expected a table [{SECTION}.{kind}], found {numbers!r}")
    return kind, numbers


def train_embedding_prior(pairs: Pairs, inputs: StageInputs, out: Path, options: TrainingOptions) -> dict[str, Any]:
    """Train the prior over embeddings that the recipe chooses; the last validation's metrics.

    Raises:
        DalleError: a recipe that does not fit the inputs, and as `training.loop.train`.
    """
    kind, numbers = chosen(recipes.read(options.config, options.sets))
    inputs.sizes |= {"kind": kind, "n_embedding": pairs.width}
    if options.init is None and kind == "autoregressive" and not numbers.get("n_component"):
        numbers = {**numbers, "n_component": n_component(numbers, pairs)}
    trainable = TRAINABLES[kind]
    start = warm_start.open_weights(options.init, trainable.kind, trainable.stage)
    takes_states = (numbers if start is None else start.require("model", dict)).get("captions") == "states"
    if takes_states:
        del inputs.sizes["n_text_vocab"]  # the CLIP's
    stage = TrainingStage(trainable, out, options, inputs, {f"{SECTION}.{kind}": numbers})
    if kind == "autoregressive":
        return stage.run(lambda: AutoregressivePriorTask(stage.model, stage.train, pairs, options.seed))
    folders = [out.parent] if start is None else [start.path.parent, out.parent]
    states = StatesOf.find(pairs.captions, *folders) if takes_states else None
    return stage.run(lambda: DiffusionPriorTask(stage.model, stage.train, pairs, options.seed, states))


def n_component(numbers: Mapping[str, Any], pairs: Pairs) -> int:
    """How many principal components hold 99% of the variance of the training embeddings."""
    train = recipes.build(EmbeddingPriorTrain, numbers.get("train", {}), f"{SECTION}.autoregressive.train")
    n = measured(pairs, pairs.split(train.validation)[0]).n_holding(HELD)
    if rank() == 0:
        console.note(f"{n} of {pairs.width} principal components hold {HELD:.0%} of the variance: n_component = {n}")
    return n
