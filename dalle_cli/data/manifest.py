"""A table of images and captions: .jsonl, .csv, .tsv or .parquet, with paths relative to the table.

Several rows of one image, as in COCO, are one sample with several captions.
"""

import csv
import io
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from dalle_cli.data import files
from dalle_cli.data.captions import NAMES, from_value
from dalle_cli.data.samples import IndexOptions, Sample, id_of
from dalle_cli.data.skips import BadSample
from dalle_cli.errors import DalleError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
IN_FOLDER = "manifest.jsonl"  # a folder with this table at its top, as `export` writes it, is read through it
IMAGE_NAMES = ("image", "file", "file_name", "path")

Row = dict[str, Any]


def index(source: str, options: IndexOptions) -> list[Sample]:
    """All rows whose image exists and, if captions are needed, whose caption can be used."""
    merged: dict[str, tuple[str, list[str]]] = {}  # id -> path of the image, captions
    for where, row in _rows(source, options):
        image = next((row[name] for name in IMAGE_NAMES if row.get(name)), None)
        sample_id = _id(row, image)
        try:
            if not isinstance(image, str):
                raise BadSample("no image in row")
            path = files.join(files.parent(source), image.replace("\0", ""))
            texts = from_value(next((row[n] for n in NAMES if row.get(n)), None)) if options.need_captions else ()
            known_path, known_texts = merged.setdefault(sample_id, (path, []))
            if known_path != path:
                raise BadSample(f"duplicate id: {image}")
            known_texts.extend(texts)
        except BadSample as reason:
            options.skipped.add(sample_id or where, str(reason))
    with ThreadPoolExecutor(files.readers(source)) as pool:
        found = pool.map(lambda item: _sample(item[0], item[1][0], item[1][1], options), merged.items())
        return [sample for sample in found if sample]


def _id(row: Row, image: object) -> str:
    """The id of a row: the `id` column, or the image's path without suffix; "" if it has neither."""
    if (given := row.get("id")) not in (None, ""):
        return " ".join(str(given).split())
    return id_of(image) if isinstance(image, str) else ""


def _sample(sample_id: str, path: str, texts: list[str], options: IndexOptions) -> Sample | None:
    try:
        passed = options.filters.captions(tuple(texts)) if options.need_captions else ()
        return Sample(sample_id, path, 0, files.size(path), passed)
    except BadSample as reason:
        options.skipped.add(sample_id, str(reason))
    except FileNotFoundError:
        options.skipped.add(sample_id, "missing")
    except (OSError, ValueError) as error:  # ValueError: an impossible path
        options.skipped.add(sample_id, f"unreadable: {error}")
    return None


def _rows(source: str, options: IndexOptions) -> Iterator[tuple[str, Row]]:
    """Yield ("line 12", row) for each row that can be parsed; count the others."""
    suffix = os.path.splitext(source)[1].lower()
    try:
        with files.open_binary(source) as file:
            if suffix == ".jsonl":
                yield from _json_rows(file, options)
            elif suffix == ".parquet":
                yield from _parquet_rows(file, source)
            else:
                yield from _csv_rows(file, source, options)
    except OSError as error:
        raise DalleError(f"expected to read {source}, found {error.strerror or error}; check the file") from None


def _json_rows(file: BinaryIO, options: IndexOptions) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            options.skipped.add(f"line {number}", "caption is not UTF-8")
            continue
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield f"line {number}", row
        else:
            options.skipped.add(f"line {number}", "malformed row")


def _csv_rows(file: BinaryIO, source: str, options: IndexOptions) -> Iterator[tuple[str, Row]]:
    # Bytes that are not UTF-8 become lone surrogates, which captions.clean refuses: one bad row costs one row.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    lines = (line.replace("\0", "") for line in text)
    reader = csv.reader(lines, "excel-tab" if source.lower().endswith(".tsv") else "excel")
    header: list[str] | None = None
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error:
            options.skipped.add(f"line {reader.line_num}", "malformed row")
            continue
        if header is None:
            header = [name.strip().lower() for name in values]
            _check_columns(source, header)
        elif any(values):
            yield f"line {reader.line_num}", dict(zip(header, values, strict=False))


def _parquet_rows(file: BinaryIO, source: str) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DalleError(
            f"expected pyarrow to read {source}, found it is not installed; run pip install 'dalle-cli[parquet]'"
        ) from None
    try:
        table = parquet.ParquetFile(file)
        columns = [name for name in table.schema_arrow.names if name.lower() in ("id", *IMAGE_NAMES, *NAMES)]
        _check_columns(source, [name.lower() for name in table.schema_arrow.names])
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in table.iter_batches(columns=columns))
        for number, row in enumerate(rows, 1):
            yield f"row {number}", {key.lower(): value for key, value in row.items()}
    except (ValueError, KeyError) as error:  # pyarrow.ArrowInvalid is a ValueError
        reason = " ".join(str(error).split())
        raise DalleError(f"expected a parquet file at {source}, found {reason}; write it again") from None


def _check_columns(source: str, header: list[str]) -> None:
    if not set(IMAGE_NAMES) & set(header):
        found = ", ".join(header[:8]).encode("utf-8", "replace").decode()
        wanted = "image (or file, file_name, path)"
        raise DalleError(f"expected a column {wanted} in {source}, found {found}; name the columns in the first line")
