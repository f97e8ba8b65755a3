"""Training a tokenizer of captions."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dalle_cli import config as recipes
from dalle_cli.artifacts.container import replace_file
from dalle_cli.data import tokenizer as tokenizers
from dalle_cli.data.datasets import open_dataset
from dalle_cli.data.filters import Filters
from dalle_cli.data.tokenizer import TokenizerConfig


def train_tokenizer(
    dataset: str | Path,
    out: str | Path,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    sets: Iterable[str] = (),
    force: bool = False,
) -> dict[str, int]:
    """Train a byte-level BPE tokenizer on a data set's captions; its vocabulary, and how many captions there were.

    Raises:
        DalleError: a data set without captions, or another file than a tokenizer at `out`.
    """
    table, out = recipes.read(config, sets), Path(out)
    (options,), (filters,) = (
        recipes.section(table, name, cls) for name, cls in (("tokenizer", TokenizerConfig), ("data", Filters))
    )
    if out.exists() and not force:
        tokenizers.load(out)  # only a tokenizer is replaced
    data = open_dataset(str(dataset), need_captions=True, filters=filters)
    tokenizer = tokenizers.train((text for texts in data.captions for text in texts), options.vocab_size)
    replace_file(out, lambda part: part.write_bytes(tokenizer.data))
    return {"vocabulary": tokenizer.vocab_size, "captions": sum(map(len, data.captions))}
