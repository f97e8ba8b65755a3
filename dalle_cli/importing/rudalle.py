"""ruDALL-E: Malevich and other weights of its third version, priors over codes that read Russian, with their VQGAN."""

import re

import torch
from torch import Tensor

from dalle_cli.errors import DalleError
from dalle_cli.importing import vqgan
from dalle_cli.importing.publication import From, Importer, Part, Publication, Shapes, Source, n_layers, renamed
from dalle_cli.importing.tokenizers import youtokentome
from dalle_cli.models.attention import Pattern
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.models.vqgan import VQGAN

WEIGHTS = ("pytorch_model_v3.bin", "model.safetensors", "pytorch_model.bin")
VQGAN_FILE, BPE_FILE = "vqgan.gumbelf8-sber.model.ckpt", "bpe.model"
SAMPLING = {"temperature": 1.0, "top_k": 2048, "top_p": 0.995}
BOS = 2  # before every caption, at position 0
HEADS = {2048: 16, 3840: 60}  # by width; no file says them
HEAD_WIDTH = 128  # for other widths
MASK = "transformer.conv_mask"
IGNORED = (r"transformer\.(row|col|conv)_mask",)
LAYERS = (
    (r"input_layernorm", "norm_1"), (r"post_attention_layernorm", "norm_2"),
    (r"before_first_addition_layernorm", "attention_norm"), (r"before_second_addition_layernorm", "mlp_norm"),
    (r"attention\.query_key_value", "qkv"), (r"attention\.dense", "attention_out"),
    (r"mlp\.dense_h_to_4h", "mlp_in"), (r"mlp\.dense_4h_to_h", "mlp_out"),
)  # fmt: skip
RENAMED = [
    *((rf"transformer\.layers\.(\d+)\.{theirs}\.(\w+)", rf"blocks.\1.{ours}.\2") for theirs, ours in LAYERS),
    (r"image_embeddings\.weight", "code.weight"),
    (r"image_(row|col)_embeddings\.weight", r"\1.weight"),
    (r"transformer\.final_layernorm\.(\w+)", r"norm.0.\1"),
    (r"to_logits\.0\.(\w+)", r"norm.1.\1"),
]


def prior_config(shapes: Shapes) -> PriorConfig:
    """The sizes of a prior from its tensors. One embedding of a text position is of none."""
    n_text, (rows, width) = shapes["text_pos_embeddings.weight"][0] - 1, shapes["text_embeddings.weight"]
    n_layer = n_layers(shapes, r"transformer\.layers\.(\d+)\.")
    if n_layer % 4 == 2:  # the publisher's code takes column attention there
        raise DalleError(f"expected layers whose last is convolutional, found {n_layer} layers; give other weights")
    return PriorConfig(
        n_layer=n_layer,
        n_head=HEADS.get(width, max(1, width // HEAD_WIDTH)),
        n_embd=width,
        n_text_vocab=rows - n_text,  # the table ends with the pads of every position
        n_text=n_text - 1,
        n_image_vocab=shapes["image_embeddings.weight"][0],
        grid=shapes["image_row_embeddings.weight"][0],
        attention="window",
        activation="gelu_tanh",
        sandwich_norm=True,
        final_norms=2,
    )


def prior_tensors(shapes: Shapes) -> dict[str, From]:
    """The origin of every tensor of the prior."""
    config = prior_config(shapes)
    n_vocab, n_prefix = config.n_text_vocab, config.n_prefix
    made = {re.sub(r"^col\.", "column.", name): origin for name, origin in renamed(shapes, RENAMED).items()}

    def rows(name: str, start: int, stop: int | None) -> From:
        return From.one(name, lambda tensor: tensor[start:stop])

    words = "text_embeddings.weight"
    made["start"] = From.one(words, lambda tensor: tensor[BOS])
    made["token.weight"] = rows(words, 0, n_vocab)
    made["pad.weight"] = rows(words, n_vocab + 1, n_vocab + n_prefix)
    made["text_position.weight"] = rows("text_pos_embeddings.weight", 0, n_prefix)
    for kind in ("weight", "bias"):
        made[f"text_head.{kind}"] = rows(f"to_logits.1.{kind}", 0, n_vocab)
        made[f"image_head.{kind}"] = rows(f"to_logits.1.{kind}", n_vocab + n_prefix, None)
    return made


def check_window(mask: Tensor, config: PriorConfig) -> None:
    """Raises: DalleError if the last layer's mask is not that of the third version, whose other tensors look alike."""
    ours = Pattern("window", config.n_text, config.grid).mask(torch.device("cpu"))
    theirs = mask[: len(ours), : len(ours)] != 0
    if theirs.shape != ours.shape or not torch.equal(theirs, ours):
        raise DalleError(
            "expected ruDALL-E weights of version 3, found the attention mask of another version, as Emojich and "
            "Malevich v2 have it; give pytorch_model_v3.bin"
        )


def _weights(source: Source) -> str:
    return next(name for name in WEIGHTS if name in source.files)


def _recognize(source: Source) -> bool:
    return WEIGHTS[0] in source.files or (BPE_FILE in source.files and any(name in source.files for name in WEIGHTS))


def _plan(source: Source) -> Publication:
    weights = _weights(source)
    tensors = source.tensors(weights)
    config = prior_config(tensors.shapes)
    if MASK in tensors.shapes:
        check_window(tensors.read(MASK), config)
    tokenizer = youtokentome(source.data(BPE_FILE), bos=False)
    codes = vqgan.vqgan_config(source.tensors(VQGAN_FILE).shapes)
    dvae = Part(
        "dvae.safetensors", "weights.dvae", VQGAN, codes, (VQGAN_FILE,), vqgan.vqgan_tensors, ignored=vqgan.IGNORED
    )
    prior = Part(
        "prior.safetensors", "weights.prior.codes", Prior, config, (weights,), prior_tensors, SAMPLING,
        ignored=IGNORED, encoder=dvae.file, tokenizer="tokenizer.json",
    )  # fmt: skip
    return Publication(
        "ruDALL-E Malevich",
        (dvae, prior),
        {"tokenizer.json": tokenizer},
        "apache-2.0",
        "The page of the weights names no license; Apache-2.0 is that of the publisher's code.",
        "A token prior of 1.3 billion parameters that reads Russian captions, and a VQGAN of 8 pixels a code.",
    )


IMPORTER = Importer(
    "ruDALL-E",
    _recognize,
    lambda source: (_weights(source), VQGAN_FILE, BPE_FILE),
    _plan,
    also=("ai-forever/rudalle-utils",),
)
