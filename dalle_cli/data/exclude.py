"""Lists of ids to leave out, as `overlap` writes them: a text with one id a line, or JSON."""

import json
from collections.abc import Iterable
from pathlib import Path

from dalle_cli import console
from dalle_cli.artifacts import digest_bytes
from dalle_cli.devices import rank
from dalle_cli.errors import DalleError

SHOWN = 3  # ids that match nothing, by name


def read_ids(path: Path) -> frozenset[str]:
    """The ids of a list.

    In a text an empty line, or one that begins with #, is none, and one that begins with a quote is a JSON string. A
    .json file is a list of strings, or an object with such a list under "ids".

    Raises:
        DalleError: no such file, not UTF-8, or no list of ids.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DalleError(f"expected a list of ids, found {error.strerror}: {path}; give what `overlap` wrote") from None
    except UnicodeDecodeError:
        raise DalleError(f"expected a list of ids, found no UTF-8 in {path}; give what `overlap` wrote") from None
    if path.suffix.lower() == ".json":
        return _from_json(path, text)
    lines = (line.strip() for line in text.splitlines())
    return frozenset(_id(path, line) for line in lines if line and not line.startswith("#"))


def as_line(name: str) -> str:
    """An id as a line of the text; a JSON string where it could be read as something else."""
    plain = name.splitlines() == [name] == [name.strip()] and not name.startswith(("#", '"', "\ufeff"))
    return name if plain else json.dumps(name)


def _id(path: Path, line: str) -> str:
    if not line.startswith('"'):
        return line
    value = _parsed(path, line)
    if not isinstance(value, str):
        raise _no_list(path, f"the line {line[:60]}")
    return value


def _from_json(path: Path, text: str) -> frozenset[str]:
    value = _parsed(path, text)
    ids = value.get("ids") if isinstance(value, dict) else value
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise _no_list(path, "something else")
    return frozenset(ids)


def _parsed(path: Path, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _no_list(path, "what is no JSON") from None


def _no_list(path: Path, found: str) -> DalleError:
    return DalleError(f"expected a list of ids, found {found} in {path}; give what `overlap` wrote")


def leave_out(path: Path | None, known: Iterable[str]) -> frozenset[str]:
    """Which of the `known` ids a list names; says how many, and warns of what it names besides.

    Raises:
        DalleError: it is no list, or names all that are known.
    """
    if path is None:
        return frozenset()
    listed, ids = read_ids(path), set(known)
    gone, strangers = listed & ids, sorted(listed - ids)
    if gone == ids:
        raise DalleError(f"expected some pictures, found all {len(ids)} left out by {path}; give a shorter list")
    if rank() == 0:
        console.note(f"{len(gone)} of {len(ids)} pictures are left out, as {path.name} says")
        if strangers:
            some = ", ".join(strangers[:SHOWN]) + (" ..." if len(strangers) > SHOWN else "")
            console.warn(f"expected ids of these pictures in {path}, found {len(strangers)} of no picture: {some}")
    return gone


def told(gone: frozenset[str]) -> dict[str, str]:
    """What a history's inputs say of the ids that are left out; nothing where none are."""
    return {"without": digest_bytes("".join(f"{as_line(name)}\n" for name in sorted(gone)).encode())} if gone else {}
