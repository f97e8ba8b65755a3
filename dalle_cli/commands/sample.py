"""`dalle sample`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dalle_cli.options import (
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
    Model,
    PromptFile,
    Prompts,
    Samples,
    Seed,
    Temperature,
    TopK,
    TopP,
)

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact
    from dalle_cli.commands.drawing import Candidate

EXAMPLE = """export DALLE_MODEL=model/
dalle sample "a tutu radish walking a dog" -n 64 | dalle decode | dalle rerank --keep 8 | dalle show -o radish.png
dalle sample --from a-tutu-radish-walking-a-dog.codes.safetensors --rows 3,17 -o two.codes.safetensors"""


def run(
    ctx: typer.Context,
    prompts: Prompts = None,
    prompt_file: PromptFile = None,
    n: Samples = 16,
    out: DrawnOut = None,
    model: Model = None,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    guidance: Guidance = 1.0,
    guidance_from: GuidanceFrom = 0.0,
    guidance_to: GuidanceTo = 1.0,
    seed: Seed = 0,
    source: DrawnFrom = None,
    rows: DrawnRows = None,
    batch_size: DrawBatch = 64,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
) -> None:
    """Draw codes for a prompt from a prior."""
    from dalle_cli import bundle, console
    from dalle_cli.artifacts import write_artifact
    from dalle_cli.artifacts.container import check_replaceable
    from dalle_cli.commands import drawing
    from dalle_cli.config import build
    from dalle_cli.devices import arithmetic
    from dalle_cli.errors import DalleError
    from dalle_cli.paths import after_prompt, beside

    told: dict[str, Any] = {
        "n": n, "temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance, "seed": seed,
        "guidance_from": guidance_from, "guidance_to": guidance_to, "dtype": dtype,
    }  # fmt: skip
    past = None
    if source is not None:
        past = _open(ctx, source)
        told = {**_entry(past)["options"], **{name: value for name, value in told.items() if _is_given(ctx, name)}}
        told.pop("rows", None)
        wanted, target = _candidates(past, rows), out or beside(source, ".codes.safetensors")
    elif rows is not None:
        raise DalleError("expected --from beside --rows, found none; say of which codes these are the rows")
    else:
        texts = drawing.read_prompts(prompts, prompt_file)
        wanted, target = drawing.candidates(texts, n), out or after_prompt(texts, prompt_file, ".codes.safetensors")
    machine = arithmetic(device, str(told.pop("dtype", dtype)))
    weights = bundle.weights(model, "weights.prior.codes")
    if past is not None:
        bundle.check_digest("prior", weights.digest, _entry(past)["inputs"].get("model", ""), past.path)
    settings = build(drawing.Settings, told, "sample")
    check_replaceable(target, "codes", force)
    drawn = drawing.sample(drawing.Drawer(weights, wanted, settings, machine), batch_size, past, rows)
    write_artifact(target, "codes", drawn.tensors, drawn.config, drawn.history, force)
    console.result(target, prompts=len({row.prompt for row in wanted}), samples=len(wanted))


def _is_given(ctx: typer.Context, name: str) -> bool:
    return getattr(ctx.get_parameter_source(name), "name", "DEFAULT") == "COMMANDLINE"


def _open(ctx: typer.Context, source: Path) -> "Artifact":
    """The codes to draw again.

    Raises:
        DalleError: they were not drawn, or the command line says in another way, too, what to draw.
    """
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.errors import DalleError

    unfit = {"prompts": "a prompt", "prompt_file": "--prompts", "n": "-n"}
    if found := [said for name, said in unfit.items() if _is_given(ctx, name)]:
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
