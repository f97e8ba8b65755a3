"""What `doctor` asks of a dVAE, of a prior over its codes, and of a CLIP.

N pictures, S their side, T caption length, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dalle_cli.doctor.checks import BAD, OK, WARNING, Finding, at_least, at_most, dropped, surely_above
from dalle_cli.evaluation.reconstruction import psnr, squared_error, usage
from dalle_cli.models.clip import CLIP, equal_captions
from dalle_cli.models.dvae import DVAE
from dalle_cli.models.pixels import from_uint8, to_uint8

AT_ONCE = 64
COLLAPSE = 0.05  # share of the vocabulary, or of the codes looked at, below which a codebook is called collapsed
GONE = 1.1  # perplexity of codes that say nothing
FAR_ABOVE, ABOVE = 4.0, 1.5  # times chance, of a CLIP's accuracy
WARMEST = 100.0  # the inverse temperature that a CLIP is held below
APART_GOOD, APART_FAIR = 0.9, 0.99  # cosines of the embeddings of different pictures


@torch.no_grad()
def examine_dvae(dvae: DVAE, images: Tensor, advance: Callable[[], None]) -> list[Finding]:
    """Which codes pictures become, and whether they can be seen again: (N, 3, S, S) uint8."""
    config = dvae.config
    counts = torch.zeros(config.n_vocab, dtype=torch.int64)
    errors, flat = [], []
    for part in torch.split(images, AT_ONCE):
        codes = dvae.encode(from_uint8(part))
        counts += torch.bincount(codes.flatten().cpu(), minlength=config.n_vocab)
        errors.append(squared_error(part.cpu(), to_uint8(dvae.decode(codes)).cpu()))
        flat.append(part.cpu().double().var((2, 3), correction=0).mean(1))  # of its mean color in every place
    advance()
    advance()
    used, perplexity, _ = usage(counts)
    most = min(config.n_vocab, int(counts.sum()))
    advice = 'few codes do the work: set dvae.quantizer = "fsq", or lower dvae.train.beta or lr'
    seen, plain = (float(psnr(torch.cat(parts)).mean()) for parts in (errors, flat))
    blind = "it shows no more than each picture's mean color: train longer, or lower lr"
    return [
        at_least(f"codes in use, of {config.n_vocab}", used, max(COLLAPSE * most, 2), 2, advice),
        at_least("perplexity of codes", perplexity, max(COLLAPSE * most, GONE), GONE, advice),
        at_least("dB of pictures seen again", seen, plain + 1, plain, blind),
    ]


def examine_prior(figures: Mapping[str, object], caption_dropout: object) -> list[Finding]:
    """A prior over codes by what `likelihood.Judge` says of it on pairs."""

    def number(name: str) -> float:
        value = figures[name]
        return float(value) if isinstance(value, (int, float)) else math.nan

    def gained(question: str, name: str, advice: str) -> Finding:
        error = figures[f"{name}_error"]
        return surely_above(question, number(name), error if isinstance(error, float) else None, advice)

    advice = "it is no better than counting {}: train longer, or lower lr"
    found = [
        at_most(f"nats of a {what}", number(name), number(f"{name}_unigram"), number(f"{name}_uniform"),
                advice.format(f"{what}s"))
        for what, name in (("code", "image_nats"), ("caption token", "text_nats"))
    ]  # fmt: skip
    if figures["gain_over_shuffled"] is not None:
        cut = "captions are not read: do codes and captions belong together, and are captions joined by id?"
        found.append(gained("nats of a code with others' captions, more than with own", "gain_over_shuffled", cut))
    if caption_dropout:
        null = "the null caption says as much as a caption: is the mask of dropped ones in use?"
        found.append(gained("nats of a code with null captions, more than with own", "gain_over_null", null))
    return [*found, dropped("share of captions dropped in training", caption_dropout)]


@torch.no_grad()
def examine_clip(
    clip: CLIP, images: Tensor, tokens: Tensor, lengths: Tensor, advance: Callable[[], None]
) -> list[Finding]:
    """Whether own captions are near, by groups: (N, 3, S, S) uint8, (N, T), (N,) int64."""
    hits, chances, cosines = [], [], []
    for rows in torch.split(torch.arange(len(images)), AT_ONCE):
        z_i = clip.encode_image(from_uint8(images[rows]))
        z_t = clip.encode_text(tokens[rows], lengths[rows])
        pairs = equal_captions(tokens[rows], lengths[rows])
        best = clip.similarity(z_i, z_t).argmax(dim=1, keepdim=True)
        hits.append(pairs.gather(1, best).double().flatten().cpu())
        chances.append(pairs.double().mean(1).cpu())
        alike = clip.similarity(z_i, z_i)
        n = len(rows)
        cosines.append(((alike.sum() - alike.diagonal().sum()) / max(n * (n - 1), 1)).item())
    advance()
    advance()
    accuracy, chance = (float(torch.cat(parts).mean()) for parts in (hits, chances))
    advice = "own captions are hardly found: train longer, in larger batches, or lower lr"
    alone = "all pictures look the same to it: lower lr, or train in larger batches"
    return [
        temperature(float(clip.scale())),
        at_least("pictures whose own caption is the nearest", accuracy, min(FAR_ABOVE * chance, (1 + chance) / 2),
                 ABOVE * chance, advice),
        at_most("cosine between different pictures", sum(cosines) / len(cosines), APART_GOOD, APART_FAIR, alone),
    ]  # fmt: skip


def temperature(scale: float) -> Finding:
    """The factor that similarities are multiplied by; it is learned, and clipped."""
    verdict = OK if 1 < scale < 0.999 * WARMEST else WARNING if scale > 0 else BAD
    advice = "it is at its limit: more data, or less training, unless the model is large"
    if scale <= 1:
        advice = "it has come down, as where pictures and captions do not belong together: check the pairs"
    return Finding("inverse temperature", verdict, scale, f"above 1 and below {WARMEST:g}", advice)
