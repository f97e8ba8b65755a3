"""`dalle sample`."""

from dalle_cli.options import (
    BatchSize,
    Device,
    DrawnOut,
    Dtype,
    Force,
    Guidance,
    Model,
    PromptFile,
    Prompts,
    Samples,
    Seed,
    Temperature,
    TopK,
    TopP,
)

EXAMPLE = """export DALLE_MODEL=model/
dalle sample "a tutu radish walking a dog" -n 64 | dalle decode | dalle rerank --keep 8 | dalle show -o radish.png"""


def run(
    prompts: Prompts = None,
    prompt_file: PromptFile = None,
    n: Samples = 16,
    out: DrawnOut = None,
    model: Model = None,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    guidance: Guidance = 1.0,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
) -> None:
    """Draw codes for a prompt from a prior."""
    from dalle_cli import bundle, console
    from dalle_cli.artifacts import write_artifact
    from dalle_cli.artifacts.container import check_replaceable
    from dalle_cli.commands import drawing
    from dalle_cli.devices import arithmetic
    from dalle_cli.paths import after_prompt

    texts = drawing.read_prompts(prompts, prompt_file)
    machine = arithmetic(device, dtype)
    weights = bundle.weights(model, "weights.prior.codes")
    settings = drawing.Settings(n, temperature, top_k, top_p, guidance, seed, batch_size)
    target = out or after_prompt(texts, prompt_file, ".codes.safetensors")
    check_replaceable(target, "codes", force)
    drawn = drawing.sample(weights, texts, settings, machine)
    write_artifact(target, "codes", drawn.tensors, drawn.config, drawn.history, force)
    console.result(target, prompts=len(texts), samples=len(texts) * n)
