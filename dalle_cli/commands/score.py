"""`dalle score`."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol

import typer

from dalle_cli.options import (
    BatchSize,
    Device,
    Dtype,
    Force,
    Json,
    Model,
    RowsOut,
    ShardSize,
    Workers,
)

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact, ShardWriter
    from dalle_cli.commands.scoring import Scorer
    from dalle_cli.data.skips import SkipLog

EXAMPLE = """dalle score radish.codes.safetensors -m model/
dalle score radish.images.safetensors -m model/ --prompt "a radish" --by contrast --json
dalle score photos/ -m model/ -o photos.scored.safetensors"""


def run(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="INPUT",
            help="Codes, which are scored as they are; images, or a data set with captions, which are encoded first. "
            "Read from the pipe if left out.",
        ),
    ] = None,
    out: RowsOut = None,
    model: Model = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Score against this instead of each picture's own text.")
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="prior: log p(codes | caption), in nats of the whole grid. contrast: how much more that is than "
            "without the caption, which is what guidance sharpens.",
        ),
    ] = "prior",
    batch_size: BatchSize = 16,
    shard_size: ShardSize = 4096,
    workers: Workers = 2,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Score codes or pictures by a prior: log p(codes | caption)."""
    from dalle_cli import console
    from dalle_cli.artifacts import ShardWriter, history, open_artifact
    from dalle_cli.commands import scoring
    from dalle_cli.devices import arithmetic
    from dalle_cli.paths import given_or_piped

    scoring.check_by(by)
    given = source if source is not None else str(given_or_piped(None))
    target = out or named_after(given)
    rows = opened(given, prompt, workers)
    machine = arithmetic(device, dtype)
    scorer = scoring.Scorer(model, machine, by, pictures=not rows.encoded)
    rows.check(scorer)
    options = {"by": by, "prompt": prompt, "dtype": machine.name}
    made = history("score", options, **rows.inputs, **scorer.inputs)
    writer = ShardWriter(target, rows.kind, len(rows), shard_size, rows.header(scorer), made, force)
    with console.progress("score", len(rows), unit="pictures") as advance:
        for shard in prepared(writer, rows.skipped):
            parts = []
            for lot in rows.lots(*writer.bounds(shard), batch_size, scorer):
                parts.append({**lot.columns, "score": scorer.codes(lot.codes, lot.texts), "text": lot.texts})
                advance(len(lot.texts))
            writer.write(shard, joined(parts, rows, scorer))
            keep_list(writer, rows.skipped)
    told = figures(open_artifact(target, rows.kind), scorer)
    if as_json:
        console.emit_json({"stage": "score", "by": by, **told})
        return
    console.result(target, **{name: told[name] for name in ("pictures", "mean", "best")}, skipped=said(rows.skipped))


class Lot(NamedTuple):
    """Codes (B, W, W) to be scored, their captions, and the columns that are written beside both."""

    codes: Any
    texts: list[str]
    columns: dict[str, Any]


class Scored(Protocol):
    """What is scored, row by row; `kind` is what is written, `encoded` says that these are codes already."""

    kind: str
    encoded: bool
    inputs: "dict[str, Artifact | str]"
    skipped: "SkipLog | None"

    def __len__(self) -> int: ...

    def check(self, scorer: "Scorer") -> None:
        """Raises: DalleError if these codes are not of the prior's encoder."""

    def header(self, scorer: "Scorer") -> dict[str, Any]:
        """The config of what is written."""

    def empty(self, scorer: "Scorer") -> dict[str, Any]:
        """The columns of no rows."""

    def lots(self, start: int, stop: int, batch_size: int, scorer: "Scorer") -> Iterator[Lot]:
        """The rows from `start` to `stop`, in order."""


class Stored:
    """The rows of an artifact of codes or of images; what is written is the same, and the score."""

    skipped: "SkipLog | None" = None

    def __init__(self, artifact: "Artifact", prompt: str | None):
        from dalle_cli.errors import DalleError

        if prompt is None and "text" not in artifact:
            found = f"none in {artifact.path}"
            raise DalleError(f"expected {artifact.kind} with their captions, found {found}; give --prompt")
        self.artifact, self.prompt = artifact, prompt
        self.kind, self.encoded = artifact.kind, artifact.kind == "codes"
        self.inputs: dict[str, Artifact | str] = {artifact.kind: artifact}

    def __len__(self) -> int:
        return len(self.artifact)

    def check(self, scorer: "Scorer") -> None:
        """Raises: DalleError if these codes are not of the prior's encoder."""
        if self.encoded:
            scorer.check(self.artifact)

    def header(self, scorer: "Scorer") -> dict[str, Any]:
        """The config of what is written."""
        return self.artifact.config

    def empty(self, scorer: "Scorer") -> dict[str, Any]:
        """The columns of no rows."""
        return self._columns(slice(0, 0))

    def lots(self, start: int, stop: int, batch_size: int, scorer: "Scorer") -> Iterator[Lot]:
        """The rows from `start` to `stop`, in order."""
        for at in range(start, stop, batch_size):
            here = slice(at, min(at + batch_size, stop))
            columns = self._columns(here)
            codes = columns["codes"] if self.encoded else scorer.encode(columns["images"])
            texts = [self.prompt] * (here.stop - at) if self.prompt is not None else self.artifact.strings("text")[here]
            yield Lot(codes, list(texts), columns)

    def _columns(self, rows: slice) -> dict[str, Any]:
        import numpy as np

        table = self.artifact.headers[0].table
        numbers = {name: np.asarray(self.artifact.array(name)[rows]) for name in table.columns if name in self.artifact}
        return {**numbers, "ids": list(self.artifact.strings("ids")[rows])}


