"""A folder of images, with captions in .txt files beside them."""

import os
from concurrent.futures import ThreadPoolExecutor

from dalle_cli.data import captions, files
from dalle_cli.data.files import File
from dalle_cli.data.samples import IndexOptions, Sample, id_of, is_image
from dalle_cli.data.skips import BadSample
from dalle_cli.errors import DalleError


def index(source: str, found: list[File], options: IndexOptions) -> list[Sample]:
    """The images among the files of a folder; the caption of a.png is in a.txt.

    Raises:
        DalleError: captions are needed and there is no .txt file.
    """
    images = [f for f in found if is_image(f.name)]
    if not options.need_captions:
        return [Sample(id_of(f.name), f.path, 0, f.size, ()) for f in images]
    texts = {os.path.splitext(f.name)[0]: f for f in found if f.name.lower().endswith(".txt")}
    if not texts:
        manifests = [f.name for f in found if f.name.lower().endswith((".jsonl", ".csv", ".tsv", ".parquet"))]
        remedy = f"give the manifest {manifests[0]} instead" if manifests else "write the caption of a.png to a.txt"
        raise DalleError(
            f"expected captions in .txt files beside the images of {source}, "
            f"found {len(images):,} images and no .txt; {remedy}"
        )
    with ThreadPoolExecutor(files.readers(source)) as pool:
        results = pool.map(lambda image: _sample(image, texts.get(os.path.splitext(image.name)[0]), options), images)
        return [sample for sample in results if sample]


def _sample(image: File, text: File | None, options: IndexOptions) -> Sample | None:
    sample_id = id_of(image.name)
    try:
        data = files.read(text.path, 0, captions.MAX_BYTES + 1) if text else b""
        return Sample(sample_id, image.path, 0, image.size, options.text(data))
    except BadSample as reason:
        options.skipped.add(sample_id, str(reason))
    except OSError as error:
        options.skipped.add(sample_id, f"unreadable caption: {error.strerror or error}")
    return None
