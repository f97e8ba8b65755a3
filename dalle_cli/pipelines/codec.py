"""Images to dVAE codes and back (Ramesh et al. 2021, sec. 2.1).

Shapes: B batch, H W code grid, S side of the images in pixels.
"""

from typing import Any

import numpy as np
import torch

from dalle_cli.artifacts import Artifact
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.models.packed import pack_pointwise
from dalle_cli.models.pixels import from_uint8, to_uint8
from dalle_cli.pipelines import loading


class Codec:
    """A dVAE, ready to encode images to codes and to decode codes to images."""

    kind = "codes"

    def __init__(self, weights: Artifact, machine: Arithmetic):
        self.weights, self.machine = weights, machine
        self.dvae = pack_pointwise(loading.dvae(weights, machine.device), machine.dtype)
        config = self.dvae.config
        self.size, self.grid, self.n_vocab = config.image_size, config.grid, config.n_vocab
        self.dtype = np.uint16 if config.n_vocab <= 2**16 else np.int32

    @classmethod
    def of(cls, weights: Artifact, encoder: str, source: object, machine: Arithmetic) -> "Codec":
        """The codec of these weights, which must have the digest `encoder` that `source` names.

        Raises:
            DalleError: the weights of another dVAE.
        """
        bundles.check_digest("dVAE", weights.digest, encoder, source)
        return cls(weights, machine)

    @property
    def header(self) -> dict[str, Any]:
        """The header of an artifact of these codes."""
        return {"n_vocab": self.n_vocab, "grid": self.grid, "encoder": self.weights.digest}

    @property
    def empty(self) -> Any:
        """No rows: (0, H, W)."""
        return np.zeros((0, self.grid, self.grid), self.dtype)

    def encode(self, images: Any) -> Any:
        """(B, 3, S, S) uint8 -> codes (B, H, W) uint16, or int32 where the vocabulary is larger."""
        with self.machine.autocast():
            codes = self.dvae.encode(from_uint8(torch.from_numpy(images).to(self.machine.device)))
        return codes.cpu().numpy().astype(self.dtype)

    def decode(self, codes: Any) -> Any:
        """(B, H, W) integers -> images (B, 3, S, S) uint8.

        Raises:
            DalleError: a code beyond the vocabulary, or a grid of another size.
        """
        rows = check_codes(codes, self.n_vocab, self.grid)
        with self.machine.autocast():
            return to_uint8(self.dvae.decode(torch.from_numpy(rows).to(self.machine.device))).cpu().numpy()


def check_codes(codes: Any, n_vocab: int, grid: int) -> Any:
    """Codes (B, H, W) as int64, checked against the vocabulary and the size of the grid.

    Raises:
        DalleError: a code beyond the vocabulary, or a grid of another size.
    """
    rows = np.asarray(codes).astype(np.int64)
    if rows.size and not 0 <= rows.min() <= rows.max() < n_vocab:
        raise DalleError(f"expected codes below {n_vocab}, found {rows.max()}; the file is not this dVAE's")
    if rows.shape[1:] != (grid, grid):
        raise DalleError(f"expected codes of {(grid, grid)}, found {rows.shape[1:]}; the file is not this dVAE's")
    return rows
