"""PyPI's DALL-E, the publisher's own package: encoder and decoder with weights as they are drawn at first."""

from importlib import import_module

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.codec import N_VOCAB, SIDE, codes, pixels
from bench.peers import count
from bench.timing import Subject


def published(work: str, dtype: str, batch: int = 4, side: int = SIDE, n_hid: int = 256) -> Subject:
    """`work` is encode or decode, as its usage notebook has them; in bfloat16 under autocast."""
    package = import_module("dall_e")
    model = import_module("dall_e.encoder").Encoder(n_hid=n_hid) if work == "encode" else None
    model = model or import_module("dall_e.decoder").Decoder(n_hid=n_hid)
    given = package.map_pixels(pixels(batch, side)) if work == "encode" else codes(batch, side)

    def run() -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            if work == "encode":
                return torch.argmax(model(given), dim=1)
            drawn = model(F.one_hot(given, num_classes=N_VOCAB).permute(0, 3, 1, 2).float()).float()
            return package.unmap_pixels(torch.sigmoid(drawn[:, :3]))  # type: ignore[no-any-return]

    return Subject(run, batch, parameters=count(model), warmup=1)
