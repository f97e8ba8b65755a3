"""Training a CLIP (Radford et al. 2021): the reranker of both systems, and DALL-E 2's encoder.

Shapes: B batch, S side in pixels, T caption length, D embedding width.
"""

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dalle_cli.data.augment import by_name
from dalle_cli.data.datasets import Dataset
from dalle_cli.data.loader import Loader, sequential
from dalle_cli.data.split import split
from dalle_cli.data.tokenizer import Tokenizer
from dalle_cli.models.clip import CLIP, CLIPConfig
from dalle_cli.models.pixels import from_uint8
from dalle_cli.training.config import TrainConfig
from dalle_cli.training.distributed import all_rows
from dalle_cli.training.loop import Batch, mix

VALIDATION_BATCH = 64


@dataclass(frozen=True)
class CLIPTrain(TrainConfig):
    """Numbers near the published model's (ViT-B/32, 32 epochs of 400M pairs); small recipes say their own."""

    steps: int = 400_000
    batch_size: int = 32_768
    lr: float = 5e-4
    warmup: int = 2000
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.2
    clip_norm: float = 1.0
    augment: str = "prior"
    flip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        by_name(self.augment)


class CLIPTask:
    """Pictures with captions, of which each epoch draws one anew."""

    def __init__(
        self, config: CLIPConfig, train: CLIPTrain, data: Dataset, tokenizer: Tokenizer, seed: int, workers: int
    ):
        self.config, self.options, self.data, self.tokenizer = config, train, data, tokenizer
        self.seed, self.workers, self.captions = seed, workers, data.captions
        self.rank, self.world = 0, 1
        torch.manual_seed(mix(seed, -1))
        self.model = CLIP(config)
        self.rows, held_out = split(data.ids, train.validation)
        self.held_out = held_out[: train.max_validation]

    def share(self, rank: int, world: int) -> None:
        """From now on this process embeds its part of each batch alone; the loss is over the embeddings of all."""
        self.rank, self.world, model = rank, world, self.model
        image, text = model.encode_image, model.encode_text

        def encode_text(tokens: Tensor, lengths: Tensor) -> Tensor:
            return all_rows(text(tokens.chunk(world)[rank], lengths.chunk(world)[rank]))

        vars(model)["encode_image"] = lambda pixels: all_rows(image(pixels))
        vars(model)["encode_text"] = encode_text

    def batches(self, start: int) -> Generator[Batch]:
        """Pictures (B, 3, S, S) uint8, tokens (B, T) and lengths (B,) int64, a function of the seed and the update."""
        o, size = self.options, self.config.image_size
        augment, part = by_name(o.augment, o.flip), o.batch_size // self.world
        loader = Loader(
            self.data, size, augment, part, self.seed, self.workers, self.rows, rank=self.rank, world=self.world
        )
        for step, batch in enumerate(loader.batches(start), start):
            picks = np.random.default_rng((self.seed, 2, step)).random(o.batch_size)[self.rank * part :][:part]
            yield (torch.from_numpy(batch.images), *self._tokens(batch.rows, picks))

    def _tokens(self, rows: NDArray[np.int64], picks: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """Of each row's captions the one that its pick in [0, 1) chooses: tokens (B, T), lengths (B,), int64."""
        texts = [(c := self.captions[int(row)])[int(pick * len(c))] for row, pick in zip(rows, picks, strict=True)]
        tokens, lengths, _ = self.tokenizer.encode_batch(texts, self.config.n_text)
        return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(lengths.astype(np.int64))

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The contrastive or sigmoid loss of the batch."""
        images, tokens, lengths = batch
        if self.world > 1:
            tokens, lengths = all_rows(tokens), all_rows(lengths)
        return self.model.loss(from_uint8(images), tokens, lengths)

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Among groups of 64 held-out pictures: the loss, and how often the own caption is the nearest."""
        assert isinstance(model, CLIP)
        rows = self.held_out.tolist()
        totals: dict[str, float] = {}
        groups = 0
        for kept, images in sequential(self.data, self.config.image_size, rows, VALIDATION_BATCH, self.workers):
            if len(kept) < min(VALIDATION_BATCH, len(rows)):
                continue  # a smaller last group would be easier
            tokens, lengths = self._tokens(kept, np.zeros(len(kept)))
            pixels = from_uint8(torch.from_numpy(images).to(device))
            loss, figures = model.loss(pixels, tokens.to(device), lengths.to(device))
            groups += 1
            for key, value in {"loss": loss, "accuracy": figures["accuracy"]}.items():
                totals[key] = totals.get(key, 0.0) + value.item()
        return {f"{key}_held_out": value / groups for key, value in totals.items()}

    def sheet(self, model: nn.Module, device: torch.device, path: Path) -> None:
        """A CLIP draws nothing."""
