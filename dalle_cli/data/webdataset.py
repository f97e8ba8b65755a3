"""WebDataset tars: one pass over the headers finds the range of each member; nothing is unpacked.

A sample's id is its key: a member's path up to the first dot of its base name. If several tars of a data set use the
same key, all its ids begin with the name of their tar: "00001/000123".
"""

import contextlib
import itertools
import json
import math
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from dalle_cli.data import captions, files
from dalle_cli.data.samples import IndexOptions, Sample, is_image
from dalle_cli.data.skips import BadSample
from dalle_cli.errors import DalleError

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_MAX_TARS = 1_000_000
_KEY = re.compile(r"(?:\./)*((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_BRACES = re.compile(r"\{([^{}]*)\}")


def expand(source: str) -> list[str]:
    """Expand "{00000..00099}.tar" or "{a,b}.tar" to paths; several braces give all combinations.

    Raises:
        DalleError: other braces, or more than a million tars.
    """
    parts = _BRACES.split(source)
    choices = [[part] if i % 2 == 0 else _choices(part, source) for i, part in enumerate(parts)]
    total = math.prod(map(len, choices))
    if total > _MAX_TARS:
        raise DalleError(f"expected at most {_MAX_TARS:,} tars, found {total:,} in {source}; correct the braces")
    return ["".join(combination) for combination in itertools.product(*choices)]


def _choices(inner: str, source: str) -> list[str]:
    if ends := re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inner):
        first, last = int(ends[1]), int(ends[2])
        if last - first >= _MAX_TARS:
            raise DalleError(f"expected at most {_MAX_TARS:,} tars, found {last - first + 1:,} in {source}; correct it")
        width = len(ends[1]) if ends[1].startswith("0") else 0
        if first <= last:
            return [f"{n:0{width}d}" for n in range(first, last + 1)]
    elif "," in inner:
        return inner.split(",")
    raise DalleError(f"expected braces like {{00000..00099}} or {{a,b}}, found {{{inner}}} in {source}; correct them")


def index(paths: list[str], options: IndexOptions) -> list[Sample]:
    """The samples of all tars, each with the range of its image."""
    per_tar = [_index_tar(path, options) for path in paths]
    keys = [sample.id for samples in per_tar for sample in {s.id: s for s in samples}.values()]
    if len(set(keys)) == len(keys):
        return list(itertools.chain.from_iterable(per_tar))
    return [s._replace(id=f"{_stem(s.path)}/{s.id}") for samples in per_tar for s in samples]


def _stem(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2].removesuffix(".tar")


def _index_tar(path: str, options: IndexOptions) -> list[Sample]:
    images: list[Sample] = []
    texts: dict[tuple[str, str], bytes] = {}  # by key and suffix
    try:
        with files.open_binary(path) as file:
            for member in _members(file, path, options):
                if not member.isreg() or not (match := _KEY.fullmatch(member.name)):
                    continue
                key, suffix = match[1], match[2].lower()
                if is_image(f".{suffix}") and "." not in suffix:
                    images.append(Sample(key, path, member.offset_data, member.size, ()))
                elif options.need_captions and suffix in ("txt", "json"):
                    file.seek(member.offset_data)
                    texts.setdefault((key, suffix), file.read(min(member.size, captions.MAX_BYTES + 1)))
    except FileNotFoundError:
        raise DalleError(f"expected a tar at {path}, found no such file; check the path or the braces") from None
    except OSError as error:
        raise DalleError(f"expected to read {path}, found {error.strerror or error}; check the file") from None
    if not options.need_captions:
        return images
    return [sample for image in images if (sample := _captioned(image, texts, options))]


def _members(file: BinaryIO, path: str, options: IndexOptions) -> Iterator[tarfile.TarInfo]:
    """Yield the members whose data are complete; a tar that is truncated or broken is counted where it stops."""
    if file.read(6).startswith(_COMPRESSED):
        raise DalleError(f"expected a plain tar, found a compressed one at {path}; decompress it, images already are")
    end = file.seek(0, 2)
    file.seek(0)
    last = -1
    try:
        tar = tarfile.TarFile(fileobj=file, mode="r")
        while member := tar.next():
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            if member.offset <= last or member.offset_data + member.size > end:
                options.skipped.add(_stem(path) + ".tar", f"truncated tar: {member.name}")
                return
            last = member.offset
            yield member
        file.seek(tar.offset)
        if len(block := file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE or block.strip(b"\0"):
            options.skipped.add(_stem(path) + ".tar", "truncated tar: no end mark")
    except (tarfile.TarError, ValueError, EOFError) as error:  # ValueError: a malformed number in a header
        if last < 0:
            raise DalleError(f"expected a tar at {path}, found {error}; write or fetch it again") from None
        options.skipped.add(_stem(path) + ".tar", f"truncated tar: {error}")


def _captioned(image: Sample, texts: dict[tuple[str, str], bytes], options: IndexOptions) -> Sample | None:
    """Add the captions of the .txt, if there is one, else `caption` (or text, title) of the .json."""
    try:
        if (text := texts.get((image.id, "txt"))) is not None:
            return image._replace(captions=options.text(text))
        return image._replace(captions=options.value(_from_json(texts.get((image.id, "json")))))
    except BadSample as reason:
        options.skipped.add(image.id, str(reason))
        return None


def _from_json(data: bytes | None) -> object:
    if data is None:
        return None
    record = None
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(captions.decode(data))
    if not isinstance(record, dict):
        raise BadSample("caption is not JSON")
    return next((record[name] for name in captions.NAMES if record.get(name)), None)
