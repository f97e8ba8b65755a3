"""DALL-E mini at its published size, with random weights: its prior as `sample` runs it, its VQGAN as `decode` does."""

from typing import Any

import torch
from torch import Tensor, nn

from bench.timing import Subject
from dalle_cli.devices import DTYPES
from dalle_cli.models.bart import EncoderDecoderConfig, EncoderDecoderPrior
from dalle_cli.models.packed import pack, pack_pointwise
from dalle_cli.models.vqgan import VQGAN, VQGANConfig
from dalle_cli.sampling.autoregressive import sample_codes
from dalle_cli.sampling.categorical import CategoricalOptions

CAPTION = 12  # tokens, of those that a caption may have
NOISE = 1 << 20  # random numbers, which the matrices repeat: drawing half a billion takes longer than the measurement
GUIDANCE = 10.0


def filled(model: nn.Module) -> nn.Module:
    """Random matrices; norms as they begin."""
    noise = torch.randn(NOISE) / 50
    for parameter in model.parameters():
        if parameter.ndim > 1:
            random = noise.repeat(-(-parameter.numel() // NOISE))[: parameter.numel()]
            parameter.data.copy_(random.view(parameter.shape))
        else:
            parameter.data.fill_(1)
    return model.eval().requires_grad_(False)


def caption(sizes: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A caption of a dozen tokens."""
    return torch.arange(sizes["n_text"])[None] % sizes["n_text_vocab"], torch.tensor([CAPTION])


def codes(sizes: dict[str, Any], batch: int, dtype: str = "bfloat16") -> Subject:
    """The codes of `batch` images of one caption with guidance; the caption is encoded anew each time."""
    with torch.device("meta"):
        made = EncoderDecoderPrior(EncoderDecoderConfig(**sizes))
    for layer in (layer for block in [*made.encoder, *made.blocks] for layer in block.children()):
        if isinstance(layer, nn.Linear):
            layer.to(DTYPES[dtype])  # as a bundle that was imported in it is loaded
    prior = filled(made.to_empty(device="cpu"))
    assert isinstance(prior, EncoderDecoderPrior)
    steps, count = prior.config.grid**2, sum(p.numel() for p in prior.parameters())
    matrices = [p for name, p in prior.blocks.named_parameters() if p.ndim == 2 and "cross_kv" not in name]
    read = DTYPES[dtype].itemsize * sum(p.numel() for p in matrices) + 4 * prior.image_head.weight.numel()
    pack(prior, 2 * batch, DTYPES[dtype])
    options = CategoricalOptions(top_k=256, guidance_scale=GUIDANCE)

    def run() -> Tensor:
        return sample_codes(prior, *caption(sizes), range(batch), 0, options, batch_size=batch)

    return Subject(run, batch * steps, read * steps, count, warmup=0)


def pixels(batch: int, dtype: str, sizes: dict[str, Any] | None = None) -> Subject:
    """Images of random codes."""
    model = VQGAN(VQGANConfig(encoder=False, pixels="unit", **(sizes or {}))).eval().requires_grad_(False)
    pack_pointwise(model, DTYPES[dtype])
    config = model.config
    given = torch.randint(config.n_vocab, (batch, config.grid, config.grid))

    def run() -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return model.decode(given)

    return Subject(run, batch, parameters=sum(p.numel() for p in model.parameters()), warmup=1)
