"""A model of one's own, from its download to the end of its engine; each engine is llama.cpp."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_model
from hub_server import Hub

import gen_captions as gc
from conftest import KEY, ImageMaker, Tool, captions

pytest.importorskip("xllamacpp", reason="pip install -r requirements-local.txt")
pytest.importorskip("huggingface_hub", reason="pip install -r requirements-local.txt")

linux = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="looks at processes as on Linux")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny vision model, with its projector beside it."""
    return tiny_model.make(tmp_path_factory.mktemp("tiny"))[0]


@pytest.fixture
def local(tool: Tool) -> Tool:
    """The tool without a key or another server."""
    tool.environment["HF_HOME"] = str(tool.folder / "hub")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        del tool.environment[name]
    return tool


@pytest.fixture
def hub(tiny: Path, tmp_path: Path) -> Iterator[Hub]:
    """A hub that has the tiny model, as the quantization that is usual."""
    folder = tmp_path / "offered"
    shutil.copytree(tiny.parent, folder)
    (folder / "tiny.gguf").rename(folder / "tiny-Q4_K_M.gguf")
    hub = Hub(folder)
    yield hub
    hub.close()


def start(local: Tool, tiny: Path, make_image: ImageMaker, images: int) -> subprocess.Popen[str]:
    """Start a run over so many images."""
    for number in range(images):
        make_image(f"{number:02}.jpg", (300 + number, 200))
    return local.start("--local", tiny, "images", GETCAP_THREAD_POOL="1")


