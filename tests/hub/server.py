"""A small Hub over real sockets: the endpoints that huggingface_hub, diffusers and PEFT ask, git-like storage in
memory, and faults on demand. It keeps what matters about the real one: commits with parents, `parent_commit` checked
(412), branches, tags, pull requests, LFS, private repositories, `X-Error-Code`, ETags, and error texts that repeat what
was sent (so that a leaking client would be seen to leak).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ROUTES = [  # name, method, path; the first that matches
    ("create", "POST", r"/api/repos/create"),
    ("yaml", "POST", r"/api/validate-yaml"),
    ("preupload", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>.+)"),
    ("commit", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>.+)"),
    ("branch", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<rev>.+)"),
    ("refs", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/refs"),
    ("discussions", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/discussions"),
    ("tree", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/]+).*"),
    ("info", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<rev>.+))?"),
    ("batch", "POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("upload", "PUT", r"/lfs/(?P<repo>[^/]+/[^/]+)/(?P<path>[0-9a-f]{64})"),
    ("head", "HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)"),
    ("file", "GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)"),
]
AFTER = ("lost", "mute", "half", "garbled")  # faults of the reply: the work is done first


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Commit:
    files: dict[str, bytes]
    parent: str | None
    message: str
    oid: str = ""

    def __post_init__(self) -> None:
        listed = json.dumps([self.parent, self.message, {k: git_hash(v) for k, v in sorted(self.files.items())}])
        self.oid = hashlib.sha1(listed.encode()).hexdigest()


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branches, "refs/pr/1", tags
    tags: set[str] = field(default_factory=set)
    requests: list[dict[str, Any]] = field(default_factory=list)
    lfs: bool = False
    stored: dict[str, bytes] = field(default_factory=dict)  # LFS objects
    listed: dict[str, bytes] = field(default_factory=dict)  # more names to list and to serve, whatever they are
    served: dict[str, bytes] = field(default_factory=dict)  # sent in place of what is listed
    headers: dict[str, str] = field(default_factory=dict)  # put into replies to HEAD, in place of the right ones

    def add(self, files: dict[str, bytes], branch: str = "main", message: str = "test") -> str:
        """A commit of somebody else; returns its hash."""
        parent = self.refs.get(branch)
        commit = Commit({**(self.commits[parent].files if parent else {}), **files}, parent, message)
        self.commits[commit.oid] = commit
        self.refs[branch] = commit.oid
        return commit.oid

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    def log(self, branch: str = "main") -> list[Commit]:
        """The branch's commits, newest first, without the one that every repository starts with."""
        out, oid = [], self.refs.get(branch)
        while oid is not None and self.commits[oid].parent is not None:
            out.append(self.commits[oid])
            oid = self.commits[oid].parent
        return out


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **more: str) -> None:
        self.status, self.document, self.code = status, {"error": message, **more}, code


