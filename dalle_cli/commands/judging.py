"""What `evaluate` says of a tokenizer of pictures and of a prior: their weights, run over data."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from dalle_cli.artifacts import Artifact
    from dalle_cli.data.augment import Pixels
    from dalle_cli.data.loader import Pictures
    from dalle_cli.data.pairs import Ints, Pairs
    from dalle_cli.devices import Arithmetic
    from dalle_cli.evaluation.likelihood import Counts, Judge, Trial
    from dalle_cli.evaluation.reconstruction import Reconstructions, Shift
    from dalle_cli.models.dvae import DVAE
    from dalle_cli.models.prior import Prior

WORST = 16  # pictures on the sheet of reconstructions
SEED = 0  # of whose caption stands in for a pair's own


def judge_dvae(
    weights: "Artifact", data: "Pictures", digest: str, out: Path, *, batch_size: int, device: str, dtype: str,
    workers: int, limit: int | None, sheet: Path | None, force: bool, features: str | None,
    without: Path | None = None,
) -> dict[str, object]:  # fmt: skip
    """How well a dVAE rebuilds pictures, center-cropped, from its codes, and what the codes cost.

    What cannot be read is listed beside `out`, and what `without` lists is left out. Where `digest` is that of the data
    set that the dVAE was trained on, the pictures that training held out are told of by themselves, too. `features`
    names what the Frechet distance is taken by, as --features does.

    Raises:
        DalleError: no picture can be read, too few for the features, or no PNG lies where the sheet goes.
    """
    from dalle_cli.commands.drawing import check_png
    from dalle_cli.data.exclude import leave_out
    from dalle_cli.data.loader import sequential
    from dalle_cli.devices import arithmetic
    from dalle_cli.errors import DalleError
    from dalle_cli.evaluation.features import load_features
    from dalle_cli.evaluation.reconstruction import Reconstructions, Shift
    from dalle_cli.paths import skip_list
    from dalle_cli.pipelines import loading as load

    if sheet is not None:
        check_png(sheet, force)
    machine = arithmetic(device, dtype)
    dvae = load.dvae(weights, machine.device)
    gone, skips = leave_out(without, data.ids), skip_list(out.with_name(out.name.removesuffix(".json")))
    left = [row for row, name in enumerate(data.ids) if name not in gone]
    rows = [left[place] for place in some(len(left), limit).tolist()]
    scores = Reconstructions(dvae.config.n_vocab, WORST if sheet is not None else 0)
    shift = Shift(load_features(features, None, machine)) if features else None
    if shift is not None:
        shift.check(len(rows))
    rebuild(
        dvae, sequential(data, dvae.config.image_size, rows, batch_size, workers), len(rows), machine, scores, shift
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    data.skipped.write(skips)
    if not scores.rows:
        raise DalleError(f"expected pictures that can be read, found none of {len(rows):,}; see {skips}")
    told = {**scores.pictures(), "skipped": len(rows) - len(scores.rows), **scores.codes()}
    told |= {"without": len(gone)} if without is not None else {}
    told |= {"frechet": shift.figures()} if shift is not None else {}
    if sheet is not None:
        draw_worst(sheet, scores, data.ids, dvae.config.image_size)
    return told | held_out_scores(weights, digest, data.ids, gone, scores)


def some(n: int, limit: int | None) -> "Ints":
    """All rows of n, or `limit` of them, evenly spread."""
    import numpy as np

    return np.arange(n) if limit is None or limit >= n else np.arange(limit) * n // limit


def rebuild(
    dvae: "DVAE", batches: "Iterable[tuple[Ints, Pixels]]", n: int, machine: "Arithmetic",
    scores: "Reconstructions", shift: "Shift | None",
) -> None:  # fmt: skip
    """Encode and decode n pictures as those stages do, and score each batch."""
    import torch

    from dalle_cli import console
    from dalle_cli.commands import drawing
    from dalle_cli.commands.encode_images import encode

    device = "cpu" if machine.device.type == "mps" else machine.device  # which has no float64
    with console.progress("evaluate", n, unit="pictures") as advance:
        for kept, images in batches:
            codes = encode(dvae, images, machine)
            shown = drawing.decode(dvae, codes, machine)
            first, second = (torch.from_numpy(pixels) for pixels in (images, shown))
            scores.add(kept.tolist(), first.to(device), second.to(device), torch.from_numpy(codes))
            if shift is not None:
                shift.add(first.to(machine.device), second.to(machine.device))
            advance(len(images))


def held_out_scores(
    weights: "Artifact", digest: str, ids: "Sequence[str]", gone: frozenset[str], scores: "Reconstructions"
) -> dict[str, object]:
    """`trained_on`: whether this is the data set that training saw; then also the scores of what it held out."""
    import torch

    from dalle_cli import console
    from dalle_cli.data.split import held_out

    if not any(entry["inputs"].get("dataset") == digest for entry in weights.history):
        return {"trained_on": False}
    if fault := other_split(weights, gone):
        console.warn(f"{fault}; what training held out is not told of by itself")
        return {"trained_on": True}
    share = validation_share(weights)
    kept = torch.tensor([share is not None and held_out(ids[row], share) for row in scores.rows])
    return {"trained_on": True, "held_out": scores.pictures(kept)}


def left_out(weights: "Artifact") -> str | None:
    """What the weights say of the ids that training left out, as `without.told` does; None where it left out none."""
    told: str | None = weights.history[-1]["inputs"].get("without") if weights.history else None
    return told


def other_split(weights: "Artifact", gone: frozenset[str]) -> str | None:
    """What is wrong if training left ids out and these are not the same, so that it held out a part of others."""
    from dalle_cli.data.exclude import told

    wanted, found = left_out(weights), told(gone).get("without")
    if wanted in (None, found):
        return None
    given = f"{len(gone)} others (sha256 {found[:12]})" if found else "none"
    return f"expected --without with the ids that training left out (sha256 {wanted[:12]}), found {given}"


def validation_share(weights: "Artifact") -> float | None:
    """The share of ids that training held out; None where the weights do not say, or none were."""
    told = weights.config.get("train")
    share = told.get("validation") if isinstance(told, dict) else None
    return float(share) if isinstance(share, (int, float)) and 0 < share <= 1 else None


def draw_worst(path: Path, scores: "Reconstructions", ids: "Sequence[str]", size: int) -> None:
    """The pictures that were rebuilt worst, the worst first, each beside its reconstruction."""
    from dalle_cli.artifacts.container import replace_file
    from dalle_cli.viz.grid import sheet

    pixels: list[Any] = []
    texts: list[str] = []
    for seen in scores.worst:
        alike = "" if seen.ssim is None else f", SSIM {seen.ssim:.2f}"
        pixels += [seen.image.numpy(), seen.shown.numpy()]
        texts += [ids[seen.row], f"{seen.psnr:.1f} dB{alike}"]
    title = "Originals beside their reconstructions, worst first"
    columns = min(len(pixels), 8 if size <= 128 else 4)
    image = sheet(pixels, texts, columns=columns, title=title)
    replace_file(path, lambda part: image.save(part, format="PNG"))


def judge_prior(
    weights: "Artifact", captions: Path, codes: Path, out: Path, *, batch_size: int, device: str, dtype: str,
    limit: int | None, plot: Path | None, force: bool, everything: bool = False, without: Path | None = None,
) -> dict[str, object]:  # fmt: skip
    """What a prior gives for captions and codes of the ids that its training held out, or with `everything` of all.

    Of each id the first caption and the first grid are taken, as in the validation while training. What `without` lists
    is not judged.

    Raises:
        DalleError: captions or codes of another tokenizer or encoder, nothing held out, other ids left out than by
            training, no matplotlib for the plot.
    """
    from dalle_cli import console
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.data.exclude import leave_out
    from dalle_cli.data.pairs import Pairs
    from dalle_cli.devices import arithmetic
    from dalle_cli.evaluation.likelihood import Judge as Scores
    from dalle_cli.pipelines import loading as load
    from dalle_cli.viz import charts

    if plot is not None:
        charts.check(plot, force)
        charts.check_drawable()
    texts, latents = open_artifact(captions, "captions"), open_artifact(codes, "codes")
    machine = arithmetic(device, dtype)
    prior = load.prior(weights, machine.device)
    check_made_for(weights, prior, texts, latents)
    pairs = Pairs(texts, latents)
    gone = leave_out(without, pairs.ids)
    training, places = judged_places(weights, pairs, gone, everything)
    counts = count(prior, pairs, training, batch_size) if len(training) else count(prior, pairs, places, batch_size)
    counts.own = not len(training)
    judged = places[some(len(places), limit)]
    others = other_captions(pairs, judged, batch_size)
    judge = Scores(prior, counts, shuffle=others is not None)
    with console.progress("evaluate", len(judged), unit="pairs") as advance:
        for at in range(0, len(judged), batch_size):
            here = slice(at, at + batch_size)
            with machine.autocast():
                judge.add(trial(pairs, judged[here], (judged if others is None else others)[here]))
            advance(len(judged[here]))
    held = not everything and validation_share(weights) is not None
    told = judge.figures() | {"held_out": held, "caption_dropout": caption_dropout(weights)}
    told |= {"without": len(gone)} if without is not None else {}
    if plot is not None:
        title = f"{weights.path.stem}: {len(judged):,} {'held-out ' if held else ''}pairs"
        draw_grids(plot, judge, title)
    return told


def check_made_for(weights: "Artifact", prior: "Prior", captions: "Artifact", codes: "Artifact") -> None:
    """Raises: DalleError unless the prior was trained with the captions' tokenizer and the codes' encoder."""
    from dalle_cli.errors import DalleError
    from dalle_cli.hub import bundles as bundle

    bundle.check_digest("tokenizer", captions.fact("tokenizer", str), weights.fact("tokenizer", str), weights.path)
    bundle.check_digest("image encoder", codes.fact("encoder", str), weights.fact("encoder", str), weights.path)
    config = prior.config
    wanted = (config.n_text_vocab, config.n_text, config.n_image_vocab, config.grid)
    found = (
        *(captions.fact(k, int) for k in ("n_vocab", "n_text")),
        *(codes.fact(k, int) for k in ("n_vocab", "grid")),
    )
    if found != wanted:
        raise DalleError(
            f"expected vocabulary and length of captions, and of codes, {wanted}, found {found}; make both again"
        )


def judged_places(weights: "Artifact", pairs: "Pairs", gone: frozenset[str], everything: bool) -> "tuple[Ints, Ints]":
    """The pairs that training saw, if they are known, and those to judge, without those that are `gone`.

    Raises:
        DalleError: training held none of these pairs out, or left out others than are gone.
    """
    import numpy as np

    from dalle_cli import console
    from dalle_cli.errors import DalleError

    share = validation_share(weights)
    if share is None and not everything:
        console.warn(f"expected weights that say what training held out, found {weights.path}; all pairs are judged")
    here = np.array([name not in gone for name in pairs.ids])
    if share is None or everything:
        return np.zeros(0, np.int64), np.flatnonzero(here)
    if fault := other_split(weights, gone):
        raise DalleError(f"{fault}; give that list, or judge all pairs with --everything")
    training, held_out = pairs.split(share)
    if left_out(weights):  # else training saw what is only not to be judged
        training = training[here[training]]
    held_out = held_out[here[held_out]]
    if not len(held_out):
        raise DalleError(f"expected pairs that training held out, found none of {len(pairs)}; give more of the data")
    return training, held_out


def drawn(pairs: "Pairs", places: "Ints") -> "tuple[Tensor, Tensor, Tensor]":
    """The first caption and the first grid of each place: (B, T), (B,), (B, W, W) int64."""
    import numpy as np
    import torch

    captions, latents = pairs.draw(places, np.zeros((len(places), 2)))
    tokens, lengths = map(torch.from_numpy, pairs.tokens(captions))
    return tokens, lengths, torch.from_numpy(pairs.codes(latents))


def count(prior: "Prior", pairs: "Pairs", places: "Ints", batch_size: int) -> "Counts":
    """How often each code and each token occurs at these places."""
    from dalle_cli.evaluation.likelihood import Counts

    counts = Counts.none(prior)
    for at in range(0, len(places), batch_size):
        counts.add(*drawn(pairs, places[at : at + batch_size]))
    return counts


def other_captions(pairs: "Pairs", places: "Ints", batch_size: int) -> "Ints | None":
    """For each place another, whose caption has other tokens; None where all captions are alike."""
    from dalle_cli.evaluation.likelihood import strangers

    keys: list[int] = []
    for at in range(0, len(places), batch_size):
        tokens, lengths, _ = drawn(pairs, places[at : at + batch_size])
        keys += [hash(row[:n].numpy().tobytes()) for row, n in zip(tokens, lengths.tolist(), strict=True)]
    found = strangers(keys, SEED)
    return None if found is None else places[found]


def trial(pairs: "Pairs", places: "Ints", others: "Ints") -> "Trial":
    """Pairs, and the captions of others."""
    from dalle_cli.evaluation.likelihood import Trial

    return Trial(*drawn(pairs, places), *drawn(pairs, others)[:2])


def caption_dropout(weights: "Artifact") -> object:
    """The share of captions that training left out: where it was 0, the gain over none says how odd none is."""
    told = weights.config.get("train")
    return told.get("caption_dropout") if isinstance(told, dict) else None


def draw_grids(path: Path, judge: "Judge", title: str) -> None:
    """The heat maps: what codes cost by place, and what the caption saves there."""
    from dalle_cli.artifacts.container import replace_file
    from dalle_cli.viz.charts import Heat, Label, heat_maps, save

    maps = [
        Heat(Label("image loss", "nats per code"), judge.grid(judge.by_position)),
        Heat(
            Label("gain from the caption", "nats per code"),
            judge.grid(judge.null_by_position - judge.by_position),
            signed=True,
        ),
    ]
    picture = heat_maps(maps, title)
    replace_file(path, lambda part: save(picture, part, path.suffix))
