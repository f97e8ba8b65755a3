"""A prior over codes on captions and codes: what `dalle evaluate PRIOR CAPTIONS CODES` computes.

Shapes: B pairs of a batch, T caption length, H W code grid.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_cli import console
from dalle_cli.artifacts import Artifact
from dalle_cli.artifacts.container import replace_file
from dalle_cli.data.exclude import read_exclude_list
from dalle_cli.data.pairs import Ints, Pairs
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.evaluation.heldout import excluded_digest, other_split, validation_share
from dalle_cli.evaluation.image_sets import spread
from dalle_cli.evaluation.likelihood import PriorMetrics, Text, Unigram, derangement
from dalle_cli.evaluation.options import EvaluateOptions
from dalle_cli.hub import bundles
from dalle_cli.models.bart import CodePrior
from dalle_cli.pipelines import loading
from dalle_cli.viz import charts

SHUFFLE_SEED = 0  # of the captions that stand in for a pair's own


def evaluate_prior(
    weights: Artifact, captions: Artifact, codes: Artifact, options: EvaluateOptions, machine: Arithmetic,
    force: bool = False,
) -> dict[str, object]:  # fmt: skip
    """Losses of a prior on the pairs that its training held out, or on all with `options.everything`.

    Each id counts once, with its first caption and its first grid, as in the validation of training.

    Raises:
        DalleError: captions or codes of another tokenizer or encoder, nothing held out, other ids left out than by
            training, or no matplotlib for the plot.
    """
    if options.plot is not None:
        charts.check(options.plot, force)
        charts.load_matplotlib()
    prior = loading.prior(weights, machine.device, machine.dtype)
    check_made_for(weights, prior, captions, codes)
    pairs = Pairs(captions, codes)
    excluded = read_exclude_list(options.exclude, pairs.ids)
    training, places = split_pairs(weights, pairs, excluded, options.everything)
    counted = training if len(training) else places
    unigram = count(prior, pairs, counted, options.batch_size, own=not len(training))
    chosen = places[spread(len(places), options.limit)]
    scores = score_pairs(prior, pairs, chosen, unigram, machine, options.batch_size).metrics()
    held = not options.everything and validation_share(weights) is not None
    train = weights.config.get("train")
    # where no captions were dropped in training, the gain over none only says how unusual an empty caption is
    dropout = train.get("caption_dropout") if isinstance(train, dict) else None
    if options.plot is not None:
        title = f"{weights.path.stem}: {len(chosen):,} {'held-out ' if held else ''}pairs"
        plot_positions(options.plot, scores, title)
    scores |= {"held_out": held, "caption_dropout": dropout}
    return scores | ({"exclude": len(excluded)} if options.exclude is not None else {})


def check_made_for(weights: Artifact, prior: CodePrior, captions: Artifact, codes: Artifact) -> None:
    """Raises: DalleError unless the prior was trained with the captions' tokenizer and the codes' encoder."""
    for what, key, source in (("tokenizer", "tokenizer", captions), ("image encoder", "encoder", codes)):
        bundles.check_digest(what, source.require(key, str), weights.require(key, str), weights.path)
    config, sizes = prior.config, ((captions, "n_vocab"), (captions, "n_text"), (codes, "n_vocab"), (codes, "grid"))
    wanted = (config.n_text_vocab, config.n_text, config.n_image_vocab, config.grid)
    if (found := tuple(source.require(key, int) for source, key in sizes)) != wanted:
        said = f"{wanted}, found {found}; make both again"
        raise DalleError(f"expected vocabulary and length of captions, and of codes, {said}")


def split_pairs(weights: Artifact, pairs: Pairs, excluded: frozenset[str], everything: bool) -> tuple[Ints, Ints]:
    """The pairs of training, if they are known, and those to evaluate, without the excluded ids.

    Raises:
        DalleError: training held none of these pairs out, or left out other ids.
    """
    share = validation_share(weights)
    if share is None and not everything:
        console.warn(f"expected weights that say what training held out, found {weights.path}; using all pairs")
    here = np.array([name not in excluded for name in pairs.ids])
    if share is None or everything:
        return np.zeros(0, np.int64), np.flatnonzero(here)
    if fault := other_split(weights, excluded):
        raise DalleError(f"{fault}; give that list, or use all pairs with --everything")
    training, held_out = pairs.split(share)
    if excluded_digest(weights):  # else training used the ids that are excluded only here
        training = training[here[training]]
    held_out = held_out[here[held_out]]
    if not len(held_out):
        raise DalleError(f"expected pairs that training held out, found none of {len(pairs)}; give more of the data")
    return training, held_out


def read_pairs(pairs: Pairs, places: Ints) -> tuple[Tensor, Tensor, Tensor]:
    """The first caption and the first grid of each place: (B, T), (B,), (B, H, W) int64."""
    captions, latents = pairs.draw(places, np.zeros((len(places), 2)))
    tokens, lengths = map(torch.from_numpy, pairs.tokens(captions))
    return tokens, lengths, torch.from_numpy(pairs.codes(latents))


def count(prior: CodePrior, pairs: Pairs, places: Ints, batch_size: int, own: bool = False) -> Unigram:
    """Count the codes and tokens of these places."""
    unigram = Unigram.empty(prior, own)
    for at in range(0, len(places), batch_size):
        unigram.add(*read_pairs(pairs, places[at : at + batch_size]))
    return unigram


def score_pairs(
    prior: CodePrior, pairs: Pairs, places: Ints, unigram: Unigram, machine: Arithmetic, batch_size: int
) -> PriorMetrics:
    """Score these pairs, each with its own caption, without one, and with another pair's."""
    keys: list[int] = []
    for at in range(0, len(places), batch_size):
        tokens, lengths, _ = read_pairs(pairs, places[at : at + batch_size])
        keys += [hash(row[:n].numpy().tobytes()) for row, n in zip(tokens, lengths.tolist(), strict=True)]
    others, metrics = derangement(keys, SHUFFLE_SEED), PriorMetrics(prior, unigram)
    with console.progress("evaluate", len(places), unit="pairs") as advance:
        for at in range(0, len(places), batch_size):
            *text, codes = read_pairs(pairs, places[at : at + batch_size])
            other: Text | None = None
            if others is not None:
                other = read_pairs(pairs, places[others[at : at + batch_size]])[:2]
            with machine.autocast():
                metrics.add((text[0], text[1]), codes, other)
            advance(len(codes))
    return metrics


def plot_positions(path: Path, scores: dict[str, Any], title: str) -> None:
    """Heat maps of the loss of codes by position, and of what the caption saves there."""
    loss, gain = charts.Label("image loss", "nats per code"), charts.Label("gain from the caption", "nats per code")
    maps = [
        charts.Heat(loss, scores["by_position"]),
        charts.Heat(gain, scores["gain_over_null_by_position"], signed=True),
    ]
    figure = charts.heat_maps(maps, title)
    replace_file(path, lambda part: charts.save(figure, part, path.suffix))
