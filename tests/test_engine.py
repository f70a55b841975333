"""The room Local: a model of one's own, downloaded and served; every engine here is llama.cpp itself."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_model
from hub_server import COMMIT, Hub

import gen_captions as gc
from conftest import KEY, TOOL, ImageMaker, Tool

pytest.importorskip("xllamacpp", reason="the local engine is not installed: pip install -r requirements-local.txt")
pytest.importorskip("huggingface_hub", reason="it is not installed: pip install -r requirements-local.txt")

linux = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="looks at other processes as Linux lets one do")


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
    """A hub that has the tiny model."""
    folder = tmp_path / "offered"
    shutil.copytree(tiny.parent, folder)
    hub = Hub(folder)
    yield hub
    hub.close()


def captions(folder: Path) -> dict[str, str]:
    """Return all captions below a folder by their names."""
    return {path.name: path.read_text(encoding="utf-8") for path in folder.rglob("*.txt")}


def engine_of(process: subprocess.Popen[str], *, but: int = 0) -> int:
    """Return the engine that a run has started, once it is one, other than that which is known."""
    while process.poll() is None:
        for children in Path(f"/proc/{process.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                for child in map(int, children.read_text().split()):
                    if child != but and b"serve_model" in Path(f"/proc/{child}/cmdline").read_bytes():
                        return child
    raise AssertionError("the run is over")


def let_end(engine: int, handle: int) -> None:
    """Let an engine that was stopped go on, unless it is gone, and wait until it is."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(engine, signal.SIGCONT)
    wait_for_end(handle)


def wait_for_end(handle: int) -> None:
    """Wait until a process is gone; fail after ten seconds."""
    assert select.select([handle], [], [], 10)[0], "the engine is still there"
    os.close(handle)


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """Return what a run says until it says these words."""
    assert process.stderr
    said = ""
    for line in process.stderr:
        said += line
        if words in line:
            return said
    raise AssertionError(said)


