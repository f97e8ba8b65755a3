"""`dalle rerank`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dalle_cli.options import BatchSize, Device, Dtype, Force, ImagesArg, Keep, Model, Out

if TYPE_CHECKING:
    from collections.abc import Callable

    from dalle_cli.artifacts import Artifact
    from dalle_cli.devices import Arithmetic

EXAMPLE = """dalle rerank radish.images.safetensors -m clip.safetensors --keep 8
dalle rerank radish.images.safetensors -m model/ --by prior --keep 8"""


def run(
    images: ImagesArg = None,
    out: Out = None,
    model: Model = None,
    keep: Keep = 0,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Score against this instead of each picture's own text.")
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="clip: cosine of picture and caption. prior or contrast: what `score` says; MODEL must then hold a "
            "prior and its dVAE.",
        ),
    ] = "clip",
    codes: Annotated[
        Path | None,
        typer.Option(
            metavar="CODES",
            help="With --by prior or contrast: what the pictures were decoded from, scored as they are. Else pictures "
            "are encoded again, which seldom gives back the codes that were drawn.",
        ),
    ] = None,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
) -> None:
    """Score pictures against their prompts, by CLIP or by a prior, and keep the best."""
    import numpy as np

    from dalle_cli import console
    from dalle_cli.artifacts import history, open_artifact, write_artifact
    from dalle_cli.artifacts.container import check_replaceable
    from dalle_cli.commands import drawing, scoring
    from dalle_cli.devices import arithmetic
    from dalle_cli.errors import DalleError
    from dalle_cli.paths import beside, given_or_piped

    scoring.check_by(by, "clip")
    if codes is not None and by == "clip":
        raise DalleError("expected --by prior or contrast beside --codes, found clip; leave --codes out")
    source = given_or_piped(images)
    pictures = open_artifact(source, "images")
    if prompt is None and "text" not in pictures:
        raise DalleError(f"expected images with their prompts, found none in {source}; give --prompt")
    if not len(pictures):
        raise DalleError(f"expected images to rank, found none in {source}")
    texts = [prompt] * len(pictures) if prompt is not None else list(pictures.strings("text"))
    drawing.check_keep(texts, keep)
    target = out or beside(source, ".best.safetensors")
    check_replaceable(target, "images", force)
    machine = arithmetic(device, dtype)
    ranked, score, inputs = judge(by, model, machine, pictures, codes)
    ids = pictures.strings("ids")
    scores = np.empty(len(pictures), dtype=np.float32)
    with console.progress("rerank", len(pictures), unit="pictures") as advance:
        for at in range(0, len(pictures), batch_size):
            rows = slice(at, at + batch_size)
            scores[rows] = score(ranked[rows], texts[rows])
            advance(len(scores[rows]))
    order = drawing.best(scores, texts, keep)
    columns = {
        "images": np.asarray(pictures.array("images")[order]),
        "score": scores[order],
        "ids": [ids[int(row)] for row in order],
        "text": [texts[int(row)] for row in order],
    }
    options = {"keep": keep, "prompt": prompt, "dtype": machine.name} | ({} if by == "clip" else {"by": by})
    made = history("rerank", options, images=pictures, **inputs)
    write_artifact(target, "images", columns, {}, made, force)
    console.result(target, kept=len(order), of=len(pictures), best=float(scores.max()), mean=float(scores.mean()))


def judge(
    by: str, model: str | None, machine: "Arithmetic", pictures: "Artifact", codes: Path | None
) -> "tuple[Any, Callable[[Any, list[str]], Any], dict[str, Artifact | str]]":
    """The column that is scored, what scores B rows of it against B captions, (B,) float32, and a history's inputs."""
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.commands import drawing, scoring
    from dalle_cli.hub import bundles as bundle

    if by == "clip":
        clip = bundle.weights(model, "weights.clip")
        return pictures.array("images"), drawing.Judge(clip, machine).score, {"model": clip}
    scorer = scoring.Scorer(model, machine, by, pictures=codes is None)
    if codes is None:
        return pictures.array("images"), scorer.pictures, scorer.inputs
    latents = open_artifact(codes, "codes")
    scorer.check(latents)
    return own_codes(latents, pictures), scorer.codes, {"codes": latents, **scorer.inputs}


def own_codes(codes: "Artifact", pictures: "Artifact") -> Any:
    """The codes of each picture, by id: (N, W, W).

    Raises:
        DalleError: the pictures were decoded from others, or an id is that of several codes.
    """
    import numpy as np

    from dalle_cli.errors import DalleError

    of = {name: row for row, name in enumerate(codes.strings("ids"))}
    made = any(e["stage"] == "decode" and e["inputs"].get("codes") == codes.digest for e in pictures.history)
    if not made or not set(pictures.strings("ids")) <= of.keys():
        raise DalleError(f"expected the codes that {pictures.path} was decoded from, found others: {codes.path}")
    if len(of) < len(codes):
        raise DalleError(f"expected codes of an id each, found ids that occur twice in {codes.path}; leave --codes out")
    return codes.array("codes")[np.array([of[name] for name in pictures.strings("ids")])]
