"""Captions as data sets hold them -> clean text."""

from collections.abc import Sequence
from typing import Any

from dalle_cli.data.skips import BadSample

MAX_BYTES = 1 << 20  # 10,000 words are 60 kB
NAMES = ("caption", "text", "title")  # columns, or keys in JSON, in order of preference


def decode(data: bytes) -> str:
    """Decode UTF-8, with or without a byte-order mark; other encodings are not guessed.

    Raises:
        BadSample: not UTF-8, or over 1 MiB.
    """
    if len(data) > MAX_BYTES:
        raise BadSample("caption too long: over 1 MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadSample("caption is not UTF-8") from None


def clean(text: str) -> str:
    """Drop NULs and byte-order marks; replace each run of white space by one blank.

    Raises:
        BadSample: a lone surrogate, which UTF-8 cannot hold.
    """
    text = " ".join(text.replace("\0", "").replace("\ufeff", "").split())
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadSample("caption is not UTF-8") from None
    return text


def from_text(data: bytes, all_lines: bool) -> tuple[str, ...]:
    """The first line of a .txt file that is not empty, or every such line as an alternative caption."""
    lines = tuple(filter(None, map(clean, decode(data).splitlines())))
    return lines if all_lines else lines[:1]


def from_value(value: object) -> tuple[str, ...]:
    """The captions in a value from a manifest or JSON: a text, a list of texts, or None.

    Raises:
        BadSample: anything else.
    """
    values: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(text, str | None) for text in values):
        raise BadSample("caption is not text")
    return tuple(filter(None, (clean(str(text)) for text in values if text)))