def wait_for_captions(folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a run has written two captions."""
    while len(captions(folder)) < 2:
        assert process.poll() is None, process.communicate()


def engine_of(process: subprocess.Popen[str]) -> int:
    """Return the engine that a run has started, once it is one."""
    while process.poll() is None:
        for children in Path(f"/proc/{process.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                for child in map(int, children.read_text().split()):
                    if b"serve_model" in Path(f"/proc/{child}/cmdline").read_bytes():
                        return child
    raise AssertionError(process.communicate())


def is_gone(engine: int) -> bool:
    """Return whether a process, known by its file descriptor, ends within ten seconds."""
    ended = bool(select.select([engine], [], [], 10)[0])
    os.close(engine)
    return ended


def test_six_formats_are_captioned_without_a_key_and_no_proxy_sees_it(
    local: Tool, tiny: Path, make_image: ImageMaker
) -> None:
    for name, mode, size in (
        ("a.jpg", "RGB", (640, 480)),
        ("b.png", "RGBA", (300, 900)),
        ("c.webp", "RGB", (64, 64)),
        ("d.gif", "P", (50, 20)),
        ("sub/e.bmp", "L", (1, 1)),
        ("sub/f.tif", "CMYK", (3000, 2000)),
    ):
        make_image(name, size, colour=0 if mode in "PL" else "red", mode=mode)
    images = local.folder / "images"
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(0.1)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        names = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY")
        others = {"OPENAI_BASE_URL": address, "OPENAI_API_KEY": KEY, "GETCAP_MODEL": "gpt-6-luna"}
        local.environment |= dict.fromkeys(names, address) | others
        said = local("--local", tiny, "images", "--trigger", "ohwx").stderr
        with pytest.raises(TimeoutError):
            proxy.accept()
    assert "6 captioned in " in said
    found = captions(images)
    assert list(found) == ["a.txt", "b.txt", "c.txt", "d.txt", "sub/e.txt", "sub/f.txt"]
    assert len(set(found.values())) == 6
    for text in found.values():
        assert text.startswith("ohwx, ") and text.endswith(".\n") and len(text.split()) > 10
    journal = (images / ".gen-captions" / "journal.jsonl").read_text()
    models = [json.loads(line)["model"] for line in journal.splitlines() if line]
    assert models == [str(tiny)] * 6
    assert "loading" not in local("--local", tiny, "images", "--trigger", "ohwx").stderr


def test_a_long_prompt_has_room(local: Tool, tiny: Path, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    local("--local", tiny, "images", "--prompt", "describe the zebra carefully " * 300)
    assert len(captions(local.folder / "images")) == 1


@linux
@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGINT], 130),
        ([signal.SIGINT, signal.SIGINT], 130),
        ([signal.SIGTERM], 143),
        ([signal.SIGHUP], -signal.SIGHUP),  # the terminal is closed
        ([signal.SIGKILL], -signal.SIGKILL),
    ],
)
def test_a_run_that_ends_early_leaves_no_engine_and_keeps_its_captions(
    local: Tool, tiny: Path, make_image: ImageMaker, signals: list[signal.Signals], code: int
) -> None:
    process = start(local, tiny, make_image, 60)
    wait_for_captions(local.folder / "images", process)
    engine = os.pidfd_open(engine_of(process))
    for number in signals:
        process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == code, said
    assert is_gone(engine)
    found = captions(local.folder / "images")
    assert len(found) < 60 and all(text.endswith(".\n") for text in found.values())
    assert code < 0 or f"{len(found)} captioned" in said


@linux
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_run_that_ends_while_its_model_is_loaded_leaves_no_engine(
    local: Tool, tiny: Path, make_image: ImageMaker, number: signal.Signals, code: int
) -> None:
    process = start(local, tiny, make_image, 1)
    child = engine_of(process)
    engine = os.pidfd_open(child)
    while "xllamacpp" not in Path(f"/proc/{child}/maps").read_text():
        pass
    os.kill(child, signal.SIGSTOP)  # it does not see to anything, as while a large model is loaded
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == code, said
    assert is_gone(engine)


@linux
def test_an_engine_that_dies_ends_the_run_and_the_same_command_goes_on(
    local: Tool, tiny: Path, make_image: ImageMaker
) -> None:
    process = start(local, tiny, make_image, 30)
    wait_for_captions(local.folder / "images", process)
    os.kill(engine_of(process), signal.SIGKILL)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 3, said
    assert (
        "the engine ended with code -9; see above; if nothing is said there, take a smaller model"
        in said
    )
    before = captions(local.folder / "images")
    assert f"{len(before)} captioned, {30 - len(before)} not done yet in " in said
    local("--local", tiny, "images")
    after = captions(local.folder / "images")
    assert len(before) < 30 == len(after) and before.items() <= after.items()


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        ("cut the model", 3, "model is corrupted or incomplete"),
        ("cut the projector", 3, "mmproj-tiny.gguf': load_tensors: failed"),
        ("no projector", 3, "tiny.gguf: no tiny.gguf model with its mmproj file"),
        ("no model", 2, "tiny.gguf: no such file"),
    ],
)
def test_what_is_wrong_with_a_model_is_said_in_llama_cpps_words(
    local: Tool, tiny: Path, make_image: ImageMaker, damage: str, code: int, words: str
) -> None:
    make_image("a.jpg")
    folder = local.folder / "model"
    shutil.copytree(tiny.parent, folder)
    model, projector = folder / "tiny.gguf", folder / "mmproj-tiny.gguf"
    match damage:
        case "cut the model":
            model.write_bytes(model.read_bytes()[:300_000])
        case "cut the projector":
            projector.write_bytes(projector.read_bytes()[:100_000])
        case "no projector":
            projector.unlink()
        case _:
            model.unlink()
    assert words in local("--local", model, "images", code=code).stderr
    assert not captions(local.folder / "images")


def test_nobody_without_the_key_is_served(tiny: Path) -> None:
    settings = dataclasses.replace(gc.read_settings(["images"]), local=str(tiny), thread_pool=1)
    with gc.open_engine(settings, "describe") as (there, _):
        assert there.base_url.startswith("http://127.0.0.1:")
        request = urllib.request.Request(f"{there.base_url}/chat/completions", b"{}")
        with pytest.raises(urllib.error.HTTPError, match="401") as refusal:
            urllib.request.urlopen(request)
        refusal.value.close()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                assert there.api_key.encode() not in path.read_bytes()


def test_a_model_is_downloaded_once_and_then_nobody_is_asked(
    local: Tool, hub: Hub, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    local.environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret"}
    said = local("--local", "small", "images").stderr
    repo, commit = gc.LOCAL_MODELS["small"]
    assert f"downloading 0.00 GB from {hub.url}: tiny-Q4_K_M.gguf, mmproj-tiny.gguf" in said
    (asked,) = hub.asked(f"GET /api/models/{repo}/revision/{commit}")
    assert asked["authorization"] == "Bearer hf_secret" and "hf_secret" not in said
    assert [headers.get("authorization") for headers in hub.asked("GET /cdn/")] == [None, None]
    hub.requests.clear()
    make_image("b.jpg", (90, 90))
    assert "downloading" not in local("--local", "small", "images").stderr
    assert len(captions(local.folder / "images")) == 2
    assert hub.requests == []


def test_a_download_that_was_killed_is_made_in_the_next_run(
    local: Tool, hub: Hub, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    local.environment["HF_ENDPOINT"] = hub.url
    hub.stall_after = 100_000
    process = local.start("--local", "some/captioner", "images")
    assert hub.stalled.wait(20)
    process.kill()
    process.communicate()
    hub.stall_after = 0
    local("--local", "some/captioner", "images")
    assert len(captions(local.folder / "images")) == 1


@pytest.mark.parametrize(
    ("refusal", "variables", "words"),
    [
        ((401, {"X-Error-Code": "GatedRepo"}), {}, "401 Client Error. Cannot access gated repo"),
        ((500, {}), {}, "Server error '500 Internal Server Error'"),
        (None, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "Connection refused"),
        (None, {"HF_ENDPOINT": "https://huggingface.co"}, "Name or service not known"),
        (None, {"HF_HUB_OFFLINE": "1"}, "offline mode is enabled"),
    ],
)
def test_where_no_model_can_be_had_the_run_ends_with_the_reason(
    local: Tool,
    hub: Hub,
    make_image: ImageMaker,
    refusal: tuple[int, dict[str, str]] | None,
    variables: dict[str, str],
    words: str,
) -> None:
    make_image("a.jpg")
    hub.refusal = refusal
    environment = {"HF_ENDPOINT": hub.url, **variables}
    said = local("--local", "some/captioner", "images", code=3, **environment).stderr
    place = environment["HF_ENDPOINT"]
    assert f"--local: cannot download the model some/captioner from {place}: " in said
    assert words in said
    assert os.listdir(local.folder / "images") == ["a.jpg"]


def test_the_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    words = "packages are missing; install gen-captions with its extra: pip install '.[local]'"
    with pytest.raises(gc.SettingsError, match=re.escape(words)):
        gc.check_local("small")


def test_joycaption_is_asked_as_it_was_trained(local: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    said = local("--local", "joycaption", "images", "--dry-run", "-v").stdout
    assert "Write a long descriptive caption for this image in a formal tone." in said
