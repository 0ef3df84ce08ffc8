"""A Hugging Face hub on the loopback interface: the parts of its HTTP API that the real clients use here.

Clients are pointed at it by `environment()` (HF_ENDPOINT, a cache of their own), in a process of their own: their
constants are fixed at import. Repositories live in memory. Served: information, listings, files with byte ranges,
private and gated repositories, whoami, creation, uploads (regular and LFS) and commits, for models and data
sets. A repository's commits are numbered, so that a test can tell one revision from another.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from support import loopback

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet")
DATE = "2026-01-01T00:00:00.000Z"

_RESOLVE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_INFO = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/revision/([^/]+))?")
_TREE = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?")
_ACTION = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/(paths-info|preupload|commit|branch)/([^/]+)")
_LFS_BATCH = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")


@dataclass
class Repo:
    """A repository: its commits, each a whole set of files, and what its branches and tags point at."""

    kind: str
    """models or datasets."""
    name: str
    private: bool = False
    gated: bool = False
    """Files are given to `Hub.readers` alone; everyone sees what there is."""
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, changes: Mapping[str, bytes], *, branch: str = "main") -> str:
        """Add a commit with these files changed; returns its hash."""
        files = self.commits.get(self.refs.get(branch, ""), {}) | dict(changes)
        commit = hashlib.sha1(f"{self.kind}/{self.name}/{len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit

    def find(self, revision: str) -> str | None:
        """Return the commit of a branch, a tag or a hash."""
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass
class Request:
    """One request that was answered, for tests that count them."""

    method: str
    path: str
    num_bytes: int


class Hub:
    """The repositories, the users and what was asked of them."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.tokens: dict[str, str] = {"hf_owner": "owner", "hf_guest": "guest"}
        """User by token. A user may write under the own name alone."""
        self.readers: set[str] = {"owner"}
        """Users who accepted the licence of every gated repository; a private one is its owner's."""
        self.uploads: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.url = ""
        self.seconds_per_chunk = 0.0
        """How long each MB of a file takes to be sent, for tests of downloads that are interrupted."""

    def add(self, name: str, files: Mapping[str, bytes] | Path, *, kind: str = "models", **settings: bool) -> Repo:
        """Add a repository with one commit: these files, or those of a folder."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        repo = self.repos[kind, name] = Repo(kind=kind, name=name, **settings)
        repo.commit(files)
        return repo

    def environment(self, home: Path, *, token: str | None = None) -> dict[str, str]:
        """Variables of a client process: this hub and no other, its cache and settings under `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "WANDB"))}
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        return kept | settings | ({"HF_TOKEN": token} if token is not None else {})

    def downloaded(self, suffix: str) -> int:
        """Bytes of files with this ending that were given away."""
        return sum(r.num_bytes for r in self.requests if r.method == "GET" and r.path.endswith(suffix))


@contextlib.contextmanager
def start_hub() -> Iterator[Hub]:
    """Serve a hub for the duration."""
    hub = Hub()

    class Bound(_Handler):
        pass

    Bound.hub = hub
    with loopback.serving(Bound) as hub.url:
        yield hub


class _Refused(Exception):
    """An answer that is no 200: (status, error code, message)."""


class _Handler(loopback.Handler):
    hub: Hub

    def _answer(self) -> None:
        self._body = self.body()
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            self._body = self._read_chunks()
        parts = urlsplit(self.path)
        self._path, self._query = parts.path, parse_qs(parts.query)
        try:
            self._route()
        except _Refused as refusal:
            status, code, message = refusal.args
            headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
            self._send(status, {"error": message}, headers=headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self) -> None:
        if self._path == "/api/whoami-v2":
            user = self._user()
            if user is None:
                raise _Refused(401, None, "Invalid username or password.")
            self._send(200, {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})
        elif self._path == "/api/validate-yaml":
            content = json.loads(self._body)["content"]
            valid = content.startswith("---\n") and "\n---\n" in content[4:]
            errors = [] if valid else [{"message": "no metadata"}]
            self._send(200 if valid else 400, {"errors": errors, "warnings": []})
        elif self._path == "/api/repos/create":
            self._create()
        elif match := _RESOLVE.fullmatch(self._path):
            self._resolve(match[1] or "models", match[2], unquote(match[3]), unquote(match[4]))
        elif match := _ACTION.fullmatch(self._path):
            repo = self._repo(match[1], match[2])
            getattr(self, "_" + match[3].replace("-", "_"))(repo, unquote(match[4]))
        elif match := _TREE.fullmatch(self._path):
            repo = self._repo(match[1], match[2])
            self._tree(repo, unquote(match[3]), unquote(match[4] or "").strip("/"))
        elif match := _LFS_BATCH.fullmatch(self._path):
            self._check_writer(self._repo(match[1] or "models", match[2]).name)
            self._lfs_batch()
        elif self._path.startswith("/upload/") and self.command == "PUT":
            self.hub.uploads[self._path.rpartition("/")[2]] = self._body
            self._send(200, {})
        elif match := _INFO.fullmatch(self._path):
            self._info(self._repo(match[1], match[2]), unquote(match[3] or "main"))
        else:
            raise _Refused(404, None, f"no such route: {self._path}")

    # Who may do what.

    def _user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise _Refused(401, None, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _repo(self, kind: str, name: str) -> Repo:
        repo = self.hub.repos.get((kind, name))
        user = self._user()
        if repo is None or (repo.private and user != name.partition("/")[0]):
            raise _Refused(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return repo

    def _check_writer(self, name: str) -> None:
        if self._user() != name.partition("/")[0]:
            raise _Refused(403, None, "You don't have the rights to create a model under this namespace")

    def _commit_of(self, repo: Repo, revision: str) -> str:
        commit = repo.find(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # Reading.

    def _info(self, repo: Repo, revision: str) -> None:
        commit = self._commit_of(repo, revision)
        files = repo.commits[commit]
        siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
        self._send(
            200,
            {
                "id": repo.name,
                "modelId": repo.name,
                "sha": commit,
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "siblings": siblings,
                "lastModified": DATE,
                "createdAt": DATE,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            },
        )

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
        if path.endswith(LFS_SUFFIXES):
            oid = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
        return entry

    def _tree(self, repo: Repo, revision: str, folder: str) -> None:
        files = repo.commits[self._commit_of(repo, revision)]
        below = {path: content for path, content in files.items() if not folder or path.startswith(folder + "/")}
        if folder and not below:
            raise _Refused(404, "EntryNotFound", f"{folder} does not exist")
        recursive = self._query.get("recursive", ["false"])[0].lower() == "true"
        self._send(200, list(self._listing(below, folder, recursive)))

    def _listing(self, files: Mapping[str, bytes], folder: str, recursive: bool) -> Iterator[dict[str, Any]]:
        start = len(folder) + 1 if folder else 0
        seen = set()
        for path, content in files.items():
            parts = path[start:].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                parent = path[:start] + "/".join(parts[:depth])
                if parent not in seen:
                    seen.add(parent)
                    yield {"type": "directory", "path": parent, "size": 0, "oid": "0" * 40}
            if recursive or len(parts) == 1:
                yield self._entry(path, content)

    def _paths_info(self, repo: Repo, revision: str) -> None:
        files = repo.commits[self._commit_of(repo, revision)]
        if self._body.startswith(b"{"):
            paths = json.loads(self._body)["paths"]
        else:
            paths = parse_qs(self._body.decode()).get("paths", [])
        found = []
        for path in [paths] if isinstance(paths, str) else paths:
            if path in files:
                found.append(self._entry(path, files[path]))
            elif any(name.startswith(path + "/") for name in files):
                found.append({"type": "directory", "path": path, "size": 0, "oid": "0" * 40})
        self._send(200, found)

    def _resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        repo = self._repo(kind, name)
        commit = self._commit_of(repo, revision)
        if repo.gated and self._user() not in self.hub.readers:
            status = 401 if self._user() is None else 403
            raise _Refused(status, "GatedRepo", f"Access to model {name} is restricted.")
        files = repo.commits[commit]
        if path not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        content = files[path]
        etag = hashlib.sha256(content).hexdigest() if path.endswith(LFS_SUFFIXES) else _git_hash(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status = 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            if first >= len(content):
                raise _Refused(416, None, "Range not satisfiable")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._send(status, content, headers=headers)

    # Writing.

    def _create(self) -> None:
        values = json.loads(self._body)
        user = self._user()
        if user is None:
            raise _Refused(401, None, "Unauthorized")
        name = f"{values['organization'] or user}/{values['name']}"
        self._check_writer(name)
        kind = values.get("type", "model") + "s"
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        if (kind, name) in self.hub.repos:
            self._send(409, {"error": "You already created this model repo", "url": url})
            return
        private = values.get("visibility") == "private"
        repo = self.hub.repos[kind, name] = Repo(kind=kind, name=name, private=private)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self._send(200, {"url": url, "name": name, "id": "1"})

    def _branch(self, repo: Repo, branch: str) -> None:
        self._check_writer(repo.name)
        if branch in repo.refs:
            raise _Refused(409, None, "Reference already exists")
        repo.refs[branch] = self._commit_of(repo, "main")
        self._send(200, {})

    def _preupload(self, repo: Repo, revision: str) -> None:
        self._check_writer(repo.name)
        files = repo.commits[self._commit_of(repo, revision)]
        answers = []
        for file in json.loads(self._body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            known = files.get(path)
            oid = None if known is None else self._entry(path, known).get("lfs", {}).get("oid", _git_hash(known))
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": answers})

    def _lfs_batch(self) -> None:
        objects = []
        for item in json.loads(self._body)["objects"]:
            upload = {"href": f"{self.hub.url}/upload/{item['oid']}", "header": {}}
            objects.append({**item, "authenticated": True, "actions": {"upload": upload}})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repo: Repo, revision: str) -> None:
        self._check_writer(repo.name)
        self._commit_of(repo, revision)
        changes: dict[str, bytes] = {}
        for line in self._body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                changes[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                changes[entry["value"]["path"]] = self.hub.uploads[entry["value"]["oid"]]
        commit = repo.commit(changes, branch=revision)
        self._send(200, {"commitOid": commit, "commitUrl": f"{self.hub.url}/{repo.name}/commit/{commit}"})

    def _send(self, status: int, content: Any, *, headers: Mapping[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.hub.requests.append(Request(self.command, self._path, 0 if self.command == "HEAD" else len(body)))
        self.answer(status, content, headers)

    def write(self, content: bytes) -> None:
        try:
            for start in range(0, len(content), 1_000_000):
                time.sleep(self.hub.seconds_per_chunk)
                self.wfile.write(content[start : start + 1_000_000])
        except (BrokenPipeError, ConnectionResetError):  # The client has gone.
            self.close_connection = True


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
