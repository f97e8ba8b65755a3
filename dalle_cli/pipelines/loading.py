"""Weights files to models, ready to run."""

from typing import Any, TypeVar

import torch
from torch import nn

from dalle_cli.artifacts import Artifact
from dalle_cli.artifacts.weights import check_fit, load_into
from dalle_cli.config import build
from dalle_cli.data import tokenizer as tokenizers
from dalle_cli.data.tokenizer import Tokenizer
from dalle_cli.errors import DalleError, one_line
from dalle_cli.hub import bundles
from dalle_cli.models.bart import EncoderDecoderConfig, EncoderDecoderPrior
from dalle_cli.models.clip import CLIP, CLIPConfig
from dalle_cli.models.decoder import Decoder, DecoderConfig
from dalle_cli.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig
from dalle_cli.models.dvae import DVAE, DVAEConfig
from dalle_cli.models.embedding_prior import AutoregressivePrior, AutoregressivePriorConfig
from dalle_cli.models.movq import MOVQ, MOVQConfig
from dalle_cli.models.patch_decoder import PatchDecoder, PatchDecoderConfig
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.models.upsampler import Upsampler, UpsamplerConfig
from dalle_cli.models.vqgan import VQGAN, VQGANConfig
from dalle_cli.pipelines.sizes import check_sizes
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
    MOVQ: MOVQConfig,
}


def load_model(model: type[M], weights: Artifact, device: torch.device, dtype: torch.dtype = torch.float32) -> M:
    """Load a model of the sizes in a weights file's header, in eval mode on `device`.

    With a `dtype` of bfloat16, matrices that are stored in it stay in it: half the memory of float32. Their products
    are the same then, as autocast rounds matrices to bfloat16 itself. Everything else is float32.

    Raises:
        DalleError: the tensors are not those that the header describes.
    """
    made = on_meta(model, weights)
    check_fit(made, weights)  # before a wrong header allocates memory
    if made.state_dict().keys() != {name for name, _ in (*made.named_parameters(), *made.named_buffers())}:
        made = model(made.config)  # there are buffers that no file has
    held = matrices(made, weights) if dtype == torch.bfloat16 else ()
    load_into(made, weights, device, held)
    return made.to(device).eval().requires_grad_(False)


def on_meta(model: type[M], weights: Artifact) -> M:
    """A model of the sizes in a weights file's header, without memory.

    Raises:
        DalleError: there is no model of these sizes.
    """
    check_sizes(weights)
    config = build(CONFIGS[model], weights.require("model", dict), "model")
    try:
        with torch.device("meta"):
            return model(config)
    except (RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:  # products that no tensor has
        found = f"sizes that no model has ({one_line(str(error), 200)}) in {weights.path}"
        raise DalleError(f"expected the weights that the header describes, found {found}; make it again") from None


def matrices(model: nn.Module, weights: Artifact) -> set[str]:
    """The matrices of a model's repeated blocks that are stored in bfloat16.

    What stands alone stays in float32: embeddings, and the last layer, which may compute in float32 under autocast.
    """
    stored, found = weights.headers[0].tensors, set()
    blocks = [name for name, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    for name, module in model.named_modules():
        matrix = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) and f"{name}.weight" in stored
        if matrix and stored[f"{name}.weight"].dtype == "BF16" and name.startswith(tuple(f"{b}." for b in blocks)):
            found.add(f"{name}.weight")
    return found


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


NETWORKS: dict[str, dict[str, type[nn.Module]]] = {  # kind of weights -> `kind` of the model, "" if it has none
    "weights.clip": {"": CLIP},
    "weights.dvae": {"": DVAE, "vqgan": VQGAN},
    "weights.prior.codes": {"": Prior, "encoder_decoder": EncoderDecoderPrior},
    "weights.prior.embeddings": {"": AutoregressivePrior, "diffusion": DiffusionPrior},
    "weights.decoder": {"": Decoder, "patch": PatchDecoder},
    "weights.upsampler": {"": Upsampler},
    "weights.autoencoder": {"": MOVQ},
}


def network(weights: Artifact) -> type[nn.Module]:
    """The class of the model that a weights file holds."""
    classes = NETWORKS[weights.kind]
    return classes.get(str(weights.require("model", dict).get("kind", "")), classes[""])


def load(weights: Artifact, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a weights file, as `load_model`: of a decoder the U-Net or the patch transformer, and so on."""
    return load_model(network(weights), weights, device, dtype)


def clip(weights: Artifact, device: torch.device, dtype: torch.dtype = torch.float32) -> CLIP:
    """The CLIP of a weights file."""
    return load_model(CLIP, weights, device, dtype)


def upsampler(weights: Artifact, device: torch.device, dtype: torch.dtype = torch.float32) -> Upsampler:
    """The upsampler of a weights file."""
    return load_model(Upsampler, weights, device, dtype)


def autoencoder(weights: Artifact, device: torch.device, dtype: torch.dtype = torch.float32) -> MOVQ:
    """The autoencoder of a weights file."""
    return load_model(MOVQ, weights, device, dtype)


def dvae(weights: Artifact, device: torch.device, dtype: torch.dtype = torch.float32) -> DVAE | VQGAN:
    """The model between images and codes of a weights file, of either kind."""
    loaded: DVAE | VQGAN = load(weights, device, dtype)
    return loaded


def decoder(weights: Artifact, device: torch.device, dtype: torch.dtype = torch.float32) -> DecoderNetwork:
    """The decoder of a weights file, of either network."""
    loaded: DecoderNetwork = load(weights, device, dtype)
    return loaded


def prior(weights: Artifact, device: torch.device, dtype: torch.dtype = torch.float32) -> Prior | EncoderDecoderPrior:
    """The prior over codes of a weights file, of either kind."""
    loaded: Prior | EncoderDecoderPrior = load(weights, device, dtype)
    return loaded


def embedding_prior(
    weights: Artifact, device: torch.device, dtype: torch.dtype = torch.float32
) -> DiffusionPrior | AutoregressivePrior:
    """The prior over embeddings of a weights file, of either kind."""
    loaded: DiffusionPrior | AutoregressivePrior = load(weights, device, dtype)
    return loaded