class Read:
    """The pictures of a data set, of each the first caption; their codes are written with the score."""

    kind, encoded = "codes", False

    def __init__(self, source: str, prompt: str | None, workers: int):
        from dalle_cli.data.datasets import open_dataset

        self.data, self.prompt, self.workers = open_dataset(source, need_captions=prompt is None), prompt, workers
        self.inputs: dict[str, Artifact | str] = {"dataset": self.data.digest}
        self.skipped: SkipLog | None = self.data.skipped

    def __len__(self) -> int:
        return len(self.data)

    def check(self, scorer: "Scorer") -> None:
        """Nothing: what the dVAE is was checked when it was loaded."""

    def header(self, scorer: "Scorer") -> dict[str, Any]:
        """The config of what is written."""
        config = scorer.prior.config
        return {"n_vocab": config.n_image_vocab, "grid": config.grid, "encoder": scorer.encoder}

    def empty(self, scorer: "Scorer") -> dict[str, Any]:
        """The columns of no rows."""
        import numpy as np

        config = scorer.prior.config
        small = np.uint16 if config.n_image_vocab <= 2**16 else np.int32
        return {"codes": np.zeros((0, config.grid, config.grid), small), "ids": []}

    def lots(self, start: int, stop: int, batch_size: int, scorer: "Scorer") -> Iterator[Lot]:
        """The rows from `start` to `stop`, in order, but for those that cannot be read."""
        from dalle_cli.data.loader import sequential

        dtype = self.empty(scorer)["codes"].dtype
        rows = range(start, stop)
        for kept, images in sequential(self.data, scorer.dvae.config.image_size, rows, batch_size, self.workers):
            codes = scorer.encode(images)
            own = kept.tolist()
            texts = [self.data.captions[row][0] if self.prompt is None else self.prompt for row in own]
            yield Lot(codes, texts, {"codes": codes.astype(dtype), "ids": [self.data.ids[row] for row in own]})


def opened(source: str, prompt: str | None, workers: int) -> Scored:
    """What a path names: an artifact of codes or images, or a data set.

    Raises:
        DalleError: neither, or without captions where no prompt is given.
    """
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.artifacts.container import SHARDS
    from dalle_cli.data.manifest import SUFFIXES

    path = Path(source)
    plain = path.is_file() and path.suffix.lower() not in (".tar", *SUFFIXES)
    if plain or path.suffix == ".safetensors" or (path.is_dir() and any(path.glob(SHARDS))):
        return Stored(open_artifact(path, "codes", "images"), prompt)
    return Read(source, prompt, workers)


def named_after(source: str) -> Path:
    """Where scores go without -o.

    Raises:
        DalleError: the input is no plain path.
    """
    from dalle_cli.errors import DalleError
    from dalle_cli.paths import beside

    if "://" in source or "{" in source or not Path(source).name:
        raise DalleError(f"expected -o, found none beside {source}; say where to write")
    return beside(Path(source), ".scored.safetensors")


def prepared(writer: "ShardWriter", skipped: "SkipLog | None") -> list[int]:
    """The shards to write; what earlier runs skipped of a data set is known again."""
    from dalle_cli.commands.encode_images import prepare

    return list(writer.missing()) if skipped is None else prepare(writer, skipped)


def keep_list(writer: "ShardWriter", skipped: "SkipLog | None") -> None:
    """List beside the output what could not be read."""
    from dalle_cli.paths import skip_list

    if skipped is not None:
        skipped.write(skip_list(writer.out))


def said(skipped: "SkipLog | None") -> str | None:
    """How many samples of a data set could not be used; None where all could."""
    return (skipped.summary() or None) if skipped is not None else None


def joined(parts: list[dict[str, Any]], rows: Scored, scorer: "Scorer") -> dict[str, Any]:
    """The columns of several lots as one."""
    import numpy as np

    none: dict[str, Any] = {**rows.empty(scorer), "score": np.zeros(0, np.float32), "text": []}
    columns = {name: [lot[name] for lot in (none, *parts)] for name in none}
    return {
        name: list(chain.from_iterable(lots)) if isinstance(none[name], list) else np.concatenate(lots)
        for name, lots in columns.items()
    }


def figures(scored: "Artifact", scorer: "Scorer") -> dict[str, Any]:
    """What is told of the scores, in nats of a whole grid: how many, mean, best, mean of a code, and each."""
    import numpy as np

    scores = np.asarray(scored.array("score")).astype(np.float64)
    mean = float(scores.mean()) if len(scores) else None
    listed = zip(scored.strings("ids"), scored.strings("text"), scores.tolist(), strict=True)
    return {
        "pictures": len(scores),
        "codes": scorer.prior.config.grid**2,
        "mean": mean,
        "best": float(scores.max()) if len(scores) else None,
        "rows": [{"id": name, "text": text, "score": score} for name, text, score in listed],
    }
