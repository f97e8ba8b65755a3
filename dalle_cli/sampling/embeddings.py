"""Draw CLIP image embeddings from a prior over them: by diffusion, or component by component (2022, sec. 2.2).

P captions, T their positions, D embedding width, M components, N candidates, B of them in a batch. What a candidate is
drawn with is a function of (seed, its index) alone, so it is the same in batches of any size, but for how products of
other sizes round.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dalle_cli.diffusion import samplers, schedules
from dalle_cli.diffusion.denoiser import denoiser, guided_span
from dalle_cli.diffusion.noise import Noise, noise_for
from dalle_cli.diffusion.process import Process
from dalle_cli.errors import DalleError
from dalle_cli.models.cache import Cache, Prompt
from dalle_cli.models.diffusion_prior import DiffusionPrior
from dalle_cli.models.embedding_prior import AutoregressivePrior
from dalle_cli.sampling.autoregressive import draw, guide, guided_positions, uniforms
from dalle_cli.sampling.truncation import top_k as keep_top_k
from dalle_cli.sampling.truncation import top_p as keep_top_p

STAGE = "prior"  # in the noise's name, which decoder and upsamplers have others in
BEST_OF = 2  # sec. 2.2

Choose = Callable[[Tensor, Tensor, int], Tensor]  # (logits, noise (B, 3), component) -> buckets (B,)


class Read(NamedTuple):
    """Captions as a prior reads them: tokens (P, T), lengths (P,) int64, z_t (P, D) of length 1."""

    tokens: Tensor
    lengths: Tensor
    z_t: Tensor

    def rows(self, rows: Sequence[int]) -> "Read":
        """Some of them."""
        return Read(*(x[list(rows)] for x in self))

    def null(self) -> "Read":
        """A caption that says nothing, as training drops them."""
        return Read(self.tokens[:1], torch.zeros_like(self.lengths[:1]), self.z_t[:1])


class Group(NamedTuple):
    """A batch of candidates: their numbers, captions, and what was read of these, with as many nulls behind."""

    indices: Sequence[int]
    captions: Read  # one for each candidate
    prompt: Prompt
    guided: Prompt


def process_of(prior: DiffusionPrior) -> Process:
    """The noise that a diffusion prior was trained with, and what it predicts."""
    return Process(schedules.named(prior.config.schedule, prior.config.n_timestep), "x_start")


def diffused(
    prior: DiffusionPrior,
    read: Read,
    indices: Sequence[int],
    seed: int,
    *,
    captions: Sequence[int] | None = None,
    sampler: str = "ddpm",
    steps: int = 64,
    guidance_scale: float = 1.0,
    guidance_span: tuple[float, float] = (0.0, 1.0),
    best_of: int = BEST_OF,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:
    """One embedding for every candidate index, batch after batch: (B, D) of length 1 on the prior's device.

    `captions` are rows of `read`, one for each index; without it there is one caption, or one for each. Each candidate
    is drawn `best_of` times, and the draw of the largest z_i . z_t is kept. `guidance_span` is from a share of the way
    to a later one, 0 being noise. `progress` is told the number of candidates drawn since it was last called.

    Raises: DalleError where a setting is out of its range.
    """
    if best_of < 1:
        raise DalleError(f"expected 1 draw or more to choose from, found {best_of}; 2 is the paper's")
    process, n = process_of(prior), prior.config.n_embedding
    guidance = guided_span(process.schedule, guidance_scale, *guidance_span)
    for group in _groups(prior, read, indices, captions, batch_size, guidance_scale != 1):
        rows = len(group.indices) * best_of

        def network(x: Tensor, t: Tensor, group: Group = group, rows: int = rows) -> Tensor:
            return prior.step(x, t, group.prompt if len(x) == rows else group.guided)

        with _evaluating(prior):
            noise = _noise(seed, group.indices, best_of)
            x = noise(0, (n,)).to(torch.promote_types(prior.query.dtype, torch.float32)).to(prior.query.device)
            x = samplers.sample(sampler, denoiser(network, process, guidance), process.schedule, x, steps, noise)
            z = _fittest(prior.principal.restore(x).view(-1, best_of, n), group.captions.z_t)
        if progress is not None:
            progress(len(z))
        yield z


def autoregressed(
    prior: AutoregressivePrior,
    read: Read,
    indices: Sequence[int],
    seed: int,
    *,
    captions: Sequence[int] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float = 1.0,
    guidance_span: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:
    """As `diffused`, component after component; settings as those of `sampling.autoregressive`, codes being buckets.

    The dot product z_i . z_t that each is drawn for comes from the upper half of those in training.

    Raises: DalleError where a setting is out of its range.
    """
    _check(temperature, top_k, top_p, guidance_span)
    span = guided_positions(guidance_span, prior.config.n_component) if guidance_scale != 1 else range(0)

    def choose(logits: Tensor, noise: Tensor, component: int) -> Tensor:
        if span:
            logits = guide(logits, guidance_scale) if component in span else logits.chunk(2)[0]
        if temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits / temperature
        logits = keep_top_k(logits, top_k) if top_k else logits
        return draw(keep_top_p(logits, top_p) if top_p else logits, noise)

    for group in _groups(prior, read, indices, captions, batch_size, bool(span)):
        prompt, n = group.guided if span else group.prompt, len(group.indices)
        noise = torch.stack([uniforms(seed, index, 1 + prior.config.n_component) for index in group.indices])
        lengths = group.captions.lengths
        with _evaluating(prior):
            cache = prior.cache(prompt, (2 if span else 1) * n // len(prompt.logits))
            z = prior.dequantize(_buckets(prior, cache, lengths, noise.to(lengths.device), bool(span), choose))
        if progress is not None:
            progress(n)
        yield z


def _buckets(
    prior: AutoregressivePrior, cache: Cache, lengths: Tensor, noise: Tensor, guided: bool, choose: Choose
) -> Tensor:
    """Draw the dot product and then each component, with noise (B, 1 + M, 3) -> (B, M) int64.

    A null half, which has lengths of 0, is fed the buckets of the other.
    """
    halves = 2 if guided else 1
    dots = upper_half_dots(noise[:, 0, 0], prior.config.n_dot)
    everywhere = torch.cat([lengths, torch.zeros_like(lengths)]) if guided else lengths
    logits = prior.start(dots.repeat(halves), everywhere, cache)
    drawn = [choose(logits, noise[:, 1], 0)]
    for component in range(1, prior.config.n_component):
        logits = prior.step(drawn[-1].repeat(halves), cache)
        drawn.append(choose(logits, noise[:, 1 + component], component))
    return torch.stack(drawn, dim=1)


def upper_half_dots(noise: Tensor, n_dot: int) -> Tensor:
    """Buckets of the upper half, each as likely, as in training: (B,) in [0, 1) -> (B,) int64."""
    return n_dot // 2 + (noise.double() * (n_dot - n_dot // 2)).long()


def _fittest(z: Tensor, z_t: Tensor) -> Tensor:
    """Of several embeddings the one that is nearest to the caption's (sec. 2.2): (B, K, D), (B, D) -> (B, D)."""
    best = (z * z_t[:, None].to(z.dtype)).sum(-1).argmax(dim=1)
    return z[torch.arange(len(z), device=z.device), best]


