"""Captions as found in the wild -> clean text."""

from dalle_cli.data.skips import BadSample

MAX_BYTES = 1 << 20  # a larger caption file is no caption; 10,000 words are 60 kB
NAMES = ("caption", "text", "title")  # of the column, or of the key in JSON, in order of preference


def decode(data: bytes) -> str:
    """UTF-8 (with or without a mark) -> text.

    Anything else is refused, not guessed: Latin-1 read as another code page becomes wrong words that nobody notices.

    Raises:
        BadSample: Not UTF-8, or over a mebibyte.
    """
    if len(data) > MAX_BYTES:
        raise BadSample("caption too long: over 1 MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadSample("caption is not UTF-8") from None


def clean(text: str) -> str:
    """Drop NULs and byte-order marks; make every run of white space, also of lines, one blank.

    Raises:
        BadSample: Half of a surrogate pair, which no UTF-8 file can hold.
    """
    text = " ".join(text.replace("\0", "").replace("\ufeff", "").split())
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadSample("caption is not UTF-8") from None
    return text


def from_text(data: bytes, all_lines: bool) -> tuple[str, ...]:
    """The content of a .txt file -> its first line with text on it, or every such line as an alternative."""
    lines = tuple(line for line in map(clean, decode(data).splitlines()) if line)
    return lines if all_lines else lines[:1]


def from_value(value: object) -> tuple[str, ...]:
    """A value from a manifest or JSON (text, a list of texts, or nothing) -> the captions that are not empty.

    Raises:
        BadSample: A number, an object, or a list that holds one.
    """
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    texts = []
    for text in values:
        if isinstance(text, str):
            texts.append(clean(text))
        elif text is not None:
            raise BadSample("caption is not text")
    return tuple(text for text in texts if text)
