"""Parts that both priors over CLIP embeddings share: principal components and a causal transformer (2022, sec. 2.2).

B batch, T caption positions, L positions in all, D embedding width, C width of the transformer, E width of a head, P
captions. Embeddings have length 1, so a dot product is a cosine, unless a prior says that they keep CLIP's own length.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_cli.errors import DalleError
from dalle_cli.models.attention import rotary_angles
from dalle_cli.models.blocks import init_transformer, prefill
from dalle_cli.models.cache import Prompt
from dalle_cli.models.kernels import causal_attention
from dalle_cli.models.prior import BLOCKS, PriorConfig

OFF_SCALE = 1.25  # largest accepted ratio of the entries' standard deviation to 1, either way


class Principal(nn.Module):
    """Mean, principal components and spectrum of embeddings, and the scale that gives their entries unit variance.

    They are buffers, so they are stored with the weights.
    """

    mean: Tensor  # (D,)
    components: Tensor  # (D, D), one a row, orthonormal, by falling eigenvalue
    spectrum: Tensor  # (D,) eigenvalues of the covariance
    scale: Tensor  # (1,)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("components", torch.eye(width))
        self.register_buffer("spectrum", torch.full((width,), 1 / width))
        self.register_buffer("scale", torch.full((1,), math.sqrt(width)))

    @torch.no_grad()
    def fit(self, chunks: Iterable[Tensor], scale: float = 0.0) -> None:
        """Compute the statistics, in float64, of embeddings in chunks (n, D); with `scale` 0 also the scale.

        Raises: DalleError where there are none, or none that differ.
        """
        mean, covariance = covariance_of(chunks)
        values, vectors = torch.linalg.eigh(covariance)
        spectrum, components = values.flip(0).clamp(min=0), vectors.mT.flip(0)
        largest = components.abs().argmax(dim=1, keepdim=True)
        components = components * components.gather(1, largest).sign()  # an eigenvector's sign is arbitrary: fix it
        variance = float(spectrum.mean())
        if not variance > 0:
            raise DalleError("expected embeddings that differ, found all alike; check what they were made from")
        self.mean.copy_(mean)
        self.components.copy_(components)
        self.spectrum.copy_(spectrum)
        self.scale.fill_(scale or variance**-0.5)

    def standardize(self, z: Tensor) -> Tensor:
        """Subtract the mean and scale to unit variance: (B, D) -> (B, D)."""
        return (z - self.mean) * self.scale

    def restore(self, x: Tensor) -> Tensor:
        """Invert `standardize` and normalize to length 1: (B, D) -> (B, D)."""
        return F.normalize(x / self.scale + self.mean, dim=-1)

    def project(self, z: Tensor, n: int) -> Tensor:
        """Coordinates on the first n components: (B, D) -> (B, n)."""
        with torch.autocast(z.device.type, enabled=False):
            return (z - self.mean) @ self.components[:n].mT

    def rebuild(self, coordinates: Tensor) -> Tensor:
        """The embedding with these first n coordinates, normalized to length 1: (B, n) -> (B, D)."""
        with torch.autocast(coordinates.device.type, enabled=False):
            return F.normalize(coordinates @ self.components[: coordinates.shape[-1]] + self.mean, dim=-1)

    def n_holding(self, share: float) -> int:
        """The smallest number of components that explains this share of the variance."""
        held = self.spectrum.double().cumsum(0) / self.spectrum.double().sum()
        return min(int((held < share).sum()) + 1, len(held))

    def spread(self, z: Tensor) -> float:
        """Root mean square of the standardized entries, ideally 1."""
        return float(self.standardize(z).square().mean().sqrt())


class MeanStd(nn.Module):
    """Mean and standard deviation of each dimension of embeddings, which keep the length that CLIP gives them.

    They are buffers, so they are stored with the weights. For embeddings of length 1 see `Principal`.
    """

    mean: Tensor  # (D,)
    std: Tensor  # (D,)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    @torch.no_grad()
    def fit(self, chunks: Iterable[Tensor]) -> None:
        """Compute both, in float64, of embeddings in chunks (n, D).

        Raises: DalleError where there are none, or a dimension in which all are alike.
        """
        mean, covariance = covariance_of(chunks)
        std = covariance.diagonal().clamp(min=0).sqrt()
        if not bool((std > 0).all()):
            raise DalleError("expected embeddings that differ in each dimension, found others; check their source")
        self.mean.copy_(mean)
        self.std.copy_(std)

    def standardize(self, z: Tensor) -> Tensor:
        """Subtract the mean and divide by the deviation: (B, D) -> (B, D)."""
        return (z - self.mean) / self.std

    def restore(self, x: Tensor) -> Tensor:
        """Invert `standardize`: (B, D) -> (B, D)."""
        return x * self.std + self.mean

    def spread(self, z: Tensor) -> float:
        """Root mean square of the standardized entries, ideally 1."""
        return float(self.standardize(z).square().mean().sqrt())


class Captions(nn.Module):
    """The first positions of both priors: caption tokens, a learned pad for each unused position, then z_t.

    A caption of length 0 is the null caption of training and guidance: pads, and a learned vector for z_t.
    """

    def __init__(self, n_vocab: int, n_text: int, n_embedding: int, width: int) -> None:
        super().__init__()
        self.n_text, self.n_embedding = n_text, n_embedding
        self.token = nn.Embedding(n_vocab, width)
        self.pad = nn.Embedding(n_text, width)
        self.z_in = nn.Linear(n_embedding, width)
        self.null = nn.Parameter(torch.empty(width))

    def visible(self, lengths: Tensor) -> Tensor | None:
        """All positions are attended to, pads too."""
        return None

    def forward(self, tokens: Tensor, lengths: Tensor, z_t: Tensor) -> Tensor:
        """(B, T), (B,) int64, (B, D) of length 1 -> (B, T + 1, C).

        Raises: DalleError where the shapes are not the model's.
        """
        _check_captions(tokens, z_t, (self.n_text,), self.n_embedding)
        written = torch.arange(self.n_text, device=lengths.device) < lengths[:, None]
        words = torch.where(written[..., None], self.token(tokens), self.pad.weight)
        z = self.z_in(z_t * math.sqrt(self.n_embedding))  # entries of unit variance
        z = torch.where((lengths > 0)[:, None], z, self.null.to(z.dtype))
        return torch.cat([words, z[:, None].to(words.dtype)], dim=1)


class CaptionStates(nn.Module):
    """The same positions from the states of CLIP's text tower, which stays as it is, and z_t as long as CLIP gives it.

    Nothing attends to positions beyond a caption's end. The null caption is the text "", whose length is not 0: it has
    a start and an end. Karlo, ECLIPSE and Kandinsky's priors take captions this way.
    """

    def __init__(self, n_text: int, text_width: int, n_embedding: int, width: int) -> None:
        super().__init__()
        self.shape, self.n_embedding = (n_text, text_width), n_embedding
        self.states_in = nn.Linear(text_width, width)
        self.z_in = nn.Linear(n_embedding, width)

    def visible(self, lengths: Tensor) -> Tensor:
        """Which positions may be attended to: those of the caption, then z_t: (B,) of 1 or more -> (B, T + 1) bool."""
        written = torch.arange(self.shape[0], device=lengths.device) < lengths[:, None]
        return F.pad(written, (0, 1), value=True)

    def forward(self, states: Tensor, lengths: Tensor, z_t: Tensor) -> Tensor:
        """(B, T, text_width), (B,) int64, (B, D) -> (B, T + 1, C).

        Raises: DalleError where the shapes are not the model's.
        """
        _check_captions(states, z_t, self.shape, self.n_embedding)
        weight = self.z_in.weight
        return torch.cat([self.states_in(states.to(weight.dtype)), self.z_in(z_t.to(weight.dtype))[:, None]], dim=1)


def _check_captions(captions: Tensor, z_t: Tensor, shape: tuple[int, ...], n_embedding: int) -> None:
    """Raises: DalleError for captions or embeddings of other sizes than the prior's."""
    if tuple(captions.shape[1:]) != shape or z_t.shape[1] != n_embedding:
        sizes, expected = (" x ".join(map(str, one)) for one in (captions.shape[1:], shape))
        raise DalleError(
            f"expected captions of {expected} positions and embeddings of {n_embedding}, found {sizes} and "
            f"{z_t.shape[1]}; use those that the prior was trained with"
        )


