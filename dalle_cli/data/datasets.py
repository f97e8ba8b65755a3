"""Open any kind of data set as an index of samples; images are read one at a time."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from dalle_cli.data import captions, files, images, manifest, webdataset
from dalle_cli.data.files import File
from dalle_cli.data.filters import Filters
from dalle_cli.data.samples import IndexOptions, Sample, id_of, is_image, unique
from dalle_cli.data.skips import BadSample, SkipLog
from dalle_cli.errors import DalleError

_KINDS = "a folder of images, a manifest (.jsonl .csv .tsv .parquet) or tars ({00000..00099}.tar)"


class Dataset:
    """Samples sorted by id; any thread may read images."""

    def __init__(self, samples: Sequence[Sample], filters: Filters, skipped: SkipLog) -> None:
        self._samples = samples
        self._filters = filters
        self.skipped = skipped
        self.ids: Sequence[str] = [sample.id for sample in samples]
        # One caption or several alternatives per sample; empty if the data set was opened without captions.
        self.captions: Sequence[tuple[str, ...]] = [sample.captions for sample in samples]

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, i: int) -> Image.Image:
        """Image i in mode RGB.

        Raises:
            BadSample: it cannot be used; the caller counts it.
        """
        sample = self._samples[i]
        try:
            data = files.read(sample.path, sample.offset, sample.size)
        except OSError as error:
            raise BadSample(f"unreadable: {error.strerror or error}") from None
        if 0 <= sample.size != len(data):
            raise BadSample(f"unreadable: {len(data)} of {sample.size} bytes")
        return images.decode(data, self._filters)

    def exclude(self, ids: frozenset[str]) -> "Dataset":
        """The data set without these ids."""
        return Dataset([s for s in self._samples if s.id not in ids], self._filters, self.skipped) if ids else self

    @property
    def digest(self) -> str:
        """SHA-256 in hex over (id, size in bytes, captions) of each sample; pixels are not read."""
        sha = hashlib.sha256()
        for sample in self._samples:
            line = json.dumps([sample.id, sample.size, *sample.captions], ensure_ascii=False)
            sha.update(line.encode() + b"\n")
        return sha.hexdigest()


def open_dataset(
    source: str | Path, *, need_captions: bool, filters: Filters | None = None, all_lines: bool = False
) -> Dataset:
    """Index a folder, a manifest, or WebDataset tars, local or at any fsspec URL.

    A folder with a `manifest.jsonl`, as `export` writes it, is always read through it, so that the ids are the same
    for every stage. Captions are read only if they are needed; with `all_lines` each line of a .txt is an alternative.

    Raises:
        DalleError: no such data set, or no sample in it that can be used.
    """
    source = str(source)
    options = IndexOptions(need_captions, all_lines, filters or Filters(), SkipLog())
    try:
        samples = unique(_index(source, options), options.skipped)
    except OSError as error:
        reason = " ".join(str(error.strerror or error).split())
        raise DalleError(f"expected to read {source}, found {reason}; check the path and your access") from None
    if not samples:
        wanted = "images with captions" if need_captions else "images"
        found = options.skipped.summary() or "none"
        raise DalleError(f"expected {wanted} in {source}, found {found}; give {_KINDS}")
    return Dataset(samples, options.filters, options.skipped)


def _index(source: str, options: IndexOptions) -> list[Sample]:
    suffix = os.path.splitext(source)[1].lower()
    what = files.kind(source)
    if what == "" and suffix == ".tar" and "{" in source:
        return webdataset.index(webdataset.expand(source), options)
    if what == "":
        raise DalleError(f"expected a data set, found no such file or folder: {source}; give {_KINDS}")
    if what == "folder":
        table = files.join(source, manifest.IN_FOLDER)
        return manifest.index(table, options) if files.kind(table) == "file" else _index_folder(source, options)
    if suffix == ".tar":
        return webdataset.index([source], options)
    if suffix in manifest.SUFFIXES:
        return manifest.index(source, options)
    raise DalleError(f"expected a data set, found the file {source}; give {_KINDS}")


def _index_folder(source: str, options: IndexOptions) -> list[Sample]:
    """The images among the files of a folder, else its tars; the caption of a.png is in a.txt."""
    found = files.listing(source, options.skipped.add)
    found_images = [f for f in found if is_image(f.name)]
    tars = [f.path for f in found if f.name.lower().endswith(".tar")]
    if tars and not found_images:
        return webdataset.index(tars, options)
    if not options.need_captions or not found_images:
        return [Sample(id_of(f.name), f.path, 0, f.size, ()) for f in found_images]
    texts = {os.path.splitext(f.name)[0]: f for f in found if f.name.lower().endswith(".txt")}
    if not texts:
        manifests = [f.name for f in found if f.name.lower().endswith(manifest.SUFFIXES)]
        remedy = f"give the manifest {manifests[0]} instead" if manifests else "write the caption of a.png to a.txt"
        raise DalleError(
            f"expected captions in .txt files beside the images of {source}, "
            f"found {len(found_images):,} images and no .txt; {remedy}"
        )
    with ThreadPoolExecutor(files.readers(source)) as pool:
        results = pool.map(
            lambda image: _beside(image, texts.get(os.path.splitext(image.name)[0]), options), found_images
        )
        return [sample for sample in results if sample]


def _beside(image: File, text: File | None, options: IndexOptions) -> Sample | None:
    sample_id = id_of(image.name)
    try:
        data = files.read(text.path, 0, captions.MAX_BYTES + 1) if text else b""
        return Sample(sample_id, image.path, 0, image.size, options.text(data))
    except BadSample as reason:
        options.skipped.add(sample_id, str(reason))
    except OSError as error:
        options.skipped.add(sample_id, f"unreadable caption: {error.strerror or error}")
    return None
