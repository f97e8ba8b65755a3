"""Which withheld images are asked for, in which words, and what was sampled for them.

A list is a .txt of prompts, one a line, and a .json beside it that says what each is. Shapes: images are (H, W, 3)
uint8.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from prepare import SAID, STYLES

from dalle_cli.artifacts import history, open_artifact, write_artifact
from dalle_cli.errors import DalleError

Pixels = npt.NDArray[np.uint8]

AMONG = 100  # withheld concepts of a style that the right image is among
STRANGERS = 24  # prompts of the stranger's look
HANGUL = re.compile("[\uac00-\ud7a3]")
LANGUAGES = tuple(SAID)


@dataclass(frozen=True)
class Entry:
    """One image of a tar that prepare.py wrote; `key` is its name there."""

    key: str
    style: str
    base: str
    code: str
    label: str
    group: str
    split: str
    captions: tuple[str, ...]
    image: Pixels


@dataclass(frozen=True)
class Prompt:
    """What is asked for; without a `key` there is no true image."""

    prompt: str
    style: str | None = None
    base: str | None = None
    code: str | None = None
    label: str | None = None
    group: str | None = None
    key: str | None = None


@dataclass(frozen=True)
class PromptList:
    """A list of prompts; `among` are the keys of the true images of a style that the right one is sought among."""

    prompts: tuple[Prompt, ...]
    among: dict[str, list[str]]


def order(seed: int, *names: str) -> bytes:
    """Where something stands in an order that is a function of the seed and its name."""
    return hashlib.sha256(" ".join((str(seed), *names)).encode()).digest()


# Tars


def read_tar(path: Path) -> list[Entry]:
    """The images of a tar that prepare.py wrote, by key.

    Raises:
        DalleError: no such tar.
    """
    try:
        with tarfile.open(path) as tar:
            files = {m.name: stream.read() for m in tar if (stream := tar.extractfile(m)) is not None}
        names = sorted(name for name in files if name.endswith(".json"))
        entries = [_entry(name[:-5], json.loads(files[name]), files[name[:-5] + ".png"]) for name in names]
    except (OSError, tarfile.TarError, KeyError, TypeError, ValueError) as error:
        raise DalleError(f"expected a tar of prepare.py, found {error!r} in {path}; make data") from None
    if not entries:
        raise DalleError(f"expected a tar of prepare.py, found no image in {path}; make data")
    return entries


def _entry(key: str, row: dict[str, Any], png: bytes) -> Entry:
    facts = {name: row[name] for name in ("style", "base", "code", "label", "group", "split")}
    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return Entry(key, **facts, captions=tuple(row["caption"]), image=image)


def one_each(entries: Iterable[Entry], seed: int) -> list[Entry]:
    """One variant of each concept and style, chosen and put in order by the seed."""
    found: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        own = (entry.style, entry.base)
        if own not in found or order(seed, entry.key) < order(seed, found[own].key):
            found[own] = entry
    return sorted(found.values(), key=lambda e: order(seed, e.style, e.base))


def question(entry: Entry, language: str) -> str:
    """The caption that names style and concept in a whole phrase.

    Raises:
        DalleError: there is none in this language.
    """
    name = SAID[language][entry.style]
    for text in entry.captions:
        if name in text and bool(HANGUL.search(text)) == (language == "ko"):
            return text
    raise DalleError(f"expected a caption in {language} that names the style, found none of {entry.key}; make data")


# Lists


def withheld(test: Sequence[Entry], language: str, seed: int) -> PromptList:
    """Up to 100 concepts of each style that are withheld in this one alone, the same ones in every language.

    Where a style has fewer, the images to seek among are filled up with concepts withheld in every style.
    """
    prompts, among = [], {}
    for style in STYLES:
        own = one_each((e for e in test if e.style == style and e.split == "withheld-style"), seed)[:AMONG]
        more = one_each((e for e in test if e.style == style and e.split == "withheld-concept"), seed)
        among[style] = [e.key for e in [*own, *more][:AMONG]]
        prompts += [_asking(question(e, language), e) for e in own]
    return PromptList(tuple(prompts), among)


def _asking(text: str, e: Entry) -> Prompt:
    return Prompt(text, e.style, e.base, e.code, e.label, e.group, e.key)


def strangers(listed: PromptList, seed: int) -> PromptList:
    """Some of a list's prompts at random."""
    chosen = sorted(listed.prompts, key=lambda p: order(seed, "stranger", str(p.key)))[:STRANGERS]
    return PromptList(tuple(chosen), {})


