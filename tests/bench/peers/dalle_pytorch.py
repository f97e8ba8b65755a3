"""DALLE-pytorch 1.6.6 on given token ids.

Its module of image tokenizers imports packages that no longer install beside a current torch. An empty one stands in
its place: what is compared is the transformer.
"""

import sys
import warnings
from collections.abc import Callable
from itertools import cycle
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import count, step
from bench.prior import batches
from bench.timing import Subject

AXIAL = ("axial_row", "axial_col", "axial_row", "axial_row")
CLIP = 0.5  # of its train_dalle.py
LEARNING_RATE = 3e-4  # the same, likewise


class GivenCodes(nn.Module):
    """In the place of an image tokenizer: only its sizes are read."""

    def __init__(self, grid: int, n_vocab: int) -> None:
        super().__init__()
        self.image_size, self.num_layers, self.num_tokens, self.channels = grid, 0, n_vocab, 3


def _package() -> Any:
    absent = ModuleType("dalle_pytorch.vae")
    absent.__dict__.update(OpenAIDiscreteVAE=GivenCodes, VQGanVAE=GivenCodes)
    sys.modules["dalle_pytorch.vae"] = absent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources says that it is going to leave
        import dalle_pytorch  # type: ignore[import-not-found]
    return dalle_pytorch


PACKAGE = _package()


def build(sizes: dict[str, Any], for_inference: bool = False) -> nn.Module:
    """Its DALLE of these sizes (names as PriorConfig has them); everything else is its default."""
    width, heads = sizes["n_embd"], sizes["n_head"]
    model: nn.Module = PACKAGE.DALLE(
        dim=width,
        vae=GivenCodes(sizes["grid"], sizes["n_image_vocab"]),
        num_text_tokens=sizes["n_text_vocab"],
        text_seq_len=sizes["n_text"],
        depth=sizes["n_layer"],
        heads=heads,
        dim_head=width // heads,
        attn_types=AXIAL,
        optimize_for_inference=for_inference,
    )
    return model


def trainer(model: nn.Module, dtype: str, learning_rate: float) -> Callable[[Tensor, Tensor], Tensor]:
    """An update as its training script has it: tokens (B, T), 0 for a pad, and codes (B, W*W) -> the loss."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)

    def update(tokens: Tensor, codes: Tensor) -> Tensor:
        return step(model, optimizer, lambda: model(tokens, codes, return_loss=True), dtype, CLIP)

    return update


def image_nats(model: Any, tokens: Tensor, codes: Tensor) -> Tensor:
    """Mean cross-entropy over image positions and the image vocabulary alone: (B, T), (B, W*W) -> () nats per code."""
    model.eval()
    with torch.no_grad():
        logits = model(tokens, codes)[:, tokens.shape[1] :, -model.num_image_tokens :]
    model.train()
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), codes.flatten())


def axial(sizes: dict[str, int], batch: int, dtype: str) -> Subject:
    """Its training step on random ids."""
    model = build(sizes)
    update = trainer(model, dtype, LEARNING_RATE)
    given = cycle([(tokens, codes.flatten(1)) for tokens, _, codes in batches(sizes, batch)])
    return Subject(
        lambda: update(*next(given)), batch * (sizes["n_text"] + sizes["grid"] ** 2), parameters=count(model)
    )


def drawn(sizes: dict[str, Any], batch: int, dtype: str, one_caption: bool = False) -> Subject:
    """Its own drawing, with its cache, of as many captions or of one.

    The loop is that of its `generate_images`, which loses the cache on the way unless it is guided.
    """
    model: Any = build(sizes, for_inference=True).eval().requires_grad_(False)
    tokens = batches(sizes, 1 if one_caption else batch)[0][0].expand(batch, -1)
    helpers: Any = sys.modules["dalle_pytorch.dalle_pytorch"]

    def draw(n_codes: int = sizes["grid"] ** 2) -> Tensor:
        cache: dict[Any, Any] = {}
        codes = tokens[:, :0]
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            for _ in range(n_codes):
                logits = model(tokens, codes, cache=cache)[:, -1, :]
                drawn = helpers.gumbel_sample(helpers.top_k(logits, thres=0.5), temperature=1.0, dim=-1)
                codes = torch.cat((codes, drawn[:, None] - model.num_text_tokens), dim=-1)
        return codes

    draw(2)  # a whole grid to warm up would take minutes
    return Subject(draw, batch * sizes["grid"] ** 2, parameters=sum(p.numel() for p in model.parameters()), warmup=0)
