"""CLIP as OpenAI, open_clip and transformers publish it (Radford et al. 2021, arXiv 2103.00020).

Our tensors have the names of `transformers.CLIPModel`. Sizes come from the tensors' shapes; the numbers of heads, the
activation and the mean and deviation of pixels from JSON files, where there are any.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dalle_cli.data.tokenizer import Tokenizer
from dalle_cli.errors import DalleError
from dalle_cli.importing import tokenizers
from dalle_cli.importing.publication import From, Importer, Part, Publication, Shape, Shapes, Source, n_layers, renamed
from dalle_cli.models.clip import ACTIVATIONS, CLIP, CLIPConfig

CONFIG, OPEN_CLIP, PIXELS = "config.json", "open_clip_config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # transformers'; the first that is there counts
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TENSOR_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("bpe_simple_vocab_16e6.txt.gz",))
WRAPPED = r"(?:state_dict\.|module\.)*"  # what a training checkpoint puts before each name
HEAD_WIDTH = 64  # of OpenAI's
# The keys of an open_clip config that a CLIP of ours covers; any other changes what is computed.
COVERED = {
    "": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"},
    "vision_cfg": {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers"},
}
NUMBERS = re.compile(WRAPPED + "(?:input_resolution|context_length|vocab_size)")  # in OpenAI's files alone
IGNORED = (r".*\.position_ids", r"(?:.*\.)?attn_mask", NUMBERS.pattern)
PAPER = "CLIP (Radford et al. 2021, arXiv 2103.00020): encoders of images and captions into one space."


def parts(source: Source, folders: Sequence[str] = ("",), tokenizer: str = "", name: str = "clip") -> Publication:
    """A CLIP as `NAME.safetensors` and `NAME-tokenizer.json`, in any of the layouts.

    `folders`, each ending with "/", hold transformers' text and vision encoders of one CLIP in files of their own; of a
    text encoder alone a CLIP without vision layers is made. `tokenizer` is the folder of the tokenizer's files.

    Raises:
        DalleError: it is no such CLIP, one that computes something else, or one without a tokenizer.
    """
    files = tuple(_weights(source, folder) for folder in folders)
    shapes = {key: shape for file in files for key, shape in source.tensors(file).shapes.items()}
    _refuse_others(shapes, source)
    layout = _of_transformers if _is_transformers(shapes) else _of_openai
    sizes = _sizes(layout(shapes), shapes, _described(source, folders, shapes))
    text = _tokenizer(source, tokenizer, sizes.n_text)
    if (n := Tokenizer(text).vocab_size) > sizes.n_text_vocab:
        raise DalleError(f"expected a tokenizer of at most {sizes.n_text_vocab} tokens in {source.name}, found {n}")
    part = Part(
        f"{name}.safetensors", "weights.clip", CLIP, sizes, files, layout, ignored=IGNORED,
        tokenizer=f"{name}-tokenizer.json",
    )  # fmt: skip
    return Publication("CLIP", (part,), {part.tokenizer: text}, _license(source, shapes), paper=PAPER)


def _weights(source: Source, folder: str = "") -> str:
    """The file of weights in a folder. Raises: DalleError if there is none, or one cannot tell which."""
    for name in (*OPEN_CLIP_WEIGHTS, *WEIGHTS):
        if folder + name in source.files:
            return folder + name
    found = [name for name in source.files if name.startswith(folder) and name.endswith(TENSOR_FILES)]
    if len(found) == 1:
        return found[0]
    what = ", ".join(found[:3]) or "none"
    raise DalleError(f"expected one file of CLIP's weights in {source.name}/{folder}, found {what}; leave one there")


def _refuse_others(shapes: Shapes, source: Source) -> None:
    """Raises: DalleError for relatives of CLIP that compute something else."""
    names = {re.sub(f"^{WRAPPED}", "", name) for name in shapes}
    for what, pattern in (
        ("a SigLIP", "logit_bias"),
        ("a CoCa", r"text_decoder\..*"),
        ("a CustomTextCLIP", r"text\..*|visual\.trunk\..*"),
        ("a CLIP with a ResNet", r"visual\.layer1\..*"),
    ):
        if any(re.fullmatch(pattern, name) for name in names):
            raise DalleError(f"expected a CLIP with two transformers, found {what} in {source.name}; give such a CLIP")


def _of_transformers(shapes: Shapes) -> dict[str, From]:
    ours = r"((?:text|vision)_model\..*(?<!position_ids)|\w+_projection\.weight|logit_scale)"
    made = renamed(shapes, [(ours, r"\1")])
    if "visual_projection.weight" in made and "logit_scale" not in made:  # encoders in files of their own have none
        made["logit_scale"] = From((), partial(torch.tensor, math.log(100)))
    return made


def _of_openai(shapes: Shapes) -> dict[str, From]:
    """OpenAI's and open_clip's names."""
    rules = [
        (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
        (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
        (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        (r"visual\.ln_pre\.(\w+)", r"vision_model.pre_layrnorm.\1"),
        (r"visual\.ln_post\.(\w+)", r"vision_model.post_layernorm.\1"),
        (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
        (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
        (r"ln_final\.(\w+)", r"text_model.final_layer_norm.\1"),
        (r"logit_scale", "logit_scale"),
    ]
    for theirs, ours in (("visual.transformer.", "vision_model"), ("transformer.", "text_model")):
        block, layer = re.escape(theirs) + r"resblocks\.(\d+)\.", rf"{ours}.encoder.layers.\1."
        rules += [
            (block + r"ln_([12])\.(\w+)", layer + r"layer_norm\2.\3"),
            (block + r"attn\.out_proj\.(\w+)", layer + r"self_attn.out_proj.\2"),
            (block + r"mlp\.c_fc\.(\w+)", layer + r"mlp.fc1.\2"),
            (block + r"mlp\.c_proj\.(\w+)", layer + r"mlp.fc2.\2"),
        ]
    made = renamed(shapes, [(WRAPPED + pattern, replacement) for pattern, replacement in rules])
    for name in shapes:
        plain = re.sub(f"^{WRAPPED}", "", name)
        if projection := re.fullmatch(r"(visual)\.proj|(text)_projection", plain):
            made[f"{projection[1] or projection[2]}_projection.weight"] = From.one(name, Tensor.t)
        if match := re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", plain):
            tower = "vision_model" if match[1] else "text_model"
            for i, letter in enumerate("qkv"):
                ours = f"{tower}.encoder.layers.{match[2]}.self_attn.{letter}_proj.{match[3]}"
                made[ours] = From.one(name, partial(_third, i))
    return made


def _third(i: int, tensor: Tensor) -> Tensor:
    return tensor.chunk(3)[i]


def _is_transformers(shapes: Shapes) -> bool:
    return any(name.startswith("text_model.") for name in shapes)


def _sizes(made: Mapping[str, From], shapes: Shapes, described: Mapping[str, Any]) -> CLIPConfig:
    """The sizes of a CLIP, from our names and the source's shapes. Raises: DalleError if they are of something else."""

    def shape(name: str) -> Shape:
        if name not in made:
            raise DalleError(f"expected the weights of a CLIP, found no {name} among them; give another source")
        found = shapes[made[name].names[0]]
        return found[::-1] if made[name].build is Tensor.t else found

    (n_text_vocab, text_width), (n_text, _) = (
        shape(f"text_model.embeddings.{name}_embedding.weight") for name in ("token", "position")
    )
    names: Shapes = dict.fromkeys(made, ())
    sizes: dict[str, Any] = {
        "n_proj": shape("text_projection.weight")[0], "n_text_vocab": n_text_vocab, "n_text": n_text,
        "text_width": text_width, "text_layers": n_layers(names, r"text_model\.encoder\.layers\.(\d+)\."),
        "vision_layers": 0,
    }  # fmt: skip
    if "visual_projection.weight" in made:
        width, _, _, patch = shape("vision_model.embeddings.patch_embedding.weight")
        hidden = shape("vision_model.encoder.layers.0.mlp.fc1.weight")[0]
        positions = shape("vision_model.embeddings.position_embedding.weight")[0]
        sizes |= {
            "vision_width": width, "vision_layers": n_layers(names, r"vision_model\.encoder\.layers\.(\d+)\."),
            "vision_hidden": 0 if hidden == 4 * width else hidden, "patch_size": patch,
            "image_size": math.isqrt(positions - 1) * patch,
        }  # fmt: skip
    heads = {"text_heads": text_width // HEAD_WIDTH, "vision_heads": sizes.get("vision_width", 768) // HEAD_WIDTH}
    given = {name: value for name, value in described.items() if value}
    head_width = given.pop("head_width", 0)
    if head_width:
        heads["vision_heads"] = sizes["vision_width"] // head_width
    return CLIPConfig(**{**sizes, **heads, **given})


def _described(source: Source, folders: Sequence[str], shapes: Shapes) -> dict[str, Any]:
    """What shapes do not show: heads, activation, mean and deviation of pixels, as fields of `CLIPConfig`.

    Raises:
        DalleError: a file describes what a CLIP of ours does not compute.
    """
    if _is_transformers(shapes):
        return _described_by_transformers(source, folders)
    if OPEN_CLIP in source.files:
        return _described_by_open_clip(source)
    openai = any(map(NUMBERS.fullmatch, shapes))  # open_clip's files lack these numbers
    quick = openai or "quickgelu" in "".join((source.name, *source.files)).lower()
    return {"activation": "quick_gelu" if quick else "gelu"}


def _described_by_transformers(source: Source, folders: Sequence[str]) -> dict[str, Any]:
    towers: dict[str, dict[str, Any]] = {}
    for folder in folders:
        config = source.json(folder + CONFIG)
        kind = config.get("model_type")
        if kind in ("clip_text_model", "clip_vision_model"):
            towers[kind.split("_")[1]] = config
        elif kind == "clip":
            for tower in ("text", "vision"):  # older files have the second, which wins
                towers[tower] = {**(config.get(f"{tower}_config") or {}), **(config.get(f"{tower}_config_dict") or {})}
        else:
            found = f"model_type {kind!r} in {folder}{CONFIG} of {source.name}"
            raise DalleError(f"expected the config of a CLIP, found {found}; give another source")
    activations = {tower.get("hidden_act", "quick_gelu") for tower in towers.values()}
    epsilons = {tower.get("layer_norm_eps", 1e-5) for tower in towers.values()}
    if len(activations) > 1 or not activations <= set(ACTIVATIONS) or epsilons != {1e-5}:
        both = (", ".join(sorted(map(str, values))) for values in (activations, epsilons))
        found = f"{' and '.join(both)} in {source.name}"
        raise DalleError(f"expected one of {', '.join(ACTIVATIONS)} and a layer_norm_eps of 1e-05, found {found}")
    pixels = source.json(PIXELS) if PIXELS in source.files else {}
    return {
        "activation": activations.pop(), "text_heads": towers.get("text", {}).get("num_attention_heads", 8),
        "vision_heads": towers.get("vision", {}).get("num_attention_heads", 12),
        "pixel_mean": _three(pixels.get("image_mean")), "pixel_std": _three(pixels.get("image_std")),
    }  # fmt: skip


def _described_by_open_clip(source: Source) -> dict[str, Any]:
    config = source.json(OPEN_CLIP)
    model, pixels = config.get("model_cfg") or {}, config.get("preprocess_cfg") or {}
    for table, covered in COVERED.items():
        for key, value in (model.get(table) or {} if table else model).items():
            if key not in covered and value not in (None, False):
                found = f"{table}.{key}".lstrip(".")
                raise DalleError(f"expected a plain CLIP, found {found} {value!r} in {OPEN_CLIP} of {source.name}")
    vision, text = model.get("vision_cfg") or {}, model.get("text_cfg") or {}
    quick = model.get("quick_gelu") or "quickgelu" in source.name.lower()
    return {
        "activation": "quick_gelu" if quick else "gelu", "text_heads": text.get("heads", 8),
        "head_width": vision.get("head_width", HEAD_WIDTH), "pixel_mean": _three(pixels.get("mean")),
        "pixel_std": _three(pixels.get("std")),
    }  # fmt: skip


def _three(values: Any) -> tuple[float, ...]:
    """A number for each color; none where a file says nothing."""
    if values is None:
        return ()
    red, green, blue = map(float, values)
    return red, green, blue


def _tokenizer_files(source: Source, folder: str) -> list[str]:
    """The files of a tokenizer. Raises: DalleError if there are none."""
    for names in TOKENIZERS:
        if all(folder + name in source.files for name in names):
            return [folder + name for name in names]
    raise DalleError(
        f"expected tokenizer.json, or vocab.json and merges.txt, beside CLIP's weights in {source.name}, found none; "
        "put the one of hf://openai/clip-vit-base-patch32 into one folder with the weights"
    )


def _tokenizer(source: Source, folder: str, length: int) -> bytes:
    names = _tokenizer_files(source, folder)
    files = [source.data(name) for name in names]
    if len(files) == 2:
        return tokenizers.clip_bpe_of_vocabulary(files[0], files[1], length)
    of = tokenizers.clip_bpe if names[0].endswith(".json") else tokenizers.clip_bpe_of_merges
    return of(files[0], length)


def _license(source: Source, shapes: Shapes) -> str:
    """What the model card says; OpenAI's own is MIT."""
    if "README.md" in source.files:
        head = [*source.data("README.md").decode(errors="replace").split("---\n", 2), "", ""][1]
        if match := re.search(r"^license: *['\"]?([\w.-]+)", head, re.MULTILINE):
            return match[1]
    openai = any(map(NUMBERS.fullmatch, shapes)) or "openai/clip-" in source.name
    return "mit" if openai else "unknown"


def _recognize(source: Source) -> bool:
    names = source.files
    if OPEN_CLIP in names or (CONFIG in names and any(name in names for name in WEIGHTS)):
        return OPEN_CLIP in names or source.json(CONFIG).get("model_type") in ("clip", "clip_text_model")
    weights = [name for name in names if name.endswith(TENSOR_FILES)]
    repository: str = getattr(source, "repository", "")  # from one, the whole file would have to be fetched
    if len(weights) != 1 or repository:
        return False
    tokens = re.compile(WRAPPED + r"(?:text\.)?token_embedding\.weight")
    return any(map(tokens.fullmatch, source.tensors(weights[0]).shapes))


def _files(source: Source) -> list[str]:
    small = (CONFIG, OPEN_CLIP, PIXELS, "README.md")
    return [_weights(source), *_tokenizer_files(source, ""), *(name for name in small if name in source.files)]


IMPORTER = Importer("CLIP", _recognize, _files, parts)
