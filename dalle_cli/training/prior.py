"""Training the token prior (Ramesh et al. 2021, sec. 2.2).

Shapes: B batch, T caption length, H W code grid.
"""

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dalle_cli.artifacts import Artifact
from dalle_cli.data.order import Order
from dalle_cli.data.pairs import Ints, Pairs
from dalle_cli.data.tokenizer import Tokenizer
from dalle_cli.errors import DalleError
from dalle_cli.models.dvae import DVAE
from dalle_cli.models.pixels import to_uint8
from dalle_cli.models.prior import Prior, PriorConfig, disturb_codes, drop_captions
from dalle_cli.pipelines import loading as load
from dalle_cli.sampling.autoregressive import sample_codes
from dalle_cli.sampling.sketches import N_TIMESTEP, redraw_sketches, sketch_losses
from dalle_cli.training.config import TrainConfig, check_drawing
from dalle_cli.training.loop import Batch, mix
from dalle_cli.viz.grid import sheet

VALIDATION_BATCH = 64
COLORS_AT_ONCE = 256  # codes
UNTOLD = 0.15  # share of the pairs that follow no sketch, as a likelihood of codes does not
NOISE = 0.3  # the most that is added to a true sketch, whose like is drawn with errors
REDRAWING_STEPS = 15  # of DDIM
AHEAD = 2  # batches that lie ready: encoding captions anew takes some 40 microseconds each


@torch.inference_mode()
def code_colors(dvae: DVAE) -> Tensor:
    """The mean color of a picture of each code alone: (V, 3) float32 in [-1, 1]."""
    side = 4  # codes; a decoder looks no further than to its neighbors
    codes = torch.arange(dvae.config.n_vocab)[:, None, None].expand(-1, side, side)
    parts = [to_uint8(dvae.decode(part)).float().mean((2, 3)) for part in torch.split(codes, COLORS_AT_ONCE)]
    return torch.cat(parts) / 127.5 - 1


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
    temperature: float = 1.0  # likewise
    code_noise: float = 0.0  # share of codes that are read as any other: against learning few pictures by heart
    sketch_batch: int = 256  # pairs of an update, beside its own, that a sketch learns from, if the model draws one
    sketch_only: bool = False  # whether the rest of the prior stays as it is
    sketch_redrawn: float = 0.0  # the most noise, as a share, that a sketch which stays as it is draws true ones from
    sketch_guidance: float = 1.0  # what sketches are drawn with; 1 = none
    sheet_prompts: int = 12  # held-out captions that are drawn at each validation, if the dVAE is there; 0 = none

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bpe_dropout", "caption_dropout", "code_noise", "sketch_redrawn"):
            if not 0 <= getattr(self, name) <= 1:
                raise DalleError(f"expected {name} in [0, 1], found {getattr(self, name)}")
        check_drawing(guidance=self.guidance, temperature=self.temperature, sketch_guidance=self.sketch_guidance)
        if self.sketch_batch < 1:
            raise DalleError(f"expected sketch_batch of at least 1, found {self.sketch_batch}; raise it")
        if self.sketch_only and self.sketch_redrawn:
            found = "found both; first train the one, then with its weights the other"
            raise DalleError(f"expected sketch_only or sketch_redrawn, {found}")
        if self.sheet_prompts < 0:
            raise DalleError(f"expected sheet_prompts of at least 0, found {self.sheet_prompts}; raise it")


def freeze(model: Prior, train: PriorTrain) -> None:
    """Let learn what the settings say: the sketch, all but the sketch, or all.

    Raises: DalleError where they speak of a sketch and there is none.
    """
    for name in ("sketch_only", "sketch_redrawn"):
        if getattr(train, name):
            if model.sketch is None:
                raise DalleError(f"expected prior.sketch beside prior.train.{name}, found none; say its side")
            model.requires_grad_(name == "sketch_redrawn")
            model.sketch.requires_grad_(name == "sketch_only")


