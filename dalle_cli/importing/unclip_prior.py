"""Diffusion priors in diffusers' format, as `PriorTransformer` names them: Karlo's, ECLIPSE's, Kandinsky 2.2's."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dalle_cli.errors import DalleError
from dalle_cli.importing.publication import From, Part, Shapes, Source, check_values, n_layers, renamed
from dalle_cli.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
VARIANCES = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small", "learned_range": "learned_range"}
BLOCK = r"transformer_blocks\.(\d+)\."
PRIOR_NAMES = (
    (r"proj_in\.(weight|bias)", r"image_in.\1"),
    (r"time_embedding\.linear_1\.(weight|bias)", r"time_in.\1"),
    (r"time_embedding\.linear_2\.(weight|bias)", r"time_out.\1"),
    (r"encoder_hidden_states_proj\.(weight|bias)", r"captions.states_in.\1"),
    (r"embedding_proj\.(weight|bias)", r"captions.z_in.\1"),
    (r"norm_out\.(weight|bias)", r"norm.\1"),
    (r"proj_to_clip_embeddings\.(weight|bias)", r"out.\1"),
    (BLOCK + r"norm1\.(weight|bias)", r"blocks.\1.norm_1.\2"),
    (BLOCK + r"norm3\.(weight|bias)", r"blocks.\1.norm_2.\2"),
    (BLOCK + r"attn1\.to_out\.0\.(weight|bias)", r"blocks.\1.attention_out.\2"),
    (BLOCK + r"ff\.net\.0\.proj\.(weight|bias)", r"blocks.\1.mlp_in.\2"),
    (BLOCK + r"ff\.net\.2\.(weight|bias)", r"blocks.\1.mlp_out.\2"),
)


def prior_tensors(shapes: Shapes) -> dict[str, From]:
    """Our prior's tensors from those of diffusers' `PriorTransformer`."""
    made = renamed(shapes, PRIOR_NAMES)
    for i in range(n_layers(shapes, BLOCK)):
        for kind in ("weight", "bias"):
            parts = tuple(f"transformer_blocks.{i}.attn1.to_{part}.{kind}" for part in "qkv")
            made[f"blocks.{i}.qkv.{kind}"] = From(parts, _concatenated)
    made["position.weight"] = From.one("positional_embedding", _first_row)
    made["query"] = From.one("prd_embedding", lambda x: x[0, 0])
    if has_time(shapes):
        statistics = (_first_row, _first_row)
    else:  # ECLIPSE's output is the embedding itself; the statistics in its file are not used
        statistics = (lambda x: torch.zeros_like(x[0]), lambda x: torch.ones_like(x[0]))
    for name, build in zip(("mean", "std"), statistics, strict=True):
        made[f"principal.{name}"] = From.one(f"clip_{name}", build)
    return made


def has_time(shapes: Shapes) -> bool:
    """Whether a prior is conditioned on a timestep; ECLIPSE's is not."""
    return any(name.startswith("time_embedding.") for name in shapes)


def prior_sizes(shapes: Shapes, config: Mapping[str, Any]) -> DiffusionPriorConfig:
    """Our prior's sizes, from shapes but for the number of heads.

    Raises:
        DalleError: a tensor that decides a size is missing, or no number of heads.
    """
    width, n_embedding = shape_of(shapes, "proj_in.weight")
    heads, time = config.get("num_attention_heads"), has_time(shapes)
    if type(heads) is not int or heads < 1:
        raise DalleError(f"expected num_attention_heads in the prior's config.json, found {heads!r}; fetch it again")
    return DiffusionPriorConfig(
        n_layer=n_layers(shapes, BLOCK), n_head=heads, n_embd=width, n_embedding=n_embedding,
        n_text=shape_of(shapes, "positional_embedding")[1] - (4 if time else 3), captions="states",
        text_width=shape_of(shapes, "encoder_hidden_states_proj.weight")[1], time=time, normalized=False,
    )  # fmt: skip


def shape_of(shapes: Shapes, name: str) -> tuple[int, ...]:
    """The shape of a tensor. Raises: DalleError if there is none."""
    if name not in shapes:
        raise DalleError(f"expected a tensor {name}, found none; the file is of another model")
    return shapes[name]


def prior_part(source: Source, folder: str = "", scheduler: str = "") -> Part:
    """The prior in a folder of the source with its scheduler's folder; without one, a prior of one pass.

    Raises:
        DalleError: the files are of another model.
    """
    file = folder + WEIGHTS
    sizes = prior_sizes(source.tensors(file).shapes, source.json(folder + "config.json"))
    sampling: dict[str, Any] = {"steps": 1, "guidance": 1.0, "best_of": 1}
    if sizes.time:
        sampling = {"steps": 25, "guidance": 4.0, "best_of": 1, **unclip_schedule(source, scheduler, "sample")}
    return Part(
        "prior.safetensors", "weights.prior.embeddings", DiffusionPrior, sizes, (file,), prior_tensors, sampling,
        encoder="clip.safetensors",
    )  # fmt: skip


def unclip_schedule(source: Source, folder: str, prediction: str) -> dict[str, Any]:
    """Sampling defaults from the JSON of an `UnCLIPScheduler` whose network makes this prediction.

    Raises:
        DalleError: another schedule.
    """
    name = f"{folder}/scheduler_config.json"
    own = source.json(name)
    expected = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction}
    check_values(own, expected, name)
    if (variance := VARIANCES.get(own.get("variance_type", "fixed_small_log"))) is None:
        raise DalleError(f"expected a variance_type among {', '.join(VARIANCES)} in {name}, found another")
    clip = own.get("clip_sample_range", 1.0) if own.get("clip_sample", True) else 0.0
    return {"sampler": "ddpm", "spacing": "linspace", "variance": variance, "clip": float(clip)}


def _concatenated(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _first_row(x: Tensor) -> Tensor:
    return x[0]
