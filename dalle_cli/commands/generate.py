"""`dalle generate`: sample, decode, rerank and show as one command and one process, holding the best only."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dalle_cli.options import (
    Columns,
    Compile,
    Device,
    DrawBatch,
    DrawnOut,
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
    UpsamplerSteps,
)

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact
    from dalle_cli.commands.drawing import Candidate, Judge, Podium
    from dalle_cli.commands.generating import Way

SHOWN = 4  # pictures of a prompt, where nothing was said

Kept = Annotated[
    int | None,
    typer.Option(
        "--keep", min=0, metavar="N", help=f"Keep the best N per prompt; 0 keeps all. Left out: the best {SHOWN}."
    ),
]
Preview = Annotated[
    bool | None,
    typer.Option("--terminal/--no-terminal", help="Preview in the terminal, or not. Left out: if there is one."),
]
Latents = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="codes, as DALL-E, or embeddings, as DALL-E 2: which of the two to draw, and to make pictures of, where "
        "MODEL holds a prior over each; codes if left out.",
    ),
]
DecoderSteps = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Of embeddings: paint in so many steps; else in 20.")
]
DecoderSampler = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of embeddings: paint by ddpm, ddim, dpm++ (the default) or heun.")
]
DecoderGuidance = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        metavar="X",
        help="Of embeddings: classifier-free guidance in painting, to embedding and caption; 1 = off, the default.",
    ),
]
DecoderEta = Annotated[
    float | None,
    typer.Option(
        "--eta",
        min=0.0,
        max=1.0,
        metavar="X",
        help="Of --decoder-sampler ddim: noise added on the way; 0 is none, 1 as much as ddpm.",
    ),
]

EXAMPLE = """dalle generate "a tutu radish walking a dog" -o radish.png
dalle generate "a tutu radish walking a dog" -m model/ -n 64 --keep 8 -o radish.png
dalle generate "a tutu radish" -m model/ --latents embeddings -n 64 --keep 8 --decoder-guidance 2 -o radish.png"""


def run(
    ctx: typer.Context,
    prompts: Prompts = None,
    prompt_file: PromptFile = None,
    n: Samples = 8,
    out: DrawnOut = None,
    model: Model = None,
    latents: Latents = None,
    keep: Kept = None,
    images: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also keep the pictures as an artifact here.")
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    guidance: Guidance = None,
    guidance_from: GuidanceFrom = 0.0,
    guidance_to: GuidanceTo = 1.0,
    sketch_guidance: SketchGuidance = None,
    sampler: SamplerName = None,
    steps: SamplerSteps = None,
    decoder_sampler: DecoderSampler = None,
    decoder_steps: DecoderSteps = None,
    decoder_guidance: DecoderGuidance = None,
    eta: DecoderEta = None,
    upsampler_steps: UpsamplerSteps = None,
    seed: Seed = 0,
    image: PictureFile = None,
    keep_rows: KeepRows = None,
    mask: MaskFile = None,
    batch_size: DrawBatch = 64,
    int8: Int8 = False,
    compiled: Compile = False,
    columns: Columns = 0,
    terminal: Preview = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
) -> None:
    """Draw, decode, rerank and show pictures for a prompt, in one go."""
    from dalle_cli import console
    from dalle_cli.artifacts.container import check_replaceable
    from dalle_cli.commands import drawing, generating
    from dalle_cli.devices import arithmetic
    from dalle_cli.hub import bundles as bundle
    from dalle_cli.options import AUTO
    from dalle_cli.paths import after_prompt

    texts = drawing.read_prompts(prompts, prompt_file)
    rows = drawing.candidates(texts, n)
    keep = min(SHOWN, n) if keep is None else keep
    drawing.check_keep([row.text for row in rows], keep)
    target = out or after_prompt(texts, prompt_file, ".png")
    drawing.check_png(target, force)
    if images is not None:
        check_replaceable(images, "images", force)
    machine = arithmetic(device, dtype)
    way = generating.way(ctx, rows, machine)  # which takes all that is said of how to draw from the context
    clip = bundle.weights(model, "weights.clip")
    judge, podium = drawing.Judge(clip, machine), drawing.Podium(keep)
    options: dict[str, Any] = {"keep": keep, "dtype": machine.name, **way.options}
    stopped = False
    try:
        _fill(podium, way, rows, judge, {"batch": way.at_once} if batch_size == AUTO else {})
    except KeyboardInterrupt:
        if not podium.seen:
            raise
        stopped, options["seen"] = True, podium.seen
        console.warn(f"interrupted: these are the best of the first {podium.seen} of {len(rows)}")
    if images is not None:
        _write(images, podium, _history(way, options, clip), force)
    places = podium.places()
    shown, scores = [place.picture for place in places], [place.score for place in places]
    drawing.save_sheet(target, shown, [place.candidate.text for place in places], scores, columns, None, force)
    if os.isatty(2) if terminal is None else terminal:
        drawing.preview(shown, columns)
    if model is None:
        card = clip.path.parent / "README.md"
        console.note(f"drawn by {card.parent.name}, the model that comes with the package; what it knows: {card}")
    console.result(target, kept=len(places), of=podium.seen, best=podium.best(), of_picture=way.kept)
    if stopped:
        raise KeyboardInterrupt


def _fill(
    podium: "Podium", way: "Way", rows: "Sequence[Candidate]", judge: "Judge", figures: dict[str, object]
) -> None:
    """Draw, decode and score batch by batch; of each the podium holds the best, and the rest is dropped."""
    from dalle_cli import console

    began, parts, told, done = time.monotonic(), 0, 0, 0
    with console.progress("generate", len(rows), unit="candidates") as advance:

        def made(n: int) -> None:
            nonlocal parts, told
            parts += n
            new, told = parts // way.n_parts - told, parts // way.n_parts
            if os.isatty(2):  # a plain line tells of the rate by itself
                figures["per_second"] = parts / way.n_parts / max(time.monotonic() - began, 1e-9)
            advance(new, **figures)

        for pictures in way.pictures(made):
            own = rows[done : done + len(pictures)]
            podium.offer(own, judge.score(pictures, [row.text for row in own]), pictures)
            done += len(pictures)
            figures["best"] = podium.best()
            advance(0, **figures)


def _history(way: "Way", options: dict[str, Any], clip: "Artifact") -> list[dict[str, Any]]:
    """What led to the latents, and on to the pictures."""
    from dalle_cli.artifacts import history

    drawn, made = way.history(), history("generate", options, **way.inputs, clip=clip)
    return [*drawn, *(entry for entry in made if entry not in drawn)]


def _write(path: Path, podium: "Podium", made: list[dict[str, Any]], force: bool) -> None:
    """The pictures on the podium as an artifact."""
    import numpy as np

    from dalle_cli.artifacts import write_artifact

    places = podium.places()
    columns = {
        "images": np.stack([place.picture for place in places]),
        "score": np.array([place.score for place in places], dtype=np.float32),
        "ids": [place.candidate.id for place in places],
        "text": [place.candidate.text for place in places],
    }
    write_artifact(path, "images", columns, {}, made, force)
