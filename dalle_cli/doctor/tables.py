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
from dalle_cli.doctor.checks import Finding, at_least, at_most, dropout, gain, near_one, temperature
from dalle_cli.doctor.subject import Columns, Subject
from dalle_cli.models.diffusion_prior import DiffusionPrior
from dalle_cli.models.pixels import from_uint8
from dalle_cli.sampling.decoder import Brush, paint
from dalle_cli.sampling.embeddings import Read, autoregressed, diffused

COLLAPSE = 0.05  # share of the vocabulary, or of the codes seen, below which a codebook has collapsed
CONSTANT = 1.1  # perplexity of codes that say nothing
CHANGE_GOOD, CHANGE_FAIR = 1e-2, 1e-4  # root mean square of a change of the output, as a share of the output
GUIDANCE, STEPS, DECODER_STEPS = 3.0, 16, 8  # of the samples that guidance is compared on
N_BINS = 4  # of the timesteps
CLIP_BATCH = 64  # the group in which a CLIP's validation looks for the own caption
UNLEARNED = "train longer, or lower lr"
NULL = "the null {} says as much as {}: check the mask of dropped ones"


def dvae(s: Subject) -> list[Finding]:
    """A dVAE: which codes it uses, and whether images survive them."""
    found, images = s.validate(), from_uint8(s.columns["images"]).double()
    n_codes = min(s.model.config.n_vocab, s.n * s.model.config.grid**2)
    variance = images.var((2, 3), correction=0).mean(1).clamp_min(1e-10)
    flat = float(-10 * variance.log10().mean())  # the PSNR of each image's mean color
    codebook = 'few codes do the work: set dvae.quantizer = "fsq", or lower dvae.train.beta or lr'
    blind = f"reconstructions show no more than each image's mean color: {UNLEARNED}"
    used, perplexity = found["codes_used"], found["code_perplexity"]
    return [
        at_least(f"codes in use, of {s.model.config.n_vocab}", used, max(COLLAPSE * n_codes, 2), 2, codebook),
        at_least("perplexity of codes", perplexity, max(COLLAPSE * n_codes, CONSTANT), CONSTANT, codebook),
        at_least("PSNR of reconstructions (dB)", found["psnr_held_out"], flat + 1, flat, blind),
    ]


def clip(s: Subject) -> list[Finding]:
    """A CLIP: whether it finds the own caption, and tells images apart."""
    equal, group = (s.captions == s.captions[:, None]).double(), min(s.n, CLIP_BATCH)
    chance = (1 + (group - 1) * float((equal.sum() - s.n) / (s.n * (s.n - 1)))) / group
    with torch.inference_mode(), s.request.machine.autocast():
        parts = s.columns["images"].split(CLIP_BATCH)
        z = [s.model.encode_image(from_uint8(x.to(s.request.machine.device))).double().cpu() for x in parts]
    total = F.normalize(torch.cat(z), dim=1).sum(0)
    apart = float((total @ total - s.n) / (s.n * (s.n - 1)))
    unread = f"own captions are hardly found: {UNLEARNED}, in larger batches"
    alike = "all images look the same to it: lower lr, or train in larger batches"
    accuracy = s.validate()["accuracy_held_out"]
    return [
        temperature(float(s.model.scale())),
        at_least("images whose own caption is the nearest", accuracy, min(4 * chance, (1 + chance) / 2), 1.5 * chance,
                 unread),
        at_most("cosine between different images", apart, 0.9, 0.99, alike),
    ]  # fmt: skip


