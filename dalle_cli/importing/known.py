"""The publications that can be imported, each recognized by its files."""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from dalle_cli.errors import DalleError
from dalle_cli.hub import transfer
from dalle_cli.importing import bundle
from dalle_cli.importing.publication import Importer, Publication
from dalle_cli.importing.source import OpenedSource, open_source

MODULES = ("karlo", "dalle_mini", "rudalle", "mindalle", "kandinsky", "openai_dvae", "clip")


def importers() -> Iterator[Importer]:
    """Every importer, in the order in which they are tried."""
    for name in MODULES:
        try:
            module = importlib.import_module(f"dalle_cli.importing.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"dalle_cli.importing.{name}":
                raise
            continue
        yield module.IMPORTER


def recognize(source: OpenedSource) -> Importer | None:
    """The importer of a source, or None if no publication has such files."""
    for importer in importers():
        with bundle.understood(f"the files of {importer.name}", source):
            if importer.recognize(source):
                return importer
    return None


def importer_of(source: OpenedSource) -> Importer:
    """The importer of a source.

    Raises:
        DalleError: no publication has such files.
    """
    if (found := recognize(source)) is None:
        names = ", ".join(importer.name for importer in importers())
        files = ", ".join(sorted(source.files)[:4]) or "no files"
        raise DalleError(f"expected the files of a known publication ({names}), found {files} in {source.name}")
    return found


def _planned(source: OpenedSource, importer: Importer) -> Publication:
    source.fetch(importer.files(source))
    with bundle.understood(f"the files of {importer.name}", source):
        return importer.plan(source)


def import_bundle(
    where: str, out: Path, *, dtype: str | None, clip: str | None, progress: bundle.Progress, force: bool
) -> Path:
    """Import the publication at `where` as the bundle `out`, with the CLIP at `clip` if it goes with one.

    Raises:
        DalleError: `where` is no known publication, or its files are not what its importer expects.
    """
    if dtype not in (None, *bundle.DTYPES):
        raise DalleError(f"expected --dtype {', '.join(bundle.DTYPES)}, found {dtype!r}; leave it out to keep theirs")
    bundle.check_free(out, force)
    source = open_source(where, out.absolute().with_name(f".{out.name}.unpacked"))
    importer = importer_of(source)
    planned: list[tuple[OpenedSource, Publication]] = []
    if importer.clip:
        if clip is None and not where.startswith(transfer.SCHEME):
            raise DalleError(
                f"expected --clip beside local files of {importer.name}, found none; its is {importer.clip}"
            )
        other = open_source(clip or importer.clip, out.absolute().with_name(f".{out.name}.unpacked-clip"))
        planned.append((other, _planned(other, importer_of(other))))
    elif clip is not None:
        raise DalleError(f"expected no --clip for {importer.name}, found one; leave it out")
    planned.append((source, _planned(source, importer)))
    return bundle.write(planned, out, dtype, progress, force)


def license_terms(planned: Sequence[Publication]) -> list[str]:
    """What the licenses forbid, one sentence each."""
    return [made.terms for made in planned if made.terms]
