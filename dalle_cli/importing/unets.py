"""U-Nets in diffusers' format: their tensors by our names, and their sizes from shapes.

Karlo's decoder and upsampler and Kandinsky's decoder have the same blocks. What conditions a decoder is in Karlo a
`UnCLIPTextProjModel` in a file of its own, in Kandinsky layers of the U-Net's file.

K width of the context's tokens, n how many tokens an embedding becomes.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dalle_cli.errors import DalleError
from dalle_cli.importing.publication import From, Shapes, check_values, n_layers, renamed
from dalle_cli.importing.unclip_prior import shape_of
from dalle_cli.models.decoder import DecoderConfig
from dalle_cli.models.upsampler import UpsamplerConfig

ENDS = ("weight", "bias")
AROUND = {name: name for name in ("time_embedding.linear_1", "time_embedding.linear_2", "conv_in", "conv_out")}
AROUND["norm_out"] = "conv_norm_out"
BLOCK = {
    "norm1": "norm1", "conv1": "conv1", "time": "time_emb_proj", "norm2": "norm2", "conv2": "conv2",
    "shortcut": "conv_shortcut",
}  # fmt: skip
ATTENTION = {
    "norm": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "context_kv": ("add_k_proj", "add_v_proj"),
    "out": ("to_out.0",),
}  # fmt: skip
KARLO = (  # of UnCLIPTextProjModel
    (r"learned_classifier_free_guidance_embeddings", r"null_embedding"),
    (r"clip_image_embeddings_project_to_time_embeddings\.(weight|bias)", r"embedding_time.\1"),
    (r"embedding_proj\.(weight|bias)", r"text_time.\1"),
    (r"encoder_hidden_states_proj\.(weight|bias)", r"text.project.\1"),
    (r"text_encoder_hidden_states_norm\.(weight|bias)", r"text.norm.\1"),
)
KANDINSKY = (
    (r"add_embedding\.image_proj\.(weight|bias)", r"embedding_time.\1"),
    (r"add_embedding\.image_norm\.(weight|bias)", r"embedding_time_norm.\1"),
    (r"encoder_hid_proj\.image_embeds\.(weight|bias)", r"embedding_tokens.\1"),
    (r"encoder_hid_proj\.norm\.(weight|bias)", r"embedding_tokens_norm.\1"),
)
# What no shape shows: values in a U-Net's config.json for blocks like ours; a file leaves out what was not known then
BLOCKS = {
    "act_fn": "silu", "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0, "center_input_sample": False,
    "mid_block_scale_factor": 1, "only_cross_attention": False, "resnet_out_scale_factor": 1,
    "resnet_skip_time_act": False, "time_embedding_type": "positional",
}  # fmt: skip


def unet_tensors(shapes: Shapes, file: str = "", unet: str = "unet") -> dict[str, From]:
    """A U-Net's tensors from those of diffusers' `UNet2DConditionModel` or `UNet2DModel`.

    `file` is what its names begin with where several files have the same ones; `unet` is our name of the network.
    """
    found: dict[str, From] = {}
    for own, theirs in _layers(*_counts(shapes, file)):
        for end in ENDS:
            names = tuple(f"{file}{name}.{end}" for name in theirs)
            if names[0] in shapes:
                found[f"{unet}.{own}.{end}"] = From(names, _concatenated)
    return found


def _counts(shapes: Shapes, file: str) -> tuple[int, int]:
    """The number of sizes, and of residual blocks at each of them."""
    start = re.escape(file) + r"down_blocks\."
    return n_layers(shapes, rf"{start}(\d+)\."), n_layers(shapes, rf"{start}0\.resnets\.(\d+)\.")


def _layers(n_levels: int, depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """All layers that there may be: our name, and theirs, several where ours holds what they have apart."""
    yield from ((own, (theirs,)) for own, theirs in AROUND.items())
    for block, (residual, attention) in _blocks(n_levels, depth):
        yield from ((f"{block}.{own}", (f"{residual}.{theirs}",)) for own, theirs in BLOCK.items())
        for own, parts in ATTENTION.items():
            yield f"{block}.attention.{own}", tuple(f"{attention}.{part}" for part in parts)


def _blocks(n_levels: int, depth: int) -> Iterator[tuple[str, tuple[str, str]]]:
    """Our blocks, counted through, and theirs, by size: the residual block and the attention that follows it."""
    yield "middle.0", ("mid_block.resnets.0", "mid_block.attentions.0")
    yield "middle.1", ("mid_block.resnets.1", "mid_block.attentions.1")
    for level in range(n_levels):
        for way, n, resize in (("down", depth, "downsamplers"), ("up", depth + 1, "upsamplers")):
            theirs = f"{way}_blocks.{level}"
            for i in range(n):
                yield f"{way}.{level * (n + 1) + i}", (f"{theirs}.resnets.{i}", f"{theirs}.attentions.{i}")
            yield f"{way}.{level * (n + 1) + n}", (f"{theirs}.{resize}.0", f"{theirs}.no_attention")


def decoder_tensors(shapes: Shapes) -> dict[str, From]:
    """A decoder's tensors: those of its U-Net, and what puts embedding and caption into it, Karlo's or Kandinsky's.

    Kandinsky's file has no null embedding.
    """
    found = unet_tensors(shapes) | renamed(shapes, (*KARLO, *KANDINSKY))
    if "clip_extra_context_tokens_proj.weight" in shapes:
        width = shape_of(shapes, "encoder_hidden_states_proj.weight")[0]
        for end in ENDS:
            by_token = partial(_token_major, width=width)
            found[f"embedding_tokens.{end}"] = From.one(f"clip_extra_context_tokens_proj.{end}", by_token)
    return found


def upsampler_tensors(shapes: Shapes, first: str = "", last: str = "") -> dict[str, From]:
    """An upsampler's tensors from the files, by name, of its U-Net and of that for the last step, "" for none."""
    if not last:
        return unet_tensors(shapes)
    return unet_tensors(shapes, f"{first}:") | unet_tensors(shapes, f"{last}:", "last")


