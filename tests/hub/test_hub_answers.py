"""A hub that means harm: nothing that it says becomes a path, a size or memory before it is checked."""

import json
from types import SimpleNamespace

import pytest
from hub_server import Handler
from test_hub import planted, read  # noqa: F401  # a fixture

from dalle_cli.hub import answers

pytest_plugins = "hub_worker"

SHA = "0" * 40


def answer(status=200, method="GET", body=(b"x",), **headers):
    """An answer as the HTTP client gives it."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return SimpleNamespace(status_code=status, headers=named, stream=Stream(body)), method


class Stream:
    def __init__(self, blocks):
        self.blocks, self.closed = blocks, False

    def __iter__(self):
        return iter(self.blocks)

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    "headers",
    [
        {"method": "HEAD", "ETag": f'"{SHA}"', "X_Repo_Commit": SHA, "Content_Length": "7"},
        {"method": "HEAD", "ETag": f'W/"{SHA}"'},
        {"method": "HEAD", "ETag": '"an-endpoint-of-s3"', "X_Linked_ETag": "a" * 64, "X_Linked_Size": "123456789012"},
        {"method": "HEAD", "status": 404, "ETag": '"none"'},
        {"ETag": '"a-part-2"', "Location": "https://x/y"},
        {"Location": "/x/y", "Content_Encoding": "identity"},
    ],
)
def test_answers_with_sense_pass(headers):
    answers._check(*answer(**headers))


@pytest.mark.parametrize(
    "headers",
    [
        {"method": "HEAD", "ETag": '"/etc/EVIL"'},
        {"method": "HEAD", "ETag": '"../../EVIL"'},
        {"method": "HEAD", "ETag": f'"{SHA}0"'},
        {"method": "HEAD", "ETag": f'"{SHA}", "{SHA}"'},
        {"method": "HEAD", "ETag": f'"{SHA}"', "X_Linked_ETag": "../x"},
        {"X_Repo_Commit": "../../../EVIL"},
        {"X_Repo_Commit": "main"},
        {"X_Linked_Size": "-1"},
        {"X_Linked_Size": "1e9"},
        {"Content_Length": "9" * 30},
        {"Content_Length": str(answers.MAX_BODY + 1)},
        {"Location": "file:///etc/passwd"},
        {"Location": "gopher://x"},
        {"Content_Encoding": "gzip"},
    ],
)
def test_answers_without_sense_are_refused(headers):
    with pytest.raises(answers.BadAnswer):
        answers._check(*answer(**headers))


def test_a_body_that_does_not_end():
    endless, method = answer(body=iter(lambda: bytes(1 << 20), None))
    body = endless.stream
    with answers.bodies_up_to(3 << 20):
        answers._check(endless, method)
    assert isinstance(endless.stream, Stream)
    with pytest.raises(answers.BadAnswer, match="does not end"):
        assert len(list(endless.stream)) < 4
    endless.stream.close()
    assert body.closed


def test_a_body_of_the_package_requests():
    raw = SimpleNamespace(stream=lambda size, decode_content: iter(lambda: bytes(size), None))
    response = SimpleNamespace(status_code=200, headers={}, raw=raw)
    answers._check(response, "GET")
    with pytest.raises(answers.BadAnswer, match="does not end"):
        list(response.raw.stream(1 << 20, decode_content=True))


@pytest.mark.parametrize(
    "name", ["a.json", "unet/a b.bin", ".gitattributes", "é (1).safetensors", "..a/...", "x" * 255]
)
def test_plain_names(name):
    assert answers.is_plain(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/a",
        "a/",
        "a//b",
        "../a",
        "a/../b",
        "a/./b",
        "..\\a",
        "a\0",
        "a\nb",
        "\x1b[2J",
        "C:a",
        "c:/a",
        "~/a",
        "x" * 256,
        "a/" * 300,
        None,
        3,
        ["a"],
    ],
)
def test_names_that_are_not_plain(name):
    assert not answers.is_plain(name)


@pytest.mark.parametrize(
    ("size", "fine"),
    [(0, True), (1 << 40, True), (-1, False), (10**15, False), (1.0, False), (True, False), ("7", False)],
)
def test_sizes(size, fine):
    assert answers.is_size(size) is fine


# Through the command


def about(change):
    """What the hub says of a repository, changed."""
    original = Handler.api

    def api(self, name, verb="revision", revision="main", *, query):
        kept = self.answer

        def changed(status, body=b"", **headers):
            self.answer = kept
            return kept(status, change(json.loads(json.dumps(body))) if status == 200 else body, **headers)

        self.answer = changed
        return original(self, name, verb, revision, query=query)

    return api


@pytest.mark.parametrize(
    "change",
    [
        lambda body: [],
        lambda body: {**body, "siblings": None},
        lambda body: {**body, "siblings": [1, 2]},
        lambda body: {**body, "sha": None},
        lambda body: {**body, "sha": "../" * 10 + SHA},
        lambda body: b"[" * 100_000,
        lambda body: b"\0" * 100,
        lambda body: b"[" * (9 << 20),
        lambda body: {**body, "siblings": [{**s, "size": "many"} for s in body["siblings"]]},
        lambda body: {**body, "siblings": [{**s, "lfs": "x"} for s in body["siblings"]]},
        lambda body: {
            **body,
            "siblings": [
                {**s, "size": 10, "lfs": {**s["lfs"], "size": 10}} if "lfs" in s else s for s in body["siblings"]
            ],
        },
        lambda body: {**body, "siblings": [{**s, "size": 10**15} for s in body["siblings"]]},
    ],
)
def test_a_repository_that_is_not_what_it_says(quiet, bad, planted, change, monkeypatch):  # noqa: F811
    quiet.add("me/strange", read(planted))
    monkeypatch.setattr(Handler, "api", about(change))
    assert len(bad("pull", "hf://me/strange")) < 600


@pytest.mark.parametrize("etag", ['"/{root}/EVIL"', '"../../../../EVIL"'])
def test_an_etag_becomes_no_path(quiet, bad, planted, tmp_path, etag, monkeypatch):  # noqa: F811
    quiet.add("me/tagged", read(planted))
    send = Handler.send
    lie = etag.format(root=tmp_path)
    monkeypatch.setattr(
        Handler, "send", lambda self, name, data, **more: send(self, name, data, **{**more, "ETag": lie})
    )
    assert "an answer that makes no sense (ETag" in bad("pull", "hf://me/tagged", "-o", tmp_path / "out")
    assert not list(tmp_path.rglob("EVIL*"))


def test_endless_files(quiet, bad, planted, tmp_path, monkeypatch):  # noqa: F811
    quiet.add("me/endless", read(planted))
    send = Handler.send

    def endless(self, name, data, **headers):
        if self.command == "HEAD" or self.headers.get("Range"):
            return send(self, name, data, **headers)
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection, self.server.endless = True, 0
        try:
            while self.server.endless < 1 << 30:
                self.wfile.write(bytes(1 << 20))
                self.server.endless += 1 << 20
        except OSError:
            pass

    monkeypatch.setattr(Handler, "send", endless)
    assert "an answer that does not end" in bad("pull", "hf://me/endless", "-o", tmp_path / "out")
    assert quiet.endless < 100 << 20
