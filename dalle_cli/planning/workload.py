"""Synthetic workloads: the training tasks of a recipe on random batches, in place of a data set.

Shapes: B batch, S image side in pixels, s side of the low-resolution image, T caption length, D embedding width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import numpy as np
import torch

from dalle_cli import config as recipes
from dalle_cli.data.tokenizer import TokenizerConfig
from dalle_cli.errors import DalleError
from dalle_cli.models.clip import CLIPConfig
from dalle_cli.models.diffusion_prior import DiffusionPriorConfig
from dalle_cli.models.dvae import DVAEConfig
from dalle_cli.models.embedding_prior import AutoregressivePriorConfig
from dalle_cli.models.prior import PriorConfig
from dalle_cli.models.upsampler import UpsamplerConfig
from dalle_cli.pipelines import loading
from dalle_cli.training import embedding_prior
from dalle_cli.training import prior as token_prior
from dalle_cli.training.clip import CLIPTask, CLIPTrain
from dalle_cli.training.config import TrainConfig
from dalle_cli.training.decoder import DecoderTask, DecoderTrain, trainable
from dalle_cli.training.dvae import DVAETask, DVAETrain
from dalle_cli.training.embedding_prior import AutoregressivePriorTask, DiffusionPriorTask, EmbeddingPriorTrain
from dalle_cli.training.prior import PriorTask, PriorTrain
from dalle_cli.training.task import Batch, Task
from dalle_cli.training.upsampler import UpsamplerTask, UpsamplerTrain


@dataclass(frozen=True)
class Workload:
    """One model of a recipe: its training settings, its task, and random batches of any size."""

    name: str
    train: TrainConfig
    task: Callable[[Any], Task]  # from training settings
    batch: Callable[[int], Batch]  # from a number of rows


class NoData:
    """Stands for a data set, or for pairs: a task can be built on it, and the batches come from the workload."""

    ids: tuple[str, ...] = ()
    captions: tuple[tuple[str, ...], ...] = ()

    def split(self, share: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """One row to train on, none held out."""
        return np.zeros(1, np.int64), np.zeros(0, np.int64)

    def unnormalized(self) -> "NoData":
        """The same: there are no embeddings."""
        return self


class Unmeasured:
    """A task that keeps the initial statistics of its training embeddings, for a workload has none."""

    def _measure(self) -> None: ...

    def _measure_ranges(self) -> None: ...


class SyntheticDiffusionPrior(Unmeasured, DiffusionPriorTask):
    """The diffusion prior's task on random embeddings."""


class SyntheticAutoregressivePrior(Unmeasured, AutoregressivePriorTask):
    """The autoregressive prior's task on random embeddings."""


NO_DATA = cast(Any, NoData())


def workloads(table: Mapping[str, Any]) -> list[Workload]:
    """The models that a recipe describes, in the order of the two systems, with the sizes that the stages give them.

    Raises:
        DalleError: no model in the recipe, or settings that do not fit.
    """
    makers: dict[str, Callable[[Mapping[str, Any], str], list[Workload]]] = {
        "dvae": _dvae, "clip": _clip, "prior": _prior, "embedding_prior": _embedding_priors, "decoder": _decoder,
        "upsampler_1": _upsampler, "upsampler_2": _upsampler,
    }  # fmt: skip
    found = [workload for name, make in makers.items() if name in table for workload in make(table, name)]
    if not found:
        raise DalleError(f"expected a recipe with [{'], ['.join(makers)}], found none of them; give another")
    return found


def caption_sizes(table: Mapping[str, Any]) -> dict[str, int]:
    """Vocabulary and length of the captions that `tokenize` would write; nothing where the recipe has no tokenizer."""
    if "tokenizer" not in table:
        return {}
    (tokenizer,) = recipes.section(table, "tokenizer", TokenizerConfig)
    return {"n_text_vocab": tokenizer.vocab_size, "n_text": tokenizer.length}


def condition_sizes(table: Mapping[str, Any]) -> dict[str, int]:
    """Caption sizes, and the embedding width where the recipe has a CLIP: what DALL-E 2's models are given."""
    known = caption_sizes(table)
    if "clip" in table:
        known["n_embedding"] = _clip_settings(table)[0].n_proj
    return known


def prior_config(table: Mapping[str, Any]) -> PriorConfig:
    """The token prior for the recipe's own captions and codes; without these sections its own keys count."""
    known = caption_sizes(table)
    if "dvae" in table:
        dvae, _ = recipes.section(table, "dvae", DVAEConfig, train=DVAETrain)
        known |= {"n_image_vocab": dvae.n_vocab, "grid": dvae.grid}
    return cast(PriorConfig, recipes.section(table, "prior", PriorConfig, known, train=PriorTrain)[0])


def _images(n: int, side: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)


def _captions(n: int, vocab: int, length: int) -> Batch:
    """Captions that fill their length: tokens (B, T), lengths (B,)."""
    return torch.randint(0, max(vocab, 1), (n, length)), torch.full((n,), length)


def _dvae(table: Mapping[str, Any], name: str) -> list[Workload]:
    config, train = recipes.section(table, name, DVAEConfig, train=DVAETrain)
    task = lambda train: DVAETask(config, train, NO_DATA, 0, 0)  # noqa: E731
    return [Workload(name, train, task, lambda n: (_images(n, config.image_size),))]


