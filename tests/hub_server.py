"""A hub on loopback: as much of its API as huggingface-hub needs to fetch and to put, and the faults that it may have.

Large files (`.safetensors` and what others call theirs) are sent from another origin (localhost instead of 127.0.0.1),
as the real hub's are.
"""

import base64
import hashlib
import http.server
import json
import socket
import struct
import threading
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt", ".ckpt", ".msgpack")
GOOD, POOR = "hf_good", "hf_poor"  # tokens: one that may do all, and one of somebody who has been let into nothing


def git_sha(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    refs: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)

    def commit(self, files, ref="main"):
        body = json.dumps([len(self.commits), sorted((name, git_sha(data)) for name, data in files.items())])
        sha = hashlib.sha1(body.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha

    def find(self, revision):
        sha = self.refs.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


class Hub(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.objects, self.log = {}, {}, []
        self.served = {}  # name of a large file: bytes of it that were sent
        self.leaked = []  # requests of large files that came with a token
        self.changed = set()  # names of files whose bytes are changed on their way
        self.cut = {}  # name of a large file: after how many bytes the connection is dropped, once
        self.stall = {}  # name of a large file: after how many bytes nothing more comes
        self.stalled, self.status, self.reset = threading.Event(), 0, False
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name, files, **options):
        self.repos[name] = repo = Repo(**options)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n", **files})
        return repo

    def stop(self):
        self.shutdown()
        self.server_close()
        self.thread.join()

    def handle_error(self, request, client_address):
        """A client that went away is no fault of the hub."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def setup(self):
        super().setup()
        self.connection.settimeout(20)

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code="", message=""):
        self.answer(status, {"error": message or code}, X_Error_Code=code, X_Error_Message=message or code)

    def do_GET(self):
        self.route()

    do_HEAD = do_POST = do_PUT = do_GET

    def route(self):
        hub, url = self.server, urlsplit(self.path)
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(size)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        path = unquote(url.path).strip("/")
        hub.log.append(f"{self.command} {path}")
        if hub.status:
            return self.refuse(hub.status, message="not today")
        if path.startswith("cdn/"):
            return self.large(*path.split("/", 2)[1:])
        if path.startswith("upload/"):
            hub.objects[path.partition("/")[2]] = self.body
            return self.answer(200)
        if self.token not in ("", GOOD, POOR):
            return self.refuse(401, message="Invalid credentials in Authorization header")
        if path == "api/repos/create":
            return self.create()
        if path == "api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.startswith("api/models/"):
            owner, name, *rest = path.removeprefix("api/models/").split("/", 3)
            return self.api(f"{owner}/{name}", *rest, query=parse_qs(url.query))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch()
        owner, name, verb, rest = path.split("/", 3)
        assert verb == "resolve", path
        return self.resolve(f"{owner}/{name}", *rest.split("/", 1))

    def repo(self, name):
        """The repository, or None after an answer that there is none."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self.token != GOOD):
            self.refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def api(self, name, verb="revision", revision="main", *, query):
        repo = self.repo(name)
        if repo is None:
            return None
        if verb == "preupload":
            return self.preupload()
        if verb == "commit":
            return self.commit(name, repo)
        found = repo.find(revision)
        if found is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha, files = found
        if verb == "tree":
            listed = [{"type": "file", "path": p, "size": len(d), "oid": git_sha(d)} for p, d in files.items()]
            return self.answer(200, listed)
        assert verb == "revision", self.path
        siblings = [
            self.sibling(path, data) if "blobs" in query else {"rfilename": path} for path, data in files.items()
        ]
        about = {"id": name, "modelId": name, "sha": sha, "private": repo.private, "gated": repo.gated and "auto"}
        return self.answer(200, {**about, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def sibling(self, path, data):
        about = {"rfilename": path, "size": len(data), "blobId": git_sha(data)}
        if path.endswith(LARGE):
            about["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return about

    def resolve(self, name, revision, path):
        repo = self.repo(name)
        if repo is None:
            return None
        if repo.gated and self.token != GOOD:
            return self.refuse(403 if self.token else 401, "GatedRepo", f"Access to model {name} is restricted.")
        found = repo.find(revision)
        if found is None:
            return self.refuse(404, "RevisionNotFound", "no such revision")
        sha, files = found
        if path not in files:
            return self.refuse(404, "EntryNotFound", "no such file")
        data, about = files[path], {"X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        if not path.endswith(LARGE):
            return self.send(path, data, ETag=f'"{git_sha(data)}"', **about)
        oid = hashlib.sha256(data).hexdigest()
        self.server.objects[oid] = data
        place = f"http://localhost:{self.server.server_address[1]}/cdn/{oid}/{path}"
        return self.answer(302, Location=place, X_Linked_Etag=f'"{oid}"', X_Linked_Size=len(data), **about)

    def large(self, oid, name):
        if self.token:
            self.server.leaked.append(name)
        return self.send(name, self.server.objects[oid])

    def send(self, name, data, **headers):
        """A file's bytes, or the range asked for, with whatever fault it is to have."""
        hub, status, start, end = self.server, 200, 0, len(data)
        if name in hub.changed:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            status, start, end = 206, int(first), min(int(last) + 1 if last else end, end)
            headers["Content_Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self.send_response(status)
        for key, value in {"Content-Length": end - start, **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = end
        header_only = end - start < len(data) and start == 0
        if not header_only:
            stop = min(end, *(table[name] for table in (hub.cut, hub.stall) if table.get(name, 0) > start), end)
        for at in range(start, stop, 1 << 16):
            part = data[at : min(at + (1 << 16), stop)]
            self.wfile.write(part)
            hub.served[name] = hub.served.get(name, 0) + len(part)
        if stop < end:
            if hub.stall.pop(name, None):
                self.wfile.flush()
                hub.stalled.set()
                self.connection.settimeout(20)
                self.rfile.read(1)  # until the other side is gone
            hub.cut.pop(name, None)
            if hub.reset:  # as when a router forgets a connection: no farewell
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            self.close_connection = True

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.server.endpoint}/{name}", "name": name}
        if self.token != GOOD:
            return self.refuse(403 if self.token else 401, message="You don't have the rights to create a model")
        if name in self.server.repos:
            return self.answer(409, {"error": "You already created this model repo", **url})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.add(name, {}, private=bool(private))
        return self.answer(200, url)

    def preupload(self):
        if self.token != GOOD:
            return self.refuse(403, message="no write access")
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        return self.answer(200, {"files": files})

    def batch(self):
        asked = json.loads(self.body)
        assert asked["operation"] == "upload"
        objects = []
        for one in asked["objects"]:
            entry = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.server.objects:
                entry["actions"] = {"upload": {"href": f"{self.server.endpoint}/upload/{one['oid']}"}}
            objects.append(entry)
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, name, repo):
        lines = [json.loads(line) for line in self.body.splitlines()]
        head, files = lines[0]["value"], dict(repo.commits[repo.refs["main"]])
        if head.get("parentCommit") not in (None, repo.refs["main"]):
            return self.refuse(412, message="the branch has moved on")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                data = self.server.objects[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                assert len(data) == value["size"]
                files[value["path"]] = data
        sha = repo.commit(files)
        repo.message = head["summary"]
        url = f"{self.server.endpoint}/{name}/commit/{sha}"
        return self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url})
