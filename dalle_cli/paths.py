"""How stages find their input and name their output, so that they chain in a pipe."""

import re
import sys
from pathlib import Path

from dalle_cli.errors import DalleError

LONGEST = 1 << 16  # characters of a pipe that are looked at for a path


def given_or_piped(path: Path | None) -> Path:
    """The artifact argument, or the path that the stage before wrote into the pipe.

    Raises:
        DalleError: neither is there.
    """
    if path is not None:
        return path
    if sys.stdin is not None and not sys.stdin.isatty():
        lines = sys.stdin.read(LONGEST).splitlines()
        if lines and lines[-1].strip() and "\0" not in lines[-1]:
            return Path(lines[-1].strip())
    raise DalleError("expected an artifact, found no argument and nothing in the pipe; give its path")


def beside(path: Path, suffix: str) -> Path:
    """The input's name with another ending: `radish.codes.safetensors` becomes `radish.images.safetensors`.

    Raises:
        DalleError: that is the input itself.
    """
    stem = path.name.removesuffix(".safetensors")
    for kind in (".captions", ".codes", ".embeddings", ".images", ".best"):
        stem = stem.removesuffix(kind)
    target = path.with_name(stem + suffix)
    if target == path:
        raise DalleError(f"expected -o, found that {path} would be written over itself; say where to write")
    return target


def named_after(source: str, suffix: str) -> Path:
    """The output of a command whose input is a path, or a data set at a URL or of several tars, which names none.

    Raises:
        DalleError: the input is no plain path.
    """
    if "://" in source or "{" in source or not Path(source).name:
        raise DalleError(f"expected -o, found none beside {source}; say where to write")
    return beside(Path(source), suffix)


def slug(prompt: str) -> str:
    """A file's stem from a prompt: letters and digits of any script, joined by hyphens."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "prompt"


def after_prompt(prompts: list[str], file: Path | None, suffix: str) -> Path:
    """What is drawn is named after the file of prompts, or else after the first prompt, in the working folder."""
    return Path(slug(file.stem if file else prompts[0]) + suffix)


def skip_list(out: Path) -> Path:
    """Where the samples that could not be used are listed: beside the output."""
    return out.with_name(out.name.removesuffix(".safetensors") + ".skipped.jsonl")
