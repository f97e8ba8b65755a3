"""Training the token prior (Ramesh et al. 2021, sec. 2.2).

Shapes: B batch, T caption length, H W code grid, V codes.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dalle_cli.artifacts import Artifact, open_artifact
from dalle_cli.data import tokenizer as tokenizers
from dalle_cli.data.order import Order
from dalle_cli.data.pairs import Ints, Pairs, vocabulary
from dalle_cli.data.tokenizer import Tokenizer
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.models.dvae import DVAE
from dalle_cli.models.pixels import to_uint8
from dalle_cli.models.prior import Prior, PriorConfig, disturb_codes, drop_captions
from dalle_cli.models.vqgan import VQGAN
from dalle_cli.pipelines import loading
from dalle_cli.sampling.autoregressive import sample_codes
from dalle_cli.sampling.categorical import CategoricalOptions
from dalle_cli.sampling.sketches import N_TIMESTEP, resample_sketches, sketch_losses
from dalle_cli.training import warm_start
from dalle_cli.training.config import TrainConfig, check_at_least, check_sampling, check_share, setting
from dalle_cli.training.embedding_prior import train_embedding_prior
from dalle_cli.training.options import TrainingOptions
from dalle_cli.training.rounding import sampling_autocast
from dalle_cli.training.stage import Trainable, TrainingStage, pair_inputs
from dalle_cli.training.task import Batch, PairTask, int64, mix, seeded
from dalle_cli.viz.grid import image_grid

COLORS_AT_ONCE = 256  # codes
SKETCH_DROPOUT = 0.15  # share of the pairs whose sketch is hidden, as it is for a likelihood of codes
NOISE = 0.3  # the most noise added to a true sketch: sampled ones have errors
RESAMPLING_STEPS = 15  # of DDIM


@torch.inference_mode()
def code_colors(dvae: DVAE | VQGAN) -> Tensor:
    """The mean color of an image of each code alone: (V, 3) float32 in [-1, 1]."""
    side = 4  # codes; a decoder looks no further than to its neighbors
    codes = torch.arange(dvae.config.n_vocab)[:, None, None].expand(-1, side, side)
    parts = [to_uint8(dvae.decode(part)).float().mean((2, 3)) for part in torch.split(codes, COLORS_AT_ONCE)]
    return torch.cat(parts) / 127.5 - 1


@dataclass(frozen=True)
class PriorTrain(TrainConfig):
    """The paper's numbers (app. B) for 1024 images per update; small recipes set their own."""

    steps: int = 430_000
    batch_size: int = 1024
    lr: float = 4.5e-4
    warmup: int = 5000
    beta2: float = 0.96
    weight_decay: float = 4.5e-2
    clip_norm: float = 4.0
    ema: float = 0.99
    ema_every: int = 25
    bpe_dropout: float = setting(0.1, deterministic=0.0)
    caption_dropout: float = setting(0.0, deterministic=0.0)  # 0.1 trains for guidance
    guidance: float = setting(1.0, affects="sampling")  # sampling default that the weights record; 1 = none
    temperature: float = setting(1.0, affects="sampling")  # likewise
    code_noise: float = setting(0.0, deterministic=0.0)  # share of codes that are read as random ones
    sketch_batch: int = 256  # further pairs per update that the sketch, if any, learns from
    sketch_only: bool = setting(False, deterministic=False)  # train the sketch, and freeze the rest of the prior
    # freeze the sketch, and let the codes follow true sketches that it sampled again from up to this share of noise
    sketch_resampled: float = setting(0.0, deterministic=0.0)
    sketch_guidance: float = setting(1.0, affects="sampling")  # sampling default of the sketch; 1 = none
    grid_prompts: int = setting(12, affects="nothing")  # held-out captions sampled at each validation; 0 = none

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "bpe_dropout", "caption_dropout", "code_noise", "sketch_resampled")
        check_sampling(self, "guidance", "temperature", "sketch_guidance")
        check_at_least(self, 1, "sketch_batch")
        check_at_least(self, 0, "grid_prompts")
        if self.sketch_only and self.sketch_resampled:
            found = "found both; first train the one, then with its weights the other"
            raise DalleError(f"expected sketch_only or sketch_resampled, {found}")


