"""HTML put together from Python: whatever is no markup already is escaped, so text of captions and paths stays text."""

import html
from collections.abc import Iterable, Mapping

VOID = ("br", "img", "input", "link", "meta")
Attributes = Mapping[str, "str | int | float | bool | None"]


class Html(str):
    """Text that is markup already."""


def text(value: object) -> Html:
    """A value as text, markup as it is; half a surrogate pair, as in a path that is no UTF-8, becomes "?"."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(str(value).encode("utf-8", "replace").decode()))


def el(tag: str, attributes: Attributes | None = None, *inside: object) -> Html:
    """An element; attributes that are None or False are left out, one that is True has no value."""
    told = "".join(
        f" {name}" if value is True else f' {name}="{text(value)}"'
        for name, value in (attributes or {}).items()
        if value is not None and value is not False
    )
    return Html(f"<{tag}{told}>" if tag in VOID else f"<{tag}{told}>{join(inside)}</{tag}>")


def join(parts: Iterable[object], between: str = "") -> Html:
    """Parts one after another."""
    return Html(text(between).join(text(part) for part in parts))


def number(value: float) -> str:
    """0.0284, 33, 1.2k, 4.7M, 2e-5."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.4g}".replace("e-0", "e-")


def size(n_bytes: int) -> str:
    """12 kB, 3.7 MB."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if n_bytes >= 10**power:
            return f"{n_bytes / 10**power:.3g} {unit}"
    return f"{n_bytes} bytes"


def count(n: int, one: str) -> str:
    """1 picture, 1,200 pictures."""
    return f"{n:,} {one}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    """48 s, 6 min, 3.2 h, 2.5 days."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def short(value: object) -> str:
    """A value as it stands in a table: of a SHA-256 the first 12 digits."""
    told = str(value)
    return told[:12] if is_digest(told) else told


def is_digest(value: object) -> bool:
    """Whether this is a SHA-256 in hex."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
