"""Weights files to models, ready to run."""

from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from dalle_cli.artifacts import Artifact
from dalle_cli.artifacts.weights import check_fit, load_into
from dalle_cli.config import build
from dalle_cli.data import tokenizer as tokenizers
from dalle_cli.data.tokenizer import Tokenizer
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.models.bart import EncoderDecoderConfig, EncoderDecoderPrior
from dalle_cli.models.clip import CLIP, CLIPConfig
from dalle_cli.models.decoder import Decoder, DecoderConfig
from dalle_cli.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig
from dalle_cli.models.dvae import DVAE, DVAEConfig
from dalle_cli.models.embedding_prior import AutoregressivePrior, AutoregressivePriorConfig
from dalle_cli.models.patch_decoder import PatchDecoder, PatchDecoderConfig
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.models.upsampler import Upsampler, UpsamplerConfig
from dalle_cli.models.vqgan import VQGAN, VQGANConfig
from dalle_cli.sampling.decoder import DecoderNetwork

M = TypeVar("M", bound=nn.Module)
CONFIGS: dict[type[nn.Module], type[Any]] = {
    DVAE: DVAEConfig,
    VQGAN: VQGANConfig,
    Prior: PriorConfig,
    EncoderDecoderPrior: EncoderDecoderConfig,
    CLIP: CLIPConfig,
    DiffusionPrior: DiffusionPriorConfig,
    AutoregressivePrior: AutoregressivePriorConfig,
    Decoder: DecoderConfig,
    PatchDecoder: PatchDecoderConfig,
    Upsampler: UpsamplerConfig,
}
# Sizes that repeat a part of a model. Each repetition has its own tensors, so no size exceeds the number of tensors.
DEPTHS = ("n_layer", "n_blk_per_group", "vision_layers", "text_layers", "depth")


def load_model(model: type[M], weights: Artifact, device: torch.device) -> M:
    """Load a model of the sizes in a weights file's header, in eval mode on `device`.

    Raises:
        DalleError: the tensors are not those that the header describes.
    """
    sizes, n_tensors = weights.require("model", dict), len(weights.headers[0].tensors)
    for name in DEPTHS:  # a wrong header could build thousands of layers, if only on the meta device
        if isinstance(sizes.get(name), int) and sizes[name] > n_tensors:
            found = f"{name} {sizes[name]} beside {n_tensors} tensors in {weights.path}"
            raise DalleError(f"expected the weights that the header describes, found {found}; make it again")
    config = build(CONFIGS[model], sizes, "model")
    with torch.device("meta"):
        check_fit(model(config), weights)  # before a wrong header allocates memory
    made = model(config)
    load_into(made, weights)
    return made.to(device).eval().requires_grad_(False)


def tokenizer(weights: Artifact) -> Tokenizer:
    """The tokenizer that these weights were trained with, beside them.

    Raises:
        DalleError: there is none, or its tokens are not all in the vocabulary of the weights.
    """
    path, vocab = bundles.tokenizer(weights), weights.require("model", dict).get("n_text_vocab")
    found = tokenizers.load(path)
    if isinstance(vocab, int) and found.vocab_size > vocab:
        raise DalleError(
            f"expected a tokenizer of at most {vocab} tokens, as in {weights.path}, found {found.vocab_size}: {path}; "
            "put the one of these weights there"
        )
    return found


# (weights, device) -> the model
clip = partial(load_model, CLIP)
upsampler = partial(load_model, Upsampler)


def dvae(weights: Artifact, device: torch.device) -> DVAE | VQGAN:
    """The model between images and codes of a weights file, of either kind."""
    if weights.require("model", dict).get("kind") == "vqgan":
        return load_model(VQGAN, weights, device)
    return load_model(DVAE, weights, device)


def prior(weights: Artifact, device: torch.device) -> Prior | EncoderDecoderPrior:
    """The prior over codes of a weights file, of either kind."""
    if weights.require("model", dict).get("kind") == "encoder_decoder":
        return load_model(EncoderDecoderPrior, weights, device)
    return load_model(Prior, weights, device)


def decoder(weights: Artifact, device: torch.device) -> DecoderNetwork:
    """The decoder of a weights file, of either network."""
    if weights.require("model", dict).get("kind") == "patch":
        return load_model(PatchDecoder, weights, device)
    return load_model(Decoder, weights, device)


def embedding_prior(weights: Artifact, device: torch.device) -> DiffusionPrior | AutoregressivePrior:
    """The prior over embeddings of a weights file, of either kind."""
    if weights.require("model", dict).get("kind") == "diffusion":
        return load_model(DiffusionPrior, weights, device)
    return load_model(AutoregressivePrior, weights, device)
