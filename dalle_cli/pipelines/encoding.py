"""The stages that encode a data set: captions to tokens, images to codes or embeddings."""

import glob
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dalle_cli import config as recipes
from dalle_cli.artifacts import Artifact, ShardWriter, history
from dalle_cli.data import tokenizer as tokenizers
from dalle_cli.data.augment import by_name
from dalle_cli.data.datasets import Dataset, open_dataset
from dalle_cli.data.filters import Filters
from dalle_cli.data.loader import sequential
from dalle_cli.data.skips import SkipLog
from dalle_cli.data.tokenizer import TokenizerConfig
from dalle_cli.devices import Arithmetic, arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.paths import skip_list
from dalle_cli.pipelines.clip import ClipScorer
from dalle_cli.pipelines.codec import Codec
from dalle_cli.pipelines.prompts import Progress, Quiet

Metrics = dict[str, Any]


class OneProcess:
    """The one process of a job without a launcher; several are a `training.distributed.ProcessGroup`."""

    rank, world = 0, 1

    def first(self, action: Any) -> Any:
        """The result of an action in the first process."""
        return action()

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes."""
        return [value]

    def collect(self, skipped: SkipLog) -> None:
        """Merge the skipped samples of all processes."""


def open_encoder(weights: Artifact, machine: Arithmetic) -> Codec | ClipScorer:
    """The encoder of images: a dVAE (to codes) or a CLIP (to embeddings)."""
    return Codec(weights, machine) if weights.kind == "weights.dvae" else ClipScorer(weights, machine)


def filtered(dataset: str, table: Mapping[str, Any], need_captions: bool) -> tuple[Dataset, Filters]:
    """Open a data set with the filters of a recipe's section [data]."""
    (filters,) = recipes.section(table, "data", Filters)
    return open_dataset(dataset, need_captions=need_captions, filters=filters), filters


def tokenize(
    dataset: str, tokenizer: Path, out: Path, table: Mapping[str, Any] | None = None, *, clip: str | None = None,
    device: str = "auto", shard_size: int = 65536, batch_size: int = 256, force: bool = False,
    progress: Progress = Quiet,
) -> Metrics:  # fmt: skip
    """Write a data set's captions as tokens, with a CLIP also as embeddings: an artifact of kind `captions`.

    Raises:
        DalleError: no captions, a tokenizer that cannot be read, or something else at `out`.
    """
    table = table or {}
    (options,) = recipes.section(table, "tokenizer", TokenizerConfig)
    data, filters = filtered(dataset, table, need_captions=True)
    bpe = tokenizers.load(tokenizer)
    rows = [(i, text) for i, texts in enumerate(data.captions) for text in texts]
    header = {"n_vocab": bpe.vocab_size, "n_text": options.length, "tokenizer": bpe.digest}
    inputs: dict[str, Artifact | str] = {"dataset": data.digest, "tokenizer": bpe.digest}
    scorer = None
    if clip is not None:
        weights = bundles.weights(clip, "weights.clip")
        scorer = ClipScorer(weights, arithmetic(device, "float32"))
        header, inputs = {**header, "encoder": weights.digest}, {**inputs, "model": weights}
    made = history("tokenize", {"length": options.length, "data": asdict(filters)}, **inputs)
    writer = ShardWriter(out, "captions", len(rows), shard_size, header, made, force)
    n_cut = 0
    with progress("tokenize", len(rows), unit="captions") as advance:
        for shard in writer.missing():
            start, stop = writer.bounds(shard)
            texts = [text for _, text in rows[start:stop]]
            tokens, lengths, cut = bpe.encode_batch(texts, options.length)
            n_cut += cut
            ids = [data.ids[i] for i, _ in rows[start:stop]]
            more = {} if scorer is None else {"embeddings": scorer.encode_texts(texts, batch_size)}
            writer.write(shard, {"tokens": tokens, "lengths": lengths, "ids": ids, "text": texts, **more})
            advance(stop - start)
    data.skipped.write(skip_list(out))
    cut_note = f"{n_cut} longer than {options.length} tokens" if n_cut else None
    found = len(rows) if writer.wrote else "all there already"
    return {"captions": found, "images": len(data), "cut": cut_note, "skipped": data.skipped.summary() or None}


