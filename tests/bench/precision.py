"""What fewer bits cost: nats of a prior, and how often a drawn code or a picture's code becomes another one.

B pairs, W side of the grid, V image vocabulary.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_cli.artifacts import open_artifact
from dalle_cli.data.pairs import Pairs
from dalle_cli.devices import autocast
from dalle_cli.models.packed import pack
from dalle_cli.models.pixels import from_uint8, to_uint8
from dalle_cli.pipelines import loading
from dalle_cli.sampling.categorical import sample_categorical, uniforms

CPU = torch.device("cpu")
FORMS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8, bfloat16": {"dtype": torch.bfloat16, "int8": True},
}


def report(folder: Path, n_pairs: int = 64) -> str:
    """A recipe's build folder -> a Markdown table, of held-out pairs (of all, should there be fewer than asked for)."""
    pairs = Pairs(open_artifact(folder / "captions.safetensors"), open_artifact(folder / "codes.safetensors"))
    weights = open_artifact(folder / "model" / "prior.safetensors")
    places = pairs.split(weights.require("train", dict)["validation"])[1][:n_pairs]
    rows = pairs.draw(places, np.zeros((len(places), 2)))
    tokens, lengths, codes = (torch.from_numpy(x) for x in (*pairs.tokens(rows[0]), pairs.codes(rows[1])))
    noise = torch.stack([uniforms(0, k, codes[0].numel()) for k in range(len(codes))])
    lines = ["| arithmetic | nats per code | drawn codes that differ from float32's |", "|---|---|---|"]
    exact: list[Tensor] = []
    for name, form in FORMS.items():
        prior = pack(loading.prior(weights, CPU), len(codes), **form)
        nats, drawn = [], []
        for j, logits in enumerate(steps(prior, tokens, lengths, codes)):
            nats.append(torch.nn.functional.cross_entropy(logits, codes.flatten(1)[:, j]))
            drawn.append(sample_categorical(logits, noise[:, j]))
        exact = exact or drawn
        other = (torch.stack(drawn) != torch.stack(exact)).float().mean()
        lines.append(f"| {name} | {torch.stack(nats).mean():.4f} | {other:.2%} |")
    return "\n".join([*lines, "", encoded(folder, codes)])


@torch.inference_mode()
def steps(prior: Any, tokens: Tensor, lengths: Tensor, codes: Tensor) -> Iterator[Tensor]:
    """Logits (B, V) of each code, given those before it."""
    cache = prior.cache(prior.prefill(tokens, lengths))
    yield cache.logits
    for code in codes.flatten(1)[:, :-1].unbind(1):
        yield prior.step(code, cache)


@torch.inference_mode()
def encoded(folder: Path, codes: Tensor) -> str:
    """How many codes of pictures stay the same in bfloat16; the pictures are those that the codes stand for."""
    dvae = loading.dvae(open_artifact(folder / "model" / "dvae.safetensors"), CPU)
    exact = to_uint8(dvae.decode(codes))
    images = from_uint8(exact)
    with autocast(CPU, torch.bfloat16):
        found, shown = dvae.encode(images), to_uint8(dvae.decode(codes))
    share = (found == dvae.encode(images)).float().mean()
    off = (shown.int() - exact.int()).abs().float().mean()
    return f"In bfloat16 {share:.2%} of a picture's codes stay the same; decoded pixels differ by {off:.2f} of 255."
