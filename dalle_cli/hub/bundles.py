"""Find weights: `-m` names a file, a bundle (a folder of weights and tokenizers), or a hub repository."""

import filecmp
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from dalle_cli.artifacts import Artifact, digest_file, open_artifact
from dalle_cli.artifacts.container import read_header, replace_file
from dalle_cli.errors import DalleError
from dalle_cli.hub import transfer

SHIPPED = Path(__file__).parents[1] / "bundles"
DEFAULTS = ("emoji", "shapes")  # without -m, the first of these that is shipped
UPSAMPLER = "weights.upsampler"
LEFT = (".run", ".log")  # suffixes of what stages leave beside the weights that they write
# What makes a bundle of a repository of published weights, None of any other. `importing` knows publications and lies
# above this room, so `pipelines` puts its function here.
publication: Callable[[str], Path | None] = lambda model: None  # noqa: E731


def locate(model: str | None, *kinds: str) -> Path:
    """The file or folder that `-m` names: a path, a shipped bundle, or a repository.

    A repository is fetched whole, or only its weights of `kinds` and its JSON files; that of a known publication is
    imported when it is first used.

    Raises:
        DalleError: there is none.
    """
    if model is None:
        for name in DEFAULTS:
            if (SHIPPED / name).is_dir():
                return SHIPPED / name
        raise DalleError("expected a model, found none; give -m FILE_OR_FOLDER or set DALLE_MODEL")
    if model.startswith(transfer.SCHEME):
        return publication(model) or transfer.fetch(model, kinds).folder
    if Path(model).exists():
        return Path(model)
    shipped = sorted(folder.name for folder in SHIPPED.glob("*") if folder.is_dir())
    if model in shipped:
        return SHIPPED / model
    names = f" (shipped: {', '.join(shipped)})" if shipped else ""
    raise DalleError(f"expected weights or a bundle, found no such file: {model}; check -m{names}")


def weights(model: str | None, *kinds: str) -> Artifact:
    """The weights of one of `kinds` that `model` names: the file itself, or the file of that kind in the bundle.

    If a bundle has several of the kinds, the first in `kinds` counts.

    Raises:
        DalleError: there are no such weights, or several.
    """
    path = locate(model, *kinds)
    if path.is_file():
        return open_artifact(path, *kinds)
    of_kind, broken = _kinds(path)
    found = next((of_kind[kind] for kind in kinds if kind in of_kind), [])
    wanted, where = " or ".join(kinds), model or path
    if not found and broken:
        raise DalleError(f"expected {wanted} in the bundle {where}, found none that is whole: {broken[0]}")
    if not found:
        raise DalleError(f"expected {wanted}, found none in the bundle {where}; give -m a folder that holds them")
    if len(found) > 1:
        names = ", ".join(f.name for f in found)
        raise DalleError(f"expected one file of {wanted}, found {names} in {where}; name one with -m")
    return _open(found[0], *kinds)


def _open(path: Path, *kinds: str) -> Artifact:
    artifact = open_artifact(path, *kinds)
    if digest := transfer.checked.get(path):
        artifact.digest = digest  # just computed: no need to hash the file again
    return artifact


def of_kind(folder: Path, kind: str) -> list[Artifact]:
    """All weights of one kind in a folder, as far as its files can be read; none if it is a file."""
    return [_open(file, kind) for file in _kinds(folder)[0].get(kind, [])]


def upsamplers(model: str | None) -> list[Artifact]:
    """The upsamplers of a bundle; none if `model` is a single file.

    Raises:
        DalleError: there is no such model.
    """
    path = locate(model, "weights.decoder", UPSAMPLER)
    return [open_artifact(file, UPSAMPLER) for file in _kinds(path)[0].get(UPSAMPLER, [])]


