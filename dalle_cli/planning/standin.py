"""Training tasks without data: a recipe's models on random batches, to plan with and to time.

Shapes: B batch, S side in pixels, T caption length, W side of the code grid.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dalle_cli import config as recipes
from dalle_cli.data.tokenizer import TokenizerConfig
from dalle_cli.errors import DalleError
from dalle_cli.models.clip import CLIP, CLIPConfig
from dalle_cli.models.dvae import DVAE, DVAEConfig
from dalle_cli.models.pixels import from_uint8
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.training.clip import CLIPTrain
from dalle_cli.training.config import TrainConfig
from dalle_cli.training.dvae import DVAETrain
from dalle_cli.training.loop import Batch
from dalle_cli.training.prior import PriorTrain, freeze

Loss = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Subject:
    """A model of a recipe: how it is built, what an update reads, and its loss."""

    name: str
    train: TrainConfig
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[Any, Batch, torch.Generator], Loss]
    splits: bool = True  # whether a batch may be computed in parts


class StandIn:
    """A task whose batches are random."""

    def __init__(self, subject: Subject, model: nn.Module):
        self.subject, self.model = subject, model

    def batches(self, start: int) -> Generator[Batch]:
        """Random batches of the recipe's size."""
        while True:
            yield self.subject.batch(self.subject.train.batch_size)

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> Loss:
        """The model's own loss."""
        return self.subject.loss(self.model, batch, generator)

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """There is nothing held out."""
        return {}

    def samples(self, model: nn.Module, device: torch.device) -> None:
        """There is nothing to see."""


class PartedStandIn(StandIn):
    """One whose batch may be computed in parts."""

    def split(self, batch: Batch, parts: int, step: int, generator: torch.Generator) -> list[Batch]:
        """Equal parts, whose captions are all as long."""
        return list(zip(*(t.chunk(parts) for t in batch), strict=True))


def stand_in(subject: Subject, model: nn.Module) -> StandIn:
    """A subject as a task of the training loop."""
    return (PartedStandIn if subject.splits else StandIn)(subject, model)


def subjects(table: Mapping[str, Any]) -> list[Subject]:
    """The models that a recipe describes, in the order of the chain, sized as the stages would size them.

    Raises:
        DalleError: no model in it, or numbers that do not fit.
    """
    makers = {"dvae": _dvae, "clip": _clip, "prior": _prior}
    found = [make(table) for name, make in makers.items() if name in table]
    if not found:
        raise DalleError(f"expected a recipe with [{'], ['.join(makers)}], found none of them; give another")
    return found


def caption_sizes(table: Mapping[str, Any]) -> dict[str, int]:
    """What the captions will decide, as `tokenize` would have it: vocabulary and length."""
    (tokenizer,) = recipes.section(table, "tokenizer", TokenizerConfig)
    return {"n_text_vocab": tokenizer.vocab_size, "n_text": tokenizer.length}


def prior_config(table: Mapping[str, Any]) -> PriorConfig:
    """The prior on the recipe's own captions and codes; its own keys stand where the recipe describes neither."""
    known = caption_sizes(table) if "tokenizer" in table else {}
    if "dvae" in table:
        dvae, _ = recipes.section(table, "dvae", DVAEConfig, train=DVAETrain)
        known |= {"n_image_vocab": dvae.n_vocab, "grid": dvae.grid}
    config: PriorConfig = recipes.section(table, "prior", PriorConfig, known, train=PriorTrain)[0]
    return config


def _pixels(n: int, side: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)


def _captions(n: int, vocab: int, length: int) -> Batch:
    """Captions as long as they may be."""
    return torch.randint(0, vocab, (n, length)), torch.full((n,), length)


def _dvae(table: Mapping[str, Any]) -> Subject:
    config, train = recipes.section(table, "dvae", DVAEConfig, train=DVAETrain)

    def loss(model: DVAE, batch: Batch, generator: torch.Generator) -> Loss:
        return model.loss(from_uint8(batch[0]), temperature=1.0, beta=1.0, generator=generator)

    return Subject("dvae", train, lambda: DVAE(config), lambda n: (_pixels(n, config.image_size),), loss)


def _clip(table: Mapping[str, Any]) -> Subject:
    known = {"n_text_vocab": caption_sizes(table)["n_text_vocab"]} if "tokenizer" in table else {}
    config, train = recipes.section(table, "clip", CLIPConfig, known, train=CLIPTrain)

    def batch(n: int) -> Batch:
        return (_pixels(n, config.image_size), *_captions(n, config.n_text_vocab, config.n_text))

    def loss(model: CLIP, batch: Batch, generator: torch.Generator) -> Loss:
        return model.loss(from_uint8(batch[0]), batch[1], batch[2])

    return Subject("clip", train, lambda: CLIP(config), batch, loss, splits=False)


def _prior(table: Mapping[str, Any]) -> Subject:
    config = prior_config(table)
    train = recipes.section(table, "prior", PriorConfig, train=PriorTrain)[1]

    def batch(n: int) -> Batch:
        codes = torch.randint(0, config.n_image_vocab, (n, config.grid, config.grid))
        read = (*_captions(n, config.n_text_vocab, config.n_text), codes)
        if not config.sketch or train.sketch_resampled:
            return read
        own = torch.rand(train.sketch_batch, 3, config.sketch, config.sketch)
        return (*read, *_captions(train.sketch_batch, config.n_text_vocab, config.n_text), own)

    def loss(model: Prior, batch: Batch, generator: torch.Generator) -> Loss:
        tokens, lengths, codes, *own = batch
        if model.sketch is None:
            return model.loss(tokens, lengths, codes)
        error = torch.zeros((), device=codes.device)
        if own:  # what it costs, not what it is: the noise is of a table that tensors without memory cannot look into
            words = model.sketch.read(own[0], model.written(own[1]))
            error = (model.sketch(own[2], own[1], words) - own[2]).square().mean()
        if train.sketch_only:
            return error, {}
        told = model.sketch.of(codes), torch.ones_like(lengths, dtype=torch.bool)
        loss, parts = model.loss(tokens, lengths, codes, told=told)
        return loss + error, parts

    def build() -> Prior:
        model = Prior(config)
        freeze(model, train)
        return model

    return Subject("prior", train, build, batch, loss)
