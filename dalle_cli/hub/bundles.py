"""Where weights come from: `-m` names a file, a bundle (a folder of weights and tokenizers), or a hub repository."""

from collections.abc import Sequence
from pathlib import Path

from dalle_cli.artifacts import Artifact, digest_file, open_artifact
from dalle_cli.artifacts.container import read_header
from dalle_cli.errors import DalleError
from dalle_cli.hub import transfer as hub

SHIPPED = Path(__file__).parents[1] / "bundles"
DEFAULTS = ("emoji", "shapes")  # of which the first that is shipped is what no -m means
UPSAMPLER = "weights.upsampler"


def locate(model: str | None) -> Path:
    """The file or folder that `-m` names; a name without a file behind it is a bundle shipped inside the package.

    Raises:
        DalleError: nothing there.
    """
    if model is None:
        for name in DEFAULTS:
            if (SHIPPED / name).is_dir():
                return SHIPPED / name
        raise DalleError("expected a model, found none; give -m FILE_OR_FOLDER or set DALLE_MODEL")
    if model.startswith(hub.SCHEME):
        return hub.fetch(model).folder
    path = Path(model)
    if path.exists():
        return path
    shipped = sorted(folder.name for folder in SHIPPED.glob("*") if folder.is_dir())
    if model in shipped:
        return SHIPPED / model
    names = f" (shipped: {', '.join(shipped)})" if shipped else ""
    raise DalleError(f"expected weights or a bundle, found no such file: {model}; check -m{names}")


def weights(model: str | None, *kinds: str) -> Artifact:
    """The weights of one of `kinds` that `model` names: the file itself, or the one file of a bundle of that kind.

    Where a bundle holds several of the kinds, it is the one named first. Of a repository nothing else is fetched but
    what lies beside every bundle's weights, the JSON files.

    Raises:
        DalleError: no such weights, or several.
    """
    fetched = hub.fetch(model, kinds) if model and model.startswith(hub.SCHEME) else None
    path = fetched.folder if fetched else locate(model)
    if path.is_file():
        return open_artifact(path, *kinds)
    broken: list[str] = []
    held = [(_kind(f, broken), f) for f in sorted(path.glob("*.safetensors"))]
    first = next((kind for kind in kinds if any(kind == own for own, _ in held)), None)
    found = [f for own, f in held if own == first]
    wanted, where = " or ".join(kinds), model if fetched else path
    if not found and broken:
        raise DalleError(f"expected {wanted} in the bundle {where}, found none that is whole: {broken[0]}")
    if not found:
        raise DalleError(f"expected {wanted}, found none in the bundle {where}; give -m a folder that holds them")
    if len(found) > 1:
        names = ", ".join(f.name for f in found)
        raise DalleError(f"expected one file of {wanted}, found {names} in {where}; name one with -m")
    artifact = open_artifact(found[0], *kinds)
    if fetched and found[0].name in fetched.digests:
        artifact.digest = fetched.digests[found[0].name]  # the bytes have just been held against it
    return artifact


def whole(files: Sequence[Path]) -> list[Artifact]:
    """The weights among a bundle's files, which fit each other: what one was trained with is there, too.

    Raises:
        DalleError: something else than weights, two of a kind, or a tokenizer or an encoder is missing.
    """
    found = [open_artifact(file) for file in files if file.suffix == ".safetensors"]
    if not found:
        raise DalleError("expected weights in the bundle, found no .safetensors file; give a folder that holds them")
    kinds: dict[str, Artifact] = {}
    for artifact in found:
        if not artifact.kind.startswith("weights."):
            raise DalleError(f"expected weights, found {artifact.kind}: {artifact.path}; take it out of the bundle")
        twin = kinds.setdefault(_place(artifact), artifact)
        if twin is not artifact:
            names = f"{twin.path.name} and {artifact.path.name}"
            raise DalleError(f"expected one file of {artifact.kind}, found {names} in the bundle; take one out")
    tokenizers = {digest_file(file) for file in files if file.suffix == ".json"}
    there = {"tokenizer": tokenizers, "encoder": {artifact.digest for artifact in found}}
    for artifact in found:
        for what, digests in there.items():
            if what in artifact.config and artifact.fact(what, str) not in digests:
                raise DalleError(
                    f"expected the {what} of {artifact.path.name} (sha256 {artifact.fact(what, str)[:12]}) in the "
                    "bundle, found none of that digest; put it beside"
                )
    return found


def _place(weights: Artifact) -> str:
    """What a bundle holds one of: a kind; of upsamplers, one from each size."""
    if weights.kind != UPSAMPLER:
        return weights.kind
    return f"{weights.kind} from {weights.fact('model', dict).get('low_size')}"


def upsamplers(model: str | None) -> list[Artifact]:
    """The upsamplers of a bundle, any number of them; none where `model` is a single file.

    Raises:
        DalleError: nothing there.
    """
    if model and model.startswith(hub.SCHEME):
        path = hub.fetch(model, ("weights.decoder", UPSAMPLER)).folder
    else:
        path = locate(model)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    return [open_artifact(file, UPSAMPLER) for file in files if _kind(file, []) == UPSAMPLER]


def _kind(path: Path, broken: list[str]) -> str:
    try:
        return read_header(path).kind
    except DalleError as error:
        broken.append(str(error))
        return ""


def find_tokenizer(digest: str, *folders: Path) -> Path:
    """The tokenizer JSON of this digest in one of the folders; weights and captions name theirs so.

    Raises:
        DalleError: there is none.
    """
    candidates = [path for folder in dict.fromkeys(folders) for path in sorted(folder.glob("*.json"))]
    for path in candidates:
        if digest_file(path) == digest:
            return path
    found = ", ".join(str(path) for path in candidates) or "no .json file"
    where = " or ".join(str(folder) for folder in dict.fromkeys(folders))
    raise DalleError(f"expected the tokenizer of sha256 {digest[:12]} in {where}, found {found}; copy it there")


def find_weights(digest: str, *folders: Path) -> Artifact | None:
    """The weights file of this digest in one of the folders; None where there is none."""
    for path in (path for folder in dict.fromkeys(folders) for path in sorted(folder.glob("*.safetensors"))):
        try:
            found = open_artifact(path)
        except DalleError:
            continue
        if found.kind.startswith("weights.") and found.digest == digest:
            return found
    return None


def tokenizer(weights: Artifact) -> Path:
    """The tokenizer JSON that these weights were trained with: the file beside them with the digest they name.

    Raises:
        DalleError: there is none.
    """
    return find_tokenizer(weights.fact("tokenizer", str), weights.path.parent)


def check_digest(what: str, found: str, expected: str, source: object) -> None:
    """Refuse a model that is not the one an artifact was made with.

    Raises:
        DalleError: the digests differ.
    """
    if found != expected:
        raise DalleError(
            f"expected the {what} that {source} was made with (sha256 {expected[:12]}), found {found[:12]}; "
            f"give that one, or make {source} again"
        )
