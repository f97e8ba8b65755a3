"""Prepare a trained model for inference: replace its matrices by packed ones."""

from typing import TypeVar

import torch
from torch import nn

from dalle_cli.models.bart import CodePrior, EncoderDecoderPrior
from dalle_cli.models.dvae import DVAE
from dalle_cli.models.kernels import Int8Linear, PackedConvolution, PackedLinear, PackedPointwise, packs
from dalle_cli.models.unet import UNet
from dalle_cli.models.vqgan import VQGAN

P = TypeVar("P", bound=CodePrior)
D = TypeVar("D", bound=DVAE | VQGAN)
M = TypeVar("M", bound=nn.Module)


def pack(prior: P, rows: int, dtype: torch.dtype, int8: bool = False, plain: bool = False) -> P:
    """Replace the matrices of the blocks and the image head, in place; the prior can then be sampled, not trained.

    Choose `rows` as the number of codes that are sampled at once. Products are in `dtype` regardless of autocast;
    residual sums, norms and embeddings keep their dtype. The text head, which sampling does not use, is removed. The
    head of an encoder-decoder stays in float32: it is sampled with a guidance that multiplies what rounding leaves.
    `plain` keeps the ordinary layout, for a compiler. A prior that is already packed is returned unchanged.
    """

    def packed(linear: nn.Linear, rows: int) -> nn.Module:
        return Int8Linear(linear, dtype) if int8 else PackedLinear(linear, rows, dtype, plain)

    if not isinstance(prior.image_head, nn.Linear):
        return prior
    stacks = [(prior.blocks, rows)]
    if isinstance(prior, EncoderDecoderPrior):
        stacks.append((prior.encoder, prior.config.n_text))
        prior.image_head = PackedLinear(prior.image_head, rows, torch.float32, plain)  # type: ignore[assignment]
    else:
        prior.image_head = packed(prior.image_head, rows)  # type: ignore[assignment]
        prior.text_head = None  # type: ignore[assignment]
    for blocks, rows_at_once in stacks:
        for block in blocks:
            for name, layer in block.named_children():
                if isinstance(layer, nn.Linear):
                    setattr(block, name, packed(layer, prior.config.n_text if name == "cross_kv" else rows_at_once))
    return prior


def pack_pointwise(dvae: D, dtype: torch.dtype) -> D:
    """Replace the 1x1 convolutions by packed products, in place, where this is faster: in float32 on CPU.

    A dVAE's first layer of the decoder is left as it is, because `DVAE.decode` gathers its columns.
    """
    if dtype != torch.float32 or not packs(dtype) or next(dvae.parameters()).device.type != "cpu":
        return dvae
    kept = dvae.decoder[0] if isinstance(dvae, DVAE) else None
    for module in dvae.modules():
        for name, layer in module.named_children():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer is not kept:
                setattr(module, name, PackedPointwise(layer))
    return dvae


def pack_convolutions(model: M, dtype: torch.dtype) -> M:
    """Replace the 3x3 convolutions of a model's U-Nets by packed ones, in place, where this is faster: bfloat16 on CPU.

    The first and the last convolution are left as they are; the last computes in float32.
    """
    if dtype != torch.bfloat16 or not packs(dtype) or next(model.parameters()).device.type != "cpu":
        return model
    unets = [module for module in model.modules() if isinstance(module, UNet)]
    for block in (block for unet in unets for blocks in (unet.down, unet.middle, unet.up) for block in blocks):
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                setattr(block, name, PackedConvolution(layer, dtype))
    return model
