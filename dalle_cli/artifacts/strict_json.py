"""JSON of strangers: one object without repeated keys, deep nesting, numbers beyond 64 bits and broken Unicode."""

import json
import math
from typing import Any

DIGITS = 20  # of an integer: enough for any of 64 bits
MAX_DEPTH = 32  # of tables within tables


def parse(raw: bytes | str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is something else, or holds what JSON proper or other readers do not have.
    """
    try:
        value = json.loads(
            raw, object_pairs_hook=_unique_keys, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
    except RecursionError:
        raise ValueError("tables nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, no object")
    if _too_deep(value, MAX_DEPTH):
        raise ValueError("tables nested too deeply")
    json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
    return value


def _constant(name: str) -> float:
    raise ValueError(f"{name}, which JSON does not have")


def _float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError("a number that is too large")
    return number


def _int(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError("a number that is too large")
    return int(text)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(table := dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _too_deep(value: object, left: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left == 0 or any(_too_deep(v, left - 1) for v in inner)
