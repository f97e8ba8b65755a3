"""Run as a program with a folder: small files as kuprel/min-dalle has them, and what its own modules make of them.

It runs in a process of its own, as importing min_dalle changes global settings of torch.
"""

import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

SIZES = {"layers": 2, "width": 32, "heads": 4, "hidden": 44, "n_text_vocab": 60, "n_text": 8, "n_codes": 50}
PROMPTS = ([0, 7, 9, 33, 2], [0, 11, 2], [0, *range(20, 26), 2])  # BOS, a caption, EOS
GUIDANCE = 5.0
STEPS = 40  # codes of the greedy sequence


def stored(model: torch.nn.Module) -> OrderedDict:
    """The tensors that the published files have: scales of norms only behind attention and embeddings."""
    scaled = ("self_attn_layer_norm.weight", "encoder_attn_layer_norm.weight", "layernorm_embedding.weight")
    published = OrderedDict()
    for name, tensor in model.state_dict().items():
        norm = "layer_norm" in name or ".ln" in name or "final_ln" in name or "layernorm" in name
        plain = "pre_" in name or not name.endswith(scaled)
        if norm and name.endswith("weight") and plain:
            assert torch.equal(tensor, torch.ones_like(tensor))
        else:
            published[name] = tensor
    return published


def shake(model: torch.nn.Module) -> torch.nn.Module:
    """No stored tensor keeps its initial value; norms without a scale keep theirs of 1."""
    for name, tensor in model.state_dict().items():
        if name in stored(model):
            tensor.add_(torch.randn_like(tensor) * (0.5 if tensor.ndim == 1 else 0.2))
    return model.eval()


def greedy(encoder, decoder, prompt: list[int], start: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, guided logits and the encoder's states (null first), by the publisher's modules one token at a time."""
    text = torch.ones(2, SIZES["n_text"], dtype=torch.long)
    text[0, :2] = torch.tensor([prompt[0], prompt[-1]])
    text[1, : len(prompt)] = torch.tensor(prompt)
    states, mask = encoder(text), text.not_equal(1)[:, None, None, :]
    attention = torch.zeros(SIZES["layers"], 4, 256, SIZES["width"])
    codes, logits, last = [], [], torch.tensor([[start]])
    for position in range(STEPS):
        made, attention = decoder(mask, states, attention, last, torch.tensor([position]))
        null, own = made[:, -1, : SIZES["n_codes"]]
        logits.append(null + GUIDANCE * (own - null))
        last = logits[-1].argmax().view(1, 1)
        codes.append(int(last))
    return torch.tensor(codes), torch.stack(logits), states


def words() -> dict[str, int]:
    """A vocabulary of a few letters, with BART's special tokens in their places."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["<s>", "<pad>", "</s>", "<unk>", "Ġ", *letters, *("Ġ" + c for c in letters[:20]), "Ġre", "Ġred"]
    return {name: i for i, name in enumerate(names)}


def vqgan_sizes(encoder: bool = True) -> Any:
    """Those of a small VQGAN in the layout of the published one."""
    from dalle_cli.models.vqgan import VQGANConfig

    return VQGANConfig(
        width=32, multipliers=(1, 1, 1, 1, 1), depth=1, n_latent=8, n_embd=6, n_vocab=SIZES["n_codes"], pixels="unit",
        encoder=encoder,
    )  # fmt: skip


def publish(folder: Path) -> Path:
    """All files of the repository, and `expected.pt`, by this program and a decoder of ours."""
    from dalle_cli.models.vqgan import VQGAN

    subprocess.run([sys.executable, __file__, str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    (folder / "vocab_mini.json").write_text(json.dumps(words()))
    (folder / "merges_mini.txt").write_text("#version: 0.2\nĠ r\nĠr e\nĠre d\n")
    torch.manual_seed(1)
    decoder = VQGAN(vqgan_sizes(encoder=False)).state_dict()
    torch.save({name.removeprefix("quantize."): t.contiguous() for name, t in decoder.items()}, folder / "detoker.pt")
    return folder


def main(folder: Path) -> None:
    """Write the files and expected.pt."""
    from min_dalle.models import DalleBartDecoder, DalleBartEncoder

    torch.manual_seed(0)
    torch.set_num_threads(1)
    shared = {"embed_count": SIZES["width"], "attention_head_count": SIZES["heads"], "layer_count": SIZES["layers"]}
    shared |= {"glu_embed_count": SIZES["hidden"], "device": "cpu"}
    encoder = shake(DalleBartEncoder(text_vocab_count=60, text_token_count=SIZES["n_text"], **shared))
    decoder = shake(DalleBartDecoder(image_vocab_count=SIZES["n_codes"], **shared))
    torch.save(stored(encoder), folder / "encoder_mini.pt")
    torch.save(stored(decoder), folder / "decoder_mini.pt")
    (folder / "config_mini.json").write_text(json.dumps({"decoder_attention_heads": SIZES["heads"]}))
    torch.save([greedy(encoder, decoder, prompt, SIZES["n_codes"]) for prompt in PROMPTS], folder / "expected.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
