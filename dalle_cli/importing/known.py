"""The publications that can be imported, each recognized by its files, and the import itself."""

import importlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dalle_cli.errors import DalleError
from dalle_cli.hub import transfer
from dalle_cli.importing import bundle
from dalle_cli.importing.publication import Importer, Publication
from dalle_cli.importing.source import CombinedSource, HubSource, OpenedSource, open_source, size_in_words

log = logging.getLogger("dalle_cli")

MODULES = ("karlo", "eclipse", "dalle_mini", "rudalle", "mindalle", "kandinsky", "openai_dvae", "clip")
BYTES_PER_MINUTE = 100e6 / 8 * 60  # of a connection of 100 Mbit/s
# SHA-256 of files as their publishers had them when their importers were written.
DIGESTS = {
    "kakaobrain/karlo-v1-alpha": {
        "prior/diffusion_pytorch_model.safetensors": "fe92c79eec57c71b5e64c4c026efd7caec1c06fa46235b9d9a8c803f0b3d6aa1",
        "decoder/diffusion_pytorch_model.safetensors": (
            "a000a47fbda5c308a374102b6874a27d89878bbb5bbb13fec9c1aaee813408c1"
        ),
        "text_proj/diffusion_pytorch_model.safetensors": (
            "5333857deea4078c7bbc5692ae57c31bfdf48a886731a4cb48ce3d865167f7f3"
        ),
    },
    "ECLIPSE-Community/ECLIPSE_Karlo_Prior": {
        "diffusion_pytorch_model.safetensors": "9e3e9b1a6788613d1890313e0d1b54969a5b3deefc7d8d0f8a2886cadaec5dcd",
    },
    "kuprel/min-dalle": {
        "encoder.pt": "76e7797b19625122e21138556e06b78cc84686ed5f5e5c42aa53c81ffb2f4bb8",
        "encoder_mini.pt": "158e1ff118b6e85c7b03577178758f94a24b6e1625e8f8ee6415fbde020b938b",
        "decoder_mini.pt": "f8343c2bf982cb60d463417facc4debeeaabc9f238a1f7115ac5bdf778ea3901",
    },
    "dalle-mini/dalle-mega": {
        "flax_model.msgpack": "35a6c84b02cff45f7257283dbc7f2e4c403950ef146d9f0c9f5e6b9848b9602c",
    },
    "dalle-mini/dalle-mini": {
        "flax_model.msgpack": "df70127fbf804aaec7b9eeb54bc123283405ea74e5047bede4986638a384951a",
    },
}


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
    if (known := recognize(source)) is None:
        names = ", ".join(importer.name for importer in importers())
        files = ", ".join(sorted(source.files)[:4]) or "no files"
        found = f"{files} in {source.name}"
        raise DalleError(f"expected the files of a known publication ({names}), found {found}; give one of these")
    return known


def import_bundle(
    where: str | OpenedSource,
    out: Path,
    *,
    dtype: str | None,
    clip: str | None,
    prior: str | None = None,
    progress: bundle.ByteProgress,
    force: bool = False,
) -> Path:
    """Import the publication at `where` as the bundle `out`, with the CLIP at `clip` if it goes with one.

    `prior` is the source of a prior that stands in the place of its own.

    Raises:
        DalleError: `where` is no known publication, or its files are not what its importer expects.
    """
    if dtype not in (None, *bundle.DTYPES):
        raise DalleError(f"expected --dtype {', '.join(bundle.DTYPES)}, found {dtype!r}; leave it out to keep theirs")
    bundle.check_free(out, force)
    with bundle.temporary(out) as folder:
        source = open_source(where, folder / "source") if isinstance(where, str) else where
        importer = importer_of(source)
        if importer.also and source.repository:
            others = [name for name in importer.also if name != source.repository]
            source = CombinedSource([source, *(HubSource(transfer.SCHEME + name) for name in others)])
        if prior is not None and not importer.prior:
            raise DalleError(f"expected no --prior for {importer.name}, found one; leave it out")
        found = [(source if prior is None else CombinedSource([source], importer.prior), importer)]
        if prior is not None:
            other = open_source(prior, folder / "prior")
            found.insert(0, (other, importer_of(other)))
        if ranker := _clip_source(source, importer, clip):
            other = open_source(ranker, folder / "clip")
            found.insert(0, (other, importer_of(other)))
        planned = [(source, _planned(source, own)) for source, own in _fetched(found)]
        if prior is not None:
            _check_prior(planned[-2][1], planned[-1][1])
        if ranker:
            _check_kind(planned[0][1], "weights.clip", "--clip")
            planned[0] = (planned[0][0], _with_header(planned[0][1], importer.clip_header))
        bundle.write(planned, folder / "bundle", dtype, progress)
        bundle.replace(folder / "bundle", out)
    return out


def _check_kind(made: Publication, kind: str, option: str) -> None:
    """Raises: DalleError unless a publication is one file of this kind."""
    if [part.kind for part in made.parts] != [kind]:
        raise DalleError(f"expected {kind} alone for {option}, found {made.name}; give another source")


def _check_prior(prior: Publication, model: Publication) -> None:
    """Raises: DalleError unless a publication is a prior over embeddings as wide as those of the model's decoder."""
    _check_kind(prior, "weights.prior.embeddings", "--prior")
    width = prior.parts[0].sizes.n_embedding
    for part in model.parts:
        if part.kind == "weights.decoder" and part.sizes.n_embedding != width:
            found = f"one over {width}; give a prior for {model.name}"
            raise DalleError(f"expected a prior over embeddings of {part.sizes.n_embedding} numbers, found {found}")


def _with_header(made: Publication, header: Mapping[str, Any]) -> Publication:
    return replace(made, parts=tuple(replace(part, header={**part.header, **header}) for part in made.parts))


def _clip_source(source: OpenedSource, importer: Importer, clip: str | None) -> str | None:
    if not importer.clip and clip is not None:
        raise DalleError(f"expected no --clip for {importer.name}, found one; leave it out")
    if importer.clip and clip is None and not source.repository:
        found = f"local files of {importer.name}, found none; give --clip, for example {importer.clip}"
        raise DalleError(f"expected --clip beside {found}")
    return clip or importer.clip or None


def _fetched(found: list[tuple[OpenedSource, Importer]]) -> list[tuple[OpenedSource, Importer]]:
    """The sources, with all files that are needed on this machine; how many bytes are ahead is said before."""
    needed = []
    for source, importer in found:
        with bundle.understood(f"the files of {importer.name}", source):
            needed.append((source, list(importer.files(source))))
    ahead = sum(source.files[name] for source, names in needed for name in source.missing(names))
    if ahead:
        minutes = ahead / BYTES_PER_MINUTE
        what = f"{found[-1][1].name}, {size_in_words(ahead)} to fetch"
        log.info("%s: %s (%.0f minutes at 100 Mbit/s); what has arrived is kept", found[-1][0].name, what, minutes)
    for source, names in needed:
        source.fetch(names)
        for name in names:
            known = DIGESTS.get(source.origin(name)[0], {}).get(name)
            if known and source.digest(name) != known:
                log.warning("%s of %s is another file than the one that was known (sha256)", name, source.name)
    return found


def _planned(source: OpenedSource, importer: Importer) -> Publication:
    with bundle.understood(f"the files of {importer.name}", source):
        planned = importer.plan(source)
    if planned.terms:
        log.warning("%s: license %s. %s", planned.name, planned.license, planned.terms)
    return planned
