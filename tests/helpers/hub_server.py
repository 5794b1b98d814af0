"""A small Hugging Face Hub on localhost: real HTTP, the hub's URL layout, and a record of every request.

It serves what `huggingface_hub` asks for when it downloads a snapshot:

    GET  /api/models/<id>/revision/<revision>    which commit that is
    GET  /api/models/<id>/tree/<commit>          the files of the commit
    HEAD /<id>/resolve/<commit>/<file>           ETag, size and commit of a file
    GET  /<id>/resolve/<commit>/<file>           the file, or the range of it that is asked for

and takes what it uploads, every file in its commit:

    POST /api/repos/create                       a repository
    POST /api/validate-yaml                      the model card
    POST /api/models/<id>/preupload/<revision>   how files are to be sent
    POST /api/models/<id>/commit/<revision>      files, as lines of JSON

`huggingface_hub` takes `HF_ENDPOINT` from the environment when it is imported: use it in another process.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

__all__ = ["HubServer", "Repository", "commit_of"]


def commit_of(text: str) -> str:
    """A commit hash that stands for `text`: 40 hexadecimal digits."""
    return hashlib.sha1(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Repository:
    """Commit -> file name -> content, and the branches and tags that name commits.

    `gated`: whoever has no token sees the list of files and may not read them. `token`: for whoever does not
    have it, the repository does not exist.
    """

    commits: Mapping[str, Mapping[str, bytes]]
    refs: Mapping[str, str]
    gated: bool = False
    token: str | None = None


@dataclass(frozen=True)
class _Reply:
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


class HubServer:
    """Serves `repositories` while it is entered as a context manager.

    `hold`: an event that file downloads wait for, or None. `ranges`: whether it knows of ranges, as the Hub does.
    `silent`: what a path contains that is asked for and never answered.
    """

    def __init__(
        self,
        repositories: Mapping[str, Repository],
        *,
        hold: threading.Event | None = None,
        ranges: bool = True,
        silent: str | None = None,
    ) -> None:
        self._repositories = repositories
        self._hold = hold
        self._ranges = ranges
        self._silent = silent
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._requests: list[tuple[str, str]] = []
        self._served: Counter[str] = Counter()
        self.uploaded: dict[str, bytes] = {}
        """Content of every file that was uploaded, by repository and name."""
        self.private: set[str] = set()
        """Repositories that were made, and are private."""
        self.downloading = threading.Event()
        """Set once a file is asked for."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_GET  # noqa: N815  # the name that http.server looks for

            def do_POST(self) -> None:
                hub._take(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name upstream
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def endpoint(self) -> str:
        """What to set `HF_ENDPOINT` to."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def requests(self) -> list[tuple[str, str]]:
        """(method, path) of every request so far."""
        with self._lock:
            return list(self._requests)

    @property
    def downloads(self) -> Counter[str]:
        """How often each file was downloaded, by name, over all repositories and commits."""
        paths = [path for method, path in self.requests if method == "GET" and "/resolve/" in path]
        return Counter(path.split("/resolve/")[1].partition("/")[2] for path in paths)

    @property
    def served(self) -> Counter[str]:
        """How many bytes of each file were sent, by name, over all repositories and commits."""
        with self._lock:
            return Counter(self._served)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.set()
        if self._hold is not None:
            self._hold.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        with self._lock:
            self._requests.append((request.command, path))
        if self._silent is not None and self._silent in path:
            self._closing.wait()
            return
        reply = self._reply(path, request.headers.get("authorization"))
        if self._ranges and request.command == "GET":
            reply = _cut(reply, request.headers.get("range"))
        if request.command == "GET" and "/resolve/" in path:
            self._wait()
        request.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(reply.body)
            if "/resolve/" in path:
                with self._lock:
                    self._served[path.split("/resolve/")[1].partition("/")[2]] += len(reply.body)

    def _take(self, request: BaseHTTPRequestHandler) -> None:
        """Answer to an upload."""
        body, path = _body(request), unquote(urlsplit(request.path).path)
        repo_id = path.removeprefix("/api/models/").rpartition("/")[0].rpartition("/")[0]
        reply: dict[str, object] = {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked['organization']}/{asked['name']}"
            if asked.get("private") or asked.get("visibility") == "private":
                self.private.add(repo_id)
            reply = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}
        elif "/preupload/" in path:
            files = [{**each, "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(body)["files"]]
            reply = {"files": files}
        elif "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            for value in (line["value"] for line in lines if line["key"] == "file"):
                self.uploaded[f"{repo_id}/{value['path']}"] = base64.b64decode(value["content"])
            reply = {"success": True, "commitUrl": f"{self.endpoint}/{repo_id}/commit/1", "commitOid": "1"}
        content = json.dumps(reply).encode()
        request.send_response(HTTPStatus.OK)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def _wait(self) -> None:
        self.downloading.set()
        if self._hold is not None:
            self._hold.wait()

    def _reply(self, path: str, authorization: str | None) -> _Reply:
        if path.startswith("/api/models/"):
            return self._api(path.removeprefix("/api/models/"), authorization)
        repo_id, separator, rest = path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        repository = self._repositories.get(repo_id)
        if not separator or repository is None or not _may_see(repository, authorization):
            return _error(HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Repository not found")
        if repository.gated and authorization is None:
            return _error(HTTPStatus.FORBIDDEN, "GatedRepo", f"Access to model {repo_id} is restricted")
        commit = repository.refs.get(revision, revision)
        content = repository.commits.get(commit, {}).get(file)
        if content is None:
            return _error(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found")
        return _Reply(headers={"ETag": f'"{_blob_id(content)}"', "X-Repo-Commit": commit}, body=content)

    def _api(self, path: str, authorization: str | None) -> _Reply:
        kind = "revision" if "/revision/" in path else "tree"
        repo_id, _, revision = path.partition(f"/{kind}/")
        repository = self._repositories.get(repo_id)
        if repository is None or not _may_see(repository, authorization):
            return _error(HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Repository not found")
        commit = repository.refs.get(revision, revision)
        files = repository.commits.get(commit)
        if files is None:
            return _error(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
        if kind == "revision":
            return _json({"id": repo_id, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        return _json(
            [
                {"type": "file", "path": name, "size": len(content), "oid": _blob_id(content)}
                for name, content in files.items()
            ]
        )


def _cut(reply: _Reply, wanted: str | None) -> _Reply:
    """`reply` with the bytes `first-last` alone, if that is what `wanted` says; other forms are not asked for here."""
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
    if found is None or reply.status is not HTTPStatus.OK or int(found[1]) >= len(reply.body):
        return reply
    start, stop = int(found[1]), min(int(found[2]) + 1, len(reply.body))
    said = {"Content-Range": f"bytes {start}-{stop - 1}/{len(reply.body)}"}
    return _Reply(status=HTTPStatus.PARTIAL_CONTENT, headers={**reply.headers, **said}, body=reply.body[start:stop])


def _may_see(repository: Repository, authorization: str | None) -> bool:
    return repository.token is None or authorization == f"Bearer {repository.token}"


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _json(value: object) -> _Reply:
    return _Reply(headers={"Content-Type": "application/json"}, body=json.dumps(value).encode())


def _error(status: HTTPStatus, code: str, message: str) -> _Reply:
    return _Reply(
        status=status,
        headers={"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"},
        body=json.dumps({"error": message}).encode(),
    )


def _body(request: BaseHTTPRequestHandler) -> bytes:
    """The body of a request, which may come in chunks."""
    if request.headers.get("transfer-encoding") != "chunked":
        return request.rfile.read(int(request.headers.get("content-length", 0)))
    chunks = []
    while size := int(request.rfile.readline(), 16):
        chunks.append(request.rfile.read(size))
        request.rfile.readline()
    request.rfile.readline()
    return b"".join(chunks)