def token_prior(s: Subject) -> list[Finding]:
    """A prior over codes: whether it beats counting, and reads captions."""
    config, found, share = s.model.config, s.validate(), s.setting("caption_dropout")
    tokens, counted = (x["tokens"][_written(x)] for x in (s.columns, s.counted))
    guess = unigram(s.columns["codes"], s.counted["codes"], config.n_image_vocab)
    text_guess = unigram(tokens, counted, config.n_text_vocab)
    own = s.run()[0]
    unread = "captions are not read: check that codes and captions belong together, and are joined by id"
    counting = f"it is no better than counting: {UNLEARNED}"
    rows = [
        at_most("nats per code", found["image_nats"], guess, math.log(config.n_image_vocab), counting),
        at_most("nats per caption token", found["text_nats"], text_guess, math.log(config.n_text_vocab), counting),
    ]
    if len(set(s.captions.tolist())) > 1:
        more = s.run(s.of_others("tokens", "lengths"))[0] - own
        rows.append(gain("nats per code with others' captions, more than with own", more, unread))
    if share:
        more = s.run(s.null())[0] - own
        rows.append(gain("nats per code with null captions, more than with own", more, NULL.format("caption", "one")))
    return [*rows, dropout("captions", share)]


def embedding_prior(s: Subject) -> list[Finding]:
    """A prior over CLIP embeddings, of either kind: scales, losses with and without captions, and samples."""
    diffusion = isinstance(s.model, DiffusionPrior)
    own, other, null = (by_bin(s, changed) for changed in ({}, s.of_others("tokens", "lengths", "z_t"), s.null()))
    unread = "captions are not read: check their tokens, z_t, and the share that is dropped"
    return [
        near_one("length of z_i as stored", stored_length(s), "embed the images again with `encode-images -m CLIP`"),
        *(diffusion_losses(s, own) if diffusion else bucket_losses(s, own)),
        gain("loss with others' captions, more than with own", (other - own).mean(0), unread),
        gain("loss with null captions, more than with own", (null - own).mean(0), NULL.format("caption", "one")),
        dropout("captions", s.setting("caption_dropout")),
        *samples(s),
    ]


