"""`dalle sample`."""

from dataclasses import replace

from dalle_cli.errors import DalleError
from dalle_cli.options import (
    Compile,
    DeviceOptions,
    Force,
    InpaintingOptions,
    Model,
    OptionalSamples,
    PromptOptions,
    SampleBatch,
    SampledOut,
    SampleFrom,
    SampleRows,
    SamplingOptions,
)

EXAMPLE = """export DALLE_MODEL=model/
dalle sample "a tutu radish walking a dog" -n 64 | dalle decode | dalle rerank --keep 8 | dalle show -o radish.png
dalle sample --from a-tutu-radish-walking-a-dog.codes.safetensors --rows 3,17 -o two.codes.safetensors
dalle sample "the same cat as a sketch" --image cat.png --keep-rows 16 | dalle decode | dalle show -o sketch.png"""


def run(
    prompt: PromptOptions = PromptOptions(),
    n: OptionalSamples = None,
    out: SampledOut = None,
    model: Model = None,
    options: SamplingOptions = SamplingOptions(),
    inpainting: InpaintingOptions = InpaintingOptions(),
    source: SampleFrom = None,
    rows: SampleRows = None,
    batch_size: SampleBatch = 64,
    compiled: Compile = False,
    machine: DeviceOptions = DeviceOptions(dtype=None),
    force: Force = False,
) -> None:
    """Sample codes, or CLIP embeddings, for a prompt from a prior."""
    from dalle_cli import console, paths
    from dalle_cli.pipelines import prompts, stages

    past, dtype = None, machine.dtype
    if source is not None:
        given = {"a prompt": prompt.prompts, "--prompts": prompt.prompts_file, "-n": n}
        if found := [name for name, value in given.items() if value]:
            raise DalleError(
                f"expected --from alone to say what to sample, found {' and '.join(found)}; pick by --rows"
            )
        past, wanted, n, options, inpainting, recorded = stages.resample(source, rows, options, inpainting)
        dtype = dtype or recorded
        target = out or paths.beside(source, ".codes.safetensors")
    elif rows is not None:
        raise DalleError("expected --from beside --rows, found none; say of which codes these are the rows")
    else:
        texts, n = prompts.read_prompts(prompt.prompts, prompt.prompts_file), n or 16
        wanted, kind = prompts.candidates(texts, n), stages.latents_of(model)
        target = out or paths.after_prompt(texts, prompt.prompts_file, f".{kind}.safetensors")
    made = stages.sample(
        wanted, n, options, model, target, machine=replace(machine, dtype=dtype).open(),
        inpainting=inpainting, batch_size=batch_size, compiled=compiled, force=force, past=past, picked=rows,
        progress=console.progress,
    )  # fmt: skip
    console.result(target, **made)
