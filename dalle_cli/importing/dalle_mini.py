"""DALL-E mini and mega: the files of kuprel/min-dalle (PyTorch), and those of dalle-mini (flax), with their VQGAN.

The map is written in min-dalle's names, each behind "encoder." or "decoder.". Flax stacks the layers of a side, stores
matrices transposed, and numbers modules by class.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dalle_cli.errors import DalleError
from dalle_cli.importing import vqgan
from dalle_cli.importing.publication import From, Importer, Part, Publication, Shapes, Source, n_layers
from dalle_cli.importing.tokenizers import bart_bpe
from dalle_cli.models.bart import EncoderDecoderConfig, EncoderDecoderPrior
from dalle_cli.models.vqgan import VQGAN

SAMPLING = {"guidance": 10.0, "temperature": 1.0}
HEAD_WIDTH = 64  # of both models, where no JSON says it
NULL = ("<s>", "</s>")  # the null caption
# What names and shapes of tensors do not show.
ARCHITECTURE = {"activation_function": "gelu", "scale_embedding": False, "sinkhorn_iters": 1}
FLAX = "flax_model.msgpack"
VQGAN_REPOSITORY = "dalle-mini/vqgan_imagenet_f16_16384"
VQGAN_FILES = ("vqgan_imagenet_f16_16384/flax_model.msgpack", "detoker.pt")  # the second is a decoder alone

HALF = {
    "norm_1.bias": ("pre_self_attn_layer_norm.bias",),
    "qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attention_out.weight": ("self_attn.out_proj.weight",),
    "attention_norm.weight": ("self_attn_layer_norm.weight",),
    "attention_norm.bias": ("self_attn_layer_norm.bias",),
    "norm_2.bias": ("glu.ln0.bias",),
    "mlp_in.weight": ("glu.fc0.weight", "glu.fc1.weight"),
    "mlp_norm.bias": ("glu.ln1.bias",),
    "mlp_out.weight": ("glu.fc2.weight",),
}
CROSS = {
    "cross_norm.bias": ("pre_encoder_attn_layer_norm.bias",),
    "cross_q.weight": ("encoder_attn.q_proj.weight",),
    "cross_kv.weight": ("encoder_attn.k_proj.weight", "encoder_attn.v_proj.weight"),
    "cross_out.weight": ("encoder_attn.out_proj.weight",),
    "cross_out_norm.weight": ("encoder_attn_layer_norm.weight",),
    "cross_out_norm.bias": ("encoder_attn_layer_norm.bias",),
}
WHOLE = {
    "token.weight": "encoder.embed_tokens.weight",
    "text_position.weight": "encoder.embed_positions.weight",
    "text_embedding_norm.weight": "encoder.layernorm_embedding.weight",
    "text_embedding_norm.bias": "encoder.layernorm_embedding.bias",
    "text_norm.bias": "encoder.final_ln.bias",
    "code_position.weight": "decoder.embed_positions.weight",
    "code_embedding_norm.weight": "decoder.layernorm_embedding.weight",
    "code_embedding_norm.bias": "decoder.layernorm_embedding.bias",
    "norm.bias": "decoder.final_ln.bias",
}
FLAX_MODULES = {
    "self_attn": "FlaxBartAttention_0", "encoder_attn": "FlaxBartAttention_1",
    "pre_self_attn_layer_norm": "LayerNorm_0", "self_attn_layer_norm": "LayerNorm_1",
    "pre_encoder_attn_layer_norm": "LayerNorm_2", "encoder_attn_layer_norm": "LayerNorm_3",
    "glu": "GLU_0", "ln0": "LayerNorm_0", "ln1": "LayerNorm_1", "fc0": "Dense_0", "fc1": "Dense_1", "fc2": "Dense_2",
}  # fmt: skip

Find = Callable[[str], From]  # the origin of a tensor of min-dalle's names


def torch_name(name: str, shapes: Shapes) -> From:
    """The origin in min-dalle's two files, whose names are told apart by the files' own, as "decoder.pt:..."."""
    side, own = name.split(".", 1)
    file = next((n.split(":")[0] for n in shapes if n.startswith(side)), f"{side}.pt")
    return From.one(f"{file}:{own}")


def flax_name(name: str, shapes: Shapes) -> From:
    """The origin in a flax file: a layer of a stack of them, a matrix transposed."""
    if name == "decoder.lm_head.weight":
        return From.one("lm_head.kernel", torch.t)
    stem, leaf = name.rsplit(".", 1)
    kinds = [(leaf, _same)] if leaf == "bias" else [("scale", _same), ("embedding", _same), ("kernel", torch.t)]
    side, *path = stem.split(".")
    layer = None
    if path[0] == "layers":
        layer, path = int(path[1]), ["layers", f"FlaxBart{side.title()}Layers", *path[2:]]
    path = [FLAX_MODULES.get(part, part) for part in path]
    for kind, build in kinds:
        own = ".".join(["model", side, *path, kind])
        if own in shapes:
            return From.one(own, build if layer is None else partial(_layer, number=layer, build=build))
    return From.one(".".join(["model", side, *path, kinds[-1][0]]))  # which is then missing


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _layer(stack: Tensor, number: int, build: Callable[[Tensor], Tensor]) -> Tensor:
    return build(stack[number])


def prior_tensors(shapes: Shapes, config: EncoderDecoderConfig) -> dict[str, From]:
    """The origin of every tensor of the prior."""
    find = partial(flax_name if "lm_head.kernel" in shapes else torch_name, shapes=shapes)
    made = {ours: find(theirs) for ours, theirs in WHOLE.items()}
    codes = config.n_image_vocab
    made["code.weight"] = _then(find("decoder.embed_tokens.weight"), lambda rows: rows[:codes])
    made["start"] = _then(find("decoder.embed_tokens.weight"), lambda rows: rows[codes])
    made["image_head.weight"] = _then(find("decoder.lm_head.weight"), lambda rows: rows[:codes])
    for side, stack, tensors in (("encoder", "encoder", HALF), ("decoder", "blocks", HALF | CROSS)):
        for i in range(config.n_layer):
            for ours, parts in tensors.items():
                found = [find(f"{side}.layers.{i}.{theirs}") for theirs in parts]
                made[f"{stack}.{i}.{ours}"] = found[0] if len(found) == 1 else _joined(found)
    return made


def _then(origin: From, build: Callable[[Tensor], Tensor]) -> From:
    return From(origin.names, lambda *tensors: build(origin.build(*tensors)))


def _joined(origins: list[From]) -> From:
    """The rows of several matrices, each made of one tensor, one after another."""
    builds = [origin.build for origin in origins]
    names = tuple(name for origin in origins for name in origin.names)
    return From(names, lambda *tensors: torch.cat([build(x) for build, x in zip(builds, tensors, strict=True)]))


def prior_config(shapes: Shapes, n_codes: int, heads: int | None = None) -> EncoderDecoderConfig:
    """The sizes of a prior over `n_codes` codes from its tensors; `heads` None: as wide as the published ones.

    Raises:
        DalleError: tensors of something else.
    """
    flax = "lm_head.kernel" in shapes
    find = partial(flax_name if flax else torch_name, shapes=shapes)

    def shape(name: str) -> tuple[int, ...]:
        (own,) = find(name).names
        if own not in shapes:
            raise DalleError(f"expected DALL-E mini's tensor {own}, found none; the file is of something else")
        return shapes[own]

    n_text_vocab, width = shape("encoder.embed_tokens.weight")
    positions, rows = shape("decoder.embed_positions.weight")[0], shape("decoder.embed_tokens.weight")[0]
    if rows <= n_codes:
        raise DalleError(f"expected a start code behind the {n_codes:,} codes of the VQGAN, found {rows:,} codes")
    layer = shape("encoder.layers.0.glu.ln1.bias")
    return EncoderDecoderConfig(
        n_layer=layer[0] if flax else n_layers(shapes, r"[^:]+:layers\.(\d+)\."),
        n_head=heads or max(1, width // HEAD_WIDTH),
        n_embd=width,
        n_hid=layer[-1],
        n_text_vocab=n_text_vocab,
        n_text=shape("encoder.embed_positions.weight")[0],
        n_image_vocab=n_codes,
        grid=round(positions**0.5),
    )


def vqgan_part(source: Source) -> Part:
    """The VQGAN: dalle-mini's, both ways, where it is beside the prior, else min-dalle's decoder.

    Raises:
        DalleError: there is neither.
    """
    file = _vqgan_file(source)
    flax = file.endswith(".msgpack")
    shapes = source.tensors(file).shapes
    sizes = vqgan.vqgan_config(vqgan.flax_shapes(shapes) if flax else shapes, pixels="unit")
    tensors = vqgan.flax_tensors if flax else vqgan.vqgan_tensors
    return Part("dvae.safetensors", "weights.dvae", VQGAN, sizes, (file,), tensors)


def _vqgan_file(source: Source) -> str:
    if (found := next((name for name in VQGAN_FILES if name in source.files), None)) is None:
        raise DalleError(
            f"expected DALL-E mini's VQGAN in {source.name}, {' or '.join(VQGAN_FILES)}, found neither; put it there"
        )
    return found


def _weights(source: Source) -> tuple[str, ...]:
    """The prior's files: mini's, where both are there."""
    for end in ("_mini", ""):
        if f"encoder{end}.pt" in source.files:
            return f"encoder{end}.pt", f"decoder{end}.pt"
    return (FLAX,)


def _small_files(source: Source) -> list[str]:
    """The tokenizer's files, and the JSON with the sizes, if there is one.

    Raises:
        DalleError: there is no tokenizer.
    """
    end = "_mini" if "encoder_mini.pt" in source.files else ""
    pair = [f"vocab{end}.json", f"merges{end}.txt"]
    names = pair if all(name in source.files for name in pair) else ["tokenizer.json"]
    if names[0] not in source.files:
        raise DalleError(f"expected {' and '.join(pair)} in {source.name}, found none; put them there")
    return [*names, *(name for name in [f"config{end}.json"] if name in source.files)]


def _tokenizer(source: Source, length: int) -> tuple[bytes, tuple[int, ...]]:
    """The tokenizer's JSON, and the tokens of the null caption."""
    names = _small_files(source)
    if names[0] == "tokenizer.json":
        model = source.json(names[0])["model"]
        pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
        vocab, merges = json.dumps(model["vocab"]).encode(), "\n".join(pairs).encode()
    else:
        vocab, merges = source.data(names[0]), source.data(names[1])
    made, ids = bart_bpe(vocab, merges, length), json.loads(vocab)
    return made, tuple(ids[token] for token in NULL)


