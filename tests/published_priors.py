"""ruDALL-E and minDALL-E, small, with random weights: their publishers' own models, and files as they publish them."""

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

GRID, N_CODES, N_TEXT, N_VOCAB, WIDTH, N_LAYER = 8, 20, 16, 48, 256, 4
LEVELS = 6  # of the VQGAN: 256 pixels to a grid of 8
WORDS = "шла саша по шоссе и сосала сушку"
CAPTIONS = ("a red circle", "the small dog", "two")


def without_parents(name: str) -> Any:
    """Import a module of a package whose own `__init__` files import what is not installed, or removed since."""
    top, *inner = name.split(".")[:-1]
    if top not in sys.modules:
        spec = importlib.util.find_spec(top)
        assert spec is not None
        assert spec.origin is not None
        _stub(top, Path(spec.origin).parent)
    for part in inner:
        parent, top = sys.modules[top], f"{top}.{part}"
        _stub(top, Path(parent.__path__[0], part))
    return importlib.import_module(name)


def _stub(name: str, path: Path) -> None:
    made = types.ModuleType(name)
    made.__path__ = [str(path)]
    sys.modules.setdefault(name, made)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, norms too, and small enough for numbers that float32 adds up well."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            scale = 0.05 if parameter.ndim < 2 else 1.0 if "emb" in name else parameter[0].numel() ** -0.5
            parameter.normal_(center, scale, generator=generator)
    return model.eval().requires_grad_(False)


def malevich(**changes: Any) -> Any:
    """ruDALL-E's transformer with the settings of Malevich's third version, but for its sizes."""
    sizes = {"text_seq_length": N_TEXT, "image_tokens_per_dim": GRID, "image_vocab_size": N_CODES, "hf_version": "v3"}
    sizes |= {"cogview_sandwich_layernorm": True, "cogview_pb_relax": False, "mlp_activation": "gelu_jit", **changes}
    made = without_parents("rudalle.dalle.model").DalleModel
    return randomized(made("cpu", N_LAYER, N_VOCAB + N_TEXT, WIDTH, WIDTH // 128, 0.0, 0.0, 0.0, **sizes))


def malevich_logits(model: Any, tokens: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of tokens and codes by a forward pass over all: (B, T), (B, n) int64 -> (B, T - 1, ...), (B, n + 1, V)."""
    stream = torch.cat([tokens, codes], dim=1)
    mask = torch.ones(len(stream), 1, stream.shape[1], stream.shape[1]).tril()
    logits = model(stream, mask)[0]
    return logits[:, : N_TEXT - 1, :N_VOCAB], logits[:, N_TEXT - 1 :, model.vocab_size :]


def mindalle(**changes: Any) -> Any:
    """minDALL-E's transformer, but for its sizes."""
    sizes = {"embed_dim": WIDTH, "n_layers": N_LAYER, "n_dense_layers": N_LAYER, "n_heads": 2, "ctx_len_txt": N_TEXT}
    sizes |= {"ctx_len_img": GRID**2, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "mlp_bias": True}
    sizes |= {"attn_bias": True, "gelu_use_approx": False, **changes}
    made = without_parents("helm.clients.image_generation.mindalle.models.stage2.transformer").Transformer1d
    return randomized(made(N_VOCAB, N_CODES, SimpleNamespace(**sizes)))


def mindalle_logits(model: Any, tokens: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """As `malevich_logits`."""
    n = codes.shape[1]
    padded = torch.cat([codes, codes.new_zeros(len(codes), 1)], dim=1)  # the last one is not read
    image, text = model(padded, tokens, torch.arange(n + 1), torch.arange(N_TEXT))
    return text, image


def greedy(logits: Any, model: Any, tokens: Tensor) -> Tensor:
    """The likeliest codes one after another, by a forward pass over all for each: (B, T) -> (B, W*W)."""
    codes = tokens[:, :0]
    for _ in range(GRID**2):
        codes = torch.cat([codes, logits(model, tokens, codes)[1][:, -1].argmax(-1, keepdim=True)], dim=1)
    return codes


def vqgan_sizes() -> dict[str, Any]:
    """The settings of the VQGANs' encoder and decoder."""
    sizes = {"double_z": False, "z_channels": 8, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32}
    return sizes | {"ch_mult": [1] * LEVELS, "num_res_blocks": 1, "attn_resolutions": [GRID], "dropout": 0.0}


def malevich_vqgan() -> Any:
    """ruDALL-E's VQGAN."""
    wavelets = types.ModuleType("rudalle.vae.decoder_dwt")  # of another variant; they need a package of their own
    wavelets.DecoderDWT = None
    sys.modules.setdefault(wavelets.__name__, wavelets)
    made = without_parents("rudalle.vae.model").GumbelVQ
    return randomized(made(vqgan_sizes(), N_CODES, 8))


def mindalle_vqgan() -> Any:
    """minDALL-E's VQGAN."""
    sizes = SimpleNamespace(**vqgan_sizes(), pdrop=0.0)
    del sizes.dropout
    made = without_parents("helm.clients.image_generation.mindalle.models.stage1.vqgan").VQGAN

    class Settings(dict[str, Any]):
        __getattr__ = dict.__getitem__

    return randomized(made(N_CODES, 8, Settings(vars(sizes))))


def yttm_model() -> str:
    """A text model of YouTokenToMe over the letters of WORDS, with a few merges."""
    letters = "\u2581" + "".join(sorted(set(WORDS) - {" "}))
    ids = {letter: 4 + i for i, letter in enumerate(letters)}
    pairs, names = (("\u2581", "с"), ("ш", "а"), ("с", "с"), ("\u2581с", "а"), ("к", "у")), dict(ids)
    rules = []
    for left, right in pairs:
        names[left + right] = 4 + len(names)
        rules.append(f"{names[left]} {names[right]} {names[left + right]}")
    rows = [f"{len(ids)} {len(rules)}", *(f"{ord(letter)} {n}" for letter, n in ids.items()), *rules, "1 0 2 3"]
    return "\n".join(rows) + "\n"


def publish_malevich(folder: Path) -> tuple[Any, Any]:
    """Files as ruDALL-E is published; returns the transformer and the VQGAN."""
    folder.mkdir(parents=True, exist_ok=True)
    model, vqgan = malevich(), malevich_vqgan()
    torch.save(model.state_dict(), folder / "pytorch_model_v3.bin")
    loss = {"loss.discriminator.main.0.weight": torch.zeros(3)}
    torch.save({"state_dict": vqgan.state_dict() | loss}, folder / "vqgan.gumbelf8-sber.model.ckpt")
    (folder / "bpe.model").write_text(yttm_model(), encoding="utf-8")
    return model, vqgan


def publish_mindalle(folder: Path) -> tuple[Any, Any]:
    """Files as minDALL-E is published; returns the transformer and the VQGAN."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    model, vqgan = mindalle(), mindalle_vqgan()
    (folder / "config.yaml").write_text("stage2:\n  hparams:\n    n_heads: 2\n")
    torch.save({"state_dict": vqgan.state_dict()}, folder / "stage1_last.ckpt")
    torch.save({"state_dict": model.state_dict()}, folder / "stage2_last.ckpt")
    letters = sorted(set("".join(CAPTIONS)) - {" "})
    tokens = ["[UNK]", *letters, *(letter + "</w>" for letter in letters), "re", "red</w>", "[PAD]"]
    assert len(tokens) <= N_VOCAB
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "tokenizer" / "bpe-16k-vocab.json").write_text(json.dumps(vocab))
    (folder / "tokenizer" / "bpe-16k-merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    return model, vqgan
