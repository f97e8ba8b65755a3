"""The hub: `hf://owner/repo[@revision]` to files in huggingface-hub's own cache, and a bundle to a repository.

Only what a bundle consists of is fetched: weights, JSON, the model card and licenses; never a pickle. A large file that
was cut off is continued, also by a later process, and every file is held against the hub's digest each time it is used.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from dalle_cli import __version__, console
from dalle_cli.artifacts import digest_file
from dalle_cli.artifacts.container import read_header, replace_file
from dalle_cli.errors import DalleError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEME = "hf://"
TRAVELS = re.compile(r"[\w][\w .()+=,-]*\.(safetensors|json)|README\.md|(LICENSE|NOTICE)(\.md|\.txt)?")
NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
REVISION = re.compile(r"\w(?!.*\.\.)[\w./+-]*")  # becomes the name of a file in the cache: no way up
COMMIT = re.compile(r"[0-9a-f]{40}")
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True)
class Repository:
    """A repository, and which of its revisions."""

    name: str
    revision: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}" + (f"@{self.revision}" if self.revision != "main" else "")

    @property
    def cache(self) -> Path:
        """Where huggingface-hub keeps what it has of this repository."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.name.replace('/', '--')}"


@dataclass(frozen=True)
class Entry:
    """A file of a repository: its size in bytes and its digest, SHA-256 of large files, git's SHA-1 of others."""

    name: str
    size: int | None
    sha256: str | None
    blob: str | None


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit; `cached` where the hub was not asked, so that only what is in the cache is known."""

    repository: Repository
    commit: str
    entries: tuple[Entry, ...]
    cached: bool

    @property
    def folder(self) -> Path:
        return self.repository.cache / "snapshots" / self.commit


@dataclass(frozen=True)
class Fetched:
    """Files of a snapshot in their folder in the cache; the SHA-256 of those for which the hub names one."""

    folder: Path
    files: tuple[Path, ...]
    commit: str
    digests: dict[str, str]


def parse(model: str) -> Repository:
    """`hf://owner/repo[@revision]`.

    Raises:
        DalleError: it is none.
    """
    name, at, revision = model.removeprefix(SCHEME).partition("@")
    if not NAME.fullmatch(name) or (at and not REVISION.fullmatch(revision)):
        raise DalleError(
            f"expected a hub repository as hf://owner/repo or hf://owner/repo@revision, found {model!r}; check it"
        )
    return Repository(name, revision or "main")


def fetch(model: str, kinds: Sequence[str] = ()) -> Fetched:
    """Weights of `kinds` and all JSON files of a repository; without `kinds` all that a bundle consists of.

    Raises:
        DalleError: no such repository or revision, no right to it, no connection and not in the cache, or a file
            whose bytes are not those that the hub has a digest of.
    """
    repository = parse(model)
    if kinds and COMMIT.fullmatch(repository.revision):  # a commit never changes: no need to ask
        pinned = _cached(repository)
        if pinned and _weights(pinned, kinds) and any(entry.name.endswith(".json") for entry in pinned.entries):
            return _fetch(pinned, kinds)
    return _fetch(_resolve(repository), kinds)


def _fetch(snapshot: Snapshot, kinds: Sequence[str]) -> Fetched:
    repository = snapshot.repository
    with _one_line(repository):
        weights = _weights(snapshot, kinds)
        if not weights and (snapshot.cached or not kinds):
            where = "in the cache, and no connection" if snapshot.cached else "there"
            what = " or ".join(kinds) or "a bundle of dalle's weights"
            raise DalleError(f"expected {what} in {repository}, found none {where}; check the name and the network")
        texts = [entry for entry in snapshot.entries if not entry.name.endswith(".safetensors")]
        texts = [entry for entry in texts if entry.name.endswith(".json") or not kinds]
        files = []
        for entry in (*texts, *weights):  # weights last: where they are, all is
            files.append(_download(snapshot, entry))
            _check(snapshot, entry, files[-1])
    if not snapshot.cached and not COMMIT.fullmatch(repository.revision):
        _remember(repository, snapshot.commit)
    digests = {entry.name: entry.sha256 for entry in weights if entry.sha256}
    return Fetched(snapshot.folder, tuple(files), snapshot.commit, digests)


@lru_cache
def _resolve(repository: Repository) -> Snapshot:
    """What the hub says is at the revision; without a connection what the cache has of it, and a note."""
    with _one_line(repository):
        try:
            info = library().model_info(repository.name, revision=repository.revision, files_metadata=True)
        except _faults() as error:
            snapshot = _cached(repository) if _unreachable(error) else None
            if snapshot is None:
                raise
            console.note(
                f"{repository}: {_reason(error)}, the copy in the cache is used (commit {snapshot.commit[:7]})"
            )
            return snapshot
    entries = tuple(
        Entry(file.rfilename, file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)
        for file in info.siblings or ()
        if TRAVELS.fullmatch(file.rfilename)
    )
    if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
        raise DalleError(f"expected a commit of {repository}, found {info.sha!r}; check HF_ENDPOINT")
    return Snapshot(repository, info.sha, entries, cached=False)


def _cached(repository: Repository) -> Snapshot | None:
    """What the cache has of a revision; the names of what its links point to are the digests."""
    ref = repository.cache / "refs" / repository.revision
    commit = ref.read_text().strip() if ref.is_file() else repository.revision
    folder = repository.cache / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not folder.is_dir():
        return None
    entries = []
    for path in sorted(p for p in folder.iterdir() if TRAVELS.fullmatch(p.name) and p.is_file()):
        digest = Path(os.readlink(path)).name if path.is_symlink() else ""
        sha256, blob = (digest if re.fullmatch(f"[0-9a-f]{{{n}}}", digest) else None for n in (64, 40))
        entries.append(Entry(path.name, None, sha256, blob))
    return Snapshot(repository, commit, tuple(entries), cached=True) if entries else None


def _remember(repository: Repository, commit: str) -> None:
    """Which commit a branch or tag names, where huggingface-hub looks for it; once all of the commit is there."""
    ref = repository.cache / "refs" / repository.revision
    if not ref.is_file() or ref.read_text() != commit:
        with suppress(DalleError):  # a cache that may only be read serves as well
            replace_file(ref, lambda part: part.write_text(commit))


def _weights(snapshot: Snapshot, kinds: Sequence[str]) -> list[Entry]:
    files = [entry for entry in snapshot.entries if entry.name.endswith(".safetensors")]
    found = [(entry, _kind(snapshot, entry)) for entry in files]
    return [entry for entry, kind in found if (kind in kinds if kinds else kind.startswith("weights."))]


@lru_cache
def _kind(snapshot: Snapshot, entry: Entry) -> str:
    """The kind of a file by its header, which is all that is read of one that is not in the cache; else nothing."""
    from huggingface_hub.errors import SafetensorsParsingError

    blob = snapshot.repository.cache / "blobs" / (entry.sha256 or "")
    path = snapshot.folder / entry.name if entry.sha256 is None or not blob.is_file() else blob
    try:
        if path.is_file():
            return read_header(path).kind
        api, repository = library(), snapshot.repository.name
        metadata = api.parse_safetensors_file_metadata(repository, entry.name, revision=snapshot.commit).metadata
        kind = json.loads(metadata["dalle"])["kind"]
        return kind if isinstance(kind, str) else ""
    except DalleError:
        _check(snapshot, entry, path)
        return ""
    except (SafetensorsParsingError, KeyError, TypeError, ValueError):
        return ""


def _download(snapshot: Snapshot, entry: Entry) -> Path:
    """The file in the cache, which huggingface-hub lays out; fetched if it is not there yet."""
    from huggingface_hub import hf_hub_download

    path = snapshot.folder / entry.name
    if not path.is_file():
        if entry.sha256 and entry.size:
            _continue(snapshot, entry.name, entry.size, entry.sha256)
        hf_hub_download(snapshot.repository.name, entry.name, revision=snapshot.commit)
    return path


def _continue(snapshot: Snapshot, name: str, size: int, sha256: str) -> None:
    """Fetch a large file to where huggingface-hub will find it, from the byte on where an earlier process was cut off.

    Newer versions of huggingface-hub continue within one process alone.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

    repository = snapshot.repository
    blob = repository.cache / "blobs" / sha256
    part = blob.with_name(f"{sha256}.incomplete")
    lock = repository.cache.parent / ".locks" / repository.cache.name / f"{sha256}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        if part.exists() and part.stat().st_size > size:
            part.unlink()
        url = hf_hub_url(repository.name, name, revision=snapshot.commit)
        headers = build_hf_headers(library_name="dalle", library_version=__version__)
        with open(part, "ab") as file:
            while (at := file.tell()) < size:
                try:
                    http_get(url, file, resume_size=at, headers=headers, expected_size=size, displayed_filename=name)
                except _faults():
                    if file.tell() <= at:  # nothing has arrived since the last time
                        raise
        os.replace(part, blob)


