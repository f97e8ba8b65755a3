"""`dalle sample`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dalle_cli.options import (
    Compile,
    Device,
    DrawBatch,
    DrawnFrom,
    DrawnOut,
    DrawnRows,
    Dtype,
    Force,
    Guidance,
    GuidanceFrom,
    GuidanceTo,
    Int8,
    KeepRows,
    MaskFile,
    Model,
    PictureFile,
    PromptFile,
    Prompts,
    SamplerName,
    SamplerSteps,
    Samples,
    Seed,
    SketchGuidance,
    Temperature,
    TopK,
    TopP,
    is_given,
    refuse,
)

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact
    from dalle_cli.commands.drawing import Candidate

PRIORS = ("weights.prior.codes", "weights.prior.embeddings")
EXAMPLE = """export DALLE_MODEL=model/
dalle sample "a tutu radish walking a dog" -n 64 | dalle decode | dalle rerank --keep 8 | dalle show -o radish.png
dalle sample --from a-tutu-radish-walking-a-dog.codes.safetensors --rows 3,17 -o two.codes.safetensors
dalle sample "the same cat as a sketch" --image cat.png --keep-rows 16 | dalle decode | dalle show -o sketch.png"""


def run(
    ctx: typer.Context,
    prompts: Prompts = None,
    prompt_file: PromptFile = None,
    n: Samples = 16,
    out: DrawnOut = None,
    model: Model = None,
    temperature: Temperature = None,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    guidance: Guidance = None,
    guidance_from: GuidanceFrom = 0.0,
    guidance_to: GuidanceTo = 1.0,
    sketch_guidance: SketchGuidance = None,
    sampler: SamplerName = None,
    steps: SamplerSteps = None,
    seed: Seed = 0,
    image: PictureFile = None,
    keep_rows: KeepRows = None,
    mask: MaskFile = None,
    source: DrawnFrom = None,
    rows: DrawnRows = None,
    batch_size: DrawBatch = 64,
    int8: Int8 = False,
    compiled: Compile = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
) -> None:
    """Draw codes, or CLIP embeddings, for a prompt from a prior."""
    from dalle_cli import console
    from dalle_cli.artifacts import write_artifact
    from dalle_cli.artifacts.container import check_replaceable
    from dalle_cli.commands import drawing, drawn_with, picture_prompt
    from dalle_cli.config import build
    from dalle_cli.devices import arithmetic
    from dalle_cli.errors import DalleError
    from dalle_cli.hub import bundles as bundle
    from dalle_cli.paths import after_prompt, beside

    told: dict[str, Any] = {
        "n": n, "temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance, "seed": seed,
        "guidance_from": guidance_from, "guidance_to": guidance_to, "sketch_guidance": sketch_guidance, "int8": int8,
        "dtype": dtype,
    }  # fmt: skip
    past, asked = None, picture_prompt.Asked(image, keep_rows, mask)
    if source is not None:
        past = _open(ctx, source)
        asked = picture_prompt.again(asked, _entry(past), source)
        told = {**_entry(past)["options"], **{name: value for name, value in told.items() if is_given(ctx, name)}}
        told = {name: value for name, value in told.items() if name not in ("rows", "keep_rows")}
        wanted, target = _candidates(past, rows), out or beside(source, ".codes.safetensors")
    elif rows is not None:
        raise DalleError("expected --from beside --rows, found none; say of which codes these are the rows")
    else:
        texts = drawing.read_prompts(prompts, prompt_file)
        if (found := bundle.weights(model, *PRIORS)).kind == "weights.prior.embeddings":
            name = out or after_prompt(texts, prompt_file, ".embeddings.safetensors")
            return _embeddings(ctx, found, drawing.candidates(texts, n), name, model)
        wanted, target = drawing.candidates(texts, n), out or after_prompt(texts, prompt_file, ".codes.safetensors")
    refuse(ctx, "a prior over codes", "sampler", "steps")
    machine = arithmetic(device, str(told.pop("dtype", dtype)))
    weights = bundle.weights(model, "weights.prior.codes")
    if past is not None:
        bundle.check_digest("prior", weights.digest, _entry(past)["inputs"].get("model", ""), past.path)
    told |= drawn_with.all_made_for(weights, told)
    settings = build(drawn_with.Settings, told, "sample")
    check_replaceable(target, "codes", force)
    kept = picture_prompt.of_bundle(asked, weights, model, machine)
    drawn = drawing.sample(drawing.Drawer(weights, wanted, settings, machine, compiled, kept), batch_size, past, rows)
    write_artifact(target, "codes", drawn.tensors, drawn.config, drawn.history, force)
    console.result(target, prompts=len({row.prompt for row in wanted}), samples=len(wanted), of_picture=kept)


def _embeddings(
    ctx: typer.Context, weights: "Artifact", wanted: "list[Candidate]", target: Path, model: str | None
) -> None:
    """Draw embeddings, by the options of the command line.

    Raises:
        DalleError: an option that is for codes.
    """
    from dalle_cli import console
    from dalle_cli.artifacts import write_artifact
    from dalle_cli.artifacts.container import check_replaceable
    from dalle_cli.commands import drawing_embeddings as drawing
    from dalle_cli.commands.drawn_with import made_for
    from dalle_cli.devices import arithmetic

    refuse(ctx, "a prior over embeddings", "image", "keep_rows", "mask", "int8", "compiled", "sketch_guidance")
    given = ctx.params
    names = ("n", "guidance", "seed", "guidance_from", "guidance_to", "sampler", "steps")
    told = {name: given[name] for name in names} | {"guidance": made_for(weights, "guidance", given["guidance"])}
    told |= {name: given[name] for name in ("temperature", "top_k", "top_p") if is_given(ctx, name)}
    settings = drawing.EmbeddingSettings(**told)
    check_replaceable(target, "embeddings", given["force"])
    machine = arithmetic(given["device"], given["dtype"])
    drawer = drawing.EmbeddingDrawer(weights, drawing.clip_of(weights, model), wanted, settings, machine)
    drawn = drawing.sample(drawer, given["batch_size"])
    write_artifact(target, "embeddings", drawn.tensors, drawn.config, drawn.history, given["force"])
    console.result(target, prompts=len(drawer.texts), samples=len(wanted))


def _open(ctx: typer.Context, source: Path) -> "Artifact":
    """The codes to draw again.

    Raises:
        DalleError: they were not drawn, or the command line says in another way, too, what to draw.
    """
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.errors import DalleError

    unfit = {"prompts": "a prompt", "prompt_file": "--prompts", "n": "-n"}
    if found := [said for name, said in unfit.items() if is_given(ctx, name)]:
        raise DalleError(f"expected --from alone to say what to draw, found {' and '.join(found)}; pick by --rows")
    past = open_artifact(source, "codes")
    if not all(name in past for name in ("prompt", "seed", "text")) or _entry(past).get("stage") != "sample":
        raise DalleError(f"expected codes that `sample` drew, found others in {source}; give --from another file")
    return past


def _entry(past: "Artifact") -> dict[str, Any]:
    """What the history says of the drawing."""
    return past.history[-1] if past.history else {}


def _candidates(past: "Artifact", rows: str | None) -> "list[Candidate]":
    """The candidates of these rows, counted from 0, or of all.

    Raises:
        DalleError: no such row, or one that tells of another drawing than the file's own.
    """
    import numpy as np

    from dalle_cli.commands.drawing import Candidate
    from dalle_cli.errors import DalleError

    try:
        picked = range(len(past)) if rows is None else [int(number) for number in rows.split(",")]
    except ValueError:
        raise DalleError(f"expected --rows as 3,17, found {rows!r}") from None
    if not picked or not 0 <= min(picked) <= max(picked) < len(past):
        raise DalleError(f"expected --rows from 0 to {len(past) - 1}, found {rows}; the file has {len(past)}")
    ids, text, seed = past.strings("ids"), past.strings("text"), _entry(past)["options"].get("seed")
    prompts, seeds = np.asarray(past.array("prompt")), np.asarray(past.array("seed"))
    found = []
    for row in picked:
        told = re.fullmatch(r"(\d{5,9})-(\d{5,9})", ids[row])
        if told is None or int(told[1]) != prompts[row] or seeds[row] != seed:
            raise DalleError(f"expected the row of one drawing, found {ids[row]!r} of seed {seeds[row]} in {past.path}")
        found.append(Candidate(text[row], int(told[1]), int(told[2])))
    return found
