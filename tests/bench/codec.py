"""The published dVAE at 256 pixels, as `encode-images` and `decode` run it."""

import torch
from torch import Tensor

from bench.timing import Subject
from dalle_cli.devices import DTYPES, autocast
from dalle_cli.models.dvae import DVAE, DVAEConfig
from dalle_cli.models.packed import pack_pointwise

N_VOCAB, SIDE = 8192, 256


def pixels(batch: int, side: int) -> Tensor:
    """Random pictures (B, 3, S, S) in [0, 1]."""
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def codes(batch: int, side: int) -> Tensor:
    """Random codes (B, S/8, S/8)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, N_VOCAB, (batch, side // 8, side // 8), generator=generator)


def ours(work: str, dtype: str, batch: int = 4, side: int = SIDE, n_hid: int = 256) -> Subject:
    """`work` is encode or decode."""
    model = DVAE(DVAEConfig(image_size=side, n_hid=n_hid, n_vocab=N_VOCAB)).eval().requires_grad_(False)
    pack_pointwise(model, DTYPES[dtype])
    given = pixels(batch, side) if work == "encode" else codes(batch, side)

    def run() -> Tensor:
        with torch.inference_mode(), autocast(torch.device("cpu"), DTYPES[dtype]):
            return model.encode(given) if work == "encode" else model.decode(given)

    return Subject(run, batch, parameters=sum(p.numel() for p in model.parameters()), warmup=1)
