"""What `doctor` asks of a prior over CLIP embeddings, of either kind.

N pairs, T caption positions, D embedding width, M components; z_i and z_t are of length 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.diffusion.noise import noise_for
from dalle_cli.doctor.checks import Finding, at_least, at_most, dropped, gain, noise_bins, unit_scale
from dalle_cli.models.diffusion_prior import DiffusionPrior
from dalle_cli.models.embedding_prior import EmbeddingPrior
from dalle_cli.sampling.embeddings import Read, autoregressed, diffused, process_of

N_BINS = 4  # of the timesteps
GOLDEN = (5**0.5 - 1) / 2  # whose multiples fill [0, 1) evenly
AT_ONCE = 64
GUIDANCE = 3.0  # that is compared with none
STEPS = 16  # in which a diffusion prior draws
OUTSIDE_GOOD, OUTSIDE_FAIR = 0.02, 0.1  # shares of components that lie beyond the buckets
MOVED_GOOD, MOVED_FAIR = 1e-3, 1e-5  # distances of guided draws, 1 - cosine
CHANGE_GOOD, CHANGE_FAIR = 1e-2, 1e-4  # root mean square of a change, as a share of what changes


@dataclass(frozen=True)
class Seen:
    """N pairs: captions, for each another caption that reads differently, z_i (N, D), and those of the others.

    `lengths` (N,) are those of z_i as they are stored.
    """

    read: Read
    other: Read
    z_i: Tensor
    other_z_i: Tensor
    lengths: Tensor

    @property
    def numbers(self) -> range:
        """What noise is a function of."""
        return range(len(self.z_i))


Prior = DiffusionPrior | EmbeddingPrior


@torch.no_grad()
def examine(prior: Prior, seen: Seen, caption_dropout: object, seed: int, advance: Callable[[], None]) -> list[Finding]:
    """All that is asked, in two looks: of losses, and of what is drawn."""
    found = [length(seen.lengths), scale(prior, seen.z_i)]
    own, other, null = (losses(prior, read, seen, seed) for read in (seen.read, seen.other, nothing(seen.read)))
    if isinstance(prior, DiffusionPrior):
        found += [*noise_bins(bins(prior, own, seen.z_i)), noised_counts(prior, seen, seed)]
    else:
        uniform = math.log(prior.config.n_bucket)
        advice = "a fair draw costs as much: train longer, or lower lr"
        found.append(at_most("nats of a bucket", float(own.mean()), 0.95 * uniform, uniform, advice))
    own, other, null = (of_all.mean(1) for of_all in (own, other, null))
    advice = "captions are not read: look at their tokens, at z_t, and at what is dropped"
    found.append(gain("loss with others' captions, more than with own", other - own, advice))
    advice = "the null caption says as much as a caption: is the mask of dropped ones in use?"
    found.append(gain("loss with null captions, more than with own", null - own, advice))
    found.append(dropped("share of captions dropped in training", caption_dropout))
    advance()
    found += of_draws(prior, seen, seed)
    advance()
    return found


def nothing(read: Read) -> Read:
    """Null captions in place of these."""
    return Read(read.tokens, torch.zeros_like(read.lengths), read.z_t)


def length(lengths: Tensor) -> Finding:
    """Whether the stored z_i are of length 1; stages bring them to it, but what made them meant something else."""
    mean = float(lengths.double().mean())
    return unit_scale("length of z_i as stored", mean, "embed the pictures again by `encode-images -m CLIP`")


def scale(prior: Prior, z_i: Tensor) -> Finding:
    """Whether z_i fit what the prior makes of them before noise, or before buckets."""
    if isinstance(prior, DiffusionPrior):
        advice = "noise of unit variance does not fit: train with scale = 0, which measures it, on these embeddings"
        return unit_scale("scale of z_i before noise", prior.principal.spread(z_i), advice)
    coordinates = prior.principal.project(z_i, prior.config.n_component)
    outside = float(((coordinates < prior.low) | (coordinates > prior.high)).double().mean())
    advice = "buckets do not reach so far: train on these embeddings"
    return at_most("share of z_i beyond the buckets", outside, OUTSIDE_GOOD, OUTSIDE_FAIR, advice)


def losses(prior: Prior, read: Read, seen: Seen, seed: int) -> Tensor:
    """Of each pair: squared error by bin of the timesteps (N, bins), or nats a bucket (N, 1); float64, on the CPU."""
    of_rows = _squared if isinstance(prior, DiffusionPrior) else _nats
    parts = []
    for begin in range(0, len(seen.z_i), AT_ONCE):
        here = range(begin, min(begin + AT_ONCE, len(seen.z_i)))
        parts.append(of_rows(prior, read.rows(here), seen.read.rows(here), seen.z_i[list(here)], here, seed))  # type: ignore[arg-type]
    return torch.cat(parts).double().cpu()


def _squared(prior: DiffusionPrior, read: Read, _: Read, z_i: Tensor, numbers: Sequence[int], seed: int) -> Tensor:
    """Of each bin at one timestep, always the same for a pair: (n, bins)."""
    process, x_start = process_of(prior), prior.principal.standardize(z_i)
    columns = []
    for number in range(n_bins(prior)):
        shares = [(number + i * GOLDEN % 1) / n_bins(prior) for i in numbers]
        t = torch.tensor([min(int(share * len(process.schedule)), len(process.schedule) - 1) for share in shares])
        noise = noise_for(seed, numbers, number, x_start.shape[1:], "doctor").to(x_start.device)
        predicted = prior(process.noised(x_start, t, noise), t.to(x_start.device), *read)
        columns.append((predicted.to(x_start.dtype) - x_start).square().mean(1))
    return torch.stack(columns, dim=1)


def _nats(prior: EmbeddingPrior, read: Read, own: Read, z_i: Tensor, numbers: Sequence[int], seed: int) -> Tensor:
    """With the dot product of the own caption, which another's would give away: (n, 1)."""
    buckets = prior.quantize(z_i)
    logits = prior(*read, prior.quantize_dot((z_i * own.z_t).sum(-1)), buckets)
    of_each = F.cross_entropy(logits.flatten(0, 1), buckets.flatten(), reduction="none")
    return of_each.view(len(buckets), -1).mean(1, keepdim=True)


