"""What `doctor` reads of a data set, and of captions and embeddings: the same pairs whatever the model.

N pictures or pairs, S side, T caption positions.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dalle_cli.data.conditions import Conditions
from dalle_cli.data.loader import Pictures, sequential
from dalle_cli.data.pairs import Ints, Pairs
from dalle_cli.doctor.decoder import Told
from dalle_cli.doctor.embeddings import Seen
from dalle_cli.errors import DalleError
from dalle_cli.evaluation.likelihood import strangers
from dalle_cli.sampling.embeddings import Read

BATCH = 64
SEED = 0  # of whose caption stands in for a pair's own


def judged(held_out: Ints, rows: Ints, limit: int | None) -> tuple[Ints, bool]:
    """The rows to look at, evenly spread, and whether training held them out.

    Raises:
        DalleError: fewer than two.
    """
    kept = len(held_out) > 1
    chosen = held_out if kept else rows
    if limit is not None and limit < len(chosen):
        chosen = chosen[np.arange(limit) * len(chosen) // limit]
    if len(chosen) < 2:
        raise DalleError(f"expected 2 rows or more to compare, found {len(chosen)}; give more, or raise --limit")
    return chosen, kept


def read(data: Pictures, size: int, rows: Ints, workers: int, device: torch.device) -> tuple[Tensor, Ints]:
    """Pictures (N, 3, S, S) uint8 of those rows that can be read, and which they are.

    Raises:
        DalleError: fewer than two.
    """
    parts = list(sequential(data, size, rows.tolist(), BATCH, workers))
    kept = np.concatenate([part for part, _ in parts]) if parts else rows[:0]
    if len(kept) < 2:
        raise DalleError(f"expected 2 pictures or more that can be read, found {len(kept)}; check the data set")
    return torch.from_numpy(np.concatenate([images for _, images in parts])).to(device), kept


def others(tokens: Tensor, lengths: Tensor) -> list[int]:
    """For each caption (N, T), (N,) the number of one that reads differently; the next one where all are alike."""
    keys = [tuple(row[:n]) for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    return strangers(keys, SEED) or [(i + 1) % len(keys) for i in range(len(keys))]


def seen(pairs: Pairs, places: Ints, device: torch.device) -> Seen:
    """The first caption and the first embedding of each place, and of each another caption with its embedding."""
    captions, latents = pairs.draw(places, np.zeros((len(places), 2)))
    tokens, lengths = map(torch.from_numpy, pairs.tokens(captions))
    columns = (tokens, lengths, torch.from_numpy(pairs.text_embeddings(captions)))
    own, strange = Read(*(x.to(device) for x in columns)), others(tokens, lengths)
    z_i = torch.from_numpy(pairs.embeddings(latents)).to(device)
    stored = np.asarray(pairs.latents.array("embeddings")[latents]).astype(np.float32)
    return Seen(own, own.rows(strange), z_i, z_i[strange], torch.from_numpy(np.linalg.norm(stored, axis=1)))


def told(images: Tensor, about: Conditions, ids: Sequence[str]) -> Told:
    """What a decoder is told of pictures: the first embedding and the first caption of each id."""
    columns = about.of(ids, np.zeros((len(ids), 2)))
    embeddings, tokens, lengths = (torch.from_numpy(x).to(images.device) for x in columns)
    return Told(images, embeddings, tokens, lengths, others(tokens, lengths))
