"""The dVAE as `train-dvae` trains it, on the published architecture."""

from itertools import cycle
from typing import Any, cast

import torch
from torch import Tensor

from bench.prior import N_BATCHES, trainer_of
from bench.timing import Subject
from dalle_cli.data.datasets import Dataset
from dalle_cli.models.dvae import DVAEConfig
from dalle_cli.training.dvae import DVAETask, DVAETrain


class NoPictures:
    """A data set of which only the (empty) list of ids is read: the batches are given."""

    ids: tuple[str, ...] = ()


def pictures(batch: int, side: int) -> list[Tensor]:
    """Random pictures (B, 3, S, S) uint8."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (batch, 3, side, side), generator=generator).byte() for _ in range(N_BATCHES)]


def ours(image_size: int, n_hid: int, n_vocab: int, batch: int) -> Subject:
    """An update of the task itself: schedules, AdamW, average of the weights, statistics of the codes."""
    config = DVAEConfig(image_size=image_size, n_hid=n_hid, n_vocab=n_vocab)
    options = DVAETrain(batch_size=batch)
    task = DVAETask(config, options, cast(Dataset, cast(Any, NoPictures())), 0, 0)
    trainer = trainer_of(task, options)
    given = cycle(pictures(batch, image_size))
    count = sum(p.numel() for p in task.model.parameters())
    return Subject(lambda: trainer.update((next(given),)), batch, parameters=count)
