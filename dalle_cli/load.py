"""Weights files to models, ready to run."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from dalle_cli.artifacts import Artifact
from dalle_cli.artifacts.weights import check_fit, load_into
from dalle_cli.config import build
from dalle_cli.models.clip import CLIP, CLIPConfig
from dalle_cli.models.dvae import DVAE, DVAEConfig
from dalle_cli.models.prior import Prior, PriorConfig

M = TypeVar("M", bound=nn.Module)
C = TypeVar("C", DVAEConfig, PriorConfig, CLIPConfig)


def _ready(make: Callable[[C], M], config: type[C], weights: Artifact, device: torch.device) -> M:
    sizes = build(config, weights.fact("model", dict), "model")
    with torch.device("meta"):
        check_fit(make(sizes), weights)  # before memory is taken for what a lying header promises
    model = make(sizes)
    load_into(model, weights)
    return model.to(device).eval().requires_grad_(False)


def dvae(weights: Artifact, device: torch.device) -> DVAE:
    """Raises: DalleError if the tensors are not those that the header tells of."""
    return _ready(DVAE, DVAEConfig, weights, device)


def prior(weights: Artifact, device: torch.device) -> Prior:
    """Raises: DalleError if the tensors are not those that the header tells of."""
    return _ready(Prior, PriorConfig, weights, device)


def clip(weights: Artifact, device: torch.device) -> CLIP:
    """Raises: DalleError if the tensors are not those that the header tells of."""
    return _ready(CLIP, CLIPConfig, weights, device)
