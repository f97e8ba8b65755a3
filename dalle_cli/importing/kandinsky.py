"""Kandinsky 2.2 (Sber AI 2023) in diffusers' format: a DALL-E 2 whose decoder samples latents of a MOVQ.

It has two repositories, one with decoder and MOVQ, one with prior and CLIP. Local files of both lie in one folder.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dalle_cli.errors import DalleError
from dalle_cli.importing import clip
from dalle_cli.importing.publication import From, Importer, Part, Publication, Shapes, Source, n_layers
from dalle_cli.importing.unclip_prior import WEIGHTS, prior_sizes, prior_tensors, shape_of
from dalle_cli.importing.unets import decoder_sizes, decoder_tensors
from dalle_cli.models.clip import CLIP, CLIPConfig
from dalle_cli.models.decoder import Decoder, DecoderConfig
from dalle_cli.models.diffusion_prior import DiffusionPrior
from dalle_cli.models.movq import MOVQ, MOVQConfig

CONFIG, SCHEDULE = "config.json", "scheduler/scheduler_config.json"
UNET, AUTOENCODER, PRIOR = (f"{folder}/{WEIGHTS}" for folder in ("unet", "movq", "prior"))
TEXT, VISION, TOKENIZER = "text_encoder/", "image_encoder/", "tokenizer/"
PAPER = (
    "Kandinsky 2.2 (Sber AI 2023, arXiv 2310.03502), a DALL-E 2 of 4.6 billion parameters: a diffusion prior, a "
    "diffusion decoder to latents and a MOVQ from these to 512 pixels. It reads English."
)
PRIOR_SAMPLING = {
    "steps": 25, "guidance": 4.0, "best_of": 1, "sampler": "ddpm", "spacing": "linspace", "variance": "fixed_small",
    "clip": 10.0,
}  # fmt: skip
DECODER_SAMPLING = {"steps": 50, "guidance": 4.0, "sampler": "ddpm", "variance": "fixed_small", "clip": 0.0}
EXPECTED = {  # of the decoder's DDPMScheduler
    "beta_schedule": "linear", "prediction_type": "epsilon", "num_train_timesteps": 1000, "clip_sample": False,
    "thresholding": False, "variance_type": "fixed_small", "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False, "trained_betas": None,
}  # fmt: skip
LAYERS = {"norm_type": "spatial", "norm_num_groups": 32, "act_fn": "silu", "mid_block_add_attention": True}
# diffusers' words for the layers of a MOVQ, and ours, which are those of VQGAN's authors
WORDS = (
    ("mid_block.attentions.0", "mid.attn_1"), ("down_blocks.", "down."), (".resnets.", ".block."),
    (".attentions.", ".attn."), ("downsamplers.0.", "downsample."), ("upsamplers.0.", "upsample."),
    ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"), ("spatial_norm", "norm"), ("group_norm", "norm"),
    ("norm_layer", "norm"), ("conv_y", "scale"), ("conv_b", "shift"), ("to_out.0", "proj_out"), (".to_", "."),
)  # fmt: skip
CODEBOOK = r"quantize\.embedding\.weight"  # the decoder's latents are never quantized
VECTOR = "visual_projection.weight"


def movq_tensors(shapes: Shapes) -> dict[str, From]:
    """A MOVQ's tensors from those of diffusers' `VQModel` with norm_type "spatial"."""
    last = n_layers(shapes, r"decoder\.up_blocks\.(\d+)\.") - 1
    found: dict[str, From] = {}
    for name in shapes:
        if re.fullmatch(CODEBOOK, name):
            continue
        own = re.sub(r"up_blocks\.(\d+)", lambda level: f"up.{last - int(level[1])}", name)
        own = re.sub(r"mid_block\.resnets\.([01])", lambda block: f"mid.block_{int(block[1]) + 1}", own)
        for theirs, ours in WORDS:
            own = own.replace(theirs, ours)
        found[own] = From.one(name, _pointwise)
    return found


def _pointwise(x: Tensor) -> Tensor:
    """A matrix as a convolution of 1x1; anything else as it is."""
    return x[:, :, None, None] if x.ndim == 2 else x


def movq_sizes(shapes: Shapes, config: Mapping[str, Any], latent_size: int) -> MOVQConfig:
    """A MOVQ's sizes from shapes, for latents of this side.

    Raises:
        DalleError: an autoencoder of other layers, or a tensor that decides a size is missing.
    """
    for key, value in {"norm_type": "spatial", "norm_num_groups": 32, "act_fn": "silu"}.items():
        if config.get(key, value) != value:
            raise DalleError(
                f"expected {key} {value!r} in the MOVQ's config.json, found {config[key]!r}; it is another"
            )
    levels = [f"encoder.down_blocks.{i}" for i in range(n_layers(shapes, r"encoder\.down_blocks\.(\d+)\."))]
    widths = [shape_of(shapes, f"{level}.resnets.0.conv1.weight")[0] for level in levels]
    size = latent_size << (len(levels) - 1)
    return MOVQConfig(
        image_size=size, width=widths[0], multipliers=tuple(width // widths[0] for width in widths),
        depth=n_layers(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        attention=tuple(size >> i for i, level in enumerate(levels) if f"{level}.attentions.0.to_q.weight" in shapes),
        n_latent=shape_of(shapes, "decoder.conv_in.weight")[1],
    )  # fmt: skip


def decoder_schedule(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The decoder's fields for its schedule, and its sampling defaults, from the JSON of a `DDPMScheduler`.

    Raises:
        DalleError: another schedule.
    """
    for key, value in EXPECTED.items():
        if config.get(key, value) != value:
            raise DalleError(
                f"expected {key} {value!r} in {SCHEDULE}, found {config[key]!r}; this version knows no other"
            )
    betas, offset = (config.get("beta_start"), config.get("beta_end")), config.get("steps_offset", 0)
    if not all(isinstance(beta, float) for beta in betas) or offset not in (0, 1):
        found = f"{betas[0]!r}, {betas[1]!r} and {offset!r}"
        raise DalleError(f"expected beta_start, beta_end and a steps_offset of 0 or 1 in {SCHEDULE}, found {found}")
    spacing = "leading+1" if offset else "leading"
    return {"schedule": "linear", "betas": betas}, {**DECODER_SAMPLING, "spacing": spacing}