def decoder(s: Subject) -> list[Finding]:
    """A diffusion decoder: scale, losses by timestep, whether z_i and captions count, and guidance."""
    n, config, columns = len(s.task.process.schedule), s.model.config, s.columns
    middle = {"t": n // 4 + columns["t"] // 2}  # where conditioning counts most
    z_i = columns["z_i"].double()
    z_i = F.normalize(z_i, dim=1) * config.n_embedding**0.5 if config.unit_variance else z_i
    loss, own = s.run(middle)
    loss_other, other = s.run(middle | s.of_others("z_i"))
    unused = "z_i is ignored: check its projections, and the share that is dropped"
    unread = "captions are ignored; beside z_i they count for little, but not for nothing"
    no_guidance = "guidance does nothing: nulls give the same image as z_i and caption"
    null, reads = s.run(middle | s.null("given"))[1], s.model.text is not None
    return [
        near_one("scale of z_i as the U-Net takes it", float(z_i.square().mean().sqrt()),
                 "set decoder.unit_variance = true, and train again"),
        *timesteps(*validated(s)),
        at_least("change of the output with another's z_i", share(other, own), CHANGE_GOOD, CHANGE_FAIR, unused),
        gain("loss with others' z_i, more than with own", loss_other - loss, unused),
        at_least("change of the output with the null z_i", share(null, own), CHANGE_GOOD, CHANGE_FAIR,
                 NULL.format("z_i", "z_i")),
        *(at_least(f"change of the output with {what} caption", share(s.run(middle | changed)[1], own), CHANGE_GOOD,
                   CHANGE_FAIR, unread)
          for what, changed in (("another's", s.of_others("tokens", "lengths")), ("the null", s.null())) if reads),
        dropout("z_i", s.setting("embedding_dropout")),
        *([dropout("captions", s.setting("caption_dropout"))] if reads else []),
        at_least(f"gray levels that guidance {GUIDANCE:g} moves an image by", guided_levels(s), 0.2, 0.01, no_guidance),
    ]  # fmt: skip


def upsampler(s: Subject) -> list[Finding]:
    """An upsampler: losses by timestep, and whether it sees the low-resolution image."""
    n = len(s.task.process.schedule)
    middle = {"t": n // 4 + s.columns["t"] // 2}
    loss, own = s.run(middle)
    loss_other, other = s.run(middle | s.rolled("low", "levels"))
    unused = "the low-resolution image is ignored: check the channels that it comes in by"
    name = "change of the output with another's low-resolution image"
    return [
        *timesteps(*validated(s)),
        at_least(name, share(other, own), CHANGE_GOOD, CHANGE_FAIR, unused),
        gain("loss with others' low-resolution images, more than with own", loss_other - loss, unused),
    ]


CHECKS: dict[str, Callable[[Subject], list[Finding]]] = {
    "weights.dvae": dvae, "weights.clip": clip, "weights.prior.codes": token_prior, "weights.decoder": decoder,
    "weights.prior.embeddings": embedding_prior, "weights.upsampler": upsampler,
}  # fmt: skip


def _written(columns: Columns) -> Tensor:
    """Which places hold a token, not a pad: (N, T) bool."""
    return torch.arange(columns["tokens"].shape[1]) < columns["lengths"][:, None]


def unigram(targets: Tensor, counted: Tensor, n_vocab: int) -> float:
    """Nats per target of a guess from smoothed counts, which knows no order and no caption."""
    counts = torch.bincount(counted.flatten(), minlength=n_vocab).double() + 1
    return float(counts.sum().log() - counts[targets.flatten()].log().mean())


def share(other: Tensor, own: Tensor) -> float:
    """Root mean square of a change, as a share of what changes."""
    return float((other - own).square().mean().sqrt() / own.square().mean().sqrt().clamp(min=1e-12))


def bins(n_timestep: int) -> list[str]:
    """The names of equal bins of the timesteps."""
    n = min(N_BINS, n_timestep)
    return [f"{-(-b * n_timestep // n)} to {-(-(b + 1) * n_timestep // n) - 1}" for b in range(n)]


def by_bin(s: Subject, changed: Columns) -> Tensor:
    """Errors of each group in each bin of the timesteps: (bins, G); without timesteps there is one bin."""
    if "t" not in s.columns:
        return s.run(changed)[0][None]
    n = s.model.config.n_timestep
    count = len(bins(n))
    return torch.stack([s.run({**changed, "t": (b * n + s.columns["t"]) // count})[0] for b in range(count)])


def timesteps(names: list[str], losses: list[float], zero: list[float]) -> list[Finding]:
    """Losses by bin of the timesteps, beside those of a network that outputs zeros."""
    worse = f"it does no better than an output of zeros: {UNLEARNED}"
    unseen = "where noise is easiest to tell it must be far below: check that the noised input reaches the network"
    rows = [
        at_most(f"loss at timesteps {name}", loss, nothing, 1.02 * nothing, worse)
        for name, loss, nothing in zip(names, losses, zero, strict=True)
    ]
    least = min((loss / max(nothing, 1e-12) for loss, nothing in zip(losses, zero, strict=True)), default=math.nan)
    return [*rows, at_most("least of them, as a share of an output of zeros", least, 0.5, 0.9, unseen)]


def validated(s: Subject) -> tuple[list[str], list[float], list[float]]:
    """Losses by bin of the task's own validation, and those of an output of zeros."""
    found = {name.removeprefix("mse_t"): x for name, x in s.validate().items() if name.startswith("mse_t")}
    with s.predicting_zero():
        zero = s.validate()
    return [name.replace("_", " to ") for name in found], list(found.values()), [zero[f"mse_t{name}"] for name in found]


def stored_length(s: Subject) -> float:
    """Mean length of the stored z_i, which stages normalize as they read them."""
    _, rows = s.task.pairs.draw(s.task.held_out, np.zeros((s.n, 2)))
    stored = np.asarray(s.task.pairs.latents.array("embeddings")[rows]).astype(np.float64)
    return float(np.linalg.norm(stored, axis=1).mean())


def diffusion_losses(s: Subject, own: Tensor) -> list[Finding]:
    """The scale before noise, losses by timestep, and whether the noised z_i counts."""
    model, n = s.model, s.model.config.n_timestep
    misfit = "noise of unit variance does not fit: train on these embeddings with scale = 0, which measures it"
    unseen = "the noised z_i is not among the tokens: check its projection"
    with s.predicting_zero():
        zero = by_bin(s, {})
    early = {"t": torch.full_like(s.columns["t"], n // 8)}
    change = share(s.run(early | s.rolled("z_i", "noise"))[1], s.run(early)[1])
    return [
        near_one(
            "scale of z_i before noise", model.principal.spread(s.columns["z_i"].to(model.principal.mean)), misfit
        ),
        *timesteps(bins(n), own.mean(1).tolist(), zero.mean(1).tolist()),
        at_least("change of the output with another noised z_i", change, CHANGE_GOOD, CHANGE_FAIR, unseen),
    ]


def bucket_losses(s: Subject, own: Tensor) -> list[Finding]:
    """Whether the buckets hold z_i, and whether they are learned."""
    model, uniform = s.model, math.log(s.model.config.n_bucket)
    x = model.principal.project(s.columns["z_i"].to(model.low), model.config.n_component)
    outside = float(((x < model.low) | (x > model.high)).double().mean())
    return [
        at_most("share of z_i beyond the buckets", outside, 0.02, 0.1, "the buckets do not reach: train on these"
                " embeddings"),
        at_most("nats per bucket", float(own.mean()), 0.95 * uniform, uniform, f"a uniform guess costs as much: "
                f"{UNLEARNED}"),
    ]  # fmt: skip


def samples(s: Subject) -> list[Finding]:
    """Sampled z_i beside the image's own, that of another caption, and samples with guidance."""
    plain, guided = (sampled(s, scale) for scale in (1.0, GUIDANCE))
    z_i = s.columns["z_i"].double()
    own, other = ((plain * z).sum(-1) for z in (z_i, z_i[s.others]))
    moved = float((1 - (plain * guided).sum(-1)).mean())
    astray = f"samples do not follow captions: {UNLEARNED}, or see the losses above"
    no_guidance = "guidance does nothing: check that training drops captions, and that the null differs from a caption"
    return [
        gain("cosine of sampled to true z_i, more than to that of another caption", own - other, astray),
        at_least("cosine of sampled to true z_i", float(own.mean()), float(other.mean()), -1.0, astray),
        at_least(f"distance of samples at guidance {GUIDANCE:g} from those without", moved, 1e-3, 1e-5, no_guidance),
    ]


def sampled(s: Subject, guidance: float) -> Tensor:
    """One z_i for each caption, from the same noise whatever the guidance: (N, D) float64 of length 1."""
    columns, numbers, seed = (
        (s.columns[name].to(s.request.machine.device) for name in ("tokens", "lengths", "z_t")),
        range(s.n),
        s.request.seed,
    )
    read = Read(*columns)
    if isinstance(s.model, DiffusionPrior):
        steps = min(STEPS, s.model.config.n_timestep)
        parts = diffused(s.model, read, numbers, seed, steps=steps, best_of=1, guidance_scale=guidance)
    else:
        parts = autoregressed(s.model, read, numbers, seed, guidance_scale=guidance)
    return F.normalize(torch.cat(list(parts)).double().cpu(), dim=-1)


def guided_levels(s: Subject) -> float:
    """Gray levels between images from the same noise with and without guidance."""
    steps, noise = min(DECODER_STEPS, s.model.config.n_timestep), row_noise(s.request.seed, range(s.n), "doctor")
    conditioning = [s.columns[name] for name in ("z_i", "tokens", "lengths")]
    with s.request.machine.autocast():
        plain, guided = (
            paint(s.model, *conditioning, Brush(steps, guidance=g), noise).double() for g in (1.0, GUIDANCE)
        )
    return float((guided - plain).abs().mean())
