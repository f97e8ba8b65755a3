"""What both priors over CLIP embeddings stand on: principal components, and attention that looks back (2022, sec. 2.2).

N embeddings, B batch, D their width, K principal components, C width of a transformer, S positions of a prefix, L of
what follows it, H heads, E width of a head. Embeddings are of length 1, so that a dot product is a cosine.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_cli.errors import DalleError
from dalle_cli.models.attention import trains_on_cpu
from dalle_cli.models.local_attention import batched_attention, causal_attention
from dalle_cli.models.modern import rotary_angles
from dalle_cli.models.prior import BLOCKS, PriorConfig

OFF_SCALE = 1.25  # times that entries may be larger or smaller than of unit variance


class Principal(nn.Module):
    """Mean, principal components and spectrum of embeddings, and the scale that gives their entries unit variance.

    Kept as buffers, so that weights carry what they were trained with.
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
        """Take the statistics of embeddings that come in chunks (n, D), in float64; `scale` 0 measures it.

        Raises: DalleError where there are none, or none that differ.
        """
        mean, covariance = covariance_of(chunks)
        values, vectors = torch.linalg.eigh(covariance)
        spectrum, components = values.flip(0).clamp(min=0), vectors.mT.flip(0)
        largest = components.abs().argmax(dim=1, keepdim=True)
        components = components * components.gather(1, largest).sign()  # eigenvectors know no sign: make it the same
        variance = float(spectrum.mean())
        if not variance > 0:
            raise DalleError("expected embeddings that differ, found all alike; check what they were made from")
        self.mean.copy_(mean)
        self.components.copy_(components)
        self.spectrum.copy_(spectrum)
        self.scale.fill_(scale or variance**-0.5)

    def standardize(self, z: Tensor) -> Tensor:
        """Without the mean, and of unit variance: (B, D) -> (B, D)."""
        return (z - self.mean) * self.scale

    def restore(self, x: Tensor) -> Tensor:
        """The way back, to length 1: (B, D) -> (B, D)."""
        return F.normalize(x / self.scale + self.mean, dim=-1)

    def project(self, z: Tensor, n: int) -> Tensor:
        """Coordinates on the first n components: (B, D) -> (B, n)."""
        with torch.autocast(z.device.type, enabled=False):
            return (z - self.mean) @ self.components[:n].mT

    def rebuild(self, coordinates: Tensor) -> Tensor:
        """The embedding of the first n coordinates, to length 1: (B, n) -> (B, D)."""
        with torch.autocast(coordinates.device.type, enabled=False):
            return F.normalize(coordinates @ self.components[: coordinates.shape[-1]] + self.mean, dim=-1)

    def n_holding(self, share: float) -> int:
        """How few components hold this share of the variance."""
        held = self.spectrum.double().cumsum(0) / self.spectrum.double().sum()
        return min(int((held < share).sum()) + 1, len(held))

    def spread(self, z: Tensor) -> float:
        """Root mean square of standardized entries, which should be 1."""
        return float(self.standardize(z).square().mean().sqrt())


