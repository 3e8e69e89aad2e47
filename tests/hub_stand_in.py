"""A stand-in for the Hugging Face hub's HTTP API on 127.0.0.1: enough of it to download a repository, and to fail."""

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """One repository with one commit, which `revisions` all name."""

    files: Mapping[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files)).encode()).hexdigest()


@dataclass
class HubStandIn:
    """The server; use it as a context manager. `log` holds (method, path, Range header or None) of every request."""

    repos: Mapping[str, Repo]
    cut: dict[str, int] = field(default_factory=dict)
    """File name to a count of bytes after which its next GET is cut off; each entry serves once."""
    log: list[tuple[str, str, str | None]] = field(default_factory=list)

    def __enter__(self) -> "HubStandIn":
        hub = self

        class Handler(_Handler):
            stand_in = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def gets(self, filename: str) -> list[str | None]:
        """The Range headers of the GET requests for a file, in order."""
        return [r for method, path, r in self.log if method == "GET" and path.endswith("/" + filename)]


class _Handler(BaseHTTPRequestHandler):
    stand_in: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.stand_in.log.append((self.command, path, self.headers.get("Range")))
        api = re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        name, revision = (api[1], api[3] or "main") if api else (file[1], file[2]) if file else ("", "")
        repo = self.stand_in.repos.get(name)
        if repo is None:
            # To strangers the hub does not tell a private name from one that does not exist.
            if "Authorization" not in self.headers:
                return self._send(401, b"", {"X-Error-Message": "Invalid username or password."})
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if repo.gated and not (api and api[2] != "tree"):
            return self._send(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {name} is gated."})
        if revision not in (*repo.revisions, repo.commit):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if api and api[2] == "tree":
            return self._json([_tree_entry(n, data) for n, data in repo.files.items()])
        if api:
            return self._json({"id": name, "sha": repo.commit, "siblings": [{"rfilename": n} for n in repo.files]})
        assert file is not None
        if file[3] not in repo.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        self._file(file[3], repo, body)

    def _file(self, name: str, repo: Repo, body: bool) -> None:
        data = repo.files[name]
        headers = {"ETag": f'"{_blob(data)}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        status, start = (206, int(asked[1])) if asked else (200, 0)
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        keep = self.stand_in.cut.pop(name, None) if body else None
        self._send(status, data[start:], headers, body=body, keep=keep)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, data: bytes, headers: Mapping[str, str], *, body: bool = True, keep: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | dict(headers)).items():
            self.send_header(key, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data[:keep])
        if keep is not None:
            self.close_connection = True


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _tree_entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
