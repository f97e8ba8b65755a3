"""What the sampling loops of all priors share: captions of candidates, and a model in evaluation mode."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from dalle_cli.errors import DalleError


def rows_of_captions(
    captions: Sequence[int] | None, n_captions: int, n_candidates: int, batch_size: int
) -> Sequence[int]:
    """The caption's row for each candidate: `captions`, else the only caption, else one caption each.

    Raises:
        DalleError: another number of captions than candidates, or a batch size below 1.
    """
    if captions is None:
        captions = [0] * n_candidates if n_captions == 1 else range(n_captions)
    if len(captions) != n_candidates:
        found = f"found {len(captions)}"
        raise DalleError(f"expected 1 caption or {n_candidates}, {found}; give one for all or one for each")
    if batch_size < 1:
        raise DalleError(f"expected a batch size of 1 or more, found {batch_size}; try 16")
    return captions


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Disable dropout and gradients."""
    training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(training)