@torch.no_grad()
def null_embedding(projection: Tensor, source: Source, sizes: CLIPConfig, file: str) -> Tensor:
    """CLIP's embedding of an image that is zero after normalization, a mean gray: -> (D,).

    The publisher guides with it. `file` has the vision tower, of which no more than a layer is in memory at a time.
    """
    if projection.is_meta:  # only the shape is wanted
        return projection[:, 0]
    tensors = source.tensors(file)
    with torch.device("meta"):
        tower = CLIP(replace(sizes, text_layers=1)).vision_model.eval()

    def run(name: str, layer: nn.Module, x: Tensor) -> Tensor:
        state = {key: tensors.read(f"vision_model.{name}.{key}").float() for key in layer.state_dict()}
        layer.load_state_dict(state, assign=True)
        y: Tensor = layer(x)
        layer.to("meta")
        tensors.release()
        return y

    x = run("embeddings", tower.embeddings, torch.zeros(1, 3, sizes.image_size, sizes.image_size))
    x = run("pre_layrnorm", tower.pre_layrnorm, x)
    for i, layer in enumerate(tower.encoder.layers):
        x = run(f"encoder.layers.{i}", layer, x)
    return projection.float() @ run("post_layernorm", tower.post_layernorm, x[:, 0])[0]


def recognize(source: Source) -> bool:
    """Whether it has a decoder conditioned on image embeddings alone, and a MOVQ."""
    if not {UNET, AUTOENCODER, f"unet/{CONFIG}"} <= source.files.keys():
        return False
    return source.json(f"unet/{CONFIG}").get("addition_embed_type") == "image"


def files(source: Source) -> list[str]:
    """Weights, sizes, the decoder's schedule and CLIP's tokenizer; the prior only if there is one."""
    folders = ["unet/", "movq/", *(["prior/"] if _has_prior(source) else [])]
    return [
        SCHEDULE, *(folder + name for folder in folders for name in (CONFIG, WEIGHTS)),
        *(name for name in source.files if name.startswith(TOKENIZER)),
        *(folder + name for folder in (TEXT, VISION) for name in (CONFIG, clip.WEIGHTS[0])),
    ]  # fmt: skip


def _has_prior(source: Source) -> bool:
    return any(name.startswith("prior/") for name in source.files)


def plan(source: Source) -> Publication:
    """CLIP, prior, decoder and MOVQ."""
    towers = clip.parts(source, (TEXT, VISION), TOKENIZER)
    encoder = replace(towers.parts[0], header={"normalized": False})
    decoder = _decoder_part(source, encoder.sizes)
    sizes = movq_sizes(source.tensors(AUTOENCODER).shapes, source.json(f"movq/{CONFIG}"), decoder.sizes.image_size)
    movq = Part(
        "autoencoder.safetensors", "weights.autoencoder", MOVQ, sizes, (AUTOENCODER,), movq_tensors,
        ignored=(CODEBOOK,),
    )  # fmt: skip
    parts = (encoder, *([_prior_part(source)] if _has_prior(source) else []), decoder, movq)
    return Publication("Kandinsky 2.2", parts, towers.texts, "apache-2.0", paper=PAPER)


def _prior_part(source: Source) -> Part:
    sizes = prior_sizes(source.tensors(PRIOR).shapes, source.json(f"prior/{CONFIG}"))
    return Part(
        "prior.safetensors", "weights.prior.embeddings", DiffusionPrior, sizes, (PRIOR,), prior_tensors,
        PRIOR_SAMPLING, encoder="clip.safetensors",
    )  # fmt: skip


def _decoder_part(source: Source, towers: CLIPConfig) -> Part:
    """The U-Net, with CLIP's embedding of gray as its null embedding."""
    schedule, sampling = decoder_schedule(source.json(SCHEDULE))
    sizes: DecoderConfig = decoder_sizes(source.tensors(UNET).shapes, source.json(f"unet/{CONFIG}"), **schedule)
    vision = VISION + clip.WEIGHTS[0]

    def tensors(shapes: Shapes) -> dict[str, From]:
        null = From.one(VECTOR, lambda projection: null_embedding(projection, source, towers, vision))
        return decoder_tensors(shapes) | {"null_embedding": null}

    return Part(
        "decoder.safetensors", "weights.decoder", Decoder, sizes, (UNET, vision), tensors, sampling,
        ignored=(r"vision_model\..*",), encoder="clip.safetensors",
    )  # fmt: skip


IMPORTER = Importer(
    "Kandinsky 2.2", recognize, files, plan, also=("kandinsky-community/kandinsky-2-2-prior",), prior=("prior/",)
)
