"""Files that are no artifacts (pages, lists, JSON): written atomically, and never over a file of another kind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle_cli.artifacts.container import replace_file
from dalle_cli.errors import DalleError


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, atomically.

    Raises:
        DalleError: the disk is full, or the folder cannot be written.
    """
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8", errors="replace"))


def check_overwrite(path: Path, wanted: str, is_ours: Callable[[Path], bool], force: bool = False) -> None:
    """Refuse to replace a file that `is_ours` does not recognize, unless forced, and any folder.

    Raises:
        DalleError: something else lies at `path`.
    """
    if path.is_dir():
        raise DalleError(f"expected to write the file {path}, found a folder there; choose another -o")
    try:
        free = force or not path.exists() or is_ours(path)
    except OSError:
        free = False
    if not free:
        raise DalleError(
            f"expected to write {wanted} to {path}, found something else there; choose another -o or give --force"
        )


def head_of(path: Path, characters: int = 2000) -> str:
    """The beginning of a file, as text."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(characters)


def read_json_key(path: Path, key: str) -> Any:
    """The value of `key` in a file that holds a JSON object; None if it holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return value.get(key) if isinstance(value, dict) else None
