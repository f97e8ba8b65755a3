"""transformers' GPT-2 of equal sizes, over the joint vocabulary."""

from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from bench.peers import count, step
from bench.peers.decoder import CLIP, streams
from bench.timing import Subject


def gpt2(sizes: dict[str, int], batch: int, dtype: str) -> Subject:
    """An update with fused AdamW; without dropout, as ours."""
    length = sizes["n_text"] + sizes["grid"] ** 2
    config = GPT2Config(
        vocab_size=sizes["n_text_vocab"] + sizes["n_image_vocab"],
        n_positions=length,
        n_embd=sizes["n_embd"],
        n_layer=sizes["n_layer"],
        n_head=sizes["n_head"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    given = cycle(streams(sizes, batch))

    def loss() -> Tensor:
        ids = next(given)
        found: Tensor = model(input_ids=ids, labels=ids).loss
        return found

    return Subject(lambda: step(model, optimizer, loss, dtype, CLIP), batch * length, parameters=count(model))


def drawn(sizes: dict[str, int], batch: int, dtype: str, cache: str) -> Subject:
    """Its `generate`, in `dtype` altogether, with its dynamic or its static cache: a grid of codes after a caption."""
    steps = sizes["grid"] ** 2
    vocabulary = sizes["n_text_vocab"] + sizes["n_image_vocab"]
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=sizes["n_text"] + steps,
        n_embd=sizes["n_embd"],
        n_layer=sizes["n_layer"],
        n_head=sizes["n_head"],
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model: Any = GPT2LMHeadModel(config)
    model = model.eval().requires_grad_(False).to(getattr(torch, dtype))
    captions = streams(sizes, batch)[0][:, : sizes["n_text"]]

    def draw(n: int = steps) -> Tensor:
        with torch.inference_mode():
            found: Tensor = model.generate(
                captions,
                attention_mask=torch.ones_like(captions),
                do_sample=True,
                top_k=0,
                max_new_tokens=n,
                min_new_tokens=n,
                cache_implementation=cache,
            )
        return found

    draw(2)
    return Subject(draw, batch * steps, parameters=sum(p.numel() for p in model.parameters()), warmup=0)
