"""Where weights come from: `-m` names a file, a bundle (a folder of weights and tokenizers), or a hub repository."""

from pathlib import Path

from dalle_cli.artifacts import Artifact, digest_file, open_artifact
from dalle_cli.artifacts.container import read_header
from dalle_cli.errors import DalleError

SHIPPED = Path(__file__).parent / "bundles"
DEFAULT = "emoji"


def locate(model: str | None) -> Path:
    """The file or folder that `-m` names; a name without a file behind it is a bundle shipped inside the package.

    Raises:
        DalleError: nothing there.
    """
    if model is None:
        if (SHIPPED / DEFAULT).is_dir():
            return SHIPPED / DEFAULT
        raise DalleError("expected a model, found none; give -m FILE_OR_FOLDER or set DALLE_MODEL")
    if model.startswith("hf://"):
        return _download(model)
    path = Path(model)
    if path.exists():
        return path
    if (SHIPPED / model).is_dir():
        return SHIPPED / model
    raise DalleError(f"expected weights or a bundle, found no such file: {model}; check -m")


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = model.removeprefix("hf://").partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=["*.safetensors", "*.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DalleError(f"expected the hub repository {repo}, found {reason}; check the name and network") from None


def weights(model: str | None, *kinds: str) -> Artifact:
    """The weights of one of `kinds` that `model` names: the file itself, or the one file of a bundle of that kind.

    Raises:
        DalleError: no such weights, or several.
    """
    path = locate(model)
    if path.is_file():
        return open_artifact(path, *kinds)
    broken: list[str] = []
    found = [f for f in sorted(path.glob("*.safetensors")) if _kind(f, broken) in kinds]
    wanted = " or ".join(kinds)
    if not found and broken:
        raise DalleError(f"expected {wanted} in the bundle {path}, found none that is whole: {broken[0]}")
    if not found:
        raise DalleError(f"expected {wanted}, found none in the bundle {path}; give -m a folder that holds them")
    if len(found) > 1:
        names = ", ".join(f.name for f in found)
        raise DalleError(f"expected one file of {wanted}, found {names} in {path}; name one with -m")
    return open_artifact(found[0], *kinds)


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