class LocalHub(ThreadingHTTPServer):
    """The server; start it with `with hub.running():`. Faults and the request log are kept per repository."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.faults: dict[tuple[str, str], list[Any]] = {}
        self.seen: dict[str, list[tuple[str, str]]] = {}
        self.lock = threading.RLock()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @contextlib.contextmanager
    def running(self) -> Iterator[LocalHub]:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield self
        finally:
            self.closing.set()
            self.shutdown()
            self.server_close()

    def make(self, name: str, *, private: bool = True, lfs: bool = False) -> Repo:
        repo = self.repos[name] = Repo(private, lfs=lfs)
        first = Commit({".gitattributes": b"*.safetensors filter=lfs\n"}, None, "initial commit")
        repo.commits[first.oid] = first
        repo.refs["main"] = first.oid
        return repo

    def fail(self, name: str, route: str, fault: Any, times: int = 10**6, after: int = 0) -> None:
        """Let `times` requests to a route fail: a status, (status, headers), or a word (see `Handler`)."""
        self.faults[name, route] = [fault, times, after]

    def count(self, name: str) -> Counter[str]:
        """How often each route was asked about a repository."""
        return Counter(route for route, _ in self.seen.get(name, []))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nothing to report."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: LocalHub

    def log_message(self, *args: Any) -> None: ...

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hits = [(route, re.fullmatch(pattern, url.path)) for route, way, pattern in ROUTES if way == self.command]
        route, match = next(((route, match) for route, match in hits if match), ("", None))
        if match is None:
            return self._json({"error": f"no such page: {self.path}"}, 404)
        found = match.groupdict()
        name, self.revision, self.file = (unquote(found.get(key) or "") for key in ("repo", "rev", "path"))
        if route == "create":
            asked = json.loads(self.body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        self.name = name
        fault = self._fault(name, route)
        if fault is not None and fault not in AFTER and self._break(fault):
            return None
        try:
            with self.server.lock:
                reply = getattr(self, f"do_{route}")()
        except Refused as refused:
            return self._json(refused.document, refused.status, refused.code)
        if fault in AFTER:
            return self._spoil(fault)
        return reply() if callable(reply) else self._json(reply)

    do_GET = do_POST = do_PUT = do_HEAD = _serve

    def _fault(self, name: str, route: str) -> Any:
        with self.server.lock:
            self.server.seen.setdefault(name, []).append((route, self.file))
            entry = self.server.faults.get((name, route))
            if entry is None or entry[1] <= 0:
                return None
            if entry[2] > 0:
                entry[2] -= 1
                return None
            entry[1] -= 1
            return entry[0]

    def _break(self, fault: Any) -> bool:
        """A fault in place of the work. True if nothing more is to be sent."""
        if fault == "reset":
            self._cut(reset=True)
        elif fault == "stall":
            self.server.closing.wait(30)
            self._cut()
        elif fault == "drip":  # a reply that never ends, a byte at a time
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n")
            with contextlib.suppress(OSError):
                for _ in range(300):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    if self.server.closing.wait(0.05):
                        break
            self._cut()
        else:
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            heard = self.headers.get("Authorization", "nobody")
            self._json({"error": f"injected {status} for {heard}"}, status, headers=headers)
        return True

    def _spoil(self, fault: str) -> None:
        """A fault in place of the reply."""
        if fault == "mute":
            self.server.closing.wait(30)
        if fault == "half":
            self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{"comm')
        if fault == "garbled":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 13\r\n\r\n<html></html>")
            return
        self._cut()

    def _cut(self, reset: bool = False) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            if reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                self.connection.shutdown(socket.SHUT_RDWR)
            self.connection.close()

    def _json(self, document: Any, status: int = 200, code: str | None = None, headers: Any = None) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        extra = {**({"X-Error-Code": code} if code else {}), **(headers or {})}
        if status >= 400:
            extra.setdefault("X-Error-Message", str(document["error"]))
        for key, value in extra.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # what the endpoints do; all run under the server's lock

    def _repo(self) -> Repo:
        repo = self.server.repos.get(self.name)
        known = self.headers.get("Authorization") == f"Bearer {self.server.token}"
        if not known and (self.headers.get("Authorization") or repo is None or repo.private):
            raise Refused(401, "Invalid credentials in Authorization header")
        if repo is None:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return repo

    def _commit(self) -> tuple[Repo, Commit]:
        repo = self._repo()
        commit = repo.at(self.revision or "main")
        if commit is None:
            raise Refused(404, f"Invalid rev id: {self.revision}", "RevisionNotFound")
        return repo, commit

    def do_create(self) -> Any:
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            raise Refused(401, "Invalid username or password.")
        if self.name in self.server.repos:
            raise Refused(409, "You already created this model repo", url=f"{self.server.url}/{self.name}")
        asked = json.loads(self.body)
        self.server.make(self.name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return {"url": f"{self.server.url}/{self.name}"}

    def do_yaml(self) -> Any:
        return {"errors": [], "warnings": []}

    def do_info(self) -> Any:
        repo, commit = self._commit()
        siblings = []
        for path, data in {**commit.files, **repo.listed}.items():
            entry: dict[str, Any] = {"rfilename": path}
            if "blobs" in self.query:
                entry |= {"size": len(data), "blobId": git_hash(data)}
                if repo.lfs and path.endswith(".safetensors"):
                    entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                    entry["blobId"] = git_hash(b"pointer" + data)
            siblings.append(entry)
        return {"id": self.name, "modelId": self.name, "sha": commit.oid, "private": repo.private, "siblings": siblings}

    def do_tree(self) -> Any:
        repo, commit = self._commit()
        files = {**commit.files, **repo.listed}
        return [{"type": "file", "path": k, "size": len(v), "oid": git_hash(v)} for k, v in files.items()]

    def do_refs(self) -> Any:
        repo = self._repo()

        def entries(keep: Any) -> list[dict[str, str]]:
            return [{"name": k, "ref": f"refs/{k}", "targetCommit": v} for k, v in repo.refs.items() if keep(k)]

        branches = entries(lambda name: name not in repo.tags and not name.startswith("refs/"))
        return {"branches": branches, "converts": [], "tags": entries(lambda name: name in repo.tags)}

    def do_branch(self) -> Any:
        repo = self._repo()
        if self.revision in repo.refs:
            raise Refused(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        repo.refs[self.revision] = repo.refs.get(start, start)
        return {}

    def do_discussions(self) -> Any:
        found = self._repo().requests
        return {"count": len(found), "start": 0, "discussions": found}

    def do_preupload(self) -> Any:
        repo = self._repo()
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if repo.lfs and file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        return {"files": files}

    def do_batch(self) -> Any:
        self._repo()
        return {
            "transfer": "basic",
            "objects": [
                {**entry, "actions": {"upload": {"href": f"{self.server.url}/lfs/{self.name}/{entry['oid']}"}}}
                for entry in json.loads(self.body)["objects"]
            ],
        }

    def do_upload(self) -> Any:
        if hashlib.sha256(self.body).hexdigest() != self.file:
            raise Refused(400, "the content is not what was announced")
        self.server.repos[self.name].stored[self.file] = self.body
        return {}

    def do_commit(self) -> Any:
        repo, head = self._commit()
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, head.oid):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in repo.stored:
                    raise Refused(400, "LFS object was not uploaded")
                files[value["path"]] = repo.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = Commit(files, head.oid, header["summary"])
        repo.commits[commit.oid] = commit
        reply = {"commitOid": commit.oid, "commitUrl": f"{self.server.url}/{self.name}/commit/{commit.oid}"}
        if "create_pr" not in self.query:
            repo.refs[self.revision] = commit.oid
            return reply
        number = len(repo.requests) + 1
        repo.refs[f"refs/pr/{number}"] = commit.oid
        repo.requests.append(
            {
                "title": header["summary"], "num": number, "author": {"name": "me"}, "status": "open",
                "createdAt": "2024-01-01T00:00:00.000Z", "isPullRequest": True,
                "repo": {"name": self.name, "type": "model"},
            }
        )  # fmt: skip
        return {**reply, "pullRequestUrl": f"{self.server.url}/{self.name}/discussions/{number}"}

    def do_head(self) -> Any:
        repo, commit = self._commit()
        data = {**commit.files, **repo.listed, **repo.served}.get(self.file)
        if data is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        large = repo.lfs and self.file.endswith(".safetensors")
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") or [0, 0])[1])
        etag = hashlib.sha256(data).hexdigest() if large else git_hash(data)

        def reply() -> None:
            part = data[start:]
            self.send_response(206 if start else 200)
            headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"', "Content-Length": str(len(part))}
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            for key, value in {**headers, **repo.headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(part)

        return reply

    do_file = do_head


def wait_until(condition: Any, seconds: float = 5.0) -> bool:
    """Whether the condition came true in time; for what a background thread does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())