def _clip_settings(table: Mapping[str, Any]) -> list[Any]:
    known = {key: n for key, n in caption_sizes(table).items() if key == "n_text_vocab"}
    return recipes.section(table, "clip", CLIPConfig, known, train=CLIPTrain)


def _clip(table: Mapping[str, Any], name: str) -> list[Workload]:
    config, train = _clip_settings(table)

    def batch(n: int) -> Batch:
        return (_images(n, config.image_size), *_captions(n, config.n_text_vocab, config.n_text))

    return [Workload(name, train, lambda train: CLIPTask(config, train, NO_DATA, NO_DATA, 0, 0), batch)]


def _prior(table: Mapping[str, Any], name: str) -> list[Workload]:
    config = prior_config(table)
    train = recipes.section(table, name, PriorConfig, train=PriorTrain)[1]

    def codes(n: int) -> Batch:
        grid = torch.randint(0, config.n_image_vocab, (n, config.grid, config.grid))
        return (*_captions(n, config.n_text_vocab, config.n_text), grid)

    def batch(n: int) -> Batch:
        return (*codes(n), *(codes(train.sketch_batch) if config.sketch and not train.sketch_resampled else ()))

    def task(train: PriorTrain) -> PriorTask:
        with (  # a sketch is made of the colors of a trained dVAE's codes
            mock.patch.object(token_prior, "code_colors", return_value=torch.zeros(config.n_image_vocab, 3)),
            mock.patch.object(loading, "dvae"),
        ):
            return PriorTask(config, train, NO_DATA, None, 0, NO_DATA)

    return [Workload(name, train, task, batch)]


def _embedding_priors(table: Mapping[str, Any], name: str) -> list[Workload]:
    """The priors that have a table of their own, else the recipe's choice.

    The number of components that training would measure is taken as the paper's.
    """
    chosen_kind, _ = embedding_prior.chosen(table)  # refuses what training would
    body, known, made = table[name], condition_sizes(table), []
    for kind in [kind for kind in embedding_prior.KINDS if kind in body] or [chosen_kind]:
        where, numbers = f"{name}.{kind}", body.get(kind, {})
        config: Any = DiffusionPriorConfig if kind == "diffusion" else AutoregressivePriorConfig
        if config is AutoregressivePriorConfig and isinstance(numbers, dict) and not numbers.get("n_component"):
            width = {**numbers, **known}.get("n_embedding", config.n_embedding)
            numbers = {**numbers, "n_component": min(config.n_component, width)}
        settings = recipes.section({where: numbers}, where, config, {"kind": kind, **known}, train=EmbeddingPriorTrain)
        made.append(_embedding_prior(*settings))
    return made


def _embedding_prior(config: Any, train: EmbeddingPriorTrain) -> Workload:
    diffusion = isinstance(config, DiffusionPriorConfig)

    def batch(n: int) -> Batch:
        z_t, z_i, noise = torch.nn.functional.normalize(torch.randn(3, n, config.n_embedding), dim=-1)
        captions, lengths = _captions(n, config.n_text_vocab, config.n_text)
        if diffusion and config.captions == "states":
            captions = torch.randn(n, config.n_text, config.text_width)
        read = (captions, lengths, z_t, z_i)
        return (*read, torch.randint(0, config.n_timestep, (n,)), noise) if diffusion else read

    cls: Any = SyntheticDiffusionPrior if diffusion else SyntheticAutoregressivePrior
    name = "diffusion_prior" if diffusion else "autoregressive_prior"
    return Workload(name, train, lambda train: cls(config, train, NO_DATA, 0), batch)


def _decoder(table: Mapping[str, Any], name: str) -> list[Workload]:
    """A decoder that reads captions, unless the recipe has n_text = 0."""
    known = condition_sizes(table)
    if isinstance(table[name], dict) and table[name].get("n_text") == 0:
        known = {key: n for key, n in known.items() if key == "n_embedding"}
    config, train = recipes.section(table, name, trainable(table[name]).model, known, train=DecoderTrain)

    def batch(n: int) -> Batch:
        embeddings = torch.randn(n, config.n_embedding), torch.ones(n, dtype=torch.bool)
        captions = _captions(n, config.n_text_vocab, config.n_text)
        if config.captions == "states":
            captions = torch.randn(n, config.n_text, config.text_width), captions[1], torch.randn(n, config.n_embedding)
        return (*_noised(n, config.image_size, config.n_timestep), *embeddings, *captions)

    return [Workload(name, train, lambda train: DecoderTask(config, train, NO_DATA, NO_DATA, 0, 0), batch)]


def _upsampler(table: Mapping[str, Any], name: str) -> list[Workload]:
    """An upsampler on crops, as it is trained."""
    config, train = recipes.section(table, name, UpsamplerConfig, train=UpsamplerTrain)
    side, low = config.image_size // train.crop, config.image_size // train.crop // config.factor

    def batch(n: int) -> Batch:
        small = torch.randn(n, 3, low, low)
        noise = torch.randn(n, 3, low, low) if int(config.low_noise * config.n_timestep) else torch.zeros(n, 0)
        return (*_noised(n, side, config.n_timestep), small, torch.full((n,), -1), noise)

    return [Workload(name, train, lambda train: UpsamplerTask(config, train, NO_DATA, 0, 0), batch)]


def _noised(n: int, side: int, n_timestep: int) -> Batch:
    """Images (B, 3, S, S) uint8, noise, timesteps (B,)."""
    return _images(n, side), torch.randn(n, 3, side, side), torch.randint(0, n_timestep, (n,))
