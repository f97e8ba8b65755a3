"""`dalle evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from dalle_cli.options import BatchSize, Device, Dtype, Force, Json, Limit, Model, Out, Seed, Without, Workers

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact
    from dalle_cli.devices import Arithmetic
    from dalle_cli.evaluation.features import ClipFeatures
    from dalle_cli.evaluation.images import Comparison, Settings

EXAMPLE = """dalle evaluate drawn.images.safetensors --reference photos/ --blur 0,1,2,4,8 -o scores.json --plot blur.png
dalle evaluate dvae.safetensors --reference photos/ --sheet worst.png
dalle evaluate prior.safetensors captions.safetensors codes/ --plot places.png"""
# What is judged: in words, and which of the options that are not for all of them are for it.
TAKES = {
    "images": ("pictures", ("reference", "features", "blur", "scores", "candidates", "size", "plot")),
    "weights.dvae": ("a dVAE", ("reference", "features", "sheet")),
    "weights.prior.codes": ("a prior", ("plot", "everything")),
}


class Machine(NamedTuple):
    """How fast and where, which changes no score beyond rounding."""

    batch_size: int
    workers: int
    device: str
    dtype: str


class Asked(NamedTuple):
    """What the options of pictures say."""

    reference: str | None
    features: str | None
    model: str | None
    radii: list[float]
    size: int | None
    limit: int | None
    without: Path | None
    plot: Path | None


def run(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT...",
            help="Pictures: from `decode`, or a data set. Or weights: of a dVAE; of a prior, then captions and codes. "
            "Read from the pipe if left out.",
        ),
    ] = None,
    out: Out = None,
    reference: Annotated[
        str | None, typer.Option(metavar="DATASET", help="Real pictures: a data set, or images that a stage wrote.")
    ] = None,
    model: Model = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[:OUTPUT]",
            help="What pictures are compared by: a CLIP (that of -m if left out), Inception-v3 (.pth), or .onnx.",
        ),
    ] = None,
    blur: Annotated[
        str, typer.Option(metavar="X,X", help="Radii of Gaussian blur of both sides, in pixels (the paper: 0,1,2,4,8).")
    ] = "0",
    scores: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Which of frechet, kernel, precision, recall, inception, clip, retrieval; else all that can be had.",
        ),
    ] = "",
    candidates: Annotated[
        int | None,
        typer.Option("-k", "--candidates", min=2, metavar="N", help="Retrieval chooses among N real pictures (100)."),
    ] = None,
    bootstrap: Annotated[
        int, typer.Option(min=0, metavar="N", help="Replicates that intervals come from; 0 = no intervals.")
    ] = 100,
    size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Side that pictures are brought to; else that of the first.")
    ] = None,
    without: Without = None,
    limit: Limit = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw scores by blur, or a prior's loss by place, as PNG.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of a dVAE: its worst reconstructions, as PNG.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="Of a prior: judge on all pairs, not on those held out alone.")
    ] = False,
    batch_size: BatchSize = 64,
    workers: Workers = 2,
    device: Device = "auto",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Score pictures against real ones, or a dVAE or a prior on data."""
    from dalle_cli import console
    from dalle_cli.artifacts.text import check_ours, json_fact, write_text
    from dalle_cli.errors import DalleError
    from dalle_cli.evaluation.images import Settings
    from dalle_cli.paths import given_or_piped

    given = inputs or [str(given_or_piped(None))]
    weights = weights_of(given[0])
    special: dict[str, Any] = {"reference": reference, "features": features, "blur": blur != "0", "scores": scores}
    special |= {"size": size, "candidates": candidates, "plot": plot, "sheet": sheet, "everything": everything}
    check_taken("images" if weights is None else weights.kind, special)
    machine = Machine(batch_size, workers, device, dtype)
    target = out or named_after(given[0])
    check_ours(target, "scores", lambda path: json_fact(path, "stage") == "evaluate", force)
    if weights is None:
        if len(given) > 1:
            raise DalleError(f"expected pictures alone, found {given[1]} after them; real ones go to --reference")
        settings = Settings(words(scores), seed, bootstrap, candidates, frozenset())
        settings.check()
        asked = Asked(reference, features, model, radii(blur), size, limit, without, plot)
        told = judge_pictures(given[0], target, settings, asked, machine, force)
    elif weights.kind == "weights.dvae":
        told = judge_dvae(weights, given, target, reference, machine, limit, without, sheet, features, force)
    else:
        told = judge_prior(weights, given, target, machine, limit, without, plot, everything, force)
    text = as_text(told)
    write_text(target, text)
    if as_json:
        console.emit(text.rstrip("\n"))
        return
    console.note(table(told))
    console.result(target)


