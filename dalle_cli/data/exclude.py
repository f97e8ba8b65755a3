"""Exclude lists: ids of samples that training leaves out, as `overlap` writes them, one a line or as JSON."""

import json
from collections.abc import Iterable
from pathlib import Path

from dalle_cli import console
from dalle_cli.artifacts import digest_bytes
from dalle_cli.devices import rank
from dalle_cli.errors import DalleError

SHOWN = 3  # unknown ids, by name


def read_ids(path: Path) -> frozenset[str]:
    """The ids of a list.

    In a text file empty lines and lines that begin with # are skipped, and a line that begins with a quote is a JSON
    string. A .json file is a list of strings, or an object with such a list under "ids".

    Raises:
        DalleError: no such file, not UTF-8, or not a list of ids.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            value = json.loads(text)
            ids = value.get("ids") if isinstance(value, dict) else value
        else:
            lines = (line.strip() for line in text.splitlines())
            lines = (line for line in lines if line and not line.startswith("#"))
            ids = [json.loads(line) if line.startswith('"') else line for line in lines]
        if isinstance(ids, list) and all(isinstance(name, str) for name in ids):
            return frozenset(ids)
        found = "something else"
    except OSError as error:
        found = str(error.strerror)
    except (ValueError, RecursionError):
        found = "what is not UTF-8 or not JSON"
    raise DalleError(f"expected a list of ids, found {found}: {path}; give a list that `overlap` wrote")


def format_id(name: str) -> str:
    """An id as a line of a text list: a JSON string if it could be read as something else."""
    plain = name.splitlines() == [name] == [name.strip()] and not name.startswith(("#", '"', "\ufeff"))
    return name if plain else json.dumps(name)


def read_exclude_list(path: Path | None, known: Iterable[str]) -> frozenset[str]:
    """The `known` ids that a list names; reports how many, and warns of unknown ones.

    Raises:
        DalleError: it is not a list, or it names all known ids.
    """
    if path is None:
        return frozenset()
    listed, ids = read_ids(path), set(known)
    excluded, unknown = listed & ids, sorted(listed - ids)
    if excluded == ids:
        raise DalleError(f"expected some images, found all {len(ids)} excluded by {path}; give a shorter list")
    if rank() == 0:
        console.note(f"{len(excluded)} of {len(ids)} images are excluded by {path.name}")
        if unknown:
            some = ", ".join(unknown[:SHOWN]) + (" ..." if len(unknown) > SHOWN else "")
            console.warn(f"expected ids of these images in {path}, found {len(unknown)} of no image: {some}")
    return excluded


def exclude_digest(excluded: frozenset[str]) -> dict[str, str]:
    """The entry of a history's inputs that names the excluded ids by their SHA-256; empty if there are none."""
    lines = "".join(f"{format_id(name)}\n" for name in sorted(excluded))
    return {"exclude": digest_bytes(lines.encode())} if excluded else {}