def decoder_sizes(shapes: Shapes, config: Mapping[str, Any], **more: Any) -> DecoderConfig:
    """A decoder's sizes from the shapes of all its files and its U-Net's config.json; `more` are those of neither.

    Raises:
        DalleError: a U-Net of other blocks, or a tensor that decides a size is missing.
    """
    karlo = "encoder_hidden_states_proj.weight" in shapes
    tokens = "clip_extra_context_tokens_proj.weight" if karlo else "encoder_hid_proj.image_embeds.weight"
    widths = shape_of(shapes, "encoder_hidden_states_proj.weight" if karlo else "encoder_hid_proj.norm.weight")
    n_rows, n_embedding = shape_of(shapes, tokens)
    texts = {"n_text": 77, "captions": "states", "text_width": widths[-1]} if karlo else {"n_text": 0}
    channels = shape_of(shapes, "conv_in.weight")[1]
    return DecoderConfig(
        **{**_unet_sizes(shapes, config, channels), **texts, **more}, n_embedding=n_embedding, unit_variance=False,
        n_extra=n_rows // widths[0], context_width=widths[0], embedding_norm=not karlo,
    )  # fmt: skip


def upsampler_sizes(
    shapes: Shapes, config: Mapping[str, Any], first: str = "", last: str = "", **more: Any
) -> UpsamplerConfig:
    """An upsampler's sizes from shapes and its first U-Net's config.json, with files as for `upsampler_tensors`.

    Raises:
        DalleError: a U-Net of other blocks, or a tensor that decides a size is missing.
    """
    file = f"{first}:" if last else ""
    channels = shape_of(shapes, f"{file}conv_in.weight")[1] // 2  # the other half is the enlarged image
    return UpsamplerConfig(**{**_unet_sizes(shapes, config, channels, file), **more}, last=bool(last), clamp=False)


def _unet_sizes(shapes: Shapes, config: Mapping[str, Any], channels: int, file: str = "") -> dict[str, Any]:
    """The fields of `UNetConfig`, for images of so many channels."""
    check_values(config, BLOCKS, "a U-Net's config.json")
    n_levels, depth = _counts(shapes, file)
    levels = [f"{file}down_blocks.{level}" for level in range(n_levels)]
    widths = [shape_of(shapes, f"{level}.resnets.0.conv1.weight")[0] for level in levels]
    attends = [f"{level}.attentions.0.to_q.weight" in shapes for level in levels]
    out, time = (
        shape_of(shapes, f"{name}.weight")[0] for name in (f"{file}conv_out", f"{levels[0]}.resnets.0.time_emb_proj")
    )
    side = config.get("sample_size")
    if not isinstance(side, int) or side < 1:
        raise DalleError(f"expected sample_size in a U-Net's config.json, found {side!r}; get the file again")
    heads = {"head_width": _head_width(config)} if any(attends) else {}
    return {
        "image_size": side, "width": widths[0], "multipliers": tuple(width // widths[0] for width in widths),
        "depth": depth, "attention": tuple(side >> i for i, attend in enumerate(attends) if attend), **heads,
        "groups": config.get("norm_num_groups", 32), "dropout": 0.0, "scale_shift": time == 2 * widths[0],
        "learned_variance": out == 2 * channels, "channels": channels,
    }  # fmt: skip


def _head_width(config: Mapping[str, Any]) -> int:
    """The width of a head, which may be written once for each size."""
    found = config.get("attention_head_dim", 8)
    widths = set(found) if isinstance(found, list) else {found}
    if len(widths) != 1 or not isinstance(width := widths.pop(), int) or width < 1:
        raise DalleError(f"expected one attention_head_dim in a U-Net's config.json, found {found!r}; it is another")
    return width


def _concatenated(*parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _token_major(rows: Tensor, width: int) -> Tensor:
    """Rows by channel, then token, to rows by token, then channel: (K n, ...) -> (n K, ...)."""
    return rows.view(width, -1, *rows.shape[1:]).transpose(0, 1).flatten(0, 1)