def _kinds(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The weights files of a folder by kind, and what is wrong with those that cannot be read."""
    found: dict[str, list[Path]] = {}
    broken = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            found.setdefault(read_header(path).kind, []).append(path)
        except DalleError as error:
            broken.append(str(error))
    return found, broken


def whole(files: Sequence[Path]) -> list[Artifact]:
    """The weights among a bundle's files, checked to fit each other and to come with their tokenizer and encoder.

    Raises:
        DalleError: a file is not weights, there are two of a kind, or a tokenizer or an encoder is missing.
    """
    found = [open_artifact(file) for file in files if file.suffix == ".safetensors"]
    if not found:
        raise DalleError("expected weights in the bundle, found no .safetensors file; give a folder that holds them")
    seen: dict[str, Artifact] = {}
    for artifact in found:
        if not artifact.kind.startswith("weights."):
            raise DalleError(f"expected weights, found {artifact.kind}: {artifact.path}; take it out of the bundle")
        size = artifact.require("model", dict).get("low_size") if artifact.kind == UPSAMPLER else ""
        twin = seen.setdefault(f"{artifact.kind} {size}", artifact)  # one upsampler for each size
        if twin is not artifact:
            names = f"{twin.path.name} and {artifact.path.name}"
            raise DalleError(f"expected one file of {artifact.kind}, found {names} in the bundle; take one out")
    tokenizers = {digest_file(file) for file in files if file.suffix == ".json"}
    present = {"tokenizer": tokenizers, "encoder": {artifact.digest for artifact in found}}
    for artifact in found:
        for what in present.keys() & artifact.config.keys():
            if (digest := artifact.require(what, str)) not in present[what]:
                raise DalleError(
                    f"expected the {what} of {artifact.path.name} (sha256 {digest[:12]}) in the bundle, "
                    "found none of that digest; put it beside"
                )
    return found


def files_of(folder: Path, force: bool) -> list[Path]:
    """The files of the bundle in a folder: safetensors, JSON, model card, licenses.

    Raises:
        DalleError: no folder; other files in it, unless `force` skips them; JSON that cannot be read.
    """
    if not folder.is_dir():
        raise DalleError(f"expected a bundle, found a file: {folder}; give the folder that holds it")
    present = sorted(p for p in folder.iterdir() if not p.name.startswith(".") and not p.name.endswith(LEFT))
    files = [path for path in present if path.is_file() and transfer.BUNDLE_FILE.fullmatch(path.name)]
    other = [path.name for path in present if path not in files]
    if other and not force:
        raise DalleError(
            f"expected safetensors, JSON, README.md and licenses, found {other[0]} in {folder}; "
            "take it out, or give --force to leave it behind"
        )
    for file in (file for file in files if file.suffix == ".json"):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise DalleError(f"expected JSON, found {error}: {file}; make it again") from None
    return files


def copy(files: Sequence[Path], folder: Path, force: bool) -> None:
    """Copy a bundle's files, each atomically; files that are there already are not copied again.

    Raises:
        DalleError: there are other files in the folder, unless `force`.
    """
    if folder.exists() and not folder.is_dir():
        raise DalleError(f"expected a folder to write to, found a file: {folder}; choose another -o")
    ours = {path.name: path for path in files}
    present = [path for path in folder.glob("*") if not path.name.startswith(".")]
    same = {p.name for p in present if p.name in ours and p.is_file() and filecmp.cmp(p, ours[p.name], shallow=False)}
    other = sorted(path.name for path in present if path.name not in same)
    if other and not force:
        raise DalleError(
            f"expected an empty folder or this very bundle, found {other[0]} in {folder}; choose another -o or --force"
        )
    for name in ours.keys() - same:
        replace_file(folder / name, lambda part, source=ours[name]: shutil.copyfile(source, part))  # type: ignore[misc]


def find_tokenizer(digest: str, *folders: Path) -> Path:
    """The tokenizer JSON with this digest in one of the folders.

    Raises:
        DalleError: there is none.
    """
    candidates = [path for folder in dict.fromkeys(folders) for path in sorted(folder.glob("*.json"))]
    for path in candidates:
        with suppress(OSError, DalleError):  # a link to nowhere, a folder, a pipe
            if digest_file(path) == digest:
                return path
    found = ", ".join(str(path) for path in candidates) or "no .json file"
    where = " or ".join(str(folder) for folder in dict.fromkeys(folders))
    raise DalleError(f"expected the tokenizer of sha256 {digest[:12]} in {where}, found {found}; copy it there")


def find_weights(digest: str, *folders: Path) -> Artifact | None:
    """The weights file with this digest in one of the folders, or None."""
    for folder in dict.fromkeys(folders):
        for kind, paths in _kinds(folder)[0].items():
            for found in map(open_artifact, paths if kind.startswith("weights.") else ()):
                if found.digest == digest:
                    return found
    return None


def tokenizer(weights: Artifact) -> Path:
    """The tokenizer JSON that these weights were trained with, beside them.

    Raises:
        DalleError: there is none with the digest that they name.
    """
    return find_tokenizer(weights.require("tokenizer", str), weights.path.parent)


def check_digest(what: str, found: str, expected: str, source: object) -> None:
    """Refuse a model other than the one an artifact was made with.

    Raises:
        DalleError: the digests differ.
    """
    if found != expected:
        raise DalleError(
            f"expected the {what} that {source} was made with (sha256 {expected[:12]}), found {found[:12]}; "
            f"give that one, or make {source} again"
        )
