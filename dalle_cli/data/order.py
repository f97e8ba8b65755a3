"""Which samples are held out, and the order of the others: one permutation per epoch."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dalle_cli.errors import DalleError

Ints = NDArray[np.int64]


class Order:
    """Places 0..n-1 in batches of B; the permutation of epoch e depends on (seed, e) alone.

    Raises:
        DalleError: there are no samples.
    """

    def __init__(self, n: int, batch_size: int, seed: int):
        if n < 1:
            raise DalleError("expected samples to train on, found none; hold out fewer or give more")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._epochs: dict[int, Ints] = {}

    def permutation(self, epoch: int) -> Ints:
        """The order of an epoch, (n,); the last two are cached."""
        if epoch not in self._epochs:
            self._epochs = {e: p for e, p in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = np.random.default_rng((self.seed, epoch)).permutation(self.n)
        return self._epochs[epoch]

    def batch(self, step: int) -> tuple[Ints, Ints]:
        """Epoch and place of each sample of batch `step`, (B,) and (B,); a batch may span two epochs."""
        at = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = at // self.n
        places = np.empty_like(at)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            places[here] = self.permutation(int(epoch))[at[here] % self.n]
        return epochs, places


def held_out(name: str, share: float) -> bool:
    """Whether the sample with this id belongs to the held-out `share` in [0, 1]: a hash of the id decides."""
    digest = hashlib.sha256(name.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split(ids: Sequence[str], share: float) -> tuple[Ints, Ints]:
    """Rows for training and for validation, each in order: (n_train,), (n_validation,) int64."""
    out = np.array([held_out(name, share) for name in ids], dtype=bool)
    return np.flatnonzero(~out), np.flatnonzero(out)
