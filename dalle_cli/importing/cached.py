"""`-m hf://owner/repo` of a publication: imported into a cache when it is first used, then a bundle like ours."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dalle_cli.artifacts.container import replace_file
from dalle_cli.errors import DalleError
from dalle_cli.hub import transfer
from dalle_cli.importing import known
from dalle_cli.importing.bundle import DTYPES
from dalle_cli.importing.source import HubSource, size_in_words

log = logging.getLogger("dalle_cli")

LAYOUT = 1  # of the bundles in the cache: another number when importers write something else
INTERVAL = 10.0  # seconds between messages


def cache() -> Path:
    """The folder of imported bundles: $DALLE_CACHE, else beside huggingface-hub's own cache."""
    from huggingface_hub import constants

    return Path(os.environ.get("DALLE_CACHE") or Path(constants.HF_HOME) / "dalle")


def bundle_of(model: str) -> Path | None:
    """The bundle of a publication on a hub, imported now if it is not in the cache; None if it is none.

    $DALLE_IMPORT_DTYPE is the dtype of its matrices; left out, they are as the publisher stores them.

    Raises:
        DalleError: no such repository, no access, no connection and not in the cache, or files that are not whole.
    """
    repository = transfer.parse(model)
    dtype = os.environ.get("DALLE_IMPORT_DTYPE") or None
    if dtype not in (None, *DTYPES):
        raise DalleError(f"expected DALLE_IMPORT_DTYPE {', '.join(DTYPES)}, found {dtype!r}; unset it to keep theirs")
    folder = cache() / repository.name.replace("/", "--")
    ref = folder / "refs" / repository.revision

    def bundle(commit: str) -> Path:
        return folder / f"{commit}-{dtype or 'stored'}-{LAYOUT}"

    if bundle(repository.revision).is_dir():  # a commit: nothing can have changed
        return bundle(repository.revision)
    before = bundle(ref.read_text().strip()) if ref.is_file() else None
    try:
        if transfer.holds_bundle(model):
            return None
        source = HubSource(model)
    except DalleError as error:
        if before is None or not before.is_dir():
            raise
        log.info("%s; using what was imported before (%s)", error, before.name[:7])
        return before
    out = bundle(source.revision)
    if not out.is_dir():
        if known.recognize(source) is None:
            return None
        log.info("%s: importing it into %s; this is done once", model, out)
        known.import_bundle(source, out, dtype=dtype, clip=None, progress=logged)
    with suppress(DalleError):  # a read-only cache is fine
        replace_file(ref, lambda part: part.write_text(source.revision))
    return out


@contextmanager
def logged(label: str, total: int, done: int = 0, unit: str = "") -> Iterator[Callable[..., Any]]:
    """Progress as a message every ten seconds: a library has no other way to speak."""
    began = last = time.monotonic()

    def advance(n: int = 1, /, **_: object) -> None:
        nonlocal done, last
        done += n
        if (now := time.monotonic()) - last >= INTERVAL:
            last = now
            rate = size_in_words(int(done / (now - began)))
            log.info("%s: %s of %s, %s/s", label, size_in_words(done), size_in_words(total), rate)

    yield advance
