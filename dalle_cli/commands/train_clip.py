"""`dalle train-clip`."""

from dalle_cli.options import DatasetArg, OutFile, TokenizerFile, Workers
from dalle_cli.training.options import TrainingOptions

EXAMPLE = "dalle train-clip photos/ -t tokenizer.json --config recipe.toml -o clip.safetensors"


def run(
    dataset: DatasetArg,
    tokenizer: TokenizerFile,
    out: OutFile,
    options: TrainingOptions = TrainingOptions(),
    workers: Workers = 2,
) -> None:
    """Train a CLIP, which scores how well an image fits a caption."""
    from dalle_cli import console, training

    console.result(out, **training.train_clip(dataset, tokenizer, out, workers=workers, **vars(options)))