def _noise(seed: int, indices: Sequence[int], best_of: int) -> Noise:
    """Noise of each draw of each candidate, the draws of one side by side; the first is the same for any `best_of`."""

    def noise(step: int, shape: Sequence[int]) -> Tensor:
        draws = [noise_for(seed, indices, step, shape, f"{STAGE} {draw}") for draw in range(best_of)]
        return torch.stack(draws, dim=1).flatten(0, 1)

    return noise


def _groups(
    prior: DiffusionPrior | AutoregressivePrior,
    read: Read,
    indices: Sequence[int],
    captions: Sequence[int] | None,
    batch_size: int,
    guided: bool,
) -> Iterator[Group]:
    """Batches of candidates with their captions, read once for all candidates where a batch has but one.

    Raises: DalleError where captions and candidates do not fit each other.
    """
    if captions is None:
        captions = [0] * len(indices) if len(read.tokens) == 1 else range(len(read.tokens))
    if len(captions) != len(indices):
        found = f"found {len(captions)}"
        raise DalleError(f"expected 1 caption or {len(indices)}, {found}; give one for all or one for each")
    if batch_size < 1:
        raise DalleError(f"expected a batch size of 1 or more, found {batch_size}; try 64")
    read = Read(*(x.to(prior.position.weight.device) for x in read))
    null = _prefill(prior, read.null()) if guided else None
    for begin in range(0, len(indices), batch_size):
        own = list(captions[begin : begin + batch_size])
        prompt = _prefill(prior, read.rows(own[:1] if len(set(own)) == 1 else own))
        both = prompt if null is None else Prompt.join([prompt, null.repeat(len(prompt.logits))])
        yield Group(indices[begin : begin + batch_size], read.rows(own), prompt, both)


def _prefill(prior: DiffusionPrior | AutoregressivePrior, read: Read) -> Prompt:
    with _evaluating(prior):
        return prior.prefill(*read)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients."""
    training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(training)


def _check(temperature: float, top_k: int | None, top_p: float | None, span: tuple[float, float]) -> None:
    if not temperature >= 0:
        raise DalleError(f"expected a temperature of 0 or more, found {temperature}; 1 draws as the model was trained")
    if top_k is not None and top_k < 0:
        raise DalleError(f"expected top-k of 0 or more, found {top_k}; 0 keeps all buckets")
    if top_p is not None and not 0 <= top_p <= 1:
        raise DalleError(f"expected top-p in [0, 1], found {top_p}; 0 and 1 keep all buckets")
    if not 0 <= span[0] <= span[1] <= 1:
        found = f"{span[0]} to {span[1]}"
        raise DalleError(
            f"expected guidance from a share of the components to a later one, found {found}; 0 to 1 is all"
        )
