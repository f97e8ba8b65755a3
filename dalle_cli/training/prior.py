"""Training the token prior (Ramesh et al. 2021, sec. 2.2).

Shapes: B batch, T caption length, H W code grid.
"""

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dalle_cli import load
from dalle_cli.artifacts import Artifact
from dalle_cli.data.order import Order
from dalle_cli.data.pairs import Floats, Ints, Pairs
from dalle_cli.data.sheet import sheet
from dalle_cli.data.tokenizer import Tokenizer
from dalle_cli.errors import DalleError
from dalle_cli.models.dvae import DVAE
from dalle_cli.models.pixels import to_uint8
from dalle_cli.models.prior import Prior, PriorConfig, disturb_codes, drop_captions
from dalle_cli.sampling.autoregressive import sample_codes
from dalle_cli.training.config import TrainConfig, check_guidance
from dalle_cli.training.loop import Batch, mix

VALIDATION_BATCH = 64
COLORS_AT_ONCE = 256  # codes
AHEAD = 2  # batches that lie ready: encoding captions anew takes some 40 microseconds each


@torch.inference_mode()
def code_colors(dvae: DVAE) -> Floats:
    """The mean color of a picture of each code alone: (V, 3) float32 in [-1, 1]."""
    side = 4  # codes; a decoder looks no further than to its neighbors
    codes = torch.arange(dvae.config.n_vocab)[:, None, None].expand(-1, side, side)
    parts = [to_uint8(dvae.decode(part)).float().mean((2, 3)) for part in torch.split(codes, COLORS_AT_ONCE)]
    return np.asarray(torch.cat(parts) / 127.5 - 1, dtype=np.float32)


