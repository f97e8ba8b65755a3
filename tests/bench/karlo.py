"""Karlo's decoder at its published size, with random weights: one guided call of its U-Net, as `decode` runs it."""

from typing import Any

import torch
from torch import Tensor, nn

from bench.published import filled
from bench.timing import Subject
from dalle_cli.models.decoder import Decoder, DecoderConfig
from dalle_cli.models.packed import pack_convolutions

ROWS = 2  # of one image with guidance: conditional and null
TEXT = 77
LENGTHS = torch.tensor([12, 2])  # of the caption, and of the null caption


def unet(sizes: dict[str, Any], packed: bool = True) -> Subject:
    """A call, conditioned before; the matrices of blocks are bfloat16, as in weights that are stored so."""
    with torch.device("meta"):
        made = Decoder(DecoderConfig(**sizes, n_text=TEXT, captions="states", dropout=0.0))
    for module in (*made.unet.down.modules(), *made.unet.middle.modules(), *made.unet.up.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight = nn.Parameter(module.weight.bfloat16())
    decoder = filled(made.to_empty(device="cpu"))
    assert isinstance(decoder, Decoder)
    c, parameters = decoder.config, sum(p.numel() for p in decoder.unet.parameters())
    if packed:
        pack_convolutions(decoder, torch.bfloat16)
    z, given = torch.randn(ROWS, c.n_embedding), torch.tensor([True, False])
    x, t = torch.randn(ROWS, 3, c.image_size, c.image_size), torch.full((ROWS,), 500)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        conditioning = decoder.condition(z, given, torch.randn(ROWS, TEXT, c.text_width), LENGTHS, z)

    def call() -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            y: Tensor = decoder(x, t, conditioning)
            return y

    return Subject(call, ROWS, parameters=parameters, warmup=1)


def diffusers_unet(sizes: dict[str, Any], dtype: str = "bfloat16") -> Subject:
    """The same call of diffusers' U-Net, in bfloat16 as a whole, as `from_pretrained(torch_dtype=...)` makes it."""
    from diffusers import UNet2DConditionModel

    levels, context = len(sizes["multipliers"]), sizes["context_width"]
    attends = [sizes["image_size"] >> level in sizes["attention"] for level in range(levels)]
    down = ["SimpleCrossAttnDownBlock2D" if attend else "ResnetDownsampleBlock2D" for attend in attends]
    up = ["SimpleCrossAttnUpBlock2D" if attend else "ResnetUpsampleBlock2D" for attend in reversed(attends)]
    kind = getattr(torch, dtype)
    with torch.device("meta"):
        made = UNet2DConditionModel(
            sample_size=sizes["image_size"], in_channels=3, out_channels=6, layers_per_block=sizes["depth"],
            block_out_channels=[sizes["width"] * m for m in sizes["multipliers"]], down_block_types=down,
            up_block_types=up, mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=context,
            attention_head_dim=sizes["head_width"], class_embed_type="identity", resnet_time_scale_shift="scale_shift",
            norm_num_groups=sizes.get("groups", 32),
        ).to(kind)  # fmt: skip
    model: Any = filled(made.to_empty(device="cpu"))
    side, n = sizes["image_size"], sizes.get("n_extra", 4) + TEXT
    x, t = torch.randn(ROWS, 3, side, side, dtype=kind), torch.full((ROWS,), 500)
    states, added = torch.randn(ROWS, n, context, dtype=kind), torch.randn(ROWS, 4 * sizes["width"], dtype=kind)
    mask = torch.arange(n) < LENGTHS[:, None] + n - TEXT

    def call() -> Tensor:
        with torch.inference_mode():
            y: Tensor = model(x, t, states, class_labels=added, attention_mask=mask).sample
            return y

    return Subject(call, ROWS, parameters=sum(p.numel() for p in made.parameters()), warmup=1)
