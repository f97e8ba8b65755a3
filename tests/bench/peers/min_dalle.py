"""min-dalle 0.4.11: its own sampling loop and detokenizer, with random weights in place of the downloaded ones.

In float32 alone: its loop mixes that with other dtypes where there is no GPU.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bench.peers import count
from bench.published import CAPTION, GUIDANCE, filled
from bench.timing import Subject

THREADS = torch.get_num_threads()
PACKAGE: Any = import_module("min_dalle.min_dalle")
torch.set_num_threads(THREADS)  # which the package sets as it is imported


class Words:
    """A tokenizer that knows one caption."""

    def tokenize(self, text: str, is_verbose: bool = False) -> list[int]:
        """BOS, words, EOS."""
        return [0, *range(5, 3 + CAPTION), 2]


class Codes:
    """A detokenizer that leaves the codes as they are."""

    def forward(self, is_seamless: bool, tokens: Tensor) -> Tensor:
        """The codes."""
        return tokens


def codes(sizes: dict[str, Any], batch: int) -> Subject:
    """The codes of a square number of images of one caption, as its `generate_raw_image_stream` gives them."""
    shared = {"attention_head_count": sizes["n_head"], "embed_count": sizes["n_embd"]}
    shared |= {"glu_embed_count": sizes["n_hid"], "layer_count": sizes["n_layer"], "device": "cpu"}
    model = PACKAGE.MinDalle.__new__(PACKAGE.MinDalle)  # its __init__ downloads
    model.device, model.dtype, model.is_reusable, model.is_verbose = "cpu", torch.float32, True, False
    model.text_token_count, model.layer_count = sizes["n_text"], sizes["n_layer"]
    model.attention_head_count, model.embed_count = sizes["n_head"], sizes["n_embd"]
    with torch.device("meta"):
        encoder = PACKAGE.DalleBartEncoder(
            text_vocab_count=sizes["n_text_vocab"], text_token_count=sizes["n_text"], **shared
        )
        decoder = PACKAGE.DalleBartDecoder(image_vocab_count=sizes["n_image_vocab"], **shared)
    encoder, decoder = (filled(made.to_empty(device="cpu")) for made in (encoder, decoder))
    encoder.pose_tokens = torch.arange(sizes["n_text"]).expand(2, -1)  # plain tensors, which stayed on "meta"
    for module in decoder.modules():
        if hasattr(module, "token_indices"):
            module.token_indices = torch.arange(256)
    model.encoder, model.decoder, model.tokenizer, model.detokenizer = encoder, decoder, Words(), Codes()

    def run() -> Tensor:
        made: Tensor = next(
            model.generate_raw_image_stream("", 1, int(batch**0.5), top_k=256, supercondition_factor=GUIDANCE)
        )
        return made

    return Subject(run, batch * 256, parameters=count(encoder) + count(decoder), warmup=0)


def pixels(batch: int) -> Subject:
    """Images of random codes by its detokenizer, which has one size."""
    model = import_module("min_dalle.models").VQGanDetokenizer().eval()
    given = torch.randint(2**14, (batch, 256))
    return Subject(lambda: model.forward(False, given), batch, parameters=count(model), warmup=1)
