"""`dalle train-tokenizer`."""

from dalle_cli.options import DatasetArg, Force, OutFile, Recipe, Sets

EXAMPLE = "dalle train-tokenizer photos/ --set tokenizer.vocab_size=4096 -o tokenizer.json"


def run(dataset: DatasetArg, out: OutFile, config: Recipe = None, sets: Sets = [], force: Force = False) -> None:
    """Train a byte-level BPE tokenizer on a data set's captions."""
    from dalle_cli import config as recipes
    from dalle_cli import console
    from dalle_cli.artifacts.container import replace_file
    from dalle_cli.data import tokenizer as tokenizers
    from dalle_cli.data.datasets import open_dataset
    from dalle_cli.data.filters import Filters
    from dalle_cli.data.tokenizer import TokenizerConfig

    table = recipes.read(config, sets)
    (options,) = recipes.section(table, "tokenizer", TokenizerConfig)
    (filters,) = recipes.section(table, "data", Filters)
    if out.exists() and not force:
        tokenizers.load(out)  # only a tokenizer is replaced
    data = open_dataset(dataset, need_captions=True, filters=filters)
    tokenizer = tokenizers.train((text for texts in data.captions for text in texts), options.vocab_size)
    replace_file(out, lambda part: part.write_bytes(tokenizer.data))
    console.result(out, vocabulary=tokenizer.vocab_size, captions=sum(map(len, data.captions)))
