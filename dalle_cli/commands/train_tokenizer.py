"""`dalle train-tokenizer`."""

from dalle_cli.options import DatasetArg, Force, OutFile, Recipe, Sets

EXAMPLE = "dalle train-tokenizer photos/ --set tokenizer.vocab_size=4096 -o tokenizer.json"


def run(dataset: DatasetArg, out: OutFile, config: Recipe = None, sets: Sets = [], force: Force = False) -> None:
    """Train a byte-level BPE tokenizer on a data set's captions."""
    from dalle_cli import console, training

    console.result(out, **training.train_tokenizer(dataset, out, config=config, sets=sets, force=force))
