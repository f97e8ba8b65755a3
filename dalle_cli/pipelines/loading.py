"""Weights files to models, ready to run."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from dalle_cli.artifacts import Artifact
from dalle_cli.artifacts.weights import check_fit, load_into
from dalle_cli.config import build
from dalle_cli.errors import DalleError
from dalle_cli.models.clip import CLIP, CLIPConfig
from dalle_cli.models.decoder import Decoder, DecoderConfig
from dalle_cli.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig
from dalle_cli.models.dvae import DVAE, DVAEConfig
from dalle_cli.models.embedding_prior import EmbeddingPrior, EmbeddingPriorConfig
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.models.upsampler import Upsampler, UpsamplerConfig

M = TypeVar("M", bound=nn.Module)
C = TypeVar(
    "C", DVAEConfig, PriorConfig, CLIPConfig, DiffusionPriorConfig, EmbeddingPriorConfig, DecoderConfig, UpsamplerConfig
)


# Sizes that repeat a part of a model. Each repetition has tensors of its own, so none exceeds the number of tensors.
DEPTHS = ("n_layer", "n_blk_per_group", "vision_layers", "text_layers", "depth")


def _ready(make: Callable[[C], M], config: type[C], weights: Artifact, device: torch.device) -> M:
    """A model built from the header's sizes, in eval mode on `device`, with the file's weights."""
    told, n_tensors = weights.fact("model", dict), len(weights.headers[0].tensors)
    for name in DEPTHS:  # before a lying header has thousands of layers built, if only on the meta device
        if isinstance(told.get(name), int) and told[name] > n_tensors:
            found = f"{name} {told[name]} beside {n_tensors} tensors in {weights.path}"
            raise DalleError(f"expected the weights that the header tells of, found {found}; make it again")
    sizes = build(config, told, "model")
    with torch.device("meta"):
        check_fit(make(sizes), weights)  # before memory is taken for what a lying header promises
    model = make(sizes)
    load_into(model, weights)
    return model.to(device).eval().requires_grad_(False)


def dvae(weights: Artifact, device: torch.device) -> DVAE:
    """The dVAE of a weights file, ready to run on `device`.

    Raises:
        DalleError: the tensors are not those that the header tells of.
    """
    return _ready(DVAE, DVAEConfig, weights, device)


def prior(weights: Artifact, device: torch.device) -> Prior:
    """The prior over codes of a weights file, ready to run on `device`.

    Raises:
        DalleError: the tensors are not those that the header tells of.
    """
    return _ready(Prior, PriorConfig, weights, device)


def clip(weights: Artifact, device: torch.device) -> CLIP:
    """The CLIP of a weights file, ready to run on `device`.

    Raises:
        DalleError: the tensors are not those that the header tells of.
    """
    return _ready(CLIP, CLIPConfig, weights, device)


def embedding_prior(weights: Artifact, device: torch.device) -> DiffusionPrior | EmbeddingPrior:
    """The prior over embeddings of a weights file, of either kind, ready to run on `device`.

    Raises:
        DalleError: the tensors are not those that the header tells of.
    """
    if weights.fact("model", dict).get("kind") == "diffusion":
        return _ready(DiffusionPrior, DiffusionPriorConfig, weights, device)
    return _ready(EmbeddingPrior, EmbeddingPriorConfig, weights, device)


def decoder(weights: Artifact, device: torch.device) -> Decoder:
    """The diffusion decoder of a weights file, ready to run on `device`.

    Raises:
        DalleError: the tensors are not those that the header tells of.
    """
    return _ready(Decoder, DecoderConfig, weights, device)


def upsampler(weights: Artifact, device: torch.device) -> Upsampler:
    """The upsampler of a weights file, ready to run on `device`.

    Raises:
        DalleError: the tensors are not those that the header tells of.
    """
    return _ready(Upsampler, UpsamplerConfig, weights, device)
