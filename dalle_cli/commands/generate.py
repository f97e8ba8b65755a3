"""`dalle generate`: sample, decode, rerank and show as one command and one process, holding the best only."""

import os
from typing import Annotated

import typer

from dalle_cli.options import (
    Compile,
    DecoderOptions,
    DeviceOptions,
    Force,
    GridOptions,
    InpaintingOptions,
    KeepImages,
    LatentsName,
    Model,
    PromptOptions,
    SampleBatch,
    SampledOut,
    Samples,
    SamplingOptions,
)

EXAMPLE = """dalle generate "a tutu radish walking a dog" -o radish.png
dalle generate "a tutu radish walking a dog" -m model/ -n 64 --keep 8 -o radish.png
dalle generate "a tutu radish" -m model/ --latents embeddings -n 64 --keep 8 --decoder-guidance 2 -o radish.png"""

Keep = Annotated[
    int | None,
    typer.Option(
        "--keep",
        min=0,
        metavar="N",
        help="Keep the best N per prompt; 0 keeps all. Left out: 4, or all where no CLIP ranks them.",
    ),
]


def run(
    prompt: PromptOptions = PromptOptions(),
    n: Samples = 8,
    out: SampledOut = None,
    model: Model = None,
    latents: LatentsName = None,
    keep: Keep = None,
    images: KeepImages = None,
    sampling: SamplingOptions = SamplingOptions(),
    decoder: DecoderOptions = DecoderOptions(),
    inpainting: InpaintingOptions = InpaintingOptions(),
    batch_size: SampleBatch = 64,
    compiled: Compile = False,
    grid: GridOptions = GridOptions(),
    machine: DeviceOptions = DeviceOptions(),
    force: Force = False,
) -> None:
    """Sample, decode, rerank and show images for a prompt, in one go."""
    from dalle_cli import console, paths
    from dalle_cli.pipelines import Pipeline, Settings, output, prompts, ranking

    texts = prompts.read_prompts(prompt.prompts, prompt.prompts_file)
    settings = Settings(n, keep, sampling, decoder, inpainting, batch_size, compiled)
    ranking.check_keep(texts * n, settings.n_keep)
    target = out or paths.after_prompt(texts, prompt.prompts_file, ".png")
    output.check_outputs(target, images, force)
    pipeline = Pipeline(model, latents=latents, machine=machine.open())
    made = pipeline.run(texts, settings, console.progress)
    best = made.top.ranked()
    if made.interrupted:
        console.warn(f"interrupted: these are the best of the first {made.top.seen} of {len(texts) * n}")
    if images is not None:
        output.write_ranked(images, best, made.history, force)
    shown, labels = [b.image for b in best], [b.candidate.text for b in best]
    scores = [b.score for b in best if b.score is not None] or None
    output.write_grid(target, shown, labels, scores, columns=grid.columns, force=force)
    if os.isatty(2) if grid.terminal is None else grid.terminal:
        console.note(output.terminal_preview(shown, grid.columns))
    if model is None:
        card = pipeline.path / "README.md"
        console.note(f"sampled from {pipeline.path.name}, the model that comes with the package; what it knows: {card}")
    console.result(target, kept=len(best), of=made.top.seen, best=made.top.best(), of_image=made.mask)
    if made.interrupted:
        raise KeyboardInterrupt
