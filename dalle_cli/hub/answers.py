"""What a hub answers, checked before it becomes a path, a size or memory.

huggingface-hub puts files into its cache under names from HTTP headers, and reads bodies whole. `guard` makes its
HTTP client refuse headers that are no digests and bodies that are too long; the rest checks what it has parsed.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

COMMIT = re.compile(r"[0-9a-f]{40}")
DIGEST = re.compile(r"([0-9a-f]{40}|[0-9a-f]{64})?")
ETAG = re.compile(r'(W/)?"?([0-9a-f]{40}|[0-9a-f]{64})"?')
SIZE = re.compile(r"[0-9]{1,14}")
MAX_BODY = 8 << 20  # bytes of an answer that is no file; JSON takes some 25 times as many in memory
MAX_FILES = 100_000  # of a repository
LONGEST = 512  # characters of a file's name
_PART = re.compile(r"(?!\.{1,2}$)[^\x00-\x1f\x7f\\]{1,255}")
# What huggingface-hub's parsers raise for JSON of another shape.
_NONSENSE = (TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError)
_most: ContextVar[int] = ContextVar("most", default=MAX_BODY)


class BadAnswer(OSError):
    """An answer that is refused. It is no error of this machine, so it has no `errno`."""


@contextmanager
def bodies_up_to(size: int) -> Iterator[None]:
    """Accept bodies of this many bytes, as those of a file that is fetched."""
    token = _most.set(max(size, 1 << 20))  # errors have bodies, too
    try:
        yield
    finally:
        _most.reset(token)


@contextmanager
def sensible() -> Iterator[None]:
    """Raise what JSON of another shape causes in huggingface-hub as a ValueError."""
    try:
        yield
    except _NONSENSE as error:
        raise ValueError(f"{type(error).__name__}: {str(error)[:200]}") from None


def is_plain(name: object) -> bool:
    """Whether a file's name is a relative path that stays below its folder on every system."""
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST:
        return False
    return all(map(_PART.fullmatch, name.split("/"))) and not re.match(r"[A-Za-z]:|~", name)


def is_size(value: object) -> bool:
    """Whether this is a number of bytes that a file may have."""
    return type(value) is int and SIZE.fullmatch(str(value)) is not None


def guard() -> None:
    """Check the answers to all requests of huggingface-hub from now on."""
    global _guarded
    if _guarded:
        return
    _guarded = True
    try:
        from huggingface_hub import set_client_factory
        from huggingface_hub.utils import _http
    except ImportError:  # before version 1.0
        from huggingface_hub import configure_http_backend
        from requests import Session

        def session() -> Any:
            made = Session()
            made.hooks["response"].append(lambda response, *args, **options: _check(response, response.request.method))
            return made

        configure_http_backend(session)
        return
    make = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)

    def client() -> Any:
        made = make()
        made.headers["accept-encoding"] = "identity"  # compressed bodies may grow a thousandfold
        hooks = made.event_hooks
        hooks["response"].append(lambda response: _check(response, response.request.method))
        made.event_hooks = hooks
        return made

    set_client_factory(client)


_guarded = False


def _check(response: Any, method: str) -> None:
    """Refuse an answer by its headers, and count the bytes of its body.

    Raises:
        BadAnswer: headers that are no digests, sizes or URLs, or a body that is compressed or says to be too long.
    """
    headers, most = response.headers, _most.get()
    found = {name: headers.get(name) for name in ("X-Repo-Commit", "X-Linked-Size", "Content-Length", "Location")}
    expected = {"X-Repo-Commit": COMMIT, "X-Linked-Size": SIZE, "Content-Length": SIZE}
    if method == "HEAD" and response.status_code < 400:
        found["ETag"] = headers.get("X-Linked-ETag") or headers.get("ETag")
        expected["ETag"] = ETAG
    for name, pattern in expected.items():
        if found[name] is not None and not pattern.fullmatch(found[name]):
            raise BadAnswer(f"{name} {found[name][:100]!r}")
    if found["Location"] and urlsplit(found["Location"]).scheme not in ("", "http", "https"):
        raise BadAnswer(f"a redirect to {found['Location'][:100]!r}")
    if method == "HEAD":
        return
    if headers.get("Content-Encoding", "identity") != "identity":
        raise BadAnswer("a compressed answer, which was not asked for")
    if int(found["Content-Length"] or 0) > most:
        raise BadAnswer(f"an answer of {found['Content-Length']} bytes, more than {most:,}")
    _count(response, most)


def _count(response: Any, most: int) -> None:
    """Make the body stop with an error after `most` bytes."""
    if hasattr(response, "raw"):  # of the package requests
        read = response.raw.stream
        response.raw.stream = lambda *args, **options: _up_to(read(*args, **options), most)
        return
    body = response.stream
    base = type(body)

    class Counted(base):  # type: ignore[misc, valid-type]  # as the client checks
        def __init__(self) -> None: ...

        def __iter__(self) -> Iterator[bytes]:
            return _up_to(body, most)

        def close(self) -> None:
            body.close()

    response.stream = Counted()


def _up_to(blocks: Any, most: int) -> Iterator[bytes]:
    for block in blocks:
        if (most := most - len(block)) < 0:
            raise BadAnswer("an answer that does not end")
        yield block
