"""The models that a recipe describes, of both systems, as planning wants them: how to build, what a batch is, the loss.

A noised picture's loss is computed with a schedule that has no memory, so nothing here looks at its numbers.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dalle_cli import config as recipes
from dalle_cli.diffusion.process import Process
from dalle_cli.errors import DalleError
from dalle_cli.models import unet
from dalle_cli.models.clip import CLIPConfig
from dalle_cli.models.decoder import Decoder, DecoderConfig
from dalle_cli.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig
from dalle_cli.models.embedding_prior import AutoregressivePrior, AutoregressivePriorConfig
from dalle_cli.models.upsampler import Upsampler, UpsamplerConfig, enlarge
from dalle_cli.planning import standin
from dalle_cli.planning.standin import Loss, Subject, caption_sizes
from dalle_cli.sampling.decoder import unet_process
from dalle_cli.sampling.embeddings import prior_process
from dalle_cli.training.clip import CLIPTrain
from dalle_cli.training.decoder import DecoderTrain, loss_of
from dalle_cli.training.denoising import denoising
from dalle_cli.training.embedding_prior import EmbeddingPriorTrain
from dalle_cli.training.loop import Batch
from dalle_cli.training.upsampler import UpsamplerTrain


def subjects(table: Mapping[str, Any]) -> list[Subject]:
    """The models that a recipe describes, in the order of both chains, sized as the stages would size them.

    Raises:
        DalleError: no model in it, or numbers that do not fit.
    """
    first, upsamplers = ("dvae", "clip", "prior"), dict.fromkeys(("upsampler_1", "upsampler_2"), _upsampler)
    makers = {"embedding_prior": _embedding_priors, "decoder": _decoder, **upsamplers}
    found = standin.subjects(table) if any(name in table for name in first) else []
    found += [subject for name, make in makers.items() if name in table for subject in make(table, name)]
    if not found:
        raise DalleError(f"expected a recipe with [{'], ['.join([*first, *makers])}], found none of them; give another")
    return found


def conditions(table: Mapping[str, Any]) -> dict[str, int]:
    """What captions and CLIP decide of the models of DALL-E 2, where the recipe describes these."""
    known = caption_sizes(table) if "tokenizer" in table else {}
    if "clip" in table:
        words = {key: n for key, n in known.items() if key == "n_text_vocab"}
        known["n_embedding"] = recipes.section(table, "clip", CLIPConfig, words, train=CLIPTrain)[0].n_proj
    return known


def _captions(n: int, length: int) -> Batch:
    return torch.zeros(n, length, dtype=torch.int64), torch.full((n,), length)  # as long as they may be


def _noising(n: int, side: int) -> Batch:
    pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)
    return pixels, torch.zeros(n, dtype=torch.int64), torch.randn(n, 3, side, side)


def _process(config: unet.UNetConfig) -> Process:
    made = unet_process(replace(config, prediction="v"))  # which looks at no number of a schedule that has no memory
    object.__setattr__(made, "prediction", config.prediction)
    return made


def _embedding_priors(table: Mapping[str, Any], name: str) -> list[Subject]:
    """Both that a recipe has numbers of, or its choice; as many components as the paper has where they are measured."""
    body, told, made = table[name], conditions(table), []
    for kind in [k for k in ("diffusion", "autoregressive") if k in body] or [body.get("kind", "diffusion")]:
        numbers, where = dict(body.get(kind, {})), f"{name}.{kind}"
        cls: Any = DiffusionPriorConfig if kind == "diffusion" else AutoregressivePriorConfig
        if cls is AutoregressivePriorConfig and not numbers.get("n_component"):
            numbers["n_component"] = min(cls.n_component, {**numbers, **told}.get("n_embedding", cls.n_embedding))
        settings = recipes.section({where: numbers}, where, cls, {"kind": kind, **told}, train=EmbeddingPriorTrain)
        made.append((_diffusion if kind == "diffusion" else _autoregressive)(*settings))
    return made


def _diffusion(config: DiffusionPriorConfig, train: EmbeddingPriorTrain) -> Subject:
    def batch(n: int) -> Batch:
        z_t, z_i, noise = torch.randn(3, n, config.n_embedding)
        return (*_captions(n, config.n_text), z_t, z_i, noise, torch.zeros(n, dtype=torch.int64))

    def loss(model: DiffusionPrior, batch: Any, generator: torch.Generator) -> Loss:
        tokens, lengths, z_t, z_i, noise, t = batch
        x_start = model.principal.standardize(z_i)
        return model.loss(prior_process(model).add_noise(x_start, t, noise), t, tokens, lengths, z_t, x_start)

    return Subject("diffusion_prior", train, partial(DiffusionPrior, config), batch, loss)


def _autoregressive(config: AutoregressivePriorConfig, train: EmbeddingPriorTrain) -> Subject:
    def batch(n: int) -> Batch:
        return (*_captions(n, config.n_text), *torch.randn(2, n, config.n_embedding))

    def loss(model: AutoregressivePrior, batch: Any, generator: torch.Generator) -> Loss:
        tokens, lengths, z_t, z_i = batch
        return model.loss(tokens, lengths, z_t, model.quantize_dot((z_i * z_t).sum(-1)), model.quantize(z_i))

    return Subject("autoregressive_prior", train, partial(AutoregressivePrior, config), batch, loss)


def _decoder(table: Mapping[str, Any], name: str) -> list[Subject]:
    """One that reads captions, unless the recipe says n_text = 0."""
    told = conditions(table)
    if isinstance(table[name], dict) and table[name].get("n_text") == 0:
        told = {key: n for key, n in told.items() if key == "n_embedding"}
    config, train = recipes.section(table, name, DecoderConfig, told, train=DecoderTrain)

    def batch(n: int) -> Batch:
        given = torch.randn(n, config.n_embedding), torch.ones(n, dtype=torch.bool)
        return (*_noising(n, config.image_size), *given, *_captions(n, config.n_text))

    def loss(model: Decoder, batch: Any, generator: torch.Generator) -> Loss:
        images, t, noise, *told = batch
        return loss_of(model, _process(config), images, t, noise, told, 0.0)

    return [Subject(name, train, partial(Decoder, config), batch, loss)]


def _upsampler(table: Mapping[str, Any], name: str) -> list[Subject]:
    """On crops, as it is trained."""
    config, train = recipes.section(table, name, UpsamplerConfig, train=UpsamplerTrain)
    side, low = config.image_size // train.crop, config.image_size // train.crop // config.factor

    def batch(n: int) -> Batch:
        return (*_noising(n, side), torch.randn(n, 3, low, low), torch.full((n,), -1))

    def loss(model: Upsampler, batch: Any, generator: torch.Generator) -> Loss:
        beside = enlarge(batch[3], config.factor), batch[4]
        return denoising(_process(config), lambda x, t: model(x, t, *beside), *batch[:3])

    return [Subject(name, train, partial(Upsampler, config), batch, loss)]