def composed(texts: Sequence[str], test: Sequence[Entry]) -> PromptList:
    """Prompts as they were written down; those that are a withheld image's caption know their true image."""
    known = {text: e for e in test if e.split == "withheld-style" for text in e.captions if SAID["en"][e.style] in text}
    prompts = []
    for text in texts:
        e = known.get(text)
        prompts.append(_asking(text, e) if e else Prompt(text))
    return PromptList(tuple(prompts), {})


def write_list(stem: Path, listed: PromptList) -> None:
    """Write STEM.txt and STEM.json.

    Raises:
        DalleError: two prompts read the same, so that what is sampled for them could not be distinguished.
    """
    texts = [p.prompt for p in listed.prompts]
    if twice := next((text for text in texts if texts.count(text) > 1), None):
        raise DalleError(f"expected prompts that differ, found {twice!r} twice; mend the captions")
    stem.parent.mkdir(parents=True, exist_ok=True)
    data = {"prompts": [asdict(p) for p in listed.prompts], "among": listed.among}
    text = json.dumps(data, ensure_ascii=False, indent=1) + "\n"
    stem.with_suffix(".json").write_text(text, encoding="utf-8")
    stem.with_suffix(".txt").write_text("".join(text + "\n" for text in texts), encoding="utf-8")


def read_list(path: Path) -> PromptList:
    """What `write_list` wrote as STEM.json.

    Raises:
        DalleError: something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return PromptList(tuple(Prompt(**row) for row in data["prompts"]), dict(data["among"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DalleError(
            f"expected a list of `measure.py prompts`, found {error!r} in {path}; name the .json"
        ) from None


def pick(entries: Sequence[Entry], keys: Iterable[str | None], source: object) -> list[Entry]:
    """The entries of these keys.

    Raises:
        DalleError: one of them is not there.
    """
    table = {e.key: e for e in entries}
    keys = list(keys)
    for key in keys:
        if key not in table:
            raise DalleError(
                f"expected the true image {key}, found none in {source}; make list and tar of one data set"
            )
    return [table[str(key)] for key in keys]


def twin(prompt: Prompt, train: Sequence[Entry], style: str) -> Entry | None:
    """The training image of a prompt's concept in another style: of the same variant, else without a skin tone."""
    same = [e for e in train if e.base == prompt.base and e.style == style]
    return min(same, key=lambda e: (e.code != prompt.code, e.code != e.base, e.key), default=None)


# What was sampled


def read_samples(path: Path, listed: PromptList) -> list[list[Pixels]]:
    """For each prompt its images, in the order of the file.

    Raises:
        DalleError: a prompt without images, or numbers of them that differ.
    """
    artifact = open_artifact(path, "images")
    if "text" not in artifact:
        raise DalleError(f"expected images with their prompts, found none in {path}; sample them with dalle sample")
    images, texts = artifact.array("images"), artifact.strings("text")
    rows: dict[str, list[int]] = {}
    for row in range(len(artifact)):
        rows.setdefault(texts[row], []).append(row)
    for p in listed.prompts:
        if p.prompt not in rows:
            raise DalleError(f"expected images of {p.prompt!r}, found none in {path}; sample the list that is measured")
    counts = {len(rows[p.prompt]) for p in listed.prompts}
    if len(counts) != 1:
        raise DalleError(f"expected as many images of each prompt, found {sorted(counts)} in {path}; sample it again")
    return [[np.asarray(images[row]).transpose(1, 2, 0) for row in rows[p.prompt]] for p in listed.prompts]


def write_samples(path: Path, listed: PromptList, images: Sequence[Sequence[Pixels]], stage: str) -> None:
    """Write images as if they had been sampled: the same number for each prompt of a list."""
    rows = [(number, k, own) for number, sampled in enumerate(images) for k, own in enumerate(sampled)]
    columns = {
        "images": np.stack([own.transpose(2, 0, 1) for _, _, own in rows]),
        "ids": [f"{number:05d}-{k:05d}" for number, k, _ in rows],
        "text": [listed.prompts[number].prompt for number, _, _ in rows],
    }
    write_artifact(path, "images", columns, {}, history(stage, {}))