def _heads(source: Source) -> int | None:
    """How many heads a layer has, where a JSON says it.

    Raises:
        DalleError: the JSON describes another architecture.
    """
    config = next((source.json(name) for name in _small_files(source) if name.startswith("config")), {})
    for key, value in ARCHITECTURE.items():
        if config.get(key, value) != value:
            raise DalleError(
                f"expected {key} {value!r} in DALL-E mini's JSON, found {config[key]!r}; give its own files"
            )
    found = config.get("decoder_attention_heads")
    return found if type(found) is int and found > 0 else None


def _recognize(source: Source) -> bool:
    if "decoder_mini.pt" in source.files or {"encoder.pt", "decoder.pt"} <= source.files.keys():
        return True
    return {FLAX, "config.json"} <= source.files.keys() and "image_vocab_size" in source.json("config.json")


def _plan(source: Source) -> Publication:
    dvae, weights = vqgan_part(source), _weights(source)
    shapes = {
        f"{name}:{own}" if len(weights) > 1 else own: shape
        for name in weights
        for own, shape in source.tensors(name).shapes.items()
    }
    config = prior_config(shapes, dvae.sizes.n_vocab, _heads(source))
    tokenizer, null = _tokenizer(source, config.n_text)
    config = replace(config, null=null)
    prior = Part(
        "prior.safetensors", "weights.prior.codes", EncoderDecoderPrior, config, weights,
        lambda shapes: prior_tensors(shapes, config), SAMPLING, encoder=dvae.file, tokenizer="tokenizer.json",
    )  # fmt: skip
    size = "mini" if config.n_embd < 2048 else "mega"
    return Publication(
        f"DALL-E {size}",
        (dvae, prior),
        {"tokenizer.json": tokenizer},
        "apache-2.0",
        paper="An encoder-decoder prior over codes (Dayma et al. 2021), and a VQGAN of 16 pixels a code.",
    )


IMPORTER = Importer(
    "DALL-E mini",
    _recognize,
    lambda source: (*_weights(source), _vqgan_file(source), *_small_files(source)),
    _plan,
    clip="hf://openai/clip-vit-base-patch32",
    also=(VQGAN_REPOSITORY,),
)
