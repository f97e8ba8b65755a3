"""minDALL-E 1.3B: a prior over codes with an ordinary token for pads and no start, and its VQGAN."""

import json
import math

import torch
from torch import Tensor

from dalle_cli.errors import DalleError
from dalle_cli.importing import vqgan
from dalle_cli.importing.publication import From, Importer, Part, Publication, Shapes, Source, n_layers, renamed
from dalle_cli.importing.tokenizers import char_bpe
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.models.vqgan import VQGAN

STAGES = ("stage1_last.ckpt", "stage2_last.ckpt")
CONFIG, VOCAB, MERGES = "config.yaml", "tokenizer/bpe-16k-vocab.json", "tokenizer/bpe-16k-merges.txt"
SAMPLING = {"temperature": 1.0, "top_k": 256}
HEAD_WIDTH = 64  # where config.yaml says nothing, as the publisher's defaults have it
RENAMED = [
    (r"tok_emb_txt\.weight", "token.weight"),
    (r"pos_emb_txt\.weight", "text_position.weight"),
    (r"tok_emb_img\.weight", "code.weight"),
    (r"pos_emb_img\.weight", "code_position.weight"),
    (r"blocks\.(\d+)\.ln([12])\.(\w+)", r"blocks.\1.norm_\2.\3"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"blocks.\1.attention_out.\2"),
    (r"blocks\.(\d+)\.mlp\.0\.(\w+)", r"blocks.\1.mlp_in.\2"),
    (r"blocks\.(\d+)\.mlp\.2\.(\w+)", r"blocks.\1.mlp_out.\2"),
    (r"ln_f\.(\w+)", r"norm.\1"),
    (r"head_txt\.weight", "text_head.weight"),
    (r"head_img\.weight", "image_head.weight"),
]


def prior_config(shapes: Shapes, n_head: int | None = None) -> PriorConfig:
    """The sizes of a prior from its tensors, and the number of heads if it is known."""
    n_text_vocab, width = shapes["tok_emb_txt.weight"]
    return PriorConfig(
        n_layer=n_layers(shapes, r"blocks\.(\d+)\."),
        n_head=n_head or max(1, width // HEAD_WIDTH),
        n_embd=width,
        n_text_vocab=n_text_vocab,
        n_text=shapes["pos_emb_txt.weight"][0],
        n_image_vocab=shapes["tok_emb_img.weight"][0],
        grid=math.isqrt(shapes["pos_emb_img.weight"][0]),
        attention="full",
        start=False,
        flat_position=True,
    )


def prior_tensors(shapes: Shapes, pad: int) -> dict[str, From]:
    """The origin of every tensor of the prior; `pad` is the token that stands at every position behind a caption."""
    config, made = prior_config(shapes), renamed(shapes, RENAMED)
    made["pad.weight"] = From.one("tok_emb_txt.weight", lambda tensor: tensor[pad].repeat(config.n_text, 1))
    for i in range(config.n_layer):
        for kind in ("weight", "bias"):
            names = tuple(f"blocks.{i}.attn.{part}.{kind}" for part in ("query", "key", "value"))
            made[f"blocks.{i}.qkv.{kind}"] = From(names, lambda *parts: torch.cat(parts))
    for ours, theirs in (("text_head", "head_txt"), ("image_head", "head_img")):
        made[f"{ours}.bias"] = From.one(f"{theirs}.weight", _zeros)  # theirs have none
    return made


def _zeros(weight: Tensor) -> Tensor:
    return weight.new_zeros(len(weight))


def n_heads(config: bytes) -> int | None:
    """The number of heads in config.yaml, None if it leaves the publisher's default.

    Raises:
        DalleError: it is no such file, or says that the model approximates the GELU.
    """
    import yaml  # type: ignore[import-untyped]  # comes with huggingface-hub

    try:
        stage = (yaml.safe_load(config) or {}).get("stage2") or {}
        sizes = stage.get("hparams") or {}
        found = sizes.get("n_heads")
    except (yaml.YAMLError, AttributeError, ValueError, RecursionError):
        raise DalleError(f"expected minDALL-E's settings in {CONFIG}, found another file; fetch it again") from None
    if sizes.get("gelu_use_approx"):
        raise DalleError(f"expected an exact GELU in {CONFIG}, found gelu_use_approx; give the published weights")
    if found is not None and (type(found) is not int or found < 1):
        raise DalleError(f"expected a number of heads in {CONFIG}, found {found!r}; fetch it again")
    return found


def _plan(source: Source) -> Publication:
    stage_1, stage_2 = STAGES
    config = prior_config(source.tensors(stage_2).shapes, n_heads(source.data(CONFIG)))
    tokenizer = char_bpe(source.data(VOCAB), source.data(MERGES))
    pad = json.loads(tokenizer)["padding"]["pad_id"]
    codes = vqgan.vqgan_config(source.tensors(stage_1).shapes)
    dvae = Part(
        "dvae.safetensors", "weights.dvae", VQGAN, codes, (stage_1,), vqgan.vqgan_tensors, ignored=vqgan.IGNORED
    )
    prior = Part(
        "prior.safetensors", "weights.prior.codes", Prior, config, (stage_2,),
        lambda shapes: prior_tensors(shapes, pad), SAMPLING, encoder=dvae.file, tokenizer="tokenizer.json",
    )  # fmt: skip
    return Publication(
        "minDALL-E 1.3B",
        (dvae, prior),
        {"tokenizer.json": tokenizer},
        "cc-by-nc-sa-4.0",
        "The weights may not be used commercially, and what is made from them must carry the same license.",
        "A token prior of 1.3 billion parameters, and a VQGAN of 16 pixels a code.",
    )


IMPORTER = Importer(
    "minDALL-E",
    lambda source: set(STAGES) <= source.files.keys(),
    lambda source: (*STAGES, CONFIG, VOCAB, MERGES),
    _plan,
    clip="hf://openai/clip-vit-base-patch32",
)
