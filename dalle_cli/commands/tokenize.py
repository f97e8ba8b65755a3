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
    from dataclasses import asdict

    from dalle_cli import config as recipes
    from dalle_cli import console
    from dalle_cli.artifacts import Artifact, ShardWriter, history
    from dalle_cli.commands.drawing_embeddings import TextEncoder
    from dalle_cli.data import tokenizer as tokenizers
    from dalle_cli.data.datasets import open_dataset
    from dalle_cli.data.filters import Filters
    from dalle_cli.data.tokenizer import TokenizerConfig
    from dalle_cli.devices import arithmetic
    from dalle_cli.hub import bundles as bundle
    from dalle_cli.paths import skip_list

    table = recipes.read(config, sets)
    (options,) = recipes.section(table, "tokenizer", TokenizerConfig)
    (filters,) = recipes.section(table, "data", Filters)
    bpe = tokenizers.load(tokenizer)
    data = open_dataset(dataset, need_captions=True, filters=filters)
    rows = [(i, text) for i, texts in enumerate(data.captions) for text in texts]
    header = {"n_vocab": bpe.vocab_size, "n_text": options.length, "tokenizer": bpe.digest}
    inputs: dict[str, Artifact | str] = {"dataset": data.digest, "tokenizer": bpe.digest}
    encoder = None
    if clip is not None:
        weights = bundle.weights(clip, "weights.clip")
        encoder = TextEncoder(weights, arithmetic(device, "float32"))
        header, inputs = {**header, "encoder": weights.digest}, {**inputs, "model": weights}
    made = history("tokenize", {"length": options.length, "data": asdict(filters)}, **inputs)
    writer = ShardWriter(out, "captions", len(rows), shard_size, header, made, force)
    n_cut = 0
    with console.progress("tokenize", len(rows), unit="captions") as advance:
        for shard in writer.missing():
            start, stop = writer.bounds(shard)
            texts = [text for _, text in rows[start:stop]]
            tokens, lengths, cut = bpe.encode_batch(texts, options.length)
            n_cut += cut
            ids = [data.ids[i] for i, _ in rows[start:stop]]
            more = {} if encoder is None else {"embeddings": encoder.embed(texts, batch_size)}
            writer.write(shard, {"tokens": tokens, "lengths": lengths, "ids": ids, "text": texts, **more})
            advance(stop - start)
    data.skipped.write(skip_list(out))
    cut_note = f"{n_cut} longer than {options.length} tokens" if n_cut else None
    found = len(rows) if writer.wrote else "all there already"
    console.result(out, captions=found, pictures=len(data), cut=cut_note, skipped=data.skipped.summary() or None)
