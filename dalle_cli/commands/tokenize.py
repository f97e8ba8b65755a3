"""`dalle tokenize`."""

from dalle_cli.options import (
    BatchSize,
    ClipFile,
    DatasetArg,
    Device,
    Force,
    OutRows,
    Recipe,
    Sets,
    ShardSize,
    TokenizerFile,
)

EXAMPLE = """dalle tokenize photos/ -t tokenizer.json -o captions.safetensors
dalle tokenize photos/ -t tokenizer.json -m clip.safetensors -o captions.safetensors"""


def run(
    dataset: DatasetArg,
    tokenizer: TokenizerFile,
    out: OutRows,
    clip: ClipFile = None,
    config: Recipe = None,
    sets: Sets = [],
    shard_size: ShardSize = 65536,
    batch_size: BatchSize = 256,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Turn a data set's captions into tokens, and with a CLIP into embeddings, too."""
    from dalle_cli import config as recipes
    from dalle_cli import console
    from dalle_cli.pipelines import encoding

    made = encoding.tokenize(
        dataset, tokenizer, out, recipes.read(config, sets), clip=clip, device=device, shard_size=shard_size,
        batch_size=batch_size, force=force, progress=console.progress,
    )  # fmt: skip
    console.result(out, **made)
