"""Fetch bundles from a hub, `hf://owner/repo[@revision]`, and upload them.

Transfers, locks and the cache are huggingface-hub's own. Only the files of a bundle are fetched: weights, JSON, the
model card and licenses, never a pickle. Each file is checked against the hub's digest each time it is used.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_cli import __version__
from dalle_cli.artifacts import digest_file
from dalle_cli.artifacts.container import read_header, replace_file
from dalle_cli.errors import DalleError, one_line
from dalle_cli.hub import answers
from dalle_cli.hub.answers import COMMIT, DIGEST

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger("dalle_cli")

SCHEME = "hf://"
BUNDLE_FILE = re.compile(r"[\w][\w .()+=,-]*\.(safetensors|json)|README\.md|(LICENSE|NOTICE)(\.md|\.txt)?")
NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
REVISION = re.compile(r"\w(?!.*\.\.)[\w./+-]*")  # no "..": it becomes a path in the cache
checked: dict[Path, str] = {}  # the SHA-256 of each file that has been found to have the hub's
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True)
class Repository:
    """A repository at one of its revisions."""

    name: str
    revision: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}" + (f"@{self.revision}" if self.revision != "main" else "")

    @property
    def cache(self) -> Path:
        """The folder of this repository in huggingface-hub's cache."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.name.replace('/', '--')}"


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The files of a repository at one commit; `cached` means as the cache knows them, without the hub.

    `every` has the digest of each file: the SHA-256 of a large one, git's SHA-1 of a small one, "" if the hub gives
    none. `sizes` are in bytes.
    """

    repository: Repository
    commit: str
    every: Mapping[str, str]
    sizes: Mapping[str, int]
    cached: bool = False

    @property
    def digests(self) -> dict[str, str]:
        """Those of the files that may belong to a bundle."""
        return {name: digest for name, digest in self.every.items() if BUNDLE_FILE.fullmatch(name)}

    @property
    def folder(self) -> Path:
        return self.repository.cache / "snapshots" / self.commit


@dataclass(frozen=True)
class Fetched:
    """Files of one commit in their folder in the cache."""

    folder: Path
    files: tuple[Path, ...]
    commit: str


def parse(model: str) -> Repository:
    """Parse `hf://owner/repo[@revision]`; the scheme may be left out.

    Raises:
        DalleError: it is something else.
    """
    name, at, revision = model.removeprefix(SCHEME).partition("@")
    if not NAME.fullmatch(name) or (at and not REVISION.fullmatch(revision)):
        raise DalleError(
            f"expected a hub repository as hf://owner/repo or hf://owner/repo@revision, found {model!r}; check it"
        )
    return Repository(name, revision or "main")


def fetch(model: str, kinds: Sequence[str] = ()) -> Fetched:
    """Fetch the weights of `kinds` and all JSON files of a repository; without `kinds` the whole bundle.

    Raises:
        DalleError: no such repository or revision, no access, no connection and not in the cache, or the bytes of a
            file do not have the hub's digest.
    """
    repository = parse(model)
    with _one_line(repository):
        pinned = _cached(repository) if kinds and COMMIT.fullmatch(repository.revision) else None
        if pinned and _weights(pinned, kinds) and any(name.endswith(".json") for name in pinned.digests):
            return _download(pinned, kinds)  # a commit never changes: no need to ask
        return _download(_resolve(repository), kinds)


def holds_bundle(model: str) -> bool:
    """Whether a repository holds weights of ours.

    Raises:
        DalleError: as `fetch`.
    """
    repository = parse(model)
    with _one_line(repository):
        pinned = _cached(repository) if COMMIT.fullmatch(repository.revision) else None
        return bool(pinned and _weights(pinned, ())) or bool(_weights(_resolve(repository), ()))


def snapshot(model: str) -> Snapshot:
    """What files a repository has: by the hub or, without a connection, by the cache.

    Raises:
        DalleError: as `fetch`.
    """
    repository = parse(model)
    with _one_line(repository):
        return _resolve(repository)


def get(snapshot: Snapshot, name: str) -> Path:
    """Fetch one file of a repository, of any name, unless it is in the cache.

    Raises:
        DalleError: no access, no connection, or bytes that do not have the hub's digest.
    """
    with _one_line(snapshot.repository):
        return _get(snapshot, name)


def _get(snapshot: Snapshot, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    path, size = snapshot.folder / name, snapshot.sizes[name]
    if not path.is_file():
        answers.guard()
        with answers.sensible(), answers.bodies_up_to(size):
            hf_hub_download(snapshot.repository.name, name, revision=snapshot.commit)
        if not path.is_file():
            raise ValueError(f"{name} of another commit")
    if size not in (0, found := path.stat().st_size):
        raise DalleError(f"expected {name} of {size:,} bytes in {snapshot.repository}, found {found:,}; check the hub")
    _check(snapshot, name, path)
    return path


def remember(snapshot: Snapshot) -> None:
    """Note in the cache which commit the revision is, where huggingface-hub looks for it without a connection."""
    if not snapshot.cached and snapshot.repository.revision != snapshot.commit:
        ref = snapshot.repository.cache / "refs" / snapshot.repository.revision
        with suppress(DalleError):  # a read-only cache is fine
            replace_file(ref, lambda part: part.write_text(snapshot.commit))


def _download(snapshot: Snapshot, kinds: Sequence[str]) -> Fetched:
    repository, weights = snapshot.repository, _weights(snapshot, kinds)
    if not weights and (snapshot.cached or not kinds):
        where = "in the cache, and no connection" if snapshot.cached else "there"
        what = " or ".join(kinds) or "a bundle of dalle's weights"
        advice = "check the name and the network, or `dalle import` if others published it"
        raise DalleError(f"expected {what} in {repository}, found none {where}; {advice}")
    texts = [name for name in snapshot.digests if not name.endswith(".safetensors")]
    texts = [name for name in texts if name.endswith(".json") or not kinds]
    files = [_get(snapshot, name) for name in (*texts, *weights)]  # weights last: once they are there, the rest is
    remember(snapshot)
    return Fetched(snapshot.folder, tuple(files), snapshot.commit)


@lru_cache
def _resolve(repository: Repository) -> Snapshot:
    """List the files of a repository: by the hub or, without a connection, by the cache."""
    try:
        with answers.sensible():
            info = library().model_info(repository.name, revision=repository.revision, files_metadata=True)
            files: Any = info.siblings
            listed = [(f.rfilename, (f.lfs.sha256 if f.lfs else f.blob_id) or "", f.size or 0) for f in files]
            return _listed(repository, info.sha, listed)
    except _faults() as error:
        nonsense = isinstance(error, (ValueError, answers.BadAnswer))
        if nonsense or 0 < _status(error) < 500 or not (snapshot := _cached(repository)):
            raise
        reason, commit = _explain(repository, error)[0], snapshot.commit[:7]
        log.info("%s: %s, using the copy in the cache (commit %s)", repository, reason, commit)
        return snapshot


def _listed(repository: Repository, commit: object, files: Sequence[tuple[Any, Any, Any]]) -> Snapshot:
    """A commit and the name, digest and size of each file, checked: they become paths and sizes."""
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise DalleError(f"expected digests in hex from {repository}, found {commit!r:.100}; check HF_ENDPOINT")
    if len(files) > answers.MAX_FILES:
        raise DalleError(f"expected at most {answers.MAX_FILES:,} files in {repository}, found {len(files):,}")
    files = [file for file in files if answers.is_plain(file[0])]  # others are no files of a bundle
    for name, digest, size in files:
        if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
            raise DalleError(f"expected digests in hex from {repository}, found {digest!r:.100}; check HF_ENDPOINT")
        if not answers.is_size(size):
            raise DalleError(f"expected the size of {name} in {repository}, found {size!r:.100}; check HF_ENDPOINT")
    digests, sizes = ({name: (digest, size)[i] for name, digest, size in files} for i in (0, 1))
    return Snapshot(repository, commit, digests, sizes)


def _cached(repository: Repository) -> Snapshot | None:
    """The files of a revision in the cache, where each is a link to a file that is named by its digest."""
    ref = repository.cache / "refs" / repository.revision
    commit = ref.read_text().strip() if ref.is_file() else repository.revision
    folder = repository.cache / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not folder.is_dir():
        return None
    digests, sizes = {}, {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, digest = path.relative_to(folder).as_posix(), Path(os.readlink(path)).name if path.is_symlink() else ""
        digests[name], sizes[name] = digest if DIGEST.fullmatch(digest) else "", path.stat().st_size
    return Snapshot(repository, commit, digests, sizes, cached=True) if digests else None


def _weights(snapshot: Snapshot, kinds: Sequence[str]) -> list[str]:
    found = {name: _kind(snapshot, name) for name in snapshot.digests if name.endswith(".safetensors")}
    return [name for name, kind in found.items() if (kind in kinds if kinds else kind.startswith("weights."))]


@lru_cache
def _kind(snapshot: Snapshot, name: str) -> str:
    """The kind of a file, or "" if it is not ours; of a file that is not in the cache only the header is fetched."""
    from huggingface_hub.errors import SafetensorsParsingError

    blob = snapshot.repository.cache / "blobs" / snapshot.digests[name]
    path = blob if blob.is_file() else snapshot.folder / name
    try:
        if path.is_file():
            return read_header(path).kind
        with answers.sensible():
            found = library().parse_safetensors_file_metadata(snapshot.repository.name, name, revision=snapshot.commit)
        return str(json.loads(found.metadata["dalle"])["kind"])
    except DalleError:
        _check(snapshot, name, path)
        return ""
    except (SafetensorsParsingError, KeyError, TypeError, ValueError):
        return ""


def _check(snapshot: Snapshot, name: str, path: Path) -> None:
    """Check a file against its digest; remove it from the cache if it has another.

    Raises:
        DalleError: the digests differ.
    """
    expected = snapshot.every[name]
    if len(expected) == 64:
        found = digest_file(path)
    else:
        data = path.read_bytes()  # git keeps only small files itself
        found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    if not expected or found == expected:
        checked.update({path: found} if len(expected) == 64 else {})
        return
    for file in (path.resolve(), snapshot.repository.cache / "blobs" / expected, snapshot.folder / name):
        file.unlink(missing_ok=True)
    raise DalleError(
        f"expected {name} of {snapshot.repository} of digest {expected[:12]}, found {found[:12]}: changed bytes; "
        "it was removed from the cache, run again to fetch it once more"
    )


def upload(name: str, files: Sequence[Path], message: str, private: bool, force: bool) -> tuple[str, str]:
    """Upload the files of one folder to a repository in one commit: -> (URL of the repository, commit).

    The repository is created if there is none.

    Raises:
        DalleError: no access, no connection, other weights are there, or it is public and should be private.
    """
    repository, ours = parse(name), [file.name for file in files]
    if repository.revision != "main":
        raise DalleError(f"expected a repository to write to as owner/repo, found a revision: {name}; leave it out")
    name = repository.name
    with _one_line(repository):
        api = library()
        url = api.create_repo(name, private=True, exist_ok=True) if private else api.create_repo(name, exist_ok=True)
        info = api.model_info(name)
        if private and not info.private:
            raise DalleError(
                f"expected {name} to be private, found it public; change that on its page, or choose another"
            )
        theirs = [f.rfilename for f in info.siblings or () if f.rfilename.endswith((".safetensors", ".json"))]
        stale = [file for file in theirs if "/" not in file and file not in ours]
        if stale and not force:
            raise DalleError(
                f"expected {name} to hold this bundle or nothing, found {', '.join(stale)} there; --force deletes that"
            )
        try:
            commit = api.upload_folder(
                repo_id=name, folder_path=files[0].parent, allow_patterns=ours, delete_patterns=stale or None,
                commit_message=message, parent_commit=info.sha,
            )  # fmt: skip
        except RuntimeError as error:  # raised by huggingface-hub for an error in one of its threads
            raise (error.__cause__ or error) from None
    return str(url), commit.oid


def library() -> "HfApi":
    """huggingface-hub's client, silent but for progress bars on a terminal."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not os.isatty(2):
        disable_progress_bars()
    answers.guard()
    return HfApi(library_name="dalle", library_version=__version__)


