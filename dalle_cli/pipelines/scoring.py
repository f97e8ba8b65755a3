"""Scores by a prior: log p(codes | caption), for `score` and `rerank`.

Shapes: B batch, T caption length, H W code grid, S side of the images in pixels.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.artifacts import Artifact, ShardWriter, history, open_artifact
from dalle_cli.artifacts.container import SHARDS
from dalle_cli.data.augment import center
from dalle_cli.data.datasets import open_dataset
from dalle_cli.data.loader import sequential
from dalle_cli.data.manifest import SUFFIXES
from dalle_cli.data.skips import SkipLog
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.models.bart import CodePrior
from dalle_cli.paths import skip_list
from dalle_cli.pipelines import loading
from dalle_cli.pipelines.codec import Codec, check_codes
from dalle_cli.pipelines.encoding import missing_shards
from dalle_cli.pipelines.prompts import Progress, Quiet

BY = ("prior", "contrast")
MAX_LOGITS = 1 << 25  # logits in memory at a time: 128 MiB of float32, about three pairs of the paper's model
log = logging.getLogger("dalle_cli")

Batch = tuple[Any, list[str], dict[str, Any]]  # codes (B, H, W), their captions, and the columns beside the scores


def nats(prior: CodePrior, tokens: Tensor, lengths: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """-ln p of each token and of each code: (B, T), (B,), (B, H, W) -> (B, T), (B, H*W) float64, on the CPU.

    It is 0 for a token that is not predicted. Logits are computed for a few pairs at a time, in float32 even under
    autocast.

    Raises:
        DalleError: the shapes are not the model's.
    """
    config = prior.config
    rows = max(1, MAX_LOGITS // (config.n_text * config.n_text_vocab + config.grid**2 * config.n_image_vocab))
    parts = zip(*(torch.split(x, rows) for x in (tokens, lengths, codes)), strict=True)
    text, image = (torch.cat(columns) for columns in zip(*(_nats(prior, *part) for part in parts), strict=True))
    return text, image


def _nats(prior: CodePrior, tokens: Tensor, lengths: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        text, image = prior(tokens, lengths, codes)
        first = tokens.shape[1] - text.shape[1]  # 1 for a prior that does not predict the first token
        text_nats = F.cross_entropy(text.flatten(0, 1), tokens[:, first:].flatten(), reduction="none")
        image_nats = F.cross_entropy(image.flatten(0, 1), codes.flatten(), reduction="none").view(len(codes), -1)
    text_nats = F.pad(text_nats.view(text.shape[:2]), (first, 0))
    return text_nats.cpu().double() * prior.predicted(lengths).cpu(), image_nats.cpu().double()


def token_mask(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Which positions hold a token rather than padding: (B, T), (B,) -> (B, T) bool."""
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]