def _check(snapshot: Snapshot, entry: Entry, path: Path) -> None:
    """Hold a file's bytes against the digest; a file of other bytes leaves the cache.

    Raises:
        DalleError: they differ.
    """
    if entry.sha256:
        expected, found = entry.sha256, digest_file(path)
    elif entry.blob:
        data = path.read_bytes()  # git keeps small files alone
        expected, found = entry.blob, hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    else:
        return
    if found == expected:
        return
    for file in (path.resolve(), snapshot.repository.cache / "blobs" / expected, snapshot.folder / entry.name):
        file.unlink(missing_ok=True)
    raise DalleError(
        f"expected {entry.name} of {snapshot.repository} of digest {expected[:12]}, found {found[:12]}: changed bytes; "
        "it was taken out of the cache, run again to fetch it anew"
    )


def upload(name: str, files: Sequence[Path], message: str, private: bool, force: bool) -> tuple[str, str]:
    """Put a bundle's files into a repository, made if there is none, as one commit; the repository's URL, the commit.

    One commit, so that nobody sees half a bundle.

    Raises:
        DalleError: no right to, no connection, weights of something else there, or it is public and should be private.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repository, ours = parse(name), {file.name for file in files}
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
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationDelete(path_in_repo=file) for file in stale),
            *(CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file)) for file in files),
        ]
        try:
            commit = api.create_commit(name, operations, commit_message=message, parent_commit=info.sha)
        except RuntimeError as error:  # what huggingface-hub makes of a fault in one of its threads
            raise (error.__cause__ or error) from None
    return str(url), commit.oid


def library() -> "HfApi":
    """huggingface-hub, which keeps silent but for bars on a terminal."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not os.isatty(2):
        disable_progress_bars()
    return HfApi(library_name="dalle", library_version=__version__)


