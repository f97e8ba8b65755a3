"""`dalle generate`: sample, decode, rerank and show as one command and one process, holding the best only."""

import os
import time
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
    Keep,
    KeepRows,
    MaskFile,
    Model,
    PictureFile,
    PromptFile,
    Prompts,
    Samples,
    Seed,
    Temperature,
    Terminal,
    TopK,
    TopP,
)

if TYPE_CHECKING:
    from dalle_cli.commands.drawing import Drawer, Judge, Podium
    from dalle_cli.models.dvae import DVAE

EXAMPLE = 'dalle generate "a tutu radish walking a dog" -m model/ -n 64 --keep 8 -o radish.png'


def run(
    prompts: Prompts = None,
    prompt_file: PromptFile = None,
    n: Samples = 16,
    out: DrawnOut = None,
    model: Model = None,
    keep: Keep = 0,
    images: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also keep the pictures as an artifact here.")
    ] = None,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    guidance: Guidance = 1.0,
    guidance_from: GuidanceFrom = 0.0,
    guidance_to: GuidanceTo = 1.0,
    seed: Seed = 0,
    image: PictureFile = None,
    keep_rows: KeepRows = None,
    mask: MaskFile = None,
    batch_size: DrawBatch = 64,
    int8: Int8 = False,
    compiled: Compile = False,
    columns: Columns = 0,
    terminal: Terminal = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
) -> None:
    """Draw, decode, rerank and show pictures for a prompt, in one go."""
    from dalle_cli import bundle, console
    from dalle_cli.artifacts import history
    from dalle_cli.artifacts.container import check_replaceable
    from dalle_cli.commands import drawing, picture_prompt
    from dalle_cli.devices import arithmetic
    from dalle_cli.paths import after_prompt

    texts, asked = drawing.read_prompts(prompts, prompt_file), picture_prompt.Asked(image, keep_rows, mask)
    rows = drawing.candidates(texts, n)
    drawing.check_keep([row.text for row in rows], keep)
    target = out or after_prompt(texts, prompt_file, ".png")
    drawing.check_png(target, force)
    if images is not None:
        check_replaceable(images, "images", force)
    settings = drawing.Settings(n, temperature, top_k, top_p, guidance, seed, guidance_from, guidance_to, int8)
    machine = arithmetic(device, dtype)
    prior, vae = bundle.weights(model, "weights.prior.codes"), bundle.weights(model, "weights.dvae")
    clip = bundle.weights(model, "weights.clip")
    dvae = drawing.decoder(vae, prior.fact("encoder", str), prior.path, machine)
    kept = picture_prompt.read(asked, vae, dvae, machine)
    drawer, judge = drawing.Drawer(prior, rows, settings, machine, compiled, kept), drawing.Judge(clip, machine)
    podium = drawing.Podium(keep)
    options: dict[str, Any] = {"keep": keep, "dtype": machine.name}
    stopped = False
    try:
        _fill(podium, drawer, dvae, judge, batch_size)
    except KeyboardInterrupt:
        if not podium.seen:
            raise
        stopped, options["seen"] = True, podium.seen
        console.warn(f"interrupted: these are the best of the first {podium.seen} of {len(rows)}")
    if images is not None:
        drawn, made = drawer.history(), history("generate", options, dvae=vae, clip=clip)
        _write(images, podium, [*drawn, *(entry for entry in made if entry not in drawn)], force)
    places = podium.places()
    shown, scores = [place.picture for place in places], [place.score for place in places]
    drawing.save_sheet(target, shown, [place.candidate.text for place in places], scores, columns, None, force)
    if terminal:
        drawing.preview(shown, columns)
    console.result(target, kept=len(places), of=podium.seen, best=podium.best(), of_picture=kept)
    if stopped:
        raise KeyboardInterrupt


def _fill(podium: "Podium", drawer: "Drawer", dvae: "DVAE", judge: "Judge", batch_size: int) -> None:
    """Draw, decode and score batch by batch; of each the podium holds the best, and the rest is dropped."""
    from dalle_cli import console
    from dalle_cli.commands import drawing
    from dalle_cli.options import AUTO

    rows, at_once = drawer.rows, drawer.fitting(batch_size)
    figures: dict[str, object] = {"batch": at_once} if batch_size == AUTO else {}
    began, codes, told = time.monotonic(), 0, 0
    with console.progress("generate", len(rows), unit="candidates") as advance:

        def drawn(n: int) -> None:
            nonlocal codes, told
            codes += n
            new, told = codes // drawer.n_codes - told, codes // drawer.n_codes
            if os.isatty(2):  # a plain line tells of the rate by itself
                figures["per_second"] = codes / drawer.n_codes / max(time.monotonic() - began, 1e-9)
            advance(new, **figures)

        done = 0
        for batch in drawer.batches(at_once, drawn):
            for at in range(0, len(batch), drawing.AT_ONCE):
                pictures = drawing.decode(dvae, batch[at : at + drawing.AT_ONCE], drawer.machine)
                own = rows[done : done + len(pictures)]
                podium.offer(own, judge.score(pictures, [row.text for row in own]), pictures)
                done += len(pictures)
            figures["best"] = podium.best()
            advance(0, **figures)


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