class Captions(nn.Module):
    """The head of both streams: caption tokens, or a pad of their own beyond its end, then the caption's z_t.

    A caption of length 0 is null: pads alone, and a learned vector in place of z_t. So what training drops and what
    guidance takes for null is the same.
    """

    def __init__(self, n_vocab: int, n_text: int, n_embedding: int, width: int) -> None:
        super().__init__()
        self.n_text, self.n_embedding = n_text, n_embedding
        self.token = nn.Embedding(n_vocab, width)
        self.pad = nn.Embedding(n_text, width)
        self.z_in = nn.Linear(n_embedding, width)
        self.null = nn.Parameter(torch.empty(width))

    def forward(self, tokens: Tensor, lengths: Tensor, z_t: Tensor) -> Tensor:
        """(B, T), (B,) int64, (B, D) of length 1 -> (B, T + 1, C).

        Raises: DalleError where the shapes are not the model's.
        """
        if tokens.shape[1] != self.n_text or z_t.shape[1] != self.n_embedding:
            found = f"{tokens.shape[1]} and {z_t.shape[1]}"
            raise DalleError(
                f"expected captions of {self.n_text} positions and embeddings of {self.n_embedding}, found {found}; "
                "use those that the prior was trained with"
            )
        written = torch.arange(self.n_text, device=lengths.device) < lengths[:, None]
        words = torch.where(written[..., None], self.token(tokens), self.pad.weight)
        z = self.z_in(z_t * math.sqrt(self.n_embedding))  # entries of unit variance
        z = torch.where((lengths > 0)[:, None], z, self.null.to(z.dtype))
        return torch.cat([words, z[:, None].to(words.dtype)], dim=1)


def stack(config: PriorConfig) -> nn.ModuleList:
    """The residual blocks of a stream, those of the token prior."""
    return nn.ModuleList(BLOCKS[config.block](config) for _ in range(config.n_layer))


def stream_rotary(config: PriorConfig, length: int, device: torch.device) -> Tensor:
    """Rotary angles of positions in a line, cosines and sines (2, L, E)."""
    return rotary_angles(length, 1, config.n_embd // config.n_head, device)


@torch.no_grad()
def draw_weights(model: nn.Module, n_layer: int) -> None:
    """Draw matrices and embeddings from N(0, 0.02), what ends a residual branch by 1 / sqrt(2 n_layer) less."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name or name.endswith("qk_scale"):
            parameter.fill_(1)
        else:
            residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
            parameter.normal_(0, 0.02 / math.sqrt(2 * n_layer) if residual else 0.02)


def off_scale(spread: float) -> bool:
    """Whether entries are so far from unit variance that noise of unit variance does not fit them."""
    return not 1 / OFF_SCALE <= spread <= OFF_SCALE


def covariance_of(chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), both float64, of rows that come in chunks (n, D) and are never all held.

    Sums are of differences from the first chunk's mean, which is near enough to the mean that no digits are lost.

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


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each position sees itself and those before: (B, H, L, E), of the last positions, and twice (B, H, M, E)."""
    if trains_on_cpu(q):
        return batched_attention(q, k, v, _ahead(q, k))
    if q.shape != k.shape:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_ahead(q, k))
    if q.is_cpu and torch.is_grad_enabled():
        return causal_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def after_prefix(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same for positions behind a prefix whose keys and values (P, H, S, E) were computed once.

    (B, H, L, E), of the last positions, and twice (B, H, M, E) -> (B, H, L, E); of B rows each prefix serves B / P, one
    after another.
    """
    n_rows, n_head, length, width = q.shape
    shared = (len(keys), n_rows // len(keys), n_head, length)

    def together(x: Tensor) -> Tensor:  # a prefix's rows side by side: (B, H, L, X) -> (P, H, B/P * L, X)
        return x.reshape(*shared, -1).transpose(1, 2).flatten(2, 3)

    q = q * width**-0.5
    near = together(q @ k.mT + _ahead(q, k))
    weights = torch.softmax(torch.cat([together(q) @ keys.mT, near], dim=-1), dim=-1)
    far, near = torch.split(weights, [keys.shape[-2], k.shape[-2]], dim=-1)

    def apart(x: Tensor) -> Tensor:  # the way back
        return x.reshape(len(keys), n_head, shared[1], length, -1).transpose(1, 2).flatten(0, 1)

    return apart(far @ values) + apart(near) @ v


def _ahead(q: Tensor, k: Tensor) -> Tensor:
    """-inf where a key lies ahead of a query, the queries being of the last positions, else 0: (L, M)."""
    return q.new_full((q.shape[-2], k.shape[-2]), float("-inf")).triu(1 + k.shape[-2] - q.shape[-2])