class PriorScorer:
    """A prior over codes with its tokenizer and, to score images, its dVAE. `inputs` names the weights for a history.

    `by` is `prior`, log p(codes | caption), or `contrast`, that minus log p(codes | no caption).

    Raises:
        DalleError: another `by`, weights that are missing, or a dVAE that the prior was not trained with.
    """

    def __init__(self, model: str | None, machine: Arithmetic, by: str = "prior", images: bool = False):
        if by not in BY:
            raise DalleError(f"expected --by {' or '.join(BY)}, found {by!r}")
        self.weights, self.machine, self.by = bundles.weights(model, "weights.prior.codes"), machine, by
        self.encoder, self.warned = self.weights.require("encoder", str), False
        self.inputs: dict[str, Artifact | str] = {"prior": self.weights}
        if images:
            dvae = bundles.weights(model, "weights.dvae")
            self.codec = Codec.of(dvae, self.encoder, self.weights.path, machine)
            self.inputs["dvae"] = dvae
        self.tokenizer = loading.tokenizer(self.weights)
        self.prior = loading.prior(self.weights, machine.device, machine.dtype)

    def check(self, codes: Artifact) -> None:
        """Raises: DalleError if the codes are not of the prior's dVAE."""
        bundles.check_digest("image encoder", codes.require("encoder", str), self.encoder, self.weights.path)

    def encode(self, images: Any) -> Any:
        """Images (B, 3, h, w) uint8 of any size -> codes (B, H, W); cropped and resized as `encode-images` does."""
        rows = [Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))) for image in images]
        pixels = np.stack([center(image, self.codec.size) for image in rows])
        return self.codec.encode(pixels.transpose(0, 3, 1, 2).copy())

    def score_images(self, images: Any, texts: Sequence[str]) -> Any:
        """Score images by their codes: (B, 3, h, w) uint8, B captions -> (B,) float32."""
        return self.score_codes(self.encode(images), texts)

    def score_codes(self, codes: Any, texts: Sequence[str]) -> Any:
        """Score whole grids of codes, in nats: (B, H, W), B captions -> (B,) float32.

        Raises:
            DalleError: codes that are not of the prior's grid and vocabulary.
        """
        config, device = self.prior.config, self.machine.device
        grids = torch.from_numpy(check_codes(codes, config.n_image_vocab, config.grid)).to(device)
        unique, own = np.unique(np.array(texts, dtype=object), return_inverse=True)
        tokens, lengths, cut = self.tokenizer.encode_batch(unique.tolist(), config.n_text)
        if cut and not self.warned:
            self.warned = True
            log.warning("captions longer than %d tokens are cut", config.n_text)
        text, length = (torch.from_numpy(x[own].astype(np.int64)).to(device) for x in (tokens, lengths))
        with self.machine.autocast():
            score = -nats(self.prior, text, length, grids)[1].sum(1)
            if self.by == "contrast":
                score += nats(self.prior, text, torch.zeros_like(length), grids)[1].sum(1)
        return score.numpy().astype(np.float32)


class StoredRows:
    """The rows of an artifact of codes or images; all its columns are copied to the output."""

    def __init__(self, artifact: Artifact, prompt: str | None):
        if prompt is None and "text" not in artifact:
            found = f"none in {artifact.path}"
            raise DalleError(f"expected {artifact.kind} with their captions, found {found}; give --prompt")
        self.artifact, self.prompt = artifact, prompt
        self.kind, self.encoded, self.skipped = artifact.kind, artifact.kind == "codes", SkipLog()
        self.inputs: dict[str, Artifact | str] = {artifact.kind: artifact}

    def __len__(self) -> int:
        return len(self.artifact)

    def header(self, scorer: PriorScorer) -> dict[str, Any]:
        """The artifact's header.

        Raises:
            DalleError: codes that are not of the prior's dVAE.
        """
        if self.encoded:
            scorer.check(self.artifact)
        return self.artifact.config

    def batches(self, rows: range, size: int, scorer: PriorScorer) -> Iterator[Batch]:
        """Batches of these rows; if there are none, one empty batch with the columns."""
        names = [name for name in self.artifact.headers[0].table.columns if name in self.artifact]
        for start in range(rows.start, max(rows.stop, rows.start + 1), size):
            part = slice(start, min(start + size, rows.stop))
            columns: dict[str, Any] = {name: np.asarray(self.artifact.array(name)[part]) for name in names}
            columns["ids"] = list(self.artifact.strings("ids")[part])
            codes = columns["codes"] if self.encoded or not len(columns["ids"]) else scorer.encode(columns["images"])
            own = [self.prompt] * len(codes) if self.prompt is not None else self.artifact.strings("text")[part]
            yield codes, list(own), columns


