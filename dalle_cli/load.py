"""Weights files to models, ready to run."""

from typing import TypeVar

import torch
from torch import nn

from dalle_cli.artifacts import Artifact
from dalle_cli.artifacts.weights import load_into
from dalle_cli.config import build
from dalle_cli.models.clip import CLIP, CLIPConfig
from dalle_cli.models.dvae import DVAE, DVAEConfig
from dalle_cli.models.prior import Prior, PriorConfig

M = TypeVar("M", bound=nn.Module)


def _ready(model: M, weights: Artifact, device: torch.device) -> M:
    load_into(model, weights)
    return model.to(device).eval().requires_grad_(False)


def dvae(weights: Artifact, device: torch.device) -> DVAE:
    """Raises: DalleError if the tensors are not those that the header tells of."""
    return _ready(DVAE(build(DVAEConfig, weights.config["model"], "model")), weights, device)


def prior(weights: Artifact, device: torch.device) -> Prior:
    """Raises: DalleError if the tensors are not those that the header tells of."""
    return _ready(Prior(build(PriorConfig, weights.config["model"], "model")), weights, device)


def clip(weights: Artifact, device: torch.device) -> CLIP:
    """Raises: DalleError if the tensors are not those that the header tells of."""
    return _ready(CLIP(build(CLIPConfig, weights.config["model"], "model")), weights, device)