def noised_counts(prior: DiffusionPrior, seen: Seen, seed: int) -> Finding:
    """How much the answer changes, as a share of itself, with another picture's z_i, a little noised, for its own."""
    process, x_start = process_of(prior), prior.principal.standardize(seen.z_i)
    t = torch.full((len(x_start),), prior.config.n_timestep // 8)
    noise = noise_for(seed, seen.numbers, 0, x_start.shape[1:], "doctor").to(x_start.device)
    x = process.noised(x_start, t, noise)
    own, other = (prior(noised, t.to(x.device), *seen.read).double() for noised in (x, x.roll(1, 0)))
    share = float((other - own).square().mean().sqrt() / own.square().mean().sqrt().clamp(min=1e-12))
    advice = "the noised z_i is not among the tokens: look at its projection"
    return at_least("change of the answer with another noised z_i", share, CHANGE_GOOD, CHANGE_FAIR, advice)


def n_bins(prior: DiffusionPrior) -> int:
    """As many as there are timesteps, but no more than are told of."""
    return min(N_BINS, prior.config.n_timestep)


def bins(prior: DiffusionPrior, own: Tensor, z_i: Tensor) -> dict[str, tuple[float, float]]:
    """Mean loss of each bin, and what the mean embedding would cost there."""
    nothing = float(prior.principal.standardize(z_i).square().mean())
    n, count = prior.config.n_timestep, n_bins(prior)
    names = [f"{-(-b * n // count)} to {-(-(b + 1) * n // count) - 1}" for b in range(count)]
    return {name: (loss, nothing) for name, loss in zip(names, own.mean(0).tolist(), strict=True)}


def of_draws(prior: Prior, seen: Seen, seed: int) -> list[Finding]:
    """What is drawn for a caption, beside its picture's own z_i, that of another, and what guidance makes of it."""
    plain, guided = (drawn(prior, seen, seed, guidance) for guidance in (1.0, GUIDANCE))
    own, other = ((plain * z.double().cpu()).sum(-1) for z in (seen.z_i, seen.other_z_i))
    advice = "what is drawn does not follow captions: train longer, or see what is said of losses above"
    found = [
        gain("cosine of drawn to true z_i, more than to that of another caption", own - other, advice),
        at_least("cosine of drawn to true z_i", float(own.mean()), float(other.mean()), -1.0, advice),
    ]
    moved = float((1 - (plain * guided).sum(-1)).mean())
    advice = "guidance does nothing: are captions dropped in training, and is the null another than the caption?"
    question = f"distance of draws at guidance {GUIDANCE:g} from those without"
    return [*found, at_least(question, moved, MOVED_GOOD, MOVED_FAIR, advice)]


def drawn(prior: Prior, seen: Seen, seed: int, guidance: float) -> Tensor:
    """One z_i for each caption, with the same noise whatever the guidance: (N, D) float64 on the CPU."""
    if isinstance(prior, DiffusionPrior):
        steps = min(STEPS, prior.config.n_timestep)
        parts = diffused(prior, seen.read, seen.numbers, seed, steps=steps, best_of=1, guidance_scale=guidance)
    else:
        parts = autoregressed(prior, seen.read, seen.numbers, seed, guidance_scale=guidance)
    return F.normalize(torch.cat(list(parts)).double().cpu(), dim=-1)
