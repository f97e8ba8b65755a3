"""`dalle train-dvae`."""

from dalle_cli.options import DatasetArg, OutFile, Workers
from dalle_cli.training.options import TrainingOptions

EXAMPLE = "dalle train-dvae photos/ --config recipes/emoji/recipe.toml -o dvae.safetensors"


def run(dataset: DatasetArg, out: OutFile, options: TrainingOptions = TrainingOptions(), workers: Workers = 2) -> None:
    """Train a discrete VAE: images to codes and back."""
    from dalle_cli import console, training

    console.result(out, **training.train_dvae(dataset, out, workers=workers, **vars(options)))
