"""A folder of pictures, with captions in .txt files beside them."""

import os
from concurrent.futures import ThreadPoolExecutor

from dalle_cli.data import captions, files
from dalle_cli.data.files import File
from dalle_cli.data.samples import Plan, Sample, id_of, is_picture
from dalle_cli.data.skips import BadSample
from dalle_cli.errors import DalleError

_REMOTE_READERS = 16  # a request to an object store waits some 50 ms, whoever waits


def index(source: str, found: list[File], plan: Plan) -> list[Sample]:
    """The pictures among the files of a folder; of a picture's caption file only the name counts, a.txt for a.png."""
    pictures = [f for f in found if is_picture(f.name)]
    if not plan.need_captions:
        return [Sample(id_of(f.name), f.path, 0, f.size, ()) for f in pictures]
    texts = {os.path.splitext(f.name)[0]: f for f in found if f.name.lower().endswith(".txt")}
    if not texts:
        raise DalleError(_no_captions(source, found, len(pictures)))
    paired = [(f, texts.get(os.path.splitext(f.name)[0])) for f in pictures]
    with ThreadPoolExecutor(_REMOTE_READERS if files.is_remote(source) else 1) as pool:
        results = pool.map(lambda pair: _sample(pair[0], pair[1], plan), paired)
        return [sample for sample in results if sample]


def _sample(picture: File, text: File | None, plan: Plan) -> Sample | None:
    sample_id = id_of(picture.name)
    try:
        data = files.read(text.path, 0, captions.MAX_BYTES + 1) if text else b""
        return Sample(sample_id, picture.path, 0, picture.size, plan.text(data))
    except BadSample as reason:
        plan.skipped.add(sample_id, str(reason))
    except OSError as error:
        plan.skipped.add(sample_id, f"unreadable caption: {error.strerror or error}")
    return None


def _no_captions(source: str, found: list[File], n_pictures: int) -> str:
    manifests = [f.name for f in found if f.name.lower().endswith((".jsonl", ".csv", ".tsv", ".parquet"))]
    remedy = f"give the manifest {manifests[0]} instead" if manifests else "write the caption of a.png to a.txt"
    found_here = f"{n_pictures:,} pictures and no .txt"
    return f"expected captions in .txt files beside the pictures of {source}, found {found_here}; {remedy}"
