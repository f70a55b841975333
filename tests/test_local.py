"""Models of one's own: the servers that run here, the files that make a model."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import gen_captions as gc


@contextlib.contextmanager
def listen(answer: bytes) -> Iterator[int]:
    """Give one answer to whoever connects; yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


OK = b"HTTP/1.1 200 OK\r\n\r\n"
MODELS = OK + b'{"data": [{"id": "eyes:2b"}, {"id": "my words.gguf"}]}'


def test_servers_that_run_here_are_named_ready_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    with listen(MODELS) as port:
        monkeypatch.setattr(gc, "LOCAL_SERVERS", {"Ollama": port, "vLLM": 9})
        (line,) = gc.describe_local_servers()
    use = f"--base-url http://127.0.0.1:{port}/v1 --model eyes:2b or 'my words.gguf'"
    assert line == f"Ollama: {use}"


ELSEWHERE = b"HTTP/1.1 302 Found\r\nLocation: http://192.0.2.1/\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize("answer", [b"SSH-2.0-x\r\n", OK + b"[" * 9999, OK + b"{}", ELSEWHERE])
def test_what_is_no_model_server_is_passed_over(answer: bytes) -> None:
    with listen(answer) as port:
        assert gc.list_models(port) == []


TWO = ["Eyes-2B-Q8_0.gguf", "Eyes-2B-Q4_K_M.gguf", "mmproj-Eyes-2B-F16.gguf", "README.md"]
FOLDER = ["at/a-1b.gguf", "at/b-2b.gguf", "at/mmproj-a-1b.gguf", "at/mmproj-b-2b.gguf"]


@pytest.mark.parametrize(
    ("names", "quant", "files"),
    [
        (TWO, "Q4_K_M", ("Eyes-2B-Q4_K_M.gguf", "mmproj-Eyes-2B-F16.gguf")),
        (TWO, "q8_0", ("Eyes-2B-Q8_0.gguf", "mmproj-Eyes-2B-F16.gguf")),
        (["m.Q4_K_M.gguf", "m.Q4_K.gguf", "mmproj.gguf"], "Q4_K", ("m.Q4_K.gguf", "mmproj.gguf")),
        (FOLDER, "a-1b.gguf", ("at/a-1b.gguf", "at/mmproj-a-1b.gguf")),
        (FOLDER, "b-2b.gguf", ("at/b-2b.gguf", "at/mmproj-b-2b.gguf")),
        (
            TWO,
            "Q5_K",
            "no Q5_K model with its mmproj file; GGUF files there: Eyes-2B-Q4_K_M.gguf, ",
        ),
        (["m-Q8_0.gguf"], "Q8_0", "no Q8_0 model with its mmproj file; GGUF files there: m-Q8_0"),
        (["model.safetensors"], "Q8_0", "GGUF files there: none"),
    ],
)
def test_model_and_projector_are_chosen(names: list[str], quant: str, files: Any) -> None:
    if isinstance(files, str):
        with pytest.raises(ValueError, match=files):
            gc.choose_files(names, quant)
    else:
        assert gc.choose_files(names, quant) == files
