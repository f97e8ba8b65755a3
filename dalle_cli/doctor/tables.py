"""The checks of each kind of weights, one a row: name, measured value, thresholds (ok, not bad), and what to do.

N rows, G groups of them, D embedding width.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.diffusion.noise import row_noise
from dalle_cli.doctor.checks import Finding, at_least, at_most, dropout, gain, near_one, same_inputs, temperature
from dalle_cli.doctor.examination import Columns, Examination
from dalle_cli.models.diffusion_prior import DiffusionPrior
from dalle_cli.models.pixels import from_uint8
from dalle_cli.sampling.categorical import CategoricalOptions
from dalle_cli.sampling.decoder import CaptionBatch, SamplerConfig, sample_images, to_images
from dalle_cli.sampling.embeddings import PromptBatch, sample_autoregressive, sample_diffusion

COLLAPSE = 0.05  # share of the vocabulary, or of the codes seen, below which a codebook has collapsed
CONSTANT = 1.1  # perplexity of codes that say nothing
GUIDANCE, STEPS, DECODER_STEPS = 3.0, 16, 8  # of the samples that guidance is compared on
N_BINS = 4  # of the timesteps
GROUP = 64  # images among whose captions a CLIP looks for the own one
TRAIN = "train longer, or lower lr"
UNREAD = "captions are not read: check that they belong to these rows, and the share that is dropped"
NULL = "the null says as much as what it stands for: check the mask of dropped ones"


def dvae(s: Examination) -> list[Finding]:
    """A dVAE: which codes it uses, and whether images survive them."""
    found, n_vocab = s.validate(), s.model.config.n_vocab
    used, perplexity, psnr = (found[name] for name in ("codes_used", "code_perplexity", "psnr_held_out"))
    least = COLLAPSE * min(n_vocab, s.n * s.model.config.grid**2)
    variance = from_uint8(s.columns["images"]).double().var((2, 3), correction=0).mean(1)
    flat = float(-10 * variance.clamp_min(1e-10).log10().mean())  # dB of each image's mean color
    advice = 'few codes do the work: set dvae.quantizer = "fsq", or lower dvae.train.beta or lr'
    blind = f"reconstructions show no more than each image's mean color: {TRAIN}"
    return [
        at_least(f"codes in use, of {n_vocab}", used, max(least, 2), 2, advice),
        at_least("perplexity of codes", perplexity, max(least, CONSTANT), CONSTANT, advice),
        at_least("PSNR of reconstructions (dB)", psnr, flat + 1, flat, blind),
    ]


def clip(s: Examination) -> list[Finding]:
    """A CLIP: whether it finds the own caption, and tells images apart."""
    hits, z = [], []
    for rows in torch.split(torch.arange(s.n), GROUP):
        images, tokens, lengths = (column[rows].to(s.device) for column in s.columns.values())
        with torch.no_grad(), s.request.machine.autocast():
            hits.append(s.model.loss(from_uint8(images), tokens, lengths)[1]["accuracy"].item() * len(rows) / s.n)
            z.append(F.normalize(s.model.encode_image(from_uint8(images)).double().cpu(), dim=1))
    parts = torch.split(s.captions, GROUP)
    chance = sum(float((part == part[:, None]).double().mean()) * len(part) for part in parts) / s.n
    total, accuracy = torch.cat(z).sum(0), sum(hits)
    cosine = float(total @ total - s.n) / (s.n * (s.n - 1))
    lost = f"own captions are hardly found: {TRAIN}, in larger batches"
    alike = "all images look the same to it: lower lr, or train in larger batches"
    return [
        temperature(float(s.model.scale())),
        at_least("images with own caption nearest", accuracy, min(4 * chance, (1 + chance) / 2), 1.5 * chance, lost),
        at_most("cosine between different images", cosine, 0.9, 0.99, alike),
    ]  # fmt: skip


def token_prior(s: Examination) -> list[Finding]:
    """A prior over codes: whether it beats counting, and reads captions."""
    c, found, own, dropped = s.model.config, s.validate(), s.run({})[0], s.setting("caption_dropout")
    other, null = (s.run(changed)[0] - own for changed in (s.of_others("tokens", "lengths"), s.null()))
    advice, what = f"it is no better than counting: {TRAIN}", "nats per code with {} captions, more than with own"
    guess = unigram(s.columns["codes"], s.counted["codes"], c.n_image_vocab)
    text_guess = unigram(written(s.columns), written(s.counted), c.n_text_vocab)
    return [
        at_most("nats per code", found["image_nats"], guess, math.log(c.n_image_vocab), advice),
        at_most("nats per caption token", found["text_nats"], text_guess, math.log(c.n_text_vocab), advice),
        *([gain(what.format("others'"), other, UNREAD)] if (s.captions != s.captions[0]).any() else []),
        *([gain(what.format("null"), null, NULL)] if dropped else []),
        dropout("captions", dropped),
    ]


def embedding_prior(s: Examination) -> list[Finding]:
    """A prior over CLIP embeddings, of either kind: scales, losses with and without captions, and samples."""
    own = by_bin(s, {})
    other, null = (by_bin(s, changed) for changed in (s.of_others("tokens", "lengths", "z_t"), s.null()))
    _, rows = s.task.pairs.draw(s.task.held_out, np.zeros((s.n, 2)))
    stored = np.asarray(s.task.pairs.latents.array("embeddings")[rows]).astype(np.float64)
    length = float(np.linalg.norm(stored, axis=1).mean()) if s.task.pairs.normalized else 1.0  # as stages read them
    z_i, (plain, guided) = s.columns["z_i"].double(), (sample(s, guidance) for guidance in (1.0, GUIDANCE))
    z_i = z_i if s.task.pairs.normalized else F.normalize(z_i, dim=-1)
    right, wrong = ((plain * z).sum(-1) for z in (z_i, z_i[s.others]))
    moved = float((1 - (plain * guided).sum(-1)).mean())
    advice = f"samples do not follow captions: {TRAIN}, or see the losses above"
    unguided = "guidance does nothing: check that training drops captions, and the null"
    return [
        near_one("length of z_i as stored", length, "embed the images again with `encode-images -m CLIP`"),
        *(denoising if isinstance(s.model, DiffusionPrior) else buckets)(s, own),
        gain("loss with others' captions, more than with own", (other - own).mean(0), UNREAD),
        gain("loss with null captions, more than with own", (null - own).mean(0), NULL),
        dropout("captions", s.setting("caption_dropout")),
        gain("cosine of sampled to true z_i, more than to that of another caption", right - wrong, advice),
        at_least("cosine of sampled to true z_i", float(right.mean()), float(wrong.mean()), -1.0, advice),
        at_least(f"distance of samples at guidance {GUIDANCE:g} from those without", moved, 1e-3, 1e-5, unguided),
    ]


def denoising(s: Examination, own: Tensor) -> list[Finding]:
    """The part of a diffusion prior alone: scale, losses by timestep, and whether the noised z_i counts."""
    principal, early = s.model.principal, {"t": torch.full_like(s.columns["t"], s.model.config.n_timestep // 8)}
    noised = effect(s, s.run(early), early | s.of_others("z_i", "noise"))[0]
    advice = "noise of unit variance does not fit: train on these embeddings with scale = 0, which measures it"
    return [
        near_one("scale of z_i before noise", principal.spread(s.columns["z_i"].to(s.device)), advice),
        *timesteps(s, own),
        change("another noised z_i", noised, "the noised z_i is not among the tokens: check its projection"),
    ]


def buckets(s: Examination, own: Tensor) -> list[Finding]:
    """The part of an autoregressive prior alone: whether the buckets hold z_i, and whether they are learned."""
    x = s.model.principal.project(s.columns["z_i"].to(s.device), s.model.config.n_component)
    outside = float(((x < s.model.low) | (x > s.model.high)).double().mean())
    uniform, advice = math.log(s.model.config.n_bucket), f"a uniform guess costs as much: {TRAIN}"
    return [
        at_most("share of z_i beyond the buckets", outside, 0.02, 0.1, "train on these embeddings"),
        at_most("nats per bucket", float(own.mean()), 0.95 * uniform, uniform, advice),
    ]


def decoder(s: Examination) -> list[Finding]:
    """A diffusion decoder: scale, losses by timestep, whether z_i and captions count, and guidance."""
    z_i, c, reads, middle = s.columns["z_i"].double(), s.model.config, s.model.text is not None, middle_half(s)
    z_i = F.normalize(z_i, dim=1) * c.n_embedding**0.5 if c.unit_variance else z_i
    own = s.run(middle)
    other, loss_gain = effect(s, own, middle | s.of_others("z_i"))
    null, wrong_caption, no_caption = (
        effect(s, own, middle | changed)[0]
        for changed in (s.null("given"), s.of_others("tokens", "lengths"), s.null("lengths"))
    )
    scale, unused = float(z_i.square().mean().sqrt()), "z_i is ignored: check its projections, and the dropped share"
    unread = "captions are ignored; beside z_i they count for little, but not for nothing"
    unguided = "guidance does nothing: nulls give the same image as z_i and caption"
    return [
        near_one("scale of z_i as the U-Net takes it", scale, "set decoder.unit_variance = true, and train again"),
        *timesteps(s, by_bin(s, {})),
        change("another's z_i", other, unused),
        gain("loss with others' z_i, more than with own", loss_gain, unused),
        change("the null z_i", null, NULL),
        *([change("another's caption", wrong_caption, unread)] if reads else []),
        *([change("the null caption", no_caption, unread)] if reads else []),
        dropout("z_i", s.setting("embedding_dropout")),
        *([dropout("captions", s.setting("caption_dropout"))] if reads else []),
        at_least(f"gray levels that guidance {GUIDANCE:g} moves an image by", guided_levels(s), 0.2, 0.01, unguided),
    ]


def upsampler(s: Examination) -> list[Finding]:
    """An upsampler: losses by timestep, and whether it sees the low-resolution image."""
    middle, advice = middle_half(s), "the low-resolution image is ignored: check the channels that it comes in by"
    other, loss_gain = effect(s, s.run(middle), middle | s.of_others("low", "levels"))
    return [
        *timesteps(s, by_bin(s, {})),
        change("another's low-resolution image", other, advice),
        gain("loss with others' low-resolution images, more than with own", loss_gain, advice),
    ]


TABLES: dict[str, Callable[[Examination], list[Finding]]] = {
    "weights.dvae": dvae, "weights.clip": clip, "weights.prior.codes": token_prior, "weights.decoder": decoder,
    "weights.prior.embeddings": embedding_prior, "weights.upsampler": upsampler,
}  # fmt: skip


def examine(s: Examination) -> list[Finding]:
    """All checks of the examination's kind, after that of its inputs."""
    weights = s.request.weights
    return [same_inputs(weights.history[-1]["inputs"] if weights.history else {}, s.digests), *TABLES[weights.kind](s)]