def small_pictures(codes: Ints, colors: Floats, side: int) -> Tensor:
    """What codes look like from afar: (B, W, W), (V, 3) -> (B, 3, s, s) float32, each cell the mean of its codes."""
    pixels = torch.from_numpy(colors[codes]).movedim(-1, 1)
    return nn.functional.avg_pool2d(pixels, pixels.shape[-1] // side)


@dataclass(frozen=True)
class PriorTrain(TrainConfig):
    """The paper's numbers (app. B), which want 1024 pictures a step; small recipes say their own."""

    steps: int = 430_000
    batch_size: int = 1024
    lr: float = 4.5e-4
    warmup: int = 5000
    beta2: float = 0.96
    weight_decay: float = 4.5e-2
    clip_norm: float = 4.0
    ema: float = 0.99
    ema_every: int = 25
    bpe_dropout: float = 0.1
    caption_dropout: float = 0.0  # 0.1 trains for guidance
    guidance: float = 1.0  # what the weights are drawn with where nothing else is said; 1 = none
    code_noise: float = 0.0  # share of codes that are read as any other: against learning few pictures by heart
    sketch_batch: int = 256  # pairs of an update, beside its own, that a sketch learns from, if the model makes one
    sheet_prompts: int = 12  # held-out captions that are drawn at each validation, if the dVAE is there; 0 = none

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bpe_dropout", "caption_dropout", "code_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise DalleError(f"expected {name} in [0, 1], found {getattr(self, name)}")
        check_guidance(self.guidance)
        if self.sketch_batch < 1:
            raise DalleError(f"expected sketch_batch of at least 1, found {self.sketch_batch}; raise it")
        if self.sheet_prompts < 0:
            raise DalleError(f"expected sheet_prompts of at least 0, found {self.sheet_prompts}; raise it")


class PriorTask:
    """Captions and codes joined by id; each epoch draws one caption and one grid of codes of each id anew."""

    colors: Floats | None = None  # of each code, where the model sketches

    def __init__(
        self,
        config: PriorConfig,
        train: PriorTrain,
        pairs: Pairs,
        tokenizer: Tokenizer | None,
        seed: int,
        dvae: Artifact | None = None,
    ):
        """`dvae` are the weights that made the codes, for pictures on the way and for what a sketch learns.

        Raises: DalleError where a sketch is asked for and there is no dVAE.
        """
        self.config, self.options, self.pairs, self.tokenizer, self.seed = config, train, pairs, tokenizer, seed
        self.dvae = dvae
        torch.manual_seed(mix(seed, -1))
        self.model = Prior(config)
        self.places, self.held_out = pairs.split(train.validation)
        self.order = Order(len(self.places), train.batch_size, seed)
        if config.sketch:
            if dvae is None:
                told = "expected the dVAE beside -o or the codes for prior.sketch, found none; copy it there"
                raise DalleError(told)
            self.colors = code_colors(load.dvae(dvae, torch.device("cpu")))
            self.sketch_order = Order(len(self.places), train.sketch_batch, mix(seed, 2))

    def batches(self, start: int) -> Generator[Batch]:
        """What `batch` gives, from update `start` on, made while the model computes."""
        with ThreadPoolExecutor(1) as pool:
            ahead = deque(pool.submit(self.batch, start + i) for i in range(AHEAD))
            for step in count(start + AHEAD):
                ready = ahead.popleft().result()
                ahead.append(pool.submit(self.batch, step))
                yield ready

    def batch(self, step: int) -> Batch:
        """Tokens (B, T), lengths (B,), codes (B, H, W), all int64: a function of the seed and the step.

        With a sketch three more, as `_seen` gives them.
        """
        _, rows = self.order.batch(step)
        rng = np.random.default_rng((self.seed, 1, step))
        captions, latents = self.pairs.draw(self.places[rows], rng.random((len(rows), 2)))
        if self.options.bpe_dropout and self.tokenizer is not None:
            tokens, lengths = self._drop_merges(captions, rng)
        else:
            tokens, lengths = self.pairs.tokens(captions)
        codes = self.pairs.codes(latents)
        return torch.from_numpy(tokens), torch.from_numpy(lengths), torch.from_numpy(codes), *self._seen(step)

    def _seen(self, step: int) -> Batch:
        """What a sketch learns from: tokens (B', T), lengths (B',), pictures (B', 3, s, s); nothing without one."""
        if self.colors is None:
            return ()
        _, rows = self.sketch_order.batch(step)
        rng = np.random.default_rng((self.seed, 2, step))
        captions, latents = self.pairs.draw(self.places[rows], rng.random((len(rows), 2)))
        tokens, lengths = self.pairs.tokens(captions)
        lengths = np.where(rng.random(len(rows)) < self.options.caption_dropout, 0, lengths)
        pictures = small_pictures(self.pairs.codes(latents), self.colors, self.config.sketch)
        return torch.from_numpy(tokens), torch.from_numpy(lengths), pictures

    def _drop_merges(self, rows: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """Captions encoded anew with BPE dropout (app. B), from the text that the artifact keeps."""
        assert self.tokenizer is not None
        texts = self.pairs.captions.strings("text")
        tokens = np.zeros((len(rows), self.config.n_text), dtype=np.int64)
        lengths = np.zeros(len(rows), dtype=np.int64)
        for i, row in enumerate(rows):
            ids = self.tokenizer.encode_dropout(texts[int(row)], self.options.bpe_dropout, rng)[: self.config.n_text]
            tokens[i, : len(ids)] = ids
            lengths[i] = len(ids)
        return tokens, lengths

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The prior's loss, in nats, after some captions were made null for guidance and some codes disturbed."""
        tokens, lengths, codes, *more = batch
        seen = (more.pop(0), more.pop(0), more.pop(0)) if self.colors is not None else None
        if more:  # a part, as `split` makes them
            return self.model.loss(tokens, lengths, codes, more[0], more[1], seen)
        lengths = self._drop_captions(lengths, generator)
        return self.model.loss(tokens, lengths, codes, read=self._disturb(codes, generator), seen=seen)

    def _drop_captions(self, lengths: Tensor, generator: torch.Generator) -> Tensor:
        probability = self.options.caption_dropout
        return drop_captions(lengths, probability, generator) if probability else lengths

    def _disturb(self, codes: Tensor, generator: torch.Generator) -> Tensor:
        probability = self.options.code_noise
        return disturb_codes(codes, probability, self.config.n_image_vocab, generator) if probability else codes

    def split(self, batch: Batch, parts: int, step: int, generator: torch.Generator) -> list[Batch]:
        """Equal parts; each carries how many caption tokens a part holds on average, which its text loss is over."""
        tokens, lengths, codes, *seen = batch
        if seen and len(seen[0]) % parts:
            found = f"found {len(seen[0])}"
            raise DalleError(f"expected sketch_batch a multiple of {parts}, the parts of a batch, {found}; change it")
        lengths = self._drop_captions(lengths, generator)
        share = lengths.sum().clamp(min=1) / parts
        read = self._disturb(codes, generator)
        chunks = zip(*(x.chunk(parts) for x in (tokens, lengths, codes, *seen, read)), strict=True)
        return [(*chunk, share, part) for *chunk, part in chunks]

    def units(self, batch: Batch) -> tuple[str, int]:
        """Positions of the stream."""
        return "tokens", len(batch[0]) * self.model.n_positions

    def flops(self) -> float:
        """Of one update."""
        return self.options.batch_size * self.model.flops()

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Nats per code and per text token on held-out pictures, each with the first of its captions."""
        assert isinstance(model, Prior)
        places = self.held_out[: self.options.max_validation]
        if not len(places):
            return {}
        text = image = tokens_seen = sketch = 0.0
        for chunk in np.array_split(places, -(-len(places) // VALIDATION_BATCH)):
            captions, latents = self.pairs.draw(chunk, np.zeros((len(chunk), 2)))
            arrays = (*self.pairs.tokens(captions), self.pairs.codes(latents))
            tokens, lengths, codes = (torch.from_numpy(a).to(device) for a in arrays)
            _, parts = model.loss(tokens, lengths, codes)
            n_tokens = float(lengths.sum())
            text += parts["text_nats"].item() * n_tokens
            tokens_seen += n_tokens
            image += parts["image_nats"].item() * len(chunk)
            if self.colors is not None:
                pictures = small_pictures(arrays[2], self.colors, self.config.sketch).to(device)
                error = (model.sketched(tokens, lengths).float() - pictures).square().mean()
                sketch += error.item() * len(chunk)
        figures = {"image_nats": image / len(places), "text_nats": text / max(tokens_seen, 1)}
        return figures if self.colors is None else {**figures, "sketch": sketch / len(places)}

    def sheet(self, model: nn.Module, device: torch.device, path: Path) -> None:
        """What the first held-out captions, always the same ones, look like by now; nothing without a dVAE."""
        assert isinstance(model, Prior)
        places = self.held_out[: self.options.sheet_prompts]
        if self.dvae is None or not len(places):
            return
        captions, _ = self.pairs.draw(places, np.zeros((len(places), 2)))
        tokens, lengths = map(torch.from_numpy, self.pairs.tokens(captions))
        with torch.autocast(device.type, enabled=False):
            numbers, scale = range(len(places)), self.options.guidance
            codes = sample_codes(model, tokens, lengths, numbers, self.seed, guidance_scale=scale)
            pixels = to_uint8(load.dvae(self.dvae, device).decode(codes)).cpu().numpy()
        texts = self.pairs.captions.strings("text")
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet(list(pixels), [texts[int(row)] for row in captions], title="held-out captions").save(path)