def freeze(model: Prior, train: PriorTrain) -> None:
    """Freeze what the settings say: all but the sketch, the sketch, or nothing.

    Raises: DalleError where they freeze a part and there is no sketch.
    """
    for name in ("sketch_only", "sketch_resampled"):
        if getattr(train, name):
            if model.sketch is None:
                raise DalleError(f"expected prior.sketch beside prior.train.{name}, found none; say its side")
            model.requires_grad_(name == "sketch_resampled")
            model.sketch.requires_grad_(name == "sketch_only")


class PriorTask(PairTask):
    """Captions and codes joined by id."""

    def __init__(
        self,
        config: PriorConfig,
        train: PriorTrain,
        pairs: Pairs,
        tokenizer: Tokenizer | None,
        seed: int,
        dvae: Artifact | None = None,
    ):
        """`tokenizer` is for BPE dropout; `dvae`, which made the codes, for sample images and for a sketch.

        Raises: DalleError where a sketch lacks its dVAE, or the weights are sharded.
        """
        super().__init__(train, pairs, seed)
        self.config, self.options, self.tokenizer, self.dvae = config, train, tokenizer, dvae
        self.model = seeded(seed, lambda: Prior(config))
        self.learns_sketch = bool(config.sketch) and not train.sketch_resampled
        if self.model.sketch is not None:
            if dvae is None:
                raise DalleError("expected the dVAE beside -o or the codes for prior.sketch, found none; copy it there")
            if train.parallel == "shard":  # FSDP gathers the weights in `Prior.loss` alone
                found = 'found "shard"; a sketch is small'
                raise DalleError(f'expected parallel = "replicate" for a prior that sketches, {found}')
            self.model.sketch.colors.copy_(code_colors(loading.dvae(dvae, torch.device("cpu"))))
            self.sketch_order = Order(len(self.places), train.sketch_batch, mix(seed, 2))
        freeze(self.model, train)

    def batch(self, step: int) -> Batch:
        """Tokens (B, T), lengths (B,), codes (B, H, W), int64; then as many columns for a sketch that learns."""
        captions, latents, rng = self.drawn(self.order, 1, step)
        if self.options.bpe_dropout and self.tokenizer is not None:
            batch = (*self._drop_merges(captions, rng), *int64(self.pairs.codes(latents)))
        else:
            batch = self._columns(captions, latents)
        return (*batch, *self._columns(*self.drawn(self.sketch_order, 2, step)[:2])) if self.learns_sketch else batch

    def _columns(self, captions: Ints, latents: Ints) -> Batch:
        """Tokens, lengths and codes of these rows."""
        return int64(*self.pairs.tokens(captions), self.pairs.codes(latents))

    def _drop_merges(self, rows: Ints, rng: np.random.Generator) -> Batch:
        """Captions encoded anew with BPE dropout (app. B), from the artifact's text: tokens (B, T), lengths (B,)."""
        assert self.tokenizer is not None
        texts, p, n_text = self.pairs.captions.strings("text"), self.options.bpe_dropout, self.config.n_text
        encoded = [self.tokenizer.encode_dropout(texts[row], p, rng) for row in rows.tolist()]
        return int64(*tokenizers.pad(encoded, n_text, self.config.n_text_vocab)[:2])

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The prior's loss in nats, with some captions dropped for guidance and some codes disturbed.

        With a sketch: 15% of the pairs do not see it, the others see the true one with some noise, or one sampled
        again. The sketch itself learns from pairs of its own; `sketch` is its squared error.
        """
        if batch[-1].ndim:  # a whole batch, not a part from `split`
            return self._loss(self._corrupted(batch, generator))
        return self._loss(batch[:-1], batch[-1])

    def _corrupted(self, batch: Batch, generator: torch.Generator) -> Batch:
        """A batch with everything random about it: tokens, lengths, codes, and codes as they are read.

        With a sketch also the sketches and who sees them; and if it learns, the arguments of `sketch_losses`: tokens,
        lengths, small images, timesteps and noise.
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
        if share := self.options.sketch_resampled:
            since, noise = (share * N_TIMESTEP * uniform(len(true))).to(true), normal(true.shape).to(true)
            seen = resample_sketches(
                self.model, tokens, lengths, true, since, noise, guidance_scale=self.options.sketch_guidance,
                steps=RESAMPLING_STEPS,
            )  # fmt: skip
        else:
            seen = true + (NOISE * uniform(len(true), 1, 1, 1) * normal(true.shape)).to(true)
        sees = (uniform(len(true)) >= SKETCH_DROPOUT).to(true.device)
        if not own:
            return (*made, seen, sees)
        with torch.no_grad():
            small = sketch.of(own[2])
        times = torch.randint(N_TIMESTEP, (len(small),), generator=generator, device=device).to(true.device)
        noise = normal(small.shape).to(true)
        return (*made, seen, sees, own[0], self._drop_captions(own[1], generator), small, times, noise)

    def _loss(self, made: Batch, n_tokens: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, lengths, codes, read, *further = made
        sketches, own = further[:2], further[2:]
        if self.options.sketch_only:
            error = sketch_losses(self.model, *own).mean()
            return error, {"sketch": error.detach()}
        seen = (sketches[0], sketches[1]) if sketches else None
        loss, parts = self.model.loss(tokens, lengths, codes, n_tokens, read, seen)
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
        """Equal parts; each carries the mean number of caption tokens in a part, over which its text loss is a mean."""
        if len(batch) > 3 and len(batch[3]) % parts:  # of the sketch
            found = f"found {len(batch[3])}"
            raise DalleError(f"expected sketch_batch a multiple of {parts}, the parts of a batch, {found}; change it")
        made = self._corrupted(batch, generator)
        share = self.model.predicted(made[1]).sum().clamp(min=1) / parts
        return [(*chunk, share) for chunk in zip(*(x.chunk(parts) for x in made), strict=True)]

    def units(self, batch: Batch) -> tuple[str, int]:
        """Positions of captions and codes."""
        return "tokens", len(batch[0]) * self.model.n_positions

    def flops(self) -> float:
        """Of one update."""
        return self.options.batch_size * self.model.flops()

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Nats per code and per text token on held-out images, each with the first of its captions.

        `sketched_nats` are of codes that follow the true sketch; `sketch` is the sketch's squared error, each at one
        timestep with its own noise.
        """
        assert isinstance(model, Prior)
        n, totals, generator = 0, np.zeros(5), torch.Generator().manual_seed(0)
        for numbers, captions, latents in self.held_out_rows(self.options.max_validation):
            tokens, lengths, codes = (column.to(device) for column in self._columns(captions, latents))
            _, parts = model.loss(tokens, lengths, codes)
            n_tokens, here = float(model.predicted(lengths).sum()), len(numbers)
            found = [parts["image_nats"].item() * here, parts["text_nats"].item() * n_tokens, n_tokens, 0.0, 0.0]
            if model.sketch is not None:
                true, all_see = model.sketch.of(codes), torch.ones_like(lengths, dtype=torch.bool)
                found[3] = model.loss(tokens, lengths, codes, sketches=(true, all_see))[1]["image_nats"].item() * here
                times = torch.randint(N_TIMESTEP, (here,), generator=generator).to(device)
                noise = torch.randn(true.shape, generator=generator).to(true)
                found[4] = sketch_losses(model, tokens, lengths, true, times, noise).sum().item()
            n, totals = n + here, totals + found
        if not n:
            return {}
        image, text, n_tokens, sketched, error = totals.tolist()
        metrics = {"image_nats": image / n, "text_nats": text / max(n_tokens, 1)}
        return metrics if model.sketch is None else metrics | {"sketched_nats": sketched / n, "sketch": error / n}

    def samples(self, model: nn.Module, device: torch.device) -> Image.Image | None:
        """Images of the first held-out captions, always the same ones; nothing without a dVAE."""
        assert isinstance(model, Prior)
        places, o = self.held_out[: self.options.grid_prompts], self.options
        if self.dvae is None or not len(places):
            return None
        captions, _ = self.pairs.draw(places)
        tokens, lengths = int64(*self.pairs.tokens(captions))
        with sampling_autocast(model, device):
            options = CategoricalOptions(temperature=o.temperature, guidance_scale=o.guidance)
            how: dict[str, Any] = {"sketch_guidance": o.sketch_guidance}
            codes = sample_codes(model, tokens, lengths, range(len(places)), self.seed, options, **how)
            pixels = to_uint8(loading.dvae(self.dvae, device).decode(codes)).cpu().numpy()
        texts = self.pairs.captions.strings("text")
        return image_grid(list(pixels), [texts[row] for row in captions.tolist()], title="held-out captions")


TRAINABLE = Trainable("train-prior", "weights.prior.codes", "prior", PriorConfig, PriorTrain)


def train_prior(
    captions: str | Path, latents: str | Path, out: str | Path, *, tokenizer: str | Path | None = None, **options: Any
) -> dict[str, Any]:
    """Train a prior over codes, or over CLIP embeddings, given captions; the last validation's metrics.

    `latents` are what `encode-images` wrote. `tokenizer` is for BPE dropout of a prior over codes, and is looked for
    beside the artifacts by default. `options` are the fields of `TrainingOptions`.

    Raises:
        DalleError: a recipe that does not fit the inputs, no tokenizer for BPE dropout, and as `training.loop.train`.
    """
    o, texts = TrainingOptions(**options), open_artifact(captions, "captions")
    found = open_artifact(latents, "codes", "embeddings")
    pairs, inputs = pair_inputs(texts, found, o)
    if found.kind == "embeddings":
        return train_embedding_prior(pairs, inputs, Path(out), o)
    inputs.sizes |= {"n_image_vocab": vocabulary(found), "grid": found.require("grid", int)}
    stage = TrainingStage(TRAINABLE, out, o, inputs)
    _check_initial_sketch(stage)
    bpe, (read_with, encoder) = None, (inputs.header[name] for name in ("tokenizer", "encoder"))
    beside = [stage.out.parent, *([] if stage.start is None else [stage.start.path.parent])]
    if stage.train.bpe_dropout:
        bpe = tokenizers.load(tokenizer or bundles.find_tokenizer(read_with, *beside, texts.path.parent))
        bundles.check_digest("tokenizer", bpe.digest, read_with, texts.path)
        if bpe.vocab_size != (n := inputs.sizes["n_text_vocab"]):
            raise DalleError(f"expected captions of {bpe.vocab_size} tokens, found {n} in {texts.path}; tokenize again")
        bpe.encode_dropout("", stage.train.bpe_dropout, np.random.default_rng(0))  # refuses tokenizers that cannot
    dvae = bundles.find_weights(encoder, *beside, found.path.parent)
    return stage.run(lambda: PriorTask(stage.model, stage.train, pairs, bpe, o.seed, dvae))


def _check_initial_sketch(stage: TrainingStage) -> None:
    """Raises: DalleError if a trained sketch is to be followed and the initial weights have none."""
    width = stage.model.sketch_width
    if stage.model.sketch and stage.train.sketch_resampled and not warm_start.has_part(stage.start, "sketch.", width):
        due = f"--init with a sketch of width {width} for prior.train.sketch_resampled"
        raise DalleError(f"expected {due}, found none; train it first, by prior.train.sketch_only")
