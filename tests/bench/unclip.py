"""The models over CLIP embeddings, as `train-prior`, `train-decoder` and `sample` run them.

B batch, N pairs, T caption positions, D width of an embedding, S side of a picture in pixels.
"""

import tempfile
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from bench.dvae import NoPictures, pictures
from bench.peers import count
from bench.prior import N_BATCHES, trainer_of
from bench.timing import Subject
from dalle_cli.artifacts import open_artifact, write_artifact
from dalle_cli.data.datasets import Dataset
from dalle_cli.data.pairs import Conditions, Pairs
from dalle_cli.devices import arithmetic
from dalle_cli.models.decoder import DecoderConfig
from dalle_cli.models.diffusion_prior import DiffusionPriorConfig
from dalle_cli.sampling.embeddings import PromptBatch, sample_diffusion
from dalle_cli.training.decoder import DecoderTask, DecoderTrain
from dalle_cli.training.embedding_prior import DiffusionPriorTask, EmbeddingPriorTrain
from dalle_cli.training.loop import Batch

N_PAIRS = 1024


def unit(seed: int, n: int, width: int) -> Tensor:
    """Random embeddings (n, D) of length 1."""
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


def pairs(sizes: dict[str, int], folder: Path) -> Pairs:
    """Random captions that fill their positions, with z_t, and random z_i: artifacts in a folder, joined by id."""
    rng = np.random.default_rng(0)
    n_text, width = sizes["n_text"], sizes["n_embedding"]
    ids = [f"{i:04d}" for i in range(N_PAIRS)]
    tokens = rng.integers(1, sizes["n_text_vocab"], (N_PAIRS, n_text)).astype(np.uint16)
    lengths = np.full(N_PAIRS, n_text, dtype=np.uint16)
    facts = {"n_vocab": sizes["n_text_vocab"], "n_text": n_text, "tokenizer": "0" * 64, "encoder": "0" * 64}
    texts = {"tokens": tokens, "lengths": lengths, "embeddings": unit(0, N_PAIRS, width).numpy()}
    captions = write_artifact(folder / "captions", "captions", {**texts, "ids": ids, "text": ids}, facts, [])
    z_i = {"embeddings": unit(1, N_PAIRS, width).numpy(), "ids": ids}
    latents = write_artifact(folder / "embeddings", "embeddings", z_i, {"encoder": "0" * 64}, [])
    return Pairs(open_artifact(captions), open_artifact(latents))


def prior_task(sizes: dict[str, int], batch: int) -> tuple[DiffusionPriorTask, list[Batch]]:
    """The task, and batches of its own making: tokens (B, T), lengths, z_t and z_i (B, D), timesteps, noise."""
    with tempfile.TemporaryDirectory() as folder:
        config, options = DiffusionPriorConfig(**sizes), EmbeddingPriorTrain(batch_size=batch)  # type: ignore[arg-type]
        task = DiffusionPriorTask(config, options, pairs(sizes, Path(folder)), 0)
        return task, [task.batch(step) for step in range(N_BATCHES)]


def prior(sizes: dict[str, int], batch: int) -> Subject:
    """An update of the diffusion prior: captions dropped, AdamW, clipping, average of the weights."""
    task, batches = prior_task(sizes, batch)
    trainer = trainer_of(task, task.options)
    given = cycle(batches)
    return Subject(lambda: trainer.update(next(given)), batch, task.flops(), count(task.model))


def embeddings(
    sizes: dict[str, int], batch: int, steps: int, dtype: str = "bfloat16", one_caption: bool = False
) -> Subject:
    """Draw `batch` embeddings by ddpm, the better of two each, of as many captions or of one."""
    task, batches = prior_task(sizes, batch)
    tokens, lengths, z_t = batches[0][:3]
    read = PromptBatch(tokens, torch.full_like(lengths, sizes["n_text"]), z_t)
    read = read.rows([0]) if one_caption else read
    model, machine = task.model.eval().requires_grad_(False), arithmetic("cpu", dtype)

    def draw() -> Tensor:
        with machine.autocast():
            return torch.cat(list(sample_diffusion(model, read, range(batch), 0, steps=steps, batch_size=batch)))

    return Subject(draw, batch, parameters=sum(p.numel() for p in model.parameters()), warmup=1)


def decoder_task(sizes: dict[str, Any], batch: int) -> DecoderTask:
    """The task of a decoder that is told of embeddings alone, without dropout."""
    config = DecoderConfig(**sizes, n_text=0, dropout=0.0)
    data, told = cast(Dataset, cast(Any, NoPictures())), cast(Conditions, None)  # the batches are given
    return DecoderTask(config, DecoderTrain(batch_size=batch), data, told, 0, 0)


def painted(sizes: dict[str, Any], batch: int) -> list[tuple[Tensor, Tensor]]:
    """Random pictures (B, 3, S, S) uint8 and embeddings (B, D)."""
    seen = pictures(batch, sizes["image_size"])
    return [(images, unit(i, batch, sizes["n_embedding"])) for i, images in enumerate(seen)]


def unet(sizes: dict[str, Any], batch: int) -> Subject:
    """An update of the decoder: a tenth of the embeddings null, the variance learned, AdamW, average of the weights."""
    task = decoder_task(sizes, batch)
    trainer = trainer_of(task, task.options)
    generator, nothing = torch.Generator().manual_seed(0), torch.zeros(batch, 0, dtype=torch.int64)

    def drawn(images: Tensor, z_i: Tensor) -> Batch:
        t = torch.randint(0, task.config.n_timestep, (batch,), generator=generator)
        given = torch.rand(batch, generator=generator) >= task.options.embedding_dropout
        noise = torch.randn(images.shape, generator=generator)
        return images, noise, t, z_i, given, nothing, torch.zeros(batch, dtype=torch.int64)

    rounds = cycle([drawn(*pair) for pair in painted(sizes, batch)])
    return Subject(lambda: trainer.update(next(rounds)), batch, parameters=count(task.model))
