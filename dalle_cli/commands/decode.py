"""`dalle decode`."""

from dalle_cli.options import (
    BatchSize,
    DecoderOptions,
    DeviceOptions,
    Force,
    LatentsArg,
    Model,
    OptionalSeed,
    RowsOut,
    ShardSize,
)

EXAMPLE = """dalle decode radish.codes.safetensors -m dvae.safetensors -o radish.images.safetensors
dalle decode radish.embeddings.safetensors -m model/ --decoder-steps 50 --decoder-guidance 2"""


def run(
    latents: LatentsArg = None,
    out: RowsOut = None,
    model: Model = None,
    options: DecoderOptions = DecoderOptions(),
    seed: OptionalSeed = None,
    batch_size: BatchSize = 64,
    shard_size: ShardSize = 4096,
    machine: DeviceOptions = DeviceOptions(),
    force: Force = False,
) -> None:
    """Decode codes with a dVAE, or CLIP embeddings with a diffusion decoder, to images."""
    from dalle_cli import console, paths
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.pipelines import stages

    source = paths.given_or_piped(latents)
    target = out or paths.beside(source, ".images.safetensors")
    made = stages.decode(
        open_artifact(source, "codes", "embeddings"), model, target, machine=machine.open(), options=options,
        seed=seed, batch_size=batch_size, shard_size=shard_size, force=force, progress=console.progress,
    )  # fmt: skip
    console.result(target, **made)