def residual_blocks(config: PriorConfig) -> nn.ModuleList:
    """The blocks of the token prior."""
    return nn.ModuleList(BLOCKS[config.block](config) for _ in range(config.n_layer))


class EmbeddingTransformer(nn.Module):
    """A causal transformer over a caption, then `own` positions; the base of both priors over CLIP embeddings."""

    captions: Captions | CaptionStates
    position: nn.Embedding
    dropout: nn.Dropout
    blocks: nn.ModuleList
    config: Any
    lasts: Sequence[int | None]  # by block: how many last positions it computes, None for all

    def initialize(self) -> None:
        """Sample all weights as the token prior's."""
        init_transformer(self.named_parameters(), self.config.n_layer)

    def rotary(self, device: torch.device) -> Tensor:
        """Rotary angles of the positions, in one line: (2, L, E)."""
        config = self.config
        return rotary_angles(config.n_positions, 1, config.n_embd // config.n_head, device)

    def transform(self, captions: Tensor, own: Tensor, visible: Tensor | None = None) -> Tensor:
        """All blocks over both parts: (B, T + 1, C), (B, L - T - 1, C) -> (B, L, C), or the last positions alone.

        `visible` (B, T + 1) bool are the captions' positions that may be attended to; None is all.
        """
        x = self.dropout(torch.cat([captions, own], dim=1) + self.position.weight)
        rotary, attend = self.rotary(x.device), causal_attention
        if visible is not None:
            attend = partial(causal_attention, visible=F.pad(visible, (0, own.shape[1]), value=True))
        for block, last in zip(self.blocks, self.lasts, strict=True):
            x = block(x, attend, rotary, last)
        y: Tensor = x
        return y

    def prefill(self, tokens: Tensor, lengths: Tensor, z_t: Tensor) -> Prompt:
        """Compute the captions' keys and values once: (P, T) or states, (P,), (P, D) -> Prompt, without logits.

        Raises: DalleError where the shapes are not the model's.
        """
        captions, visible = self.captions(tokens, lengths, z_t), self.captions.visible(lengths)
        length = captions.shape[1]
        x = self.dropout(captions + self.position.weight[:length])
        x, keys, values = prefill(self.blocks, x, self.rotary(x.device)[:, :length], self.lasts, visible)
        return Prompt(x.new_zeros(len(x), 0), keys, values, visible)


def off_scale(spread: float) -> bool:
    """Whether the entries are too far from unit variance for noise of unit variance."""
    return not 1 / OFF_SCALE <= spread <= OFF_SCALE


def covariance_of(chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), both float64, of rows that come in chunks (n, D); only one chunk is in memory.

    The first chunk's mean is subtracted from all rows before they are summed, which keeps the precision.

    Raises: DalleError where there is no row.
    """
    count, origin, total, products = 0, None, torch.zeros(()), torch.zeros(())
    for chunk in chunks:
        rows = chunk.double()
        if not len(rows):
            continue
        origin = rows.mean(0) if origin is None else origin
        rows = rows - origin
        count, total, products = count + len(rows), total + rows.sum(0), products + rows.mT @ rows
    if origin is None:
        raise DalleError("expected embeddings, found none; give some")
    shift = total / count
    return origin + shift, products / count - torch.outer(shift, shift)
