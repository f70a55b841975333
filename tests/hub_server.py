"""A model hub on loopback that speaks the protocol of Hugging Face's, as far as a download needs it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Offers the files of a folder as those of any repository that is asked for."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.stall_after = 0  # bytes of a file that are sent before nothing more comes
        self.cut_after = 0  # bytes of a file that are sent before the connection ends, once
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.stalled, self.closing = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.serve_forever)
        self.thread.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        """End it."""
        self.closing.set()
        self.shutdown()
        self.thread.join()
        self.server_close()

    def asked(self, start: str) -> list[dict[str, str]]:
        """Return the headers of the requests whose method and path begin so."""
        return [
            headers
            for method, path, headers in self.requests
            if f"{method} {path}".startswith(start)
        ]


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does, and as the other host that it sends downloads to."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        """As GET, without a body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer by the path."""
        hub = self.server
        path = self.path.partition("?")[0]
        hub.requests.append(
            (self.command, path, {name.lower(): value for name, value in self.headers.items()})
        )
        if hub.refusal:
            self.send(hub.refusal[0], b"{}", hub.refusal[1])
        elif path.startswith("/api/models/"):
            self.send(
                200, json.dumps(self.listing(path)).encode(), {"Content-Type": "application/json"}
            )
        elif path.startswith("/cdn/"):
            self.send_file(hub.folder / path.removeprefix("/cdn/"))
        else:
            name = path.rpartition("/")[2]
            if not (hub.folder / name).exists():
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            data = (hub.folder / name).read_bytes()
            linked = {
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Linked-Size": str(len(data)),
            }
            location = f"http://localhost:{hub.server_port}/cdn/{name}"
            commit = next((part for part in path.split("/") if len(part) == 40), COMMIT)
            self.send(302, b"", {"X-Repo-Commit": commit, **linked, "Location": location})

    def listing(self, path: str) -> dict[str, Any]:
        """Return what the hub says of a repository."""
        files = []
        for file in sorted(self.server.folder.iterdir()):
            data = file.read_bytes()
            lfs = {
                "sha256": hashlib.sha256(data).hexdigest(),
                "size": len(data),
                "pointerSize": 134,
            }
            files.append(
                {"rfilename": file.name, "size": len(data), "blobId": "0" * 40, "lfs": lfs}
            )
        return {
            "id": "/".join(path.split("/")[3:5]),
            "sha": COMMIT,
            "siblings": files,
            "tags": [],
            "private": False,
        }

    def send_file(self, file: Path) -> None:
        """Send a file, or the part of it that is asked for."""
        data, hub = file.read_bytes(), self.server
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        span = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if asked else {}
        body = data[start:]
        if len(body) <= (hub.stall_after or hub.cut_after or len(body)):
            self.send(206 if asked else 200, body, span)
            return
        self.send_head(206 if asked else 200, {**span, "Content-Length": str(len(body))})
        self.wfile.write(body[: hub.stall_after or hub.cut_after])
        self.wfile.flush()
        if hub.stall_after:
            hub.stalled.set()
            hub.closing.wait()
        hub.cut_after = 0
        self.close_connection = True

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """Send an answer."""
        self.send_head(status, {**headers, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_head(self, status: int, headers: dict[str, str]) -> None:
        """Send a status and headers."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""