def change(what: str, share: float, advice: str) -> Finding:
    """Whether the output changes with an input; `share` is of the output."""
    return at_least(f"change of the output with {what}", share, 1e-2, 1e-4, advice)


def effect(s: Examination, own: tuple[Tensor, Tensor], changed: Columns) -> tuple[float, Tensor]:
    """What changed columns do: root mean square change as a share of the output, and increase of the error (G,)."""
    errors, outputs = s.run(changed)
    return float((outputs - own[1]).norm() / own[1].norm().clamp(min=1e-12)), errors - own[0]


def middle_half(s: Examination) -> Columns:
    """Timesteps in the middle half, where conditioning counts most."""
    return {"t": s.model.config.n_timestep // 4 + s.columns["t"] // 2}


def by_bin(s: Examination, changed: Columns) -> Tensor:
    """Errors of each group in equal bins of the timesteps: (bins, G); one bin where there are no timesteps."""
    if "t" not in s.columns:
        return s.run(changed)[0][None]
    n, bins = s.model.config.n_timestep, min(N_BINS, s.model.config.n_timestep)
    return torch.stack([s.run({**changed, "t": (b * n + s.columns["t"]) // bins})[0] for b in range(bins)])


def timesteps(s: Examination, own: Tensor) -> list[Finding]:
    """Losses by bin of the timesteps, beside those of a network that outputs zeros."""
    with s.hook():
        zero = by_bin(s, {}).mean(1).tolist()
    losses, n, bins = own.mean(1).tolist(), s.model.config.n_timestep, len(own)
    edges = [-(-b * n // bins) for b in range(bins + 1)]
    advice = "at low noise it must be far below: check that the noised input reaches the network"
    return [
        *(at_most(f"loss at timesteps {edges[b]} to {edges[b + 1] - 1}", losses[b], zero[b], 1.02 * zero[b],
                  f"it does no better than an output of zeros: {TRAIN}") for b in range(bins)),
        at_most("least of them, as a share of an output of zeros",
                min(loss / max(nothing, 1e-12) for loss, nothing in zip(losses, zero, strict=True)), 0.5, 0.9, advice),
    ]  # fmt: skip


def written(columns: Columns) -> Tensor:
    """The caption tokens without pads: (n,) int64."""
    tokens, lengths = columns["tokens"], columns["lengths"]
    return tokens[torch.arange(tokens.shape[1]) < lengths[:, None]]


def unigram(targets: Tensor, seen: Tensor, n_vocab: int) -> float:
    """Nats per target of a guess by smoothed counts of what was seen, which knows no order and no caption."""
    counts = torch.bincount(seen.flatten(), minlength=n_vocab).double() + 1
    return float(counts.sum().log() - counts[targets].log().mean())


def sample(s: Examination, guidance: float) -> Tensor:
    """One z_i for each caption, from the same noise whatever the guidance: (N, D) float64 of length 1."""
    prompts = s.task.captions(PromptBatch(*(s.columns[name] for name in ("tokens", "lengths", "z_t"))))
    numbers, seed = range(s.n), s.request.seed
    if isinstance(s.model, DiffusionPrior):
        steps = min(STEPS, s.model.config.n_timestep)
        how = {"steps": steps, "best_of": 1, "guidance_scale": guidance, "null": s.task.null}
        parts = sample_diffusion(s.model, prompts, numbers, seed, **how)
    else:
        parts = sample_autoregressive(s.model, prompts, numbers, seed, CategoricalOptions(guidance_scale=guidance))
    return F.normalize(torch.cat(list(parts)).double().cpu(), dim=-1)


def guided_levels(s: Examination) -> float:
    """Gray levels between images sampled from the same noise with and without guidance."""
    steps, noise = min(DECODER_STEPS, s.model.config.n_timestep), row_noise(s.request.seed, range(s.n), "doctor")
    z_i, captions = s.columns["z_i"], CaptionBatch(s.columns["tokens"], s.columns["lengths"])
    with s.request.machine.autocast():
        plain, guided = (
            sample_images(s.model, z_i, captions, SamplerConfig(steps, guidance=guidance), noise)
            for guidance in (1.0, GUIDANCE)
        )
    return float((to_images(guided).double() - to_images(plain).double()).abs().mean())