class PriorTask:
    """Captions and codes joined by id; each epoch draws one caption and one grid of codes of each id anew."""

    def __init__(
        self,
        config: PriorConfig,
        train: PriorTrain,
        pairs: Pairs,
        tokenizer: Tokenizer | None,
        seed: int,
        dvae: Artifact | None = None,
    ):
        """`dvae` are the weights that made the codes, for pictures on the way and for what a sketch learns from.

        Raises: DalleError where a sketch is asked for and there is no dVAE, or the weights are cut into shards.
        """
        self.config, self.options, self.pairs, self.tokenizer, self.seed = config, train, pairs, tokenizer, seed
        self.dvae = dvae
        torch.manual_seed(mix(seed, -1))
        self.model = Prior(config)
        self.places, self.held_out = pairs.split(train.validation)
        self.order = Order(len(self.places), train.batch_size, seed)
        self.learns_sketch = bool(config.sketch) and not train.sketch_redrawn
        if self.model.sketch is not None:
            if dvae is None:
                told = "expected the dVAE beside -o or the codes for prior.sketch, found none; copy it there"
                raise DalleError(told)
            if train.parallel == "shard":  # whose weights come together in `Prior.loss` alone
                told = 'expected parallel = "replicate" for a prior that sketches, found "shard"; a sketch is small'
                raise DalleError(told)
            self.model.sketch.colors.copy_(code_colors(load.dvae(dvae, torch.device("cpu"))))
            self.sketch_order = Order(len(self.places), train.sketch_batch, mix(seed, 2))
        freeze(self.model, train)

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

        With a sketch that learns as many again, (B', ...), for that.
        """
        _, rows = self.order.batch(step)
        rng = np.random.default_rng((self.seed, 1, step))
        captions, latents = self.pairs.draw(self.places[rows], rng.random((len(rows), 2)))
        if self.options.bpe_dropout and self.tokenizer is not None:
            tokens, lengths = self._drop_merges(captions, rng)
        else:
            tokens, lengths = self.pairs.tokens(captions)
        arrays = [tokens, lengths, self.pairs.codes(latents)]
        if self.learns_sketch:
            _, rows = self.sketch_order.batch(step)
            rng = np.random.default_rng((self.seed, 2, step))
            captions, latents = self.pairs.draw(self.places[rows], rng.random((len(rows), 2)))
            arrays += [*self.pairs.tokens(captions), self.pairs.codes(latents)]
        return tuple(map(torch.from_numpy, arrays))

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
        """The prior's loss, in nats, after some captions were made null for guidance and some codes disturbed.

        With a sketch, too: of 15% of the pairs it is hidden, the others see the true one with some noise, or drawn
        again; what draws it learns from pairs of its own, `sketch` being the squared error.
        """
        if batch[-1].ndim:  # a whole one, not a part as `split` makes them
            return self._loss(self._made(batch, generator))
        return self._loss(batch[:-1], batch[-1])

    def _made(self, batch: Batch, generator: torch.Generator) -> Batch:
        """A batch with all that is drawn at random for it: tokens, lengths, codes, and codes as they are read.

        With a sketch, further: sketches and who sees them; and if it learns, as `sketch_losses` takes them, tokens,
        lengths, pictures, timesteps and noise.
        """
        tokens, lengths, codes, *own = batch
        made = (tokens, self._drop_captions(lengths, generator), codes, self._disturb(codes, generator))
        sketch = self.model.sketch
        if sketch is None:
            return made
        device = generator.device
        uniform = partial(torch.rand, generator=generator, device=device)
        normal = partial(torch.randn, generator=generator, device=device)
        with torch.no_grad():
            true = sketch.of(codes)
        if share := self.options.sketch_redrawn:
            since, noise = (share * N_TIMESTEP * uniform(len(true))).to(true), normal(true.shape).to(true)
            guidance = self.options.sketch_guidance
            told = redraw_sketches(
                self.model, tokens, lengths, true, since, noise, guidance_scale=guidance, steps=REDRAWING_STEPS
            )
        else:
            told = true + (NOISE * uniform(len(true), 1, 1, 1) * normal(true.shape)).to(true)
        sees = (uniform(len(true)) >= UNTOLD).to(true.device)
        if not own:
            return (*made, told, sees)
        with torch.no_grad():
            pictures = sketch.of(own[2])
        times = torch.randint(N_TIMESTEP, (len(pictures),), generator=generator, device=device).to(true.device)
        noise = normal(pictures.shape).to(true)
        return (*made, told, sees, own[0], self._drop_captions(own[1], generator), pictures, times, noise)

    def _loss(self, made: Batch, n_tokens: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, lengths, codes, read, *further = made
        told, own = further[:2], further[2:]
        if self.options.sketch_only:
            error = sketch_losses(self.model, *own).mean()
            return error, {"sketch": error.detach()}
        loss, parts = self.model.loss(tokens, lengths, codes, n_tokens, read, (told[0], told[1]) if told else None)
        if not own:
            return loss, parts
        error = sketch_losses(self.model, *own).mean()
        return loss + error, {**parts, "sketch": error.detach()}

    def _drop_captions(self, lengths: Tensor, generator: torch.Generator) -> Tensor:
        probability = self.options.caption_dropout
        return drop_captions(lengths, probability, generator) if probability else lengths

    def _disturb(self, codes: Tensor, generator: torch.Generator) -> Tensor:
        probability = self.options.code_noise
        return disturb_codes(codes, probability, self.config.n_image_vocab, generator) if probability else codes

    def split(self, batch: Batch, parts: int, step: int, generator: torch.Generator) -> list[Batch]:
        """Equal parts; each carries how many caption tokens a part holds on average, which its text loss is over."""
        if len(batch) > 3 and len(batch[3]) % parts:  # of the sketch
            found = f"found {len(batch[3])}"
            raise DalleError(f"expected sketch_batch a multiple of {parts}, the parts of a batch, {found}; change it")
        made = self._made(batch, generator)
        share = made[1].sum().clamp(min=1) / parts
        return [(*chunk, share) for chunk in zip(*(x.chunk(parts) for x in made), strict=True)]

    def units(self, batch: Batch) -> tuple[str, int]:
        """Positions of the stream."""
        return "tokens", len(batch[0]) * self.model.n_positions

    def flops(self) -> float:
        """Of one update."""
        return self.options.batch_size * self.model.flops()

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Nats per code and per text token on held-out pictures, each with the first of its captions.

        `sketched_nats` are of codes that follow the true sketch, `sketch` is the squared error of what draws it, each
        at a timestep and with a noise of its own.
        """
        assert isinstance(model, Prior)
        places = self.held_out[: self.options.max_validation]
        if not len(places):
            return {}
        text = image = tokens_seen = sketched = error = 0.0
        generator = torch.Generator().manual_seed(0)
        for chunk in np.array_split(places, -(-len(places) // VALIDATION_BATCH)):
            captions, latents = self.pairs.draw(chunk, np.zeros((len(chunk), 2)))
            arrays = (*self.pairs.tokens(captions), self.pairs.codes(latents))
            tokens, lengths, codes = (torch.from_numpy(a).to(device) for a in arrays)
            _, parts = model.loss(tokens, lengths, codes)
            n_tokens = float(lengths.sum())
            text += parts["text_nats"].item() * n_tokens
            tokens_seen += n_tokens
            image += parts["image_nats"].item() * len(chunk)
            if model.sketch is not None:
                told = model.sketch.of(codes), torch.ones_like(lengths, dtype=torch.bool)
                sketched += model.loss(tokens, lengths, codes, told=told)[1]["image_nats"].item() * len(chunk)
                times = torch.randint(N_TIMESTEP, (len(chunk),), generator=generator).to(device)
                noise = torch.randn(told[0].shape, generator=generator).to(told[0])
                error += sketch_losses(model, tokens, lengths, told[0], times, noise).sum().item()
        n = len(places)
        figures = {"image_nats": image / n, "text_nats": text / max(tokens_seen, 1)}
        return figures if model.sketch is None else figures | {"sketched_nats": sketched / n, "sketch": error / n}

    def sheet(self, model: nn.Module, device: torch.device, path: Path) -> None:
        """What the first held-out captions, always the same ones, look like by now; nothing without a dVAE."""
        assert isinstance(model, Prior)
        places = self.held_out[: self.options.sheet_prompts]
        if self.dvae is None or not len(places):
            return
        captions, _ = self.pairs.draw(places, np.zeros((len(places), 2)))
        tokens, lengths = map(torch.from_numpy, self.pairs.tokens(captions))
        with torch.autocast(device.type, enabled=False):
            numbers, told = range(len(places)), self.options
            codes = sample_codes(
                model, tokens, lengths, numbers, self.seed, guidance_scale=told.guidance, temperature=told.temperature,
                sketch_guidance=told.sketch_guidance,
            )  # fmt: skip
            pixels = to_uint8(load.dvae(self.dvae, device).decode(codes)).cpu().numpy()
        texts = self.pairs.captions.strings("text")
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet(list(pixels), [texts[int(row)] for row in captions], title="held-out captions").save(path)