def weights_of(first: str) -> "Artifact | None":
    """The weights to judge; None where the first input are pictures.

    Raises:
        DalleError: an artifact of another kind.
    """
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.errors import DalleError

    path = Path(first)
    if path.suffix != ".safetensors":
        return None
    found = open_artifact(path)
    if found.kind == "images":
        return None
    if found.kind not in ("weights.dvae", "weights.prior.codes"):
        wanted = "images, a data set, weights.dvae or weights.prior.codes"
        raise DalleError(f"expected {wanted}, found {found.kind}: {path}; give one of those")
    return found


def named_after(first: str) -> Path:
    """Where scores go without -o.

    Raises:
        DalleError: the input is no plain path.
    """
    from dalle_cli.errors import DalleError
    from dalle_cli.paths import beside

    if "://" in first or "{" in first:
        raise DalleError(f"expected -o, found none beside {first}; say where to write")
    return beside(Path(first), ".scores.json")


def check_taken(kind: str, special: dict[str, Any]) -> None:
    """Raises: DalleError for an option that was given and is not for what is judged."""
    from dalle_cli.errors import DalleError

    called, takes = TAKES[kind]
    for name, value in special.items():
        if value and name not in takes:
            raise DalleError(f"expected no --{name} for {called}, found it; leave it out")


def words(text: str) -> list[str]:
    """What stands between commas."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def radii(text: str) -> list[float]:
    """Radii of blur, each once.

    Raises:
        DalleError: something that is no number from 0 up.
    """
    import math

    from dalle_cli.errors import DalleError

    try:
        found = [float(word) for word in words(text)]
    except ValueError:
        found = []
    if not found or not all(math.isfinite(radius) and radius >= 0 for radius in found):
        raise DalleError(f"expected radii of blur such as 0,1,2, found {text!r}; mend --blur")
    return list(dict.fromkeys(found))


def judge_pictures(
    generated: str, out: Path, settings: "Settings", asked: Asked, machine: Machine, force: bool
) -> dict[str, Any]:
    """All scores of pictures against a reference."""
    import itertools
    from dataclasses import replace

    from dalle_cli.artifacts.container import replace_file
    from dalle_cli.data.exclude import leave_out
    from dalle_cli.devices import arithmetic
    from dalle_cli.errors import DalleError
    from dalle_cli.evaluation.cache import Pass
    from dalle_cli.evaluation.features import load_features
    from dalle_cli.evaluation.image_sets import GENERATED, REFERENCE, open_side
    from dalle_cli.evaluation.images import Comparison, score
    from dalle_cli.viz import charts
    from dalle_cli.viz import metric_charts as chart

    if asked.reference is None:
        raise DalleError("expected real pictures to compare with, found none; give --reference DATASET")
    if asked.plot is not None:
        charts.check(asked.plot, force)
        charts.check_drawable()
    where = arithmetic(machine.device, machine.dtype)
    sides = (open_side(GENERATED, generated, asked.limit), open_side(REFERENCE, asked.reference, asked.limit))
    gone = leave_out(asked.without, itertools.chain.from_iterable(one.pictures.ids for one in sides))
    side = asked.size or sides[0].size()
    if max(asked.radii) >= side:
        raise DalleError(f"expected radii of blur below {side} pixels, found {max(asked.radii):g}; mend --blur")
    network = load_features(asked.features, asked.model, where)
    clip = caption_judge(network, asked, settings, where)
    networks = [network] if clip is None or clip.name == network.name else [network, clip]
    folder = out.with_name(out.name.removesuffix(".json") + ".features")
    comparison = Comparison(
        sides, network, clip, Pass(folder, networks, asked.radii, side, where, machine.batch_size, machine.workers),
        replace(settings, without=gone),
    )  # fmt: skip
    scores, left_out = score(comparison)
    if asked.plot is not None:
        picture = chart.draw(chart.curves(scores), f"{Path(generated).name.partition('.')[0]}: scores by blur")
        replace_file(asked.plot, lambda part: charts.save(picture, part, asked.plot.suffix if asked.plot else ".png"))
    return {**facts(comparison, asked), "scores": scores, "left_out": left_out}


def caption_judge(network: Any, asked: Asked, settings: "Settings", where: "Arithmetic") -> "ClipFeatures | None":
    """The CLIP that pictures are held against captions with: that of -m, else that of --features; None without one."""
    from dalle_cli import console
    from dalle_cli.errors import DalleError
    from dalle_cli.evaluation.features import ClipFeatures
    from dalle_cli.hub import bundles as bundle

    if settings.scores and "clip" not in settings.scores:
        return None
    try:
        if asked.features is None or asked.model is None:
            found = network if isinstance(network, ClipFeatures) else None
        else:
            weights = bundle.weights(asked.model, "weights.clip")
            same = isinstance(network, ClipFeatures) and network.digest == weights.digest
            found = network if same else ClipFeatures(weights, where)
        if found is not None:
            bundle.tokenizer(found.weights)  # before a long pass over pictures
        return found
    except DalleError as error:
        if settings.scores:
            raise
        console.warn(f"no CLIP score: {error}")
        return None


def facts(c: "Comparison", asked: Asked) -> dict[str, Any]:
    """What was compared, by what, and with which settings: digests, no paths."""
    from dalle_cli.evaluation.features import title

    sides, s = c.sides, c.settings
    digests = {name: side.digest for name, side in sides.items()} | {"features": c.features.digest}
    digests |= {} if c.clip is None else {"clip": c.clip.digest}
    digests |= digest_of(asked.without)
    networks = {"name": c.features.name, "width": c.features.width, "classes": c.features.classes}
    return {
        "stage": "evaluate",
        "kind": "images",
        "called": title(c.features),
        "features": networks,
        "inputs": digests,
        "counts": {
            name: {
                "pictures": len(c.kept[name]),
                "without": c.dropped(name),
                "skipped": len(side.rows) - len(c.kept[name]) - c.dropped(name),
            }
            for name, side in sides.items()
        },
        "options": {"seed": s.seed, "bootstrap": s.replicates, "size": c.run.size, "dtype": c.run.machine.name},
    }


def judge_dvae(
    weights: "Artifact", given: list[str], out: Path, reference: str | None, machine: Machine, limit: int | None,
    without: Path | None, sheet: Path | None, features: str | None, force: bool,
) -> dict[str, Any]:  # fmt: skip
    """Scores of a dVAE's reconstructions of pictures."""
    from dalle_cli.commands import judging
    from dalle_cli.errors import DalleError
    from dalle_cli.evaluation.image_sets import open_pictures

    if len(given) > 1 or reference is None:
        found = f"{given[1]} after them" if len(given) > 1 else "none"
        raise DalleError(f"expected pictures for a dVAE to rebuild, found {found}; give --reference DATASET")
    pictures, digest = open_pictures(reference)
    told = judging.judge_dvae(
        weights, pictures, digest, out, batch_size=machine.batch_size, device=machine.device, dtype=machine.dtype,
        workers=machine.workers, limit=limit, sheet=sheet, force=force, features=features, without=without,
    )  # fmt: skip
    digests = {"model": weights.digest, "reference": digest, **digest_of(without)}
    return {"stage": "evaluate", "kind": weights.kind, "inputs": digests, "scores": told}


