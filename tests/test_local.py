"""Without a key: the servers on this machine that need none."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import gen_captions as gc

ANSWERS: dict[str, Any] = {
    "/api/tags": {"models": [{"name": "words:1b"}, {"name": "eyes:2b"}]},
    "words:1b": {"capabilities": ["completion"]},
    "eyes:2b": {"capabilities": ["completion", "vision"]},
    "/api/v0/models": {"data": [{"id": "words", "type": "llm"}, {"id": "eyes", "type": "vlm"}]},
    "/props": {"modalities": {"vision": True}},
    "/v1/models": {"data": [{"id": "eyes.gguf", "owned_by": "vllm"}]},
}


class Handler(BaseHTTPRequestHandler):
    """Answers as the four servers do."""

    def do_GET(self) -> None:
        """Answer by the path."""
        self.answer(self.path)

    def do_POST(self) -> None:
        """Answer by the model."""
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["model"])

    def answer(self, name: str) -> None:
        """Send JSON."""
        data = json.dumps(ANSWERS[name]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    """The address of such a server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("name", "paths"), [(name, paths) for name, _, paths in gc.LOCAL_SERVERS])
def test_a_server_with_a_vision_model_is_offered_with_the_words_to_use_it(
    url: str, name: str, paths: tuple[str, ...]
) -> None:
    model = {"Ollama": "eyes:2b", "LM Studio": "eyes"}.get(name, "eyes.gguf")
    assert (
        gc.describe_local_servers([(name, url, paths)])
        == f"; {name} runs here: add --base-url {url}/v1 --model {model}"
    )


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/api/tags", {"models": [{"name": "words:1b"}]}),
        ("/api/tags", {"models": "none"}),
        ("/api/v0/models", {"data": [{"id": "words", "type": "llm"}]}),
        ("/props", {"modalities": {"vision": False}}),
        ("/props", []),
    ],
)
def test_a_server_without_one_is_not(url: str, monkeypatch: pytest.MonkeyPatch, path: str, answer: Any) -> None:
    monkeypatch.setitem(ANSWERS, path, answer)
    servers = [(name, url, paths) for name, _, paths in gc.LOCAL_SERVERS if path in paths]
    assert gc.describe_local_servers(servers) == ""


@pytest.mark.parametrize("words", [b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 200_000, b""])
def test_what_speaks_no_http_is_passed_over(words: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(1000)
                connection.sendall(words)

        thread = threading.Thread(target=answer)
        thread.start()
        assert gc.ask_local(f"http://127.0.0.1:{listener.getsockname()[1]}") == {}
        thread.join()


def test_where_nothing_runs_nothing_is_said() -> None:
    assert gc.describe_local_servers([("Ollama", "http://127.0.0.1:9", ("/api/tags", "/api/show"))]) == ""