def _faults() -> tuple[type[Exception], ...]:
    """What requests fail with. The library beneath huggingface-hub has changed twice; its errors' parent is there."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1], OSError, ValueError


def _unreachable(error: Exception) -> bool:
    """Whether the hub gave no answer, or said that it cannot give one now."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    return not isinstance(error, ValueError)


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "no connection (HF_HUB_OFFLINE is set)"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f"status {error.response.status_code}"
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    return f"{'a fault' if type(error) is OSError else 'no connection'} ({_first_line(cause)})"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line), type(error).__name__)


@contextmanager
def _one_line(repository: Repository) -> Iterator[None]:
    """Whatever goes wrong between here and the hub as one line; a full disk is none of that."""
    try:
        yield
    except _faults() as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise
        found, todo = _explain(repository, error)
        raise DalleError(f"expected the hub repository {repository}, found {found}; {todo}") from None


def _explain(repository: Repository, error: Exception) -> tuple[str, str]:
    """What was found, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "that it is gated", f"ask for access on its page, then {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "none that this login sees", f"check the name; if it is private, {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no revision {repository.revision}", "give a branch, a tag or a commit after the @"
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status in (401, 403):
            return f"that the token is refused (status {status})", f"{LOG_IN}, with a token that may do this"
        return f"status {status} ({_first_line(error)})", "try again later"
    if isinstance(error, ValueError):
        return f"an answer that makes no sense ({_first_line(error)})", "check the name and HF_ENDPOINT"
    return _reason(error), "check the network and run again: what has arrived is kept"
