"""Captions and embeddings where the right answer is known: z_i is a linear function of z_t, or of a word, and noise."""

import numpy as np

from dalle_cli.artifacts import open_artifact, write_artifact
from dalle_cli.data.pairs import Pairs

WIDTH, LENGTH, WORDS = 8, 3, 12
CLIP, TOKENIZER = "c" * 64, "f" * 64


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def embeddings(n=400, by="z_t", noise=0.3, seed=0):
    """Tokens (N, T), lengths (N,), z_t and z_i (N, D) of length 1; z_i is about some mean, with a falling spectrum."""
    rng = np.random.default_rng(seed)
    fixed = np.random.default_rng(7)  # what is to be learned, the same for all seeds
    spread = 0.7 ** np.arange(WIDTH)
    matrix, words = fixed.normal(size=(WIDTH, WIDTH)), fixed.normal(size=(WORDS, WIDTH))
    mean = 0.5 * fixed.normal(size=WIDTH)
    tokens = rng.integers(0, WORDS, (n, LENGTH))
    lengths = rng.integers(1, LENGTH + 1, n)
    z_t = unit(rng.normal(size=(n, WIDTH)))
    signal = z_t @ matrix if by == "z_t" else words[tokens[:, 0]]
    z_i = unit(mean + (signal + noise * rng.normal(size=(n, WIDTH))) * spread)
    tokens[np.arange(LENGTH) >= lengths[:, None]] = 0
    return tokens, lengths, z_t, z_i


def pairs(folder, n=400, by="z_t", noise=0.3, **facts):
    """The same as artifacts on the disk, joined."""
    tokens, lengths, z_t, z_i = embeddings(n, by, noise)
    ids = [f"{i:04d}" for i in range(n)]
    texts = [" ".join(map(str, row[:end])) for row, end in zip(tokens, lengths, strict=True)]
    captions, latents = folder / "captions.safetensors", folder / "embeddings.safetensors"
    header = {"n_vocab": WORDS, "n_text": LENGTH, "tokenizer": TOKENIZER, "encoder": CLIP, **facts}
    columns = {"tokens": tokens.astype(np.uint16), "lengths": lengths.astype(np.uint16), "embeddings": z_t}
    write_artifact(captions, "captions", {**columns, "ids": ids, "text": texts}, header, [])
    write_artifact(latents, "embeddings", {"embeddings": z_i, "ids": ids}, {"encoder": CLIP}, [])
    return opened(folder)


def opened(folder):
    """What `pairs` wrote there."""
    names = ("captions.safetensors", "embeddings.safetensors")
    return Pairs(*(open_artifact(folder / name) for name in names))