class DatasetRows:
    """The images of a data set, each with its first caption; their codes are written to the output."""

    kind, encoded = "codes", False

    def __init__(self, source: str, prompt: str | None, workers: int):
        self.data, self.prompt, self.workers = open_dataset(source, need_captions=prompt is None), prompt, workers
        self.inputs: dict[str, Artifact | str] = {"dataset": self.data.digest}
        self.skipped = self.data.skipped

    def __len__(self) -> int:
        return len(self.data)

    def header(self, scorer: PriorScorer) -> dict[str, Any]:
        """The header of the dVAE's codes."""
        return scorer.codec.header

    def batches(self, rows: range, size: int, scorer: PriorScorer) -> Iterator[Batch]:
        """Batches of the readable images, after an empty batch with the columns."""
        yield scorer.codec.empty, [], {"codes": scorer.codec.empty, "ids": []}
        for kept, images in sequential(self.data, scorer.codec.size, rows, size, self.workers):
            codes, numbers = scorer.codec.encode(images), kept.tolist()
            texts = [self.data.captions[row][0] if self.prompt is None else self.prompt for row in numbers]
            yield codes, texts, {"codes": codes, "ids": [self.data.ids[row] for row in numbers]}


def open_rows(source: str, prompt: str | None = None, workers: int = 0) -> StoredRows | DatasetRows:
    """Open the rows of an artifact of codes or images, or of a data set.

    Raises:
        DalleError: neither of them, or neither captions nor a prompt.
    """
    path = Path(source)
    plain = path.is_file() and path.suffix.lower() not in (".tar", *SUFFIXES)
    if plain or path.suffix == ".safetensors" or (path.is_dir() and any(path.glob(SHARDS))):
        return StoredRows(open_artifact(path, "codes", "images"), prompt)
    return DatasetRows(source, prompt, workers)


def score(
    source: str, model: str | None, out: Path, *, machine: Arithmetic, by: str = "prior", prompt: str | None = None,
    batch_size: int = 16, shard_size: int = 4096, workers: int = 0, force: bool = False, progress: Progress = Quiet,
) -> dict[str, Any]:  # fmt: skip
    """Write codes, images or a data set's codes with an added column `score`, shard by shard; returns a summary.

    Raises:
        DalleError: codes of another dVAE, no captions, or something else at `out`.
    """
    rows = open_rows(source, prompt, workers)
    scorer = PriorScorer(model, machine, by, images=not rows.encoded)
    header = rows.header(scorer)
    options = {"by": by, "prompt": prompt, "dtype": machine.name}
    made = history("score", options, **rows.inputs, **scorer.inputs)
    writer = ShardWriter(out, rows.kind, len(rows), shard_size, header, made, force)
    with progress("score", len(rows), unit="images") as advance:
        for shard in missing_shards(writer, rows.skipped):
            parts = []
            for codes, texts, columns in rows.batches(range(*writer.bounds(shard)), batch_size, scorer):
                scores = scorer.score_codes(codes, texts) if texts else np.zeros(0, np.float32)
                parts.append({**columns, "score": scores, "text": texts})
                advance(len(texts))
            writer.write(shard, _join(parts))
            rows.skipped.write(skip_list(out))
    return {**summary(open_artifact(out, rows.kind), scorer), "skipped": rows.skipped.summary() or None}


def _join(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The columns of several batches as one."""
    joined: dict[str, Any] = {}
    for name, first in parts[0].items():
        columns = [part[name] for part in parts]
        joined[name] = [x for column in columns for x in column] if isinstance(first, list) else np.concatenate(columns)
    return joined


def summary(scored: Artifact, scorer: PriorScorer) -> dict[str, Any]:
    """Summary of scores in nats per grid: number of rows, codes per row, mean, best, and the score of each row."""
    scores = np.asarray(scored.array("score")).astype(np.float64)
    listed = zip(scored.strings("ids"), scored.strings("text"), scores.tolist(), strict=True)
    return {
        "images": len(scores),
        "codes": scorer.prior.config.grid**2,
        "mean": float(scores.mean()) if len(scores) else None,
        "best": float(scores.max()) if len(scores) else None,
        "rows": [{"id": name, "text": text, "score": value} for name, text, value in listed],
    }