def judge_prior(
    weights: "Artifact", given: list[str], out: Path, machine: Machine, limit: int | None, without: Path | None,
    plot: Path | None, everything: bool, force: bool,
) -> dict[str, Any]:  # fmt: skip
    """Scores of a prior on captions and codes."""
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.commands import judging
    from dalle_cli.errors import DalleError

    if len(given) != 3:
        raise DalleError(f"expected a prior, captions and codes, found {', '.join(given)}; give PRIOR CAPTIONS CODES")
    captions, codes = map(Path, given[1:])
    told = judging.judge_prior(
        weights, captions, codes, out, batch_size=machine.batch_size, device=machine.device, dtype=machine.dtype,
        limit=limit, plot=plot, force=force, everything=everything, without=without,
    )  # fmt: skip
    digests = {
        "model": weights.digest,
        "captions": open_artifact(captions).digest,
        "codes": open_artifact(codes).digest,
        **digest_of(without),
    }
    return {"stage": "evaluate", "kind": weights.kind, "inputs": digests, "scores": told}


def digest_of(without: Path | None) -> dict[str, str]:
    """What the inputs say of a list of ids that were left out."""
    from dalle_cli.artifacts import digest_file

    return {} if without is None else {"without": digest_file(without)}


def as_text(told: dict[str, Any]) -> str:
    """Sorted JSON: the same scores are the same bytes.

    Raises:
        DalleError: a score is no number.
    """
    import json

    from dalle_cli.errors import DalleError

    try:
        return json.dumps(told, sort_keys=True, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    except ValueError:
        raise DalleError(
            "expected scores that are numbers, found NaN or infinity; give --dtype float32, or other weights"
        ) from None


def table(told: dict[str, Any]) -> str:
    """The scores as lines for a person."""
    from dalle_cli.evaluation.tables import picture_rows, plain_rows, rendered

    if told["kind"] != "images":
        return rendered(["score", "value"], plain_rows(told["scores"]))
    heads = [f"blur {scores['blur']:g}" for scores in told["scores"]]
    lines = rendered(["score", *heads], picture_rows(told["scores"]))
    return "\n".join([lines, *(f"{name}: left out, {reason}" for name, reason in sorted(told["left_out"].items()))])
