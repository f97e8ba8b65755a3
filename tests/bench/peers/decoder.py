"""A plain PyTorch decoder, written in an hour: pre-norm, fused attention, one vocabulary for text and image."""

from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.peers import count, step
from bench.prior import batches
from bench.timing import Subject

CLIP = 4.0


class Block(nn.Module):
    """Attention and MLP, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        y: Tensor = x + self.mlp(self.norm_2(x))
        return y


class Decoder(nn.Module):
    """Predicts each id of a stream from those before it; the head is the embedding, as in GPT."""

    def __init__(self, vocab: int, length: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        for parameter in self.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy of all ids but the first: (B, 1 + L) int64 -> ()."""
        x = self.blocks(self.token(ids[:, :-1]) + self.position.weight)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), ids[:, 1:].flatten())


def streams(sizes: dict[str, int], batch: int) -> list[Tensor]:
    """Caption tokens, then codes above them, in one vocabulary: (B, T + W*W) int64."""
    first_code = sizes["n_text_vocab"]
    return [torch.cat([tokens, codes.flatten(1) + first_code], 1) for tokens, _, codes in batches(sizes, batch)]


def decoder(sizes: dict[str, int], batch: int, compiled: bool) -> Subject:
    """An update in bfloat16 with fused AdamW; compiled or not."""
    length = sizes["n_text"] + sizes["grid"] ** 2
    vocab = sizes["n_text_vocab"] + sizes["n_image_vocab"]
    model: nn.Module = Decoder(vocab, length, sizes["n_layer"], sizes["n_embd"], sizes["n_head"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    given = cycle([F.pad(ids, (1, 0)) for ids in streams(sizes, batch)])  # id 0 begins a stream: it is no caption's
    forward = torch.compile(model) if compiled else model

    def update() -> Tensor:
        return step(model, optimizer, lambda: forward(next(given)), "bfloat16", CLIP)

    return Subject(update, batch * length, parameters=count(model))