class Crops(NamedTuple):
    """How images are cropped: the augmentation, how often each image, and the seed."""

    augment: str = "center"
    repeats: int = 1
    seed: int = 0


def encode_images(
    dataset: str, model: str | None, out: Path, table: Mapping[str, Any] | None = None, *, machine: Arithmetic,
    crops: Crops = Crops(), shard_size: int = 8192, batch_size: int = 64, workers: int = 2, force: bool = False,
    group: Any = None, progress: Progress = Quiet,
) -> Metrics:  # fmt: skip
    """Write a data set's images as codes of a dVAE or embeddings of a CLIP, each process of `group` its shards.

    Raises:
        DalleError: no images, weights of another kind, or something else at `out`.
    """
    if crops.repeats > 1 and crops.augment == "center":
        raise DalleError(
            f"expected --augment prior, place or dvae with --repeats {crops.repeats}, found center; pick one"
        )
    group, crop = group or OneProcess(), by_name(crops.augment)
    data, filters = filtered(dataset, table or {}, need_captions=False)
    weights = bundles.weights(model, "weights.dvae", "weights.clip")
    encoder, rows = open_encoder(weights, machine), len(data) * crops.repeats
    options = {"data": asdict(filters), "augment": crops.augment, "repeats": crops.repeats, "dtype": machine.name}
    options |= {"seed": crops.seed} if crops.augment != "center" else {}
    made = history("encode-images", options, dataset=data.digest, model=weights)
    # `repeats` passes over the data, each with new crops
    writer = ShardWriter(out, encoder.kind, rows, shard_size, encoder.header, made, force)
    missing, written = group.first(lambda: missing_shards(writer, data.skipped)), 0
    first = group.rank == 0
    here = progress("encode-images", -(-rows // group.world), unit="images") if first else nullcontext(Quiet())
    with here as advance:
        for shard in missing[group.rank :: group.world]:
            latents, ids = [encoder.empty], []
            for numbers, draw in passes(*writer.bounds(shard), len(data)):
                batches = sequential(data, encoder.size, numbers, batch_size, workers, crop, crops.seed, draw)
                for kept, images in batches:
                    latents.append(encoder.encode(images))
                    ids += [data.ids[row] for row in kept]
                    advance(len(images))
            writer.write(shard, {encoder.kind: np.concatenate(latents), "ids": ids})
            data.skipped.write(skipped_by(out, group.rank))
            written += len(ids)
    written = sum(group.gathered(written))
    group.collect(data.skipped)
    if first:
        join_skip_lists(writer, data.skipped)
    count = written if missing else "all there already"
    return {"images": count, "skipped": data.skipped.summary() or None, "shards": writer.total}


def passes(start: int, stop: int, n: int) -> list[tuple[range, int]]:
    """Split rows `start` to `stop` of repeated passes over n samples: the rows within each pass, and its number."""
    numbers = range(start // n, -(-stop // n))
    return [(range(max(start - k * n, 0), min(stop - k * n, n)), k) for k in numbers]


def skipped_by(out: Path, rank: int) -> Path:
    """Where a process lists the samples it skipped; the first one's list is the merged one in the end."""
    return skip_list(out).with_suffix(f".{rank}.jsonl") if rank else skip_list(out)


def _other_lists(out: Path) -> list[Path]:
    """The existing lists of all processes but the first."""
    name = glob.escape(skipped_by(out, 0).stem)
    return [path for path in out.parent.glob(f"{name}.*.jsonl") if path.suffixes[-2][1:].isdecimal()]


def missing_shards(writer: ShardWriter, skipped: SkipLog) -> list[int]:
    """The shards still to write; samples skipped by earlier runs are loaded into `skipped`."""
    if any(map(writer.has, range(writer.total))):
        for path in (skipped_by(writer.out, 0), *_other_lists(writer.out)):
            skipped.load(path)
    return list(writer.missing())


def join_skip_lists(writer: ShardWriter, skipped: SkipLog) -> None:
    """Write the merged list and remove those of the other processes."""
    if others := _other_lists(writer.out):
        skipped.write(skipped_by(writer.out, 0))
    for path in others:
        path.unlink()