def _faults() -> tuple[type[Exception], ...]:
    """What a failed request raises: errors of the HTTP library under huggingface-hub, which differs by version."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1], OSError, ValueError


@contextmanager
def _one_line(repository: Repository) -> Iterator[None]:
    """Raise a failed request as one line; an error of this machine, such as a full disk, stays as it is."""
    try:
        yield
    except _faults() as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise
        found, todo = _explain(repository, error)
        raise DalleError(f"expected the hub repository {repository}, found {found}; {todo}") from None


def _status(error: BaseException) -> int:
    """The HTTP status of a failed request; 0 if there was no answer."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _explain(repository: Repository, error: BaseException) -> tuple[str, str]:
    """What a failed request found, and what to do about it."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    status, message = _status(error), next((line for line in str(error).splitlines() if line), type(error).__name__)
    message = one_line(message, 300)
    network = "check the network and run again; files that have arrived are kept"
    known = (
        (errors.GatedRepoError, "that it is gated", f"ask for access on its page, then {LOG_IN}"),
        (errors.RepositoryNotFoundError, "none that this login sees", f"check the name; if it is private, {LOG_IN}"),
        (errors.RevisionNotFoundError, f"no revision {repository.revision}", "give a branch, a tag or a commit"),
        (errors.OfflineModeIsEnabled, "no connection (HF_HUB_OFFLINE is set)", network),
    )
    for kind, found, todo in known:
        if isinstance(error, kind):
            return found, todo
    if status in (401, 403):
        return f"that the token is refused (status {status})", f"{LOG_IN}, with a token that may do this"
    if status:
        return f"status {status} ({message})", "try again later"
    if isinstance(error, (ValueError, answers.BadAnswer)):
        return f"an answer that makes no sense ({message})", "check the name and HF_ENDPOINT"
    return f"{'an error' if type(error) is OSError else 'no connection'} ({message})", network
