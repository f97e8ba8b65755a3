"""Sample CLIP image embeddings from a prior over them: by diffusion, or component by component (2022, sec. 2.2).

P captions, T their positions, D embedding width, M components, N candidates, B of them in a batch. The noise of a
candidate depends on (seed, its index) alone, so it is the same in batches of any size, up to rounding. Embeddings have
length 1 unless the prior's config says that they keep CLIP's own length.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.diffusion import samplers, schedules
from dalle_cli.diffusion.denoiser import Threshold, denoiser, guidance_interval
from dalle_cli.diffusion.noise import Noise, noise_for
from dalle_cli.diffusion.process import Process
from dalle_cli.errors import DalleError
from dalle_cli.models.cache import Cache, Prompt
from dalle_cli.models.diffusion_prior import DiffusionPrior
from dalle_cli.models.embedding_prior import AutoregressivePrior
from dalle_cli.sampling.batches import evaluating, rows_of_captions
from dalle_cli.sampling.categorical import CategoricalOptions, choose, uniforms

STAGE = "prior"  # names the noise: decoder and upsamplers use other names
BEST_OF = 2  # sec. 2.2


class PromptBatch(NamedTuple):
    """Captions as a prior takes them: tokens (P, T), lengths (P,) int64, z_t (P, D) of length 1.

    A prior with `captions = "states"` takes states of CLIP's text tower (P, T, text_width) in place of tokens, and a
    z_t that is not normalized.
    """

    tokens: Tensor
    lengths: Tensor
    z_t: Tensor

    def rows(self, rows: Sequence[int]) -> "PromptBatch":
        """Some of them."""
        return PromptBatch(*(x[list(rows)] for x in self))

    def to(self, device: torch.device) -> "PromptBatch":
        """On this device."""
        return PromptBatch(*(x.to(device) for x in self))

    def null(self) -> "PromptBatch":
        """The null caption of a prior that takes tokens, as training uses it for dropped captions."""
        return PromptBatch(self.tokens[:1], torch.zeros_like(self.lengths[:1]), self.z_t[:1])


class CandidateBatch(NamedTuple):
    """A batch of candidates: their indices, a caption each, and the encoded captions without and with null rows."""

    indices: Sequence[int]
    captions: PromptBatch
    prompt: Prompt
    guided: Prompt


def prior_process(prior: DiffusionPrior) -> Process:
    """The diffusion process that a prior was trained with."""
    return Process(schedules.make_schedule(prior.config.schedule, prior.config.n_timestep), "x_start")


def sample_diffusion(
    prior: DiffusionPrior, prompts: PromptBatch, indices: Sequence[int], seed: int, *,
    captions: Sequence[int] | None = None, sampler: str = "ddpm", steps: int = 64, guidance_scale: float = 1.0,
    guidance_span: tuple[float, float] = (0.0, 1.0), best_of: int = BEST_OF, batch_size: int = 64,
    spacing: str | None = None, clip: float = 0.0, variance: str | None = None, null: PromptBatch | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Sample one embedding for each candidate index, batch after batch: (B, D) on the prior's device.

    `captions` are rows of `prompts`, one for each index; without it there is one caption, or one for each index. Each
    candidate is sampled `best_of` times, and the sample with the largest cosine of z_i and z_t is kept. `guidance_span`
    is the guided interval of the trajectory, 0 being noise. `clip` is the range of the predicted z_i, standardized, 0
    for any; `spacing` and `variance` are those of the samplers. `null` is the null caption for guidance, which a prior
    that takes states needs: those of the text "". `progress` gets the number of candidates sampled since its last call.

    Raises:
        DalleError: a setting out of range.
    """
    if best_of < 1:
        raise DalleError(f"expected 1 sample or more to choose from, found {best_of}; 2 is the paper's")
    if not prior.config.time and steps != 1:
        raise DalleError(f"expected 1 step of a prior without timesteps, found {steps}; leave --steps out")
    process, n = prior_process(prior), prior.config.n_embedding
    guidance = guidance_interval(process.schedule, guidance_scale, *guidance_span)
    threshold = Threshold(clip) if clip else None
    null = None if guidance_scale == 1 else null or prompts.null()
    for batch in _batches(prior, prompts, indices, captions, batch_size, null):
        rows = len(batch.indices) * best_of

        def network(x: Tensor, t: Tensor, batch: CandidateBatch = batch, rows: int = rows) -> Tensor:
            return prior.step(x, t, batch.prompt if len(x) == rows else batch.guided)

        with evaluating(prior):
            noise = _noise(seed, batch.indices, best_of)
            x = noise(0, (n,)).to(torch.promote_types(prior.query.dtype, torch.float32)).to(prior.query.device)
            denoise = denoiser(network, process, guidance, threshold)
            x = samplers.sample(sampler, denoise, process.schedule, x, steps, noise, spacing=spacing, variance=variance)
            z = _best(prior.principal.restore(x).view(-1, best_of, n), batch.captions.z_t)
        if progress is not None:
            progress(len(z))
        yield z


