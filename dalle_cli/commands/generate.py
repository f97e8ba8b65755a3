"""`dalle generate`: sample, decode, rerank and show as one command and one process."""

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.options import (
    BatchSize,
    Columns,
    Device,
    DrawnOut,
    Dtype,
    Force,
    Guidance,
    Keep,
    Model,
    PromptFile,
    Prompts,
    Samples,
    Seed,
    Temperature,
    Terminal,
    TopK,
    TopP,
)

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
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    columns: Columns = 0,
    terminal: Terminal = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
) -> None:
    """Draw, decode, rerank and show pictures for a prompt, in one go."""
    import numpy as np

    from dalle_cli import bundle, console
    from dalle_cli.artifacts import history, write_artifact
    from dalle_cli.artifacts.container import check_replaceable
    from dalle_cli.commands import drawing
    from dalle_cli.devices import arithmetic
    from dalle_cli.paths import after_prompt

    texts = drawing.read_prompts(prompts, prompt_file)
    drawing.check_keep([t for t in texts for _ in range(n)], keep)
    target = out or after_prompt(texts, prompt_file, ".png")
    drawing.check_png(target, force)
    if images is not None:
        check_replaceable(images, "images", force)
    machine = arithmetic(device, dtype)
    prior, vae = bundle.weights(model, "weights.prior.codes"), bundle.weights(model, "weights.dvae")
    clip = bundle.weights(model, "weights.clip")
    dvae = drawing.decoder(vae, prior.fact("encoder", str), prior.path, machine)
    judge = drawing.Judge(clip, machine)
    settings = drawing.Settings(n, temperature, top_k, top_p, guidance, seed, batch_size)
    drawn = drawing.sample(prior, texts, settings, machine)
    codes, text, ids = (drawn.tensors[name] for name in ("codes", "text", "ids"))
    pixels, scores = [], []
    with console.progress("decode and rerank", len(codes), unit="pictures") as advance:
        for at in range(0, len(codes), batch_size):
            rows = slice(at, at + batch_size)
            pixels.append(drawing.decode(dvae, codes[rows], machine))
            scores.append(judge.score(pixels[-1], text[rows]))
            advance(len(pixels[-1]))
    score = np.concatenate(scores)
    order = drawing.best(score, text, keep)
    kept = {"images": np.concatenate(pixels)[order], "score": score[order]}
    kept |= {"ids": [ids[row] for row in order], "text": [text[row] for row in order]}
    if images is not None:
        made = history("generate", {"keep": keep, "dtype": machine.name}, dvae=vae, clip=clip)
        made = [*drawn.history, *(entry for entry in made if entry not in drawn.history)]
        write_artifact(images, "images", kept, {}, made, force)
    shown = list(kept["images"])
    drawing.save_sheet(target, shown, kept["text"], kept["score"].tolist(), columns, None, force)
    if terminal:
        drawing.preview(shown, columns)
    console.result(target, kept=len(order), of=len(codes), best=float(score.max()))