def test_a_folder_of_mixed_images_is_captioned_without_key_or_server(
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
    done = local("--local", tiny, "--image-dir", "images", "--report", "out.jsonl")
    found = captions(local.folder / "images")
    assert sorted(found) == ["a.txt", "b.txt", "c.txt", "d.txt", "e.txt", "f.txt"]
    assert all(text.endswith(".\n") and text.count("\n") == 1 and len(text.split()) > 10 for text in found.values())
    assert "Captioned 6, skipped 0, failed 0" in done.stderr
    outcomes = Path(local.folder, "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["outcome"] for line in outcomes] == [*["captioned"] * 6, "summary"]


def test_the_captions_depend_on_the_image_and_open_with_the_trigger(
    local: Tool, tiny: Path, make_image: ImageMaker
) -> None:
    for name, colour in (("a.jpg", "black"), ("b.jpg", "white")):
        make_image(name, (400, 300), colour)
    local("--local", tiny, "--image-dir", "images", "--trigger", "ohwx", GETCAP_TEMPERATURE="0")
    first, second = captions(local.folder / "images").values()
    assert first.startswith("ohwx, ") and second.startswith("ohwx, ") and first != second


def test_a_second_run_starts_no_engine_for_what_is_done(local: Tool, tiny: Path, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    local("--local", tiny, "--image-dir", "images")
    assert "loading" not in local("--local", tiny, "--image-dir", "images").stderr


def test_a_dry_run_needs_no_model(local: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    said = local("--local", "--image-dir", "images", "-n", HF_ENDPOINT="http://127.0.0.1:9").stdout
    assert "To caption 1" in said and f"{gc.LOCAL_MODEL} is not on this machine yet" in said


def start_captioning(
    local: Tool, tiny: Path, make_image: ImageMaker, images: int, until: int, **environment: str
) -> tuple[subprocess.Popen[str], str]:
    """Start a run over so many images; return it, and what it has said, when so many are done."""
    for number in range(images):
        make_image(f"{number:02}.jpg", (300 + number, 200))
    process = local.start("--local", tiny, "--image-dir", "images", **environment)
    return process, read_until(process, f"{until} of {images}")


@linux
def test_an_engine_that_is_killed_is_started_once_more_and_nothing_is_lost(
    local: Tool, tiny: Path, make_image: ImageMaker
) -> None:
    process, said = start_captioning(local, tiny, make_image, 12, 2, GETCAP_THREAD_POOL="1")
    os.kill(engine_of(process), signal.SIGKILL)
    said += process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    assert (
        "WARNING the engine was killed, perhaps for want of memory" in said
        and "it is started once more; see images" in said
    )
    assert said.count("started once more") == 1
    assert len(captions(local.folder / "images")) == 12
    assert "Captioned 12, skipped 0, failed 0" in said


@linux
def test_an_engine_that_is_killed_again_ends_the_run_and_the_next_goes_on(
    local: Tool, tiny: Path, make_image: ImageMaker
) -> None:
    process, said = start_captioning(local, tiny, make_image, 30, 2, GETCAP_THREAD_POOL="1")
    os.kill(engine_of(process), signal.SIGKILL)
    said += read_until(process, "8 of 30")
    os.kill(engine_of(process), signal.SIGKILL)
    said += process.communicate(timeout=60)[1]
    assert process.returncode == 3, said
    assert ", for the second time (" in said
    done = local("--local", tiny, "--image-dir", "images")
    assert len(captions(local.folder / "images")) == 30 and "failed 0" in done.stderr


@linux
def test_an_engine_that_dies_without_its_log_is_started_once_more(
    local: Tool, tiny: Path, make_image: ImageMaker
) -> None:
    process, said = start_captioning(local, tiny, make_image, 12, 2, GETCAP_THREAD_POOL="1")
    Path(local.folder, "images/.gen-captions/engine.log").unlink()
    os.kill(engine_of(process), signal.SIGKILL)
    said += process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "Traceback" not in said, said
    assert len(captions(local.folder / "images")) == 12


@linux
def test_an_engine_that_cannot_be_started_again_ends_the_run(local: Tool, tiny: Path, make_image: ImageMaker) -> None:
    process, said = start_captioning(local, tiny, make_image, 12, 2, GETCAP_THREAD_POOL="1")
    log_path = Path(local.folder, "images/.gen-captions/engine.log")
    log_path.unlink()
    log_path.mkdir()
    os.kill(engine_of(process), signal.SIGKILL)
    said += process.communicate(timeout=60)[1]
    assert process.returncode == 3 and "the engine cannot be started: Is a directory" in said, said


@linux
def test_ctrl_c_while_the_engine_is_started_again_ends_the_run(local: Tool, tiny: Path, make_image: ImageMaker) -> None:
    process, _ = start_captioning(local, tiny, make_image, 30, 2, GETCAP_THREAD_POOL="1")
    first = engine_of(process)
    os.kill(first, signal.SIGKILL)
    read_until(process, "started once more")
    again = engine_of(process, but=first)
    handle = os.pidfd_open(again)
    os.kill(again, signal.SIGSTOP)  # as a large model that takes its time
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "Captioned" in said, said
    let_end(again, handle)


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_run_that_is_killed_leaves_no_engine(
    local: Tool, tiny: Path, make_image: ImageMaker, number: signal.Signals
) -> None:
    process, _ = start_captioning(local, tiny, make_image, 30, 1)
    engine = os.pidfd_open(engine_of(process))
    process.send_signal(number)
    process.communicate()
    wait_for_end(engine)


@linux
def test_a_run_that_is_killed_while_the_model_is_loaded_leaves_no_engine(
    local: Tool, tiny: Path, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    process = local.start("--local", tiny, "--image-dir", "images")
    read_until(process, "loading")
    engine = os.pidfd_open(engine_of(process))
    process.kill()
    process.communicate()
    wait_for_end(engine)


@linux
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leaves_no_engine_and_keeps_what_was_answered(
    local: Tool, tiny: Path, make_image: ImageMaker, times: int
) -> None:
    process, said = start_captioning(local, tiny, make_image, 40, 2)
    engine = os.pidfd_open(engine_of(process))
    for _ in range(times):
        process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=30)[1]
    assert process.returncode == 130, said
    wait_for_end(engine)
    assert f"Captioned {len(captions(local.folder / 'images'))}," in said


@linux
def test_ctrl_c_while_the_model_is_loaded_ends_both(local: Tool, tiny: Path, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    process = local.start("--local", tiny, "--image-dir", "images")
    read_until(process, "loading")
    engine = os.pidfd_open(engine_of(process))
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130, said
    wait_for_end(engine)


def make_engine(tiny: Path, log_path: Path) -> gc.Engine:
    """Return an engine that is not started."""
    settings = gc.resolve_settings({"local": str(tiny), "verbose": False, "quiet": False}, {}, {})
    return gc.Engine(gc.engine_options(settings, gc.find_files(str(tiny)), 500, 2), str(log_path))


def test_a_port_that_somebody_takes_first_is_left_to_them(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny, tmp_path / "engine.log")
    with socket.create_server(("127.0.0.1", 0)) as theirs, contextlib.closing(engine):
        taken, free = theirs.getsockname()[1], gc.free_port()
        ports = iter([taken, free])
        monkeypatch.setattr(gc, "free_port", lambda: next(ports))  # what a race would do
        engine.start()
        assert engine.url == f"http://127.0.0.1:{free}/v1"


def test_where_no_port_can_be_had_the_run_ends_with_the_reason(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny, tmp_path / "engine.log")
    with socket.create_server(("127.0.0.1", 0)) as theirs, contextlib.closing(engine):
        monkeypatch.setattr(gc, "free_port", lambda: theirs.getsockname()[1])
        with pytest.raises(gc.StopRun, match=r"the engine found its port taken .*; see .*engine\.log"):
            engine.start()


def test_nobody_without_the_key_is_served(tiny: Path, tmp_path: Path) -> None:
    engine = make_engine(tiny, tmp_path / "engine.log")
    with contextlib.closing(engine):
        engine.start()
        assert gc.ask_local(f"{engine.url}/models") == {}
        settings = engine.direct(gc.Settings())
        assert gc.ask_local(f"{engine.url}/models", key=settings.api_key)["data"]
        assert settings.api_key not in (tmp_path / "engine.log").read_text()
        assert settings.api_key.encode() not in b"".join(
            path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()
        )


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        ("cut the model", 3, "the engine cannot read the model: its file is damaged"),
        ("cut the projector", 3, "the engine cannot use the mmproj file with this model"),
        ("no projector", 2, "it has no mmproj file, and without one a model sees no image; put it beside the model"),
        ("no model", 2, "cannot be read: No such file"),
        ("other file", 2, "is no GGUF file"),
        ("name the projector", 2, "is a projector; name the model that it belongs to"),
    ],
)
def test_what_is_wrong_with_a_model_is_said(
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
        case "no model":
            model.unlink()
        case "other file":
            model.write_text("hello")
        case _:
            model = projector
    done = local("--local", model, "--image-dir", "images", code=code)
    assert words in done.stderr
    assert not captions(local.folder / "images")


def test_a_model_of_the_hub_is_downloaded_once_and_then_nobody_is_asked(
    local: Tool, hub: Hub, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    local.environment["HF_ENDPOINT"] = hub.url
    local.environment["HF_TOKEN"] = "hf_secret"
    done = local("--local", "some/captioner", "--image-dir", "images")
    assert "downloading once: mmproj-tiny.gguf and tiny.gguf, 0.00 GB, from " in done.stderr
    assert f"{hub.url}/some/captioner to {local.folder}/hub/hub/models--some--captioner" in done.stderr
    assert "hf_secret" not in done.stderr and len(captions(local.folder / "images")) == 1
    assert {headers.get("authorization") for headers in hub.asked("GET /api/models/some")} == {"Bearer hf_secret"}
    assert [headers.get("authorization") for headers in hub.asked("GET /cdn/")] == [None, None]
    hub.requests.clear()
    make_image("b.jpg", (90, 90))
    again = local("--local", "some/captioner", "--image-dir", "images")
    assert "downloading" not in again.stderr and len(captions(local.folder / "images")) == 2
    assert hub.requests == []


def test_what_is_damaged_in_the_cache_is_downloaded_anew_once_it_is_deleted(
    local: Tool, hub: Hub, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    local.environment["HF_ENDPOINT"] = hub.url
    local("--local", "some/captioner", "--image-dir", "images")
    (model,) = Path(local.folder, "hub").rglob("tiny.gguf")
    model.resolve().write_bytes(model.read_bytes()[:300_000])
    make_image("b.jpg")
    done = local("--local", "some/captioner", "--image-dir", "images", code=3)
    assert f"one that was downloaded is so anew once it is deleted ({model} with mmproj-tiny.gguf)" in done.stderr
    model.unlink()
    local("--local", "some/captioner", "--image-dir", "images")
    assert len(captions(local.folder / "images")) == 2


def test_a_part_that_is_larger_than_its_file_is_begun_anew(local: Tool, hub: Hub, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    model = (hub.folder / "tiny.gguf").read_bytes()
    blobs = local.folder / "hub/hub/models--some--captioner/blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(model).hexdigest()}.gen-captions.incomplete").write_bytes(model + b"more")
    local("--local", "some/captioner", "--image-dir", "images", HF_ENDPOINT=hub.url)
    assert len(captions(local.folder / "images")) == 1


def test_no_proxy_sees_what_stays_on_this_machine(local: Tool, tiny: Path, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(0.1)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        names = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"), address)
        local.environment |= names
        local("--local", tiny, "--image-dir", "images")
        with pytest.raises(TimeoutError):
            proxy.accept()


def test_a_log_that_cannot_be_kept_ends_the_run_with_the_reason(
    local: Tool, tiny: Path, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    Path(local.folder, "images/.gen-captions/engine.log").mkdir(parents=True)
    done = local("--local", tiny, "--image-dir", "images", code=3)
    assert "the engine cannot be started: Is a directory" in done.stderr and "left for the next run 1" in done.stderr


def test_a_renewal_that_fails_before_it_began_leaves_undo_as_it_was(
    local: Tool, tiny: Path, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    local("--local", tiny, "--image-dir", "images")
    first = captions(local.folder / "images")
    local("--local", tiny, "--image-dir", "images", "--overwrite", "--prompt", "other words")
    damaged = local.folder / "damaged" / "tiny.gguf"
    damaged.parent.mkdir()
    damaged.write_bytes(tiny.read_bytes()[:300_000])
    shutil.copy(tiny.parent / "mmproj-tiny.gguf", damaged.parent)
    local("--local", damaged, "--image-dir", "images", "--overwrite", "--prompt", "third", code=3)
    local("--undo", "--image-dir", "images")
    assert captions(local.folder / "images") == first


@linux
def test_a_renewal_that_is_interrupted_keeps_its_originals_and_undo_goes_past_them(
    local: Tool, tiny: Path, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    local("--local", tiny, "--image-dir", "images")
    first = captions(local.folder / "images")
    local("--local", tiny, "--image-dir", "images", "--overwrite", "--prompt", "other words")
    process = local.start("--local", tiny, "--image-dir", "images", "--overwrite", "--prompt", "third")
    read_until(process, "loading")
    engine = engine_of(process)
    handle = os.pidfd_open(engine)
    os.kill(engine, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130, said
    let_end(engine, handle)
    assert len(list(Path(local.folder, "images/.gen-captions").glob("*.zip"))) == 2
    local("--undo", "--image-dir", "images")
    local("--undo", "--image-dir", "images")
    assert captions(local.folder / "images") == first


def test_a_long_prompt_has_room(local: Tool, tiny: Path, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    local("--local", tiny, "--image-dir", "images", "--prompt", "describe the zebra carefully " * 300)
    assert len(captions(local.folder / "images")) == 1


def grow(path: Path) -> None:
    """Make a model file large enough that its download comes in several pieces."""
    with path.open("ab") as file:
        file.truncate(25_000_000)


def test_a_download_that_breaks_goes_on_where_it_was(local: Tool, hub: Hub, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    grow(hub.folder / "tiny.gguf")
    hub.cut_after = 21_000_000
    local("--local", "some/captioner", "--image-dir", "images", HF_ENDPOINT=hub.url)
    assert [headers.get("range") for headers in hub.asked("GET /cdn/tiny.gguf")] == [None, "bytes=20971520-"]
    assert len(captions(local.folder / "images")) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_download_that_is_killed_goes_on_in_the_next_run(
    local: Tool, hub: Hub, make_image: ImageMaker, number: signal.Signals
) -> None:
    make_image("a.jpg")
    grow(hub.folder / "tiny.gguf")
    (hub.folder / "mmproj-tiny.gguf").rename(hub.folder / "tiny-mmproj.gguf")  # to come second
    hub.stall_after = 21_000_000
    process = local.start("--local", "some/captioner", "--image-dir", "images", HF_ENDPOINT=hub.url)
    assert hub.stalled.wait(20)
    part = local.folder / "hub/hub/models--some--captioner/blobs"
    while not any(path.stat().st_size for path in part.glob("*.incomplete")):
        assert process.poll() is None
    process.send_signal(number)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == (130 if number == signal.SIGINT else -9), said
    hub.stall_after = 0
    hub.requests.clear()
    local("--local", "some/captioner", "--image-dir", "images", HF_ENDPOINT=hub.url)
    (headers,) = hub.asked("GET /cdn/tiny.gguf")
    assert int(headers["range"].removeprefix("bytes=").rstrip("-")) >= 10_000_000
    assert len(captions(local.folder / "images")) == 1


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (401, {"X-Error-Code": "GatedRepo"}, "its terms are to be accepted at {url}/some/captioner; then put a token"),
        (403, {"X-Error-Code": "GatedRepo"}, "its terms are to be accepted at {url}/some/captioner; then put a token"),
        (401, {"X-Error-Code": "RepoNotFound"}, "{url} has no such repository, or it wants a token in HF_TOKEN"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "{url} does not have the commit"),
        (500, {}, "{url} answers HTTP 500; run again later"),
        (
            401,
            {"X-Error-Message": "Invalid credentials in Authorization header"},
            "{url} refuses access: renew the token",
        ),
    ],
)
def test_a_hub_that_refuses_is_told_with_the_way_on(
    local: Tool, hub: Hub, make_image: ImageMaker, status: int, headers: dict[str, str], words: str
) -> None:
    make_image("a.jpg")
    hub.refusal = (status, headers)
    done = local("--local", "some/captioner", "--image-dir", "images", code=3, HF_ENDPOINT=hub.url)
    assert f"--local: some/captioner: {words.format(url=hub.url)}" in done.stderr
    assert not captions(local.folder / "images")


def test_without_connection_and_cache_the_run_ends_with_the_reason(local: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    done = local("--local", "--image-dir", "images", code=3, HF_ENDPOINT="http://127.0.0.1:9")
    assert f"--local: {gc.LOCAL_MODEL.partition(':')[0]}: http://127.0.0.1:9 cannot be reached: " in done.stderr
    off = local("--local", "--image-dir", "images", code=3, HF_HUB_OFFLINE="1")
    assert "it is not in the cache, and HF_HUB_OFFLINE forbids to download it" in off.stderr


def test_the_default_is_asked_for_by_its_commit_and_taken_by_its_hash_only(
    local: Tool, hub: Hub, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    for name in gc.SHA256:
        (hub.folder / name).write_bytes(b"GGUF and something else")
    done = local("--local", "--image-dir", "images", code=3, HF_ENDPOINT=hub.url)
    assert "is not what its hash says; it is removed, run again" in done.stderr
    repo = gc.LOCAL_MODEL.partition(":")[0]
    assert hub.asked(f"GET /api/models/{repo}/revision/{gc.PINNED[repo]}")
    assert not [*Path(local.folder, "hub").rglob("*.incomplete"), *Path(local.folder, "hub").rglob("*.gguf")]
    assert gc.PINNED[repo] != COMMIT


def test_two_runs_do_not_download_the_same_file_at_once(local: Tool, hub: Hub, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    hub.stall_after = 1000
    first = local.start("--local", "some/captioner", "--image-dir", "images", HF_ENDPOINT=hub.url)
    assert hub.stalled.wait(20)
    done = local(
        "--local", "some/captioner", "--image-dir", "images", "--caption-dir", "other", code=3, HF_ENDPOINT=hub.url
    )
    assert "another run is at work there" in done.stderr
    first.kill()
    first.communicate()


MIXED = ["Eyes-2B-Q8_0.gguf", "Eyes-2B-Q4_K_M.gguf", "mmproj-Eyes-2B-F16.gguf", "mmproj-Eyes-2B-Q8_0.gguf", "README.md"]
SPLIT = [f"big-Q4_K_M-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("names", "quant", "model", "projector"),
    [
        (MIXED, "", "Eyes-2B-Q4_K_M.gguf", "mmproj-Eyes-2B-Q8_0.gguf"),
        (MIXED, "q8_0", "Eyes-2B-Q8_0.gguf", "mmproj-Eyes-2B-Q8_0.gguf"),
        (["m.Q4_K.gguf", "m.Q4_K_M.gguf", "m.mmproj-f16.gguf"], "Q4_K", "m.Q4_K.gguf", "m.mmproj-f16.gguf"),
        (["m-q5_k_s.gguf", "m-iq2.gguf", "mmproj.gguf"], "", "m-iq2.gguf", "mmproj.gguf"),
        (
            ["m_q4_k_m.gguf", "m_bf16.gguf", "mmproj_bf16.gguf", "mmproj_f16.gguf"],
            "",
            "m_q4_k_m.gguf",
            "mmproj_f16.gguf",
        ),
        (["a-1b.gguf", "mmproj-a-2b.gguf", "mmproj-a-1b.gguf"], "", "a-1b.gguf", "mmproj-a-1b.gguf"),
        ([*SPLIT, "mmproj.gguf"], "", SPLIT[0], "mmproj.gguf"),
        (["sub/m-Q8_0.gguf", "sub/mmproj.gguf", "imatrix.gguf"], "", "sub/m-Q8_0.gguf", "sub/mmproj.gguf"),
    ],
)
def test_the_files_of_a_repository_are_chosen(names: list[str], quant: str, model: str, projector: str) -> None:
    chosen = gc.choose_files(names, quant)
    assert (chosen.model, chosen.projector) == (model, projector)
    assert chosen.parts == (tuple(SPLIT) if model == SPLIT[0] else (model,))


@pytest.mark.parametrize(
    ("names", "quant", "words"),
    [
        (["README.md", "model.safetensors"], "", "it holds no model in GGUF format"),
        (["mmproj.gguf"], "", "it holds no model in GGUF format"),
        (["m-Q8_0.gguf"], "", "it has no mmproj file"),
        (["m-Q8_0.gguf", "mmproj.gguf"], "Q5_K", "it has no Q5_K; it has m-Q8_0.gguf"),
        (["m-Q4_K_M.gguf", "mmproj.gguf"], "Q4_K", "it has no Q4_K; it has"),
        ([*SPLIT[:2], "mmproj.gguf"], "", "of the 3 parts of big-Q4_K_M-00001-of-00003.gguf it has 2"),
    ],
)
def test_files_that_make_no_vision_model_are_refused(names: list[str], quant: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gc.choose_files(names, quant)


@pytest.mark.parametrize(
    ("code", "said", "words"),
    [
        (-4, "", "needs instructions that this processor does not have"),
        (3221225501, "", "needs instructions that this processor does not have"),
        (-9, "", "was killed, perhaps for want of memory"),
        (1, "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 9", "had too little memory"),
        (
            1,
            "0.0 E llama_model_load: error loading model: unknown model architecture: 'x'",
            "does not know this kind of",
        ),
        (1, "0.00.1 E srv  start: couldn't bind HTTP server socket, hostname: 127.0.0.1", "found its port taken"),
        (1, "0.00.1 E srv  load: something new\nTraceback", "ended with exit code 1: srv load: something new"),
        (1, "Traceback\nImportError: libgomp.so.1 is missing", "ended with exit code 1: libgomp.so.1 is missing"),
        (-11, "", "was ended by SIGSEGV"),
        (0, "", "ended with exit code 0"),
    ],
)
def test_an_engines_end_is_described(code: int, said: str, words: str) -> None:
    assert gc.describe_end(code, said).startswith(words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "gpt-6-luna"], "--local and --model: take one of them"),
        (["--base-url", "http://x/v1"], "--local and --base-url: take one of them"),
        (["--max-cost", "1"], "--local and --max-cost: take one of them"),
        (["--batch"], "--local: asks a model on this machine image by image"),
        (["--fix-encoding"], "--local: belongs to captioning, not to --fix-encoding"),
    ],
)
def test_flags_that_mean_another_server_are_refused(
    local: Tool, make_image: ImageMaker, flags: list[str], words: str
) -> None:
    make_image("a.jpg")
    assert words in local("--image-dir", "images", *flags, "--local", code=2).stderr


def test_what_is_no_model_is_refused(local: Tool) -> None:
    for name in ("a/b--c", "a/..", "../a", "a/b/c", "a/b:"):
        local("--image-dir", "images", "--local", name, code=2)
    done = local("--image-dir", "images", "--local", "qwen", code=2)
    assert '--local: "qwen" is not allowed; allowed: owner/name or owner/name:quant at Hugging Face' in done.stderr


def test_variables_of_another_server_do_not_matter(local: Tool, tiny: Path, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    local.environment |= {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "OPENAI_API_KEY": KEY, "GETCAP_MAX_COST": "1"}
    local("--local", tiny, "--image-dir", "images", GETCAP_MODEL="gpt-6-luna", GETCAP_SERVICE_TIER="flex")
    entry = json.loads(Path(local.folder, "images/.gen-captions/journal.jsonl").read_text())
    assert entry["model"] == "tiny"


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has all that this one has, but for the optional packages."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    (there,) = folder.glob("lib/python*/site-packages")
    for entry in sys.path:
        if entry.endswith("site-packages"):
            for path in Path(entry).iterdir():
                if not path.name.startswith(("xllamacpp", "huggingface_hub", "_virtualenv", "__")):
                    (there / path.name).symlink_to(path)
    return folder / "bin" / "python"


def run_bare(python: Path, local: Tool, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the tool with such a Python."""
    command = [python, TOOL, *arguments]
    variables = {**local.environment, **environment}
    return subprocess.run(
        command, cwd=local.folder, env=variables, capture_output=True, text=True, timeout=60, check=False
    )


def test_without_an_engine_the_command_that_installs_one_is_named(
    local: Tool, bare_python: Path, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    done = run_bare(bare_python, local, "--local", "--image-dir", "images")
    assert done.returncode == 2
    assert (
        "--local: no engine is installed: pip install -r requirements-local.txt (or have a llama-server" in done.stderr
    )


LLAMA_SERVER = """#!{python}
import argparse, os, sys
import xllamacpp

parser = argparse.ArgumentParser()
for name in ("-m", "--mmproj", "--alias", "--host"):
    parser.add_argument(name, required=True)
for name in ("--port", "-np", "-c", "-t", "-lv", "--image-max-tokens", "--cache-ram", "--reasoning-budget", "--top-k"):
    parser.add_argument(name, type=int, required=True)
for name in ("--temp", "--top-p", "--presence-penalty"):
    parser.add_argument(name, type=float, required=True)
given = parser.parse_args()
params = xllamacpp.CommonParams()
params.model.path, params.mmproj.path, params.port = given.m, given.mmproj, given.port
params.api_keys, params.n_parallel, params.n_ctx = [os.environ["LLAMA_API_KEY"]], given.np, given.c
params.cpuparams.n_threads = given.t
server = xllamacpp.Server(params)
print("this is the llama-server on the PATH", flush=True)
while True:
    import signal
    signal.pause()
"""


@linux
def test_a_llama_server_on_the_path_serves_as_well(
    local: Tool, bare_python: Path, tiny: Path, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    program = local.folder / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(LLAMA_SERVER.format(python=sys.executable))
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    done = run_bare(bare_python, local, "--local", tiny, "--image-dir", "images", PATH=path)
    assert done.returncode == 0, done.stderr
    assert len(captions(local.folder / "images")) == 1
    assert "this is the llama-server on the PATH" in Path(local.folder, "images/.gen-captions/engine.log").read_text()


def test_a_local_model_has_more_time_and_fewer_workers_unless_told_otherwise() -> None:
    flags = {"local": True, "verbose": False, "quiet": False}
    settings = gc.resolve_settings(flags, {}, {})
    assert (settings.local, settings.timeout, settings.thread_pool) == (gc.LOCAL_MODEL, 900.0, 2)
    told = gc.resolve_settings(flags, {"GETCAP_TIMEOUT": "5", "GETCAP_THREAD_POOL": "3"}, {})
    assert (told.timeout, told.thread_pool) == (5.0, 3)
