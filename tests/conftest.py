"""Fixtures: the tool as a module, the tool as a process, the vision API on loopback, images."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import aiofiles.os  # noqa: F401 - so that a forked process has it
import openai  # noqa: F401
import pytest
import tenacity  # noqa: F401
import yaml  # noqa: F401
from PIL import Image
from tqdm.contrib import logging as _logging  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "gen-captions.py"
GUARD = ROOT / "tests" / "guard"
KEY = "sk-test-0123456789abcdef"


def load(name: str, path: Path) -> ModuleType:
    """Import a file under a name; dataclasses need it in sys.modules."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


load("network_guard", GUARD / "sitecustomize.py")  # by path: Debian has a sitecustomize of its own
load("gen_captions", TOOL).load_pillow()


class Server:
    """The vision API of tests/vision_server.py in a process of its own."""

    def __init__(self) -> None:
        command = [sys.executable, str(ROOT / "tests" / "vision_server.py"), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.url = self.process.stdout.readline().strip()

    def script(self, **fields: Any) -> None:
        """Say what the next requests meet."""
        address = self.url.removesuffix("/v1") + "/script"
        request = urllib.request.Request(address, json.dumps(fields).encode(), method="PUT")
        urllib.request.urlopen(request).close()

    def batch(self, **wishes: Any) -> None:
        """Say what happens to batches from now on; all else goes on."""
        address = self.url.removesuffix("/v1") + "/batch"
        urllib.request.urlopen(
            urllib.request.Request(address, json.dumps(wishes).encode(), method="PUT")
        ).close()

    def release(self) -> None:
        """Let the answers go that the script holds."""
        address = self.url.removesuffix("/v1") + "/release"
        urllib.request.urlopen(urllib.request.Request(address, b"{}", method="PUT")).close()

    def stats(self) -> dict[str, Any]:
        """Return what was seen since the script was set."""
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/stats") as response:
            found: dict[str, Any] = json.load(response)
        return found

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()


@pytest.fixture(scope="session")
def server_process() -> Iterator[Server]:
    """One server for all tests."""
    server = Server()
    yield server
    server.close()


@pytest.fixture
def server(server_process: Server) -> Server:
    """The server with nothing scripted and nothing counted."""
    server_process.script()
    return server_process


SCRIPT = compile(TOOL.read_bytes(), str(TOOL), "exec")


def become_the_tool(arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """Run the tool in a process that was just forked, as if Python had been started with it.

    What a start costs is mostly the import of the SDK, about a second on a small machine; this process has it already.
    """
    code: object = 1
    try:
        os.closerange(
            3, 4096
        )  # our parent waits for that, and no pipe of another process is held open
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python starts
        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        logging.root.handlers.clear()  # pytest's
        sys.argv = [str(TOOL), *arguments]
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, encoding="utf-8", errors=errors, buffering=1 if number == 2 else -1)  # noqa: SIM115
            for number, mode, errors in (
                (0, "r", "strict"),
                (1, "w", "strict"),
                (2, "w", "backslashreplace"),
            )
        )
        script = sys.modules["__main__"] = ModuleType("__main__")
        script.__file__ = str(TOOL)
        exec(SCRIPT, vars(script))
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


class Tool:
    """gen-captions.py as a process."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        (folder / ".env").touch()  # else a developer's own, beside the script, would be read
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PYTHONPATH": str(GUARD),
            "OPENAI_API_KEY": KEY,
            "OPENAI_BASE_URL": url,
            "GETCAP_THROTTLE_BACKOFF_FACTOR": "0.1",
            **({"SYSTEMROOT": os.environ["SYSTEMROOT"]} if os.name == "nt" else {}),
        }

    def start(self, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
        """Start it and return the running process."""
        words, variables = [*map(str, arguments)], {**self.environment, **environment}
        return subprocess.Popen(
            [sys.executable, str(TOOL), *words],
            preexec_fn=None if os.name == "nt" else lambda: become_the_tool(words, variables),  # noqa: PLW1509 - no thread of ours holds a lock
            cwd=self.folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )

    def __call__(
        self, *arguments: str | Path, code: int = 0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end; assert the exit code, and that the key is in no output."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, (
            f"exit {process.returncode}, expected {code}\n{out}\n{err}"
        )
        assert KEY not in out + err
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def tool(tmp_path: Path, server: Server) -> Tool:
    """The tool in an empty folder, pointed at the server."""
    return Tool(tmp_path, server.url)


ImageMaker = Callable[..., Path]


@pytest.fixture
def make_image(tmp_path: Path) -> ImageMaker:
    """Return a maker of image files below images/."""

    def make(
        name: str,
        size: tuple[int, int] = (64, 48),
        colour: str = "red",
        mode: str = "RGB",
        **options: Any,
    ) -> Path:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, colour).save(path, **options)
        with path.open("ab") as file:  # no two images hold the same bytes unless a test copies one
            file.write(os.fsencode(name))
        return path

    return make


def captions(folder: Path) -> dict[str, str]:
    """Return the captions below a folder by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.txt"))
    }


def wait_for(is_so: Callable[[], object]) -> None:
    """Return when something is so; the limit is for a tool that hangs."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def snapshot(folder: Path, pattern: str = "*") -> dict[str, tuple[bytes, int, int]]:
    """Return what is below a folder: the bytes, time and permissions of each file."""
    found = {}
    for path in sorted(folder.rglob(pattern)):
        status = path.stat()
        data = path.read_bytes() if path.is_file() else b""
        found[path.relative_to(folder).as_posix()] = (data, status.st_mtime_ns, status.st_mode)
    return found