def sample_autoregressive(
    prior: AutoregressivePrior, prompts: PromptBatch, indices: Sequence[int], seed: int,
    options: CategoricalOptions = CategoricalOptions(), *, captions: Sequence[int] | None = None, batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Sample embeddings as `sample_diffusion` does, component after component, each as one of its buckets.

    The dot product z_i . z_t that an embedding is conditioned on comes from the upper half of those in training.

    Raises:
        DalleError: a setting out of range.
    """
    guided = options.guided_positions(prior.config.n_component)
    for batch in _batches(prior, prompts, indices, captions, batch_size, prompts.null() if guided else None):
        prompt, n = batch.guided if guided else batch.prompt, len(batch.indices)
        noise = torch.stack([uniforms(seed, index, 1 + prior.config.n_component) for index in batch.indices])
        lengths = batch.captions.lengths
        with evaluating(prior):
            cache = prior.cache(prompt, (2 if guided else 1) * n // len(prompt.logits))
            z = prior.dequantize(_sample_buckets(prior, cache, lengths, noise.to(lengths.device), guided, options))
        if progress is not None:
            progress(n)
        yield z


def _sample_buckets(
    prior: AutoregressivePrior, cache: Cache, lengths: Tensor, noise: Tensor, guided: range, options: CategoricalOptions
) -> Tensor:
    """Sample the dot product and then each component, with noise (B, 1 + M, 3) -> (B, M) int64.

    With guidance, null rows have length 0 and get the buckets of the conditional ones.
    """
    halves = 2 if guided else 1
    dots = upper_half_dots(noise[:, 0, 0], prior.config.n_dot)
    all_lengths = torch.cat([lengths, torch.zeros_like(lengths)]) if guided else lengths
    logits = prior.start(dots.repeat(halves), all_lengths, cache)
    buckets = [choose(options, logits, noise[:, 1], 0, guided)]
    for component in range(1, prior.config.n_component):
        logits = prior.step(buckets[-1].repeat(halves), cache)
        buckets.append(choose(options, logits, noise[:, 1 + component], component, guided))
    return torch.stack(buckets, dim=1)


def upper_half_dots(noise: Tensor, n_dot: int) -> Tensor:
    """Buckets of the upper half, all equally likely, as in training: (B,) in [0, 1) -> (B,) int64."""
    return n_dot // 2 + (noise.double() * (n_dot - n_dot // 2)).long()


def _best(z: Tensor, z_t: Tensor) -> Tensor:
    """Of several embeddings the nearest to the caption's (sec. 2.2): (B, K, D), (B, D) -> (B, D)."""
    best = (F.normalize(z, dim=-1) * z_t[:, None].to(z.dtype)).sum(-1).argmax(dim=1)
    return z[torch.arange(len(z), device=z.device), best]


def _noise(seed: int, indices: Sequence[int], best_of: int) -> Noise:
    """Noise of each sample of each candidate, those of one side by side; the first is the same for any `best_of`."""

    def noise(step: int, shape: Sequence[int]) -> Tensor:
        rows = [noise_for(seed, indices, step, shape, f"{STAGE} {k}") for k in range(best_of)]
        return torch.stack(rows, dim=1).flatten(0, 1)

    return noise


def _batches(
    prior: DiffusionPrior | AutoregressivePrior, prompts: PromptBatch, indices: Sequence[int],
    captions: Sequence[int] | None, batch_size: int, null: PromptBatch | None,
) -> Iterator[CandidateBatch]:  # fmt: skip
    """Batches of candidates with their captions, which are encoded once where all candidates of a batch share one."""
    captions = rows_of_captions(captions, len(prompts.tokens), len(indices), batch_size)
    unguided = None if null is None else _prefill(prior, null)
    for begin in range(0, len(indices), batch_size):
        own = list(captions[begin : begin + batch_size])
        prompt = _prefill(prior, prompts.rows(own[:1] if len(set(own)) == 1 else own))
        both = prompt if unguided is None else Prompt.join([prompt, unguided.repeat(len(prompt.logits))])
        given = prompts.rows(own).to(prior.position.weight.device)
        yield CandidateBatch(indices[begin : begin + batch_size], given, prompt, both)


def _prefill(prior: DiffusionPrior | AutoregressivePrior, prompts: PromptBatch) -> Prompt:
    with evaluating(prior):
        return prior.prefill(*prompts.to(prior.position.weight.device))
