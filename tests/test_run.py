"""The whole tool, as a process: what is kept and what is said, whatever happens to it."""

from __future__ import annotations

import asyncio
import contextlib
import gc as garbage
import io
import json
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import weakref
from pathlib import Path
from typing import IO, Any

import pytest
from PIL import Image

import gen_captions as gc
from conftest import (
    KEY,
    TOOL,
    ImageMaker,
    Server,
    Tool,
    become_the_tool,
    captions,
    snapshot,
    wait_for,
)

POSIX = pytest.mark.skipif(os.name == "nt", reason="signals, terminals, permissions")
ANSWER = "A grey cat sits on a blue mat."
STOPPED = "Stopped. Run the same command to continue."


def read_until(stream: IO[str] | None, words: str) -> str:
    """Return what a process said, up to the line with these words."""
    assert stream
    said = ""
    while words not in said:
        line = stream.readline()
        assert line, said
        said += line
    return said


def end_of(process: subprocess.Popen[str]) -> str:
    """Return what a process still says on stderr, and wait for its end."""
    assert process.stdout
    assert process.stderr
    said = process.stderr.read()
    process.stdout.close()
    process.stderr.close()
    process.wait(timeout=60)
    return said


def read_report(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def on_terminal(tool: Tool, *arguments: str | Path, **environment: str) -> tuple[str, int]:
    """Run the tool with stderr on a terminal; return what it showed, and the exit code."""
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    words, variables = [*map(str, arguments)], {**tool.environment, **environment}
    process = subprocess.Popen(
        [sys.executable, str(TOOL), *words],
        preexec_fn=lambda: become_the_tool(words, variables),  # noqa: PLW1509
        cwd=tool.folder,
        stdout=subprocess.DEVNULL,
        stderr=follower,
    )
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 65536):
            shown += chunk
    except OSError:  # Linux reports the end of a terminal so
        pass
    os.close(leader)
    return shown.decode().replace("\r\n", "\n"), process.wait(timeout=60)


# ---------------------------------------------------------------------------------- one run


def test_a_folder_is_captioned_end_to_end(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for name in ("a.jpg", "b.PNG", "sub/deep/c.webp"):
        make_image(name)
    (tool.folder / "config").mkdir()
    server.script(then={"content": f'  "{ANSWER}"\n'})
    folders = ["--image-dir", "./images", "--caption-dir", "./captions", "--config-dir", "./config"]
    done = tool(*folders, "--price", "0.10/0.50")
    assert captions(tool.folder / "captions") == {
        "a.txt": f"{ANSWER}\n",
        "b.txt": f"{ANSWER}\n",
        "sub/deep/c.txt": f"{ANSWER}\n",
    }
    assert done.stdout == ""
    *_, worth, last = done.stderr.splitlines()
    assert worth == "Worth a look: 2 identical to another."
    assert re.fullmatch(r"3 captioned in \d+\.\d s\. 3,660 tokens, \$0\.0004\.", last)


def test_with_nothing_to_do_nothing_is_written(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(4):
        make_image(f"{number}.jpg").with_suffix(".txt").write_text("by hand", encoding="utf-8")
    before = snapshot(tool.folder)
    for more in ((), ("--overwrite",), ("-n",)):
        said = tool("--image-dir", "images", *more, OPENAI_API_KEY="").stderr
        assert said.startswith("Nothing to do: ")
    assert tool("images").stderr == "Nothing to do: all 4 images have captions.\n"
    assert snapshot(tool.folder) == before
    assert server.stats()["requests"] == 0


def test_a_second_run_asks_for_nothing_and_touches_nothing(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(4):
        make_image(f"{number}.jpg")
    tool("--image-dir", "images")
    before = snapshot(tool.folder)
    tool("--image-dir", "images")
    tool("--image-dir", "images", "--overwrite")
    assert server.stats()["requests"] == 4
    assert snapshot(tool.folder) == before


def test_a_caption_by_hand_is_left_alone_and_a_blank_one_is_made_anew(
    tool: Tool, make_image: ImageMaker
) -> None:
    by_hand, blank = (make_image(name).with_suffix(".txt") for name in ("a.jpg", "b.jpg"))
    by_hand.write_bytes(b"mine \x92\n\n")
    blank.write_bytes(b"\xef\xbb\xbf \n")
    tool("--image-dir", "images")
    assert by_hand.read_bytes() == b"mine \x92\n\n"
    assert b"Stand-in" in blank.read_bytes()


def test_a_caption_that_a_person_writes_meanwhile_is_left_alone(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    path = make_image("a.jpg").with_suffix(".txt")
    server.script(hold_after=0)
    process = tool.start("--image-dir", "images")
    wait_for(lambda: server.stats()["requests"])
    path.write_text("mine", encoding="utf-8")
    server.release()
    assert "1 skipped (captioned meanwhile)" in end_of(process)
    assert path.read_text(encoding="utf-8") == "mine"
    assert process.returncode == 0


@POSIX
def test_a_caption_is_one_line_of_utf8_that_others_may_read(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    path = make_image("a.jpg").with_suffix(".txt")
    server.script(then={"content": "\ufeff A caf\u00e9\r\nwith “quotes”\u2028and 🐈.\n\n"})
    before = os.umask(0o022)
    try:
        tool("--image-dir", "images")
    finally:
        os.umask(before)
    assert path.read_bytes() == "A café with “quotes” and 🐈.\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


NO_CAPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("refused", {"content": "I'm sorry, I can't help with that."}),
    ("refused", {"content": None, "message": {"refusal": "I can't describe people."}}),
    ("refused", {"content": "", "finish_reason": "content_filter"}),
    ("reasoning only", {"content": "<think>The user wants a caption. A cat"}),
    ("reasoning only", {"content": "", "message": {"reasoning_content": "A cat, then."}}),
    ("cut off", {"content": "A grey cat sits on a", "finish_reason": "length"}),
    ("empty", {"content": "  \n"}),
    ("error text", {"content": "Error: failed to process the image"}),
    ("looping", {"content": "A cat, a cat, and " + "a cat, and a cat, and " * 60}),
    ("HTTP 400", {"status": 400, "body": {"error": {"message": "invalid image"}}}),
]


def test_what_is_no_caption_never_becomes_one(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(len(NO_CAPTIONS) + 1):
        make_image(f"{number:02}.jpg")
    server.script(steps=[{"content": ANSWER}, *(step for _, step in NO_CAPTIONS)])
    arguments = ("--image-dir", "images", "--thread-pool", "1", "--report", "-")
    lines = read_report(tool(*arguments, code=1).stdout)
    assert captions(tool.folder) == {"images/00.txt": f"{ANSWER}\n"}
    assert [line["reason"] for line in lines[1:-1]] == [reason for reason, _ in NO_CAPTIONS]


def test_images_are_never_written_to_by_any_command(tool: Tool, make_image: ImageMaker) -> None:
    path = make_image("a.png", size=(2000, 1000))
    path.with_name("b.txt").write_bytes("by h\xe4nd, ein schöner Tag".encode("cp1252"))
    make_image("b.jpg")

    def look() -> list[object]:
        found = (path, path.with_name("b.jpg"))
        return [(p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in found]

    before = look()
    tool("images")
    tool("images", "--fix-encoding")
    tool("images", "--overwrite", "--prompt", "another")
    tool("images", "--undo")
    end_of(tool.start("images", "--review"))
    assert look() == before


BAD_IMAGES = {
    "empty": b"",
    "text": b"<!DOCTYPE html><p>not found",
    "zeros": b"\0" * 5000,
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


def noise(size: tuple[int, int]) -> bytes:
    """Return a JPEG that does not get small."""
    image = Image.frombytes("RGB", size, random.Random(7).randbytes(3 * size[0] * size[1]))
    output = io.BytesIO()
    image.save(output, "JPEG", quality=90)
    return output.getvalue()


def test_good_and_bad_images_side_by_side(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(16):
        make_image(f"good-{number}.jpg", size=(32 + number, 32))
    whole = noise((64, 64))
    cut = {f"cut-{number}": whole[: len(whole) * number // 10] for number in range(1, 10)}
    bad = BAD_IMAGES | cut
    for number, (name, data) in enumerate(bad.items()):
        suffix = ("jpg", "png", "webp")[number % 3]
        (tool.folder / "images" / f"{name}.{suffix}").write_bytes(data)
    err = tool("--image-dir", "images", code=1).stderr
    said = re.findall(r"ERROR +images.([\w-]+)\.\w+: (?:not an image|damaged image): \w", err)
    assert sorted(said) == sorted(bad)  # each is named, and once
    assert len(captions(tool.folder)) == server.stats()["requests"] == 16
    assert server.stats()["wrong"] == []


@POSIX
def test_a_pipe_and_a_giant_among_the_images_do_not_hang_the_run(
    tool: Tool, make_image: ImageMaker
) -> None:
    folder = make_image("a.jpg").parent
    os.mkfifo(folder / "pipe.jpg")
    with (folder / "giant.png").open("wb") as file:
        file.truncate(300 << 30)
    err = tool("--image-dir", "images", code=1).stderr
    assert "images/pipe.jpg: unreadable file: is a folder, a pipe or a device" in err
    assert "images/giant.png: unreadable file: is over 256 MiB" in err
    assert len(captions(tool.folder)) == 1


# --------------------------------------------------------------------------- what -n promises


@pytest.fixture
def mixed(tool: Tool, make_image: ImageMaker) -> Tool:
    """A folder with all kinds of things in it."""
    for name in ("a.jpg", "b.jpg", "done.jpg", "twice.jpg", "twice.png", "a-masklabel.png"):
        make_image(name)
    folder = tool.folder / "images"
    (folder / "done.txt").write_text("by hand", encoding="utf-8")
    (folder / "empty.jpg").touch()
    (folder / "page.png").write_bytes(b"<!DOCTYPE html>")
    (folder / "clip.mp4").write_bytes(b"video")
    return tool


def test_n_and_the_run_count_alike_and_report_each_image(mixed: Tool) -> None:
    plan = mixed("-n", "--image-dir", "images", "--report", "plan.jsonl", code=1)
    run = mixed("--image-dir", "images", "--report", "run.jsonl", code=1)
    for last, done in ((plan, "2 planned (to caption)"), (run, "2 captioned")):
        counts = last.stderr.splitlines()[-1]
        assert counts.startswith(f"{done}, 4 failed (2 ")
        assert counts.count("2 not an image") == counts.count("2 shared caption file") == 1
        assert "3 skipped (1 mask, 1 video, 1 has a caption)" in counts

    def listed(name: str) -> list[tuple[str, str]]:
        lines = read_report((mixed.folder / name).read_text(encoding="ascii"))[:-1]
        return sorted((line["path"], line["reason"]) for line in lines)

    planned = [(image, reason.removeprefix("to caption")) for image, reason in listed("plan.jsonl")]
    assert planned == listed("run.jsonl")
    assert len(planned) == 9


def test_n_writes_nothing_and_opens_no_connection(mixed: Tool) -> None:
    before = snapshot(mixed.folder)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        for more in ((), ("--overwrite",), ("--batch",)):
            mixed("-n", "images", *more, OPENAI_BASE_URL=url, code=1)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert snapshot(mixed.folder) == before


@pytest.mark.parametrize("more", [(), ("-n",)])
def test_a_folder_without_images_is_an_error_that_says_where_it_looked(
    tool: Tool, more: tuple[str, ...]
) -> None:
    (tool.folder / "images").mkdir()
    (tool.folder / "images" / "clip.mp4").touch()
    err = tool("--image-dir", "images", *more, code=2).stderr
    assert "--image-dir: images: no images there or below; looked for jpg, jpeg," in err
    assert sorted(os.listdir(tool.folder)) == [".env", "images"]


# ------------------------------------------------------------------------------- kill and stop


@POSIX
def test_kill_9_at_ten_moments_loses_nothing(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(120):
        make_image(f"{number:03}.jpg", size=(32, 32))
    server.script(latency=0.02, then={"content": ANSWER}, check=False)
    out = tool.folder / "out"
    arguments = ("--image-dir", "images", "--caption-dir", out, "--thread-pool", "4")
    kept: dict[str, tuple[bytes, int, int]] = {}
    for moment in range(10):
        process = tool.start(*arguments)
        least = 1 + 11 * moment
        wait_for(lambda least=least: len(captions(out)) >= least)  # type: ignore[misc]
        process.kill()
        end_of(process)
        now = snapshot(out, "*.txt")
        assert {data for data, _, _ in now.values()} == {f"{ANSWER}\n".encode()}
        assert {name: now[name] for name in kept} == kept
        kept = now
    before = server.stats()["requests"]
    tool(*arguments)
    asked = server.stats()["requests"] - before
    assert 0 <= 120 - len(kept) - asked <= 4  # the last kill's answers are in the journal
    assert len(captions(out)) == 120
    assert [name for name in os.listdir(out) if not name.endswith(".txt")] == [".gen-captions"]


@POSIX
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_waits_for_what_is_on_its_way(
    tool: Tool, server: Server, make_image: ImageMaker, number: signal.Signals, code: int
) -> None:
    for image in range(40):
        make_image(f"{image:02}.jpg")
    server.script(hold_after=1)
    process = tool.start("--image-dir", "images", "--thread-pool", "4")
    wait_for(lambda: server.stats()["in_flight"] == 4)
    process.send_signal(number)
    said = read_until(process.stderr, "Stopping")
    assert said.endswith("Stopping; waiting for 4 answers. Ctrl-C again quits now.\n")
    server.release()
    last = end_of(process).splitlines()[-2:]
    assert process.returncode == code
    assert server.stats()["requests"] == len(captions(tool.folder)) == 5
    assert last[0].startswith("5 captioned, 35 not done yet in ")
    assert last[1] == STOPPED


@POSIX
def test_the_second_signal_quits_and_what_is_on_the_disk_is_counted(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    """It comes while answers are still on their way, and then while captions are being written."""
    for image in range(120):
        make_image(f"{image:03}.jpg", size=(32, 32))
    for answers in ("on their way", "being written", "being written", "being written"):
        before = len(captions(tool.folder))
        server.script(hold_after=1, check=False)
        process = tool.start("--image-dir", "images", "--thread-pool", "20")
        wait_for(lambda: server.stats()["in_flight"] == 20)
        process.send_signal(signal.SIGINT)
        read_until(process.stderr, "Stopping")
        if answers == "being written":
            server.release()
            wait_for(lambda before=before: len(captions(tool.folder)) > before + 1)  # type: ignore[misc]
        process.send_signal(signal.SIGINT)
        said = end_of(process)
        assert process.returncode == 130
        number = len(captions(tool.folder))
        assert f"\n{number - before} captioned, " in f"\n{said}"
        assert f", {120 - number} not done yet in " in said
        assert said.endswith(f"{STOPPED}\n")
        assert "Traceback" not in said


def interrupt_until_the_end(process: subprocess.Popen[str]) -> str:
    """Send Ctrl-C again and again from the last line on; return what is said then."""
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
    return end_of(process)


@POSIX
def test_ctrl_c_right_after_the_end_harms_nothing(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    """Python started for real: what ends is what counts."""
    make_image("a.jpg").with_suffix(".txt").write_text("by hand", encoding="utf-8")

    def start(flag: str = "--image-dir") -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(TOOL), flag, "images"],
            cwd=tool.folder,
            env=tool.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    for _ in range(20):
        process = start()
        read_until(process.stderr, "Nothing to do")
        assert interrupt_until_the_end(process) == ""
        assert process.returncode == 0
        process = start("--undo")
        read_until(process.stdout, "Nothing to restore")
        assert interrupt_until_the_end(process) == ""
        assert process.returncode in {0, 130}
    make_image("b.jpg")
    for _ in range(2):
        server.script(hold_after=0)
        process = start()
        wait_for(lambda: server.stats()["in_flight"])
        process.send_signal(signal.SIGINT)
        read_until(process.stderr, "Stopping")
        process.send_signal(signal.SIGINT)
        read_until(process.stderr, STOPPED)
        assert interrupt_until_the_end(process) == ""
        assert process.returncode == 130


@POSIX
def test_a_first_signal_after_the_run_was_stopped_still_waits_for_what_is_paid(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for image in range(10):
        make_image(f"{image}.jpg")
    server.script(steps=[{}, {"status": 401, "body": "no"}], hold_after=2)
    process = tool.start("--image-dir", "images", "--thread-pool", "4")
    read_until(process.stderr, "401")
    process.send_signal(signal.SIGINT)
    server.release()
    end_of(process)
    assert process.returncode == 3
    assert len(captions(tool.folder)) == server.stats()["requests"] - 1


@POSIX
def test_a_signal_does_not_wait_for_a_backoff(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    server.script(then={"status": 429, "headers": {"Retry-After": "500"}, "body": "later"})
    process = tool.start("--image-dir", "images")
    read_until(process.stderr, "retry 1 of 10")
    process.send_signal(signal.SIGTERM)
    assert "Stopping. Ctrl-C again quits now." in end_of(process)
    assert process.returncode == 143


# ------------------------------------------------------------------------- disks and folders


def run_with_little_room(tool: Tool, most_bytes: int) -> subprocess.CompletedProcess[str]:
    """Run the tool where no file may get larger, as on a disk that is full."""
    import resource

    return subprocess.run(
        [sys.executable, str(TOOL), "--image-dir", "images", "--thread-pool", "4"],
        cwd=tool.folder,
        env=tool.environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes)),
        capture_output=True,
        text=True,
        check=False,
    )


@POSIX
@pytest.mark.parametrize("most_bytes", [10, 5000])
def test_a_full_disk_stops_the_run_and_no_answer_is_lost(
    tool: Tool, server: Server, make_image: ImageMaker, most_bytes: int
) -> None:
    for number in range(30):
        make_image(f"{number:02}.jpg")
    server.script(check=False)
    full = run_with_little_room(tool, most_bytes)
    assert full.returncode == 3
    assert "Once that is mended, run the same command to continue." in full.stderr
    asked = server.stats()["requests"]
    assert asked < 20
    shown = re.findall(
        r"images/\d\d\.txt: not saved; the answer was: Stand-in for a caption", full.stderr
    )
    before = captions(tool.folder)
    assert len(shown) + len(before) == asked
    assert shown
    assert all(text.startswith("Stand-in") for text in before.values())
    tool("--image-dir", "images")
    after = captions(tool.folder)
    assert len(after) == 30
    assert {name: after[name] for name in before} == before
    assert server.stats()["requests"] == asked + 30 - len(before)


@POSIX
def test_a_caption_folder_that_vanishes_stops_the_run(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(30):
        make_image(f"{number:02}.jpg")
    (tool.folder / "out").mkdir()
    server.script(hold_after=1)
    process = tool.start("--image-dir", "images", "--caption-dir", "out", "--thread-pool", "2")
    wait_for(lambda: server.stats()["in_flight"] == 2)
    (tool.folder / "out").rename(tool.folder / "gone")
    (tool.folder / "out").write_text("a file", encoding="utf-8")
    server.release()
    said = end_of(process)
    assert process.returncode == 3
    assert said.count("cannot save captions: ") == 1
    assert said.count("the answer was: ") == server.stats()["requests"] - 1 == 2


@POSIX
@pytest.mark.parametrize("place", ["out", "out/sub"])
def test_a_folder_that_cannot_be_made_stops_before_anything_is_paid_for(
    tool: Tool, server: Server, make_image: ImageMaker, place: str
) -> None:
    make_image("a.jpg")
    make_image("sub/b.jpg")
    path = tool.folder / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("a file", encoding="utf-8")
    before = snapshot(tool.folder)
    code = 2 if place == "out" else 3
    err = tool("--image-dir", "images", "--caption-dir", "out", code=code).stderr
    assert re.search(rf"{place}: (?:is no folder|cannot save captions there)", err)
    assert server.stats()["requests"] == 0
    assert {name: kept[0] for name, kept in snapshot(tool.folder).items()} == {
        name: kept[0] for name, kept in before.items()
    }


# -------------------------------------------------------------------------- servers and money


def test_one_in_five_requests_failing_in_any_way_loses_nothing(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(150):
        make_image(f"{number:03}.jpg", size=(32, 32))
    server.script(faults=0.2, check=False)
    tool("--image-dir", "images", GETCAP_TIMEOUT="1", GETCAP_THROTTLE_BACKOFF_FACTOR="0.01")
    assert len(captions(tool.folder)) == 150
    assert server.stats()["requests"] > 170


def test_a_run_that_cannot_begin_leaves_nothing_behind(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    before = sorted(snapshot(tool.folder))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"  # nobody listens there any more
    arguments = ("--image-dir", "images", "--caption-dir", "deep/out")
    err = tool(*arguments, code=3, OPENAI_BASE_URL=url, GETCAP_THROTTLE_RETRIES="1").stderr
    assert f"cannot connect to {url[7:-3]}" in err
    assert sorted(snapshot(tool.folder)) == before


def test_images_that_failed_before_are_asked_last(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for name in "abc":
        make_image(f"{name}.jpg")
    server.script(steps=[{"content": "<think>"}, {"content": ""}], then={"status": 401})
    arguments = ("--image-dir", "images", "--thread-pool", "1", "--prompt", "This is {name}.")
    tool(*arguments, code=3)
    server.script()
    tool(*arguments)
    asked = [body["messages"][0]["content"][0]["text"] for body in server.stats()["bodies"]]
    assert asked == ["This is c.", "This is a.", "This is b."]


@POSIX
def test_two_runs_on_one_caption_folder_never_pay_twice(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(4):
        make_image(f"{number}.jpg")
    (tool.folder / "link").symlink_to(tool.folder / "images")
    server.script(hold_after=0)
    first = tool.start("--image-dir", "images", "--thread-pool", "1")
    wait_for(lambda: server.stats()["requests"])
    for name in ("images", "link"):
        said = tool("--image-dir", name, code=3).stderr
        assert "another run is at work there; wait for its end" in said
    assert "4 planned" in tool("--image-dir", "images", "-n").stderr
    server.release()
    end_of(first)
    assert first.returncode == 0
    assert server.stats()["requests"] == len(captions(tool.folder / "images")) == 4


@pytest.mark.parametrize("arguments", [(), ("-n",), ("--fix-encoding",), ("--review",)])
def test_a_python_without_the_requirements_says_which_is_missing(
    tool: Tool, make_image: ImageMaker, arguments: tuple[str, ...]
) -> None:
    make_image("a.jpg").with_name("b.txt").write_bytes(b"it\x92s")
    (tool.folder / ".env").unlink()
    before = snapshot(tool.folder)
    done = subprocess.run(
        [sys.executable, "-S", "-I", str(TOOL), "--image-dir", "images", *arguments],
        cwd=tool.folder,
        env=tool.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    said = r"gen-captions: \w+ is not installed; type: pip install -r requirements.txt\n"
    assert re.fullmatch(said, done.stderr)
    assert done.returncode == 2
    assert {name: kept[0] for name, kept in snapshot(tool.folder).items()} == {
        name: kept[0] for name, kept in before.items()
    }


def test_the_key_is_in_no_output_and_in_no_file(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    """The server repeats it in an error, in an answer and in a refusal."""
    for name in "abcd":
        make_image(f"{name}.jpg")
    steps = [
        {"content": f"A sign that says {KEY} hangs on a wall."},
        {"content": f"I'm sorry, I can't help with {KEY}."},
        {"status": 400, "body": {"error": {"message": f"bad request by {KEY}"}}},
    ]
    echo = {"status": 401, "body": {"error": {"message": f"Incorrect API key: {KEY}"}}}
    server.script(steps=steps, then=echo)
    arguments = ("-v", "images", "--thread-pool", "1", "--report", "r.jsonl")
    done = tool(*arguments, code=3)  # tool() looks at the output
    assert "Incorrect API key: [key]" in done.stderr
    assert "says [key] hangs" in captions(tool.folder)["images/a.txt"]
    for data, _, _ in snapshot(tool.folder).values():
        assert KEY.encode() not in data
    usage = tool("images", "--trigger", KEY, code=2).stderr + tool(KEY, "x", code=2).stderr
    assert "…" in usage or "the value" in usage


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "fancyfeast/llama-joycaption-beta-one-hf-llava"),
        ("--model", "llama-joycaption-beta-one-hf-llava"),
        ("--trigger", "@ohwx"),
    ],
)
def test_what_only_looks_as_long_as_a_key_is_no_key(
    tool: Tool, make_image: ImageMaker, arguments: tuple[str, str]
) -> None:
    make_image("a.jpg")
    tool("-n", "--image-dir", "images", *arguments)


# -------------------------------------------------------------------------------- exit codes


def test_each_end_has_its_exit_code(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    for name in "ab":
        make_image(f"{name}.jpg")
    server.script(then={"status": 401, "body": "no"})
    tool("--image-dir", "images", code=3)
    tool("--image-dir", "nowhere", code=2)
    tool("--no-such-flag", code=2)
    tool("--image-dir", "images", code=2, OPENAI_API_KEY="", OPENAI_BASE_URL="https://a.example/v1")
    server.script(steps=[{}, {"content": ""}])
    tool("--image-dir", "images", code=1)
    tool("--image-dir", "images", code=0)
    tool("--image-dir", "images", code=0)


# ------------------------------------------------------------------------------------ output


def test_results_go_to_stdout_and_the_rest_to_stderr(mixed: Tool) -> None:
    plan = mixed("-n", "images", code=1)
    run = mixed("images", "--report", "-", code=1)
    assert "images/a.jpg -> images/a.txt" in plan.stdout.replace("\\", "/")
    assert "planned" not in plan.stdout
    assert all(line.startswith("{") for line in run.stdout.splitlines())
    assert " ERROR   images" in run.stderr


def test_a_problem_begins_with_its_path_and_is_said_once(mixed: Tool) -> None:
    err = mixed("images", code=1).stderr.replace("\\", "/")
    for name in ("empty.jpg", "page.png", "twice.jpg", "twice.png"):
        assert len(re.findall(rf"ERROR   images/{name}: \w", err)) == 1
        assert err.count(f"images/{name}") == 1


def test_log_lines_carry_time_worker_and_level(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    (tool.folder / "images" / "b.jpg").touch()
    err = tool("-v", "--image-dir", "images", code=1).stderr
    time_ = r"(?m)^\d\d:\d\d:\d\d"
    assert re.search(rf"{time_} worker-\d+ +DEBUG   images.a\.jpg: Stand-in", err)
    assert re.search(rf"{time_} worker-\d+ +ERROR   images.b\.jpg: not an image", err)
    assert len(re.findall(time_, err)) >= len(err.splitlines()) - 1 - err.count("Output only")


@POSIX
def test_a_terminal_shows_a_bar_the_first_caption_and_problems_in_colour(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(5):
        make_image(f"{number}.jpg")
    (tool.folder / "images" / "0-bad.jpg").write_bytes(b"x")
    server.script(latency=0.15)  # so long that the bar is drawn between two images
    shown, code = on_terminal(tool, "images", "--thread-pool", "1")
    assert code == 1
    assert re.search(r"[345]/6, .*1 failed", shown)
    assert shown.count("INFO    images/0.jpg: Stand-in for a caption") == 1
    assert "images/1.jpg: Stand-in" not in shown
    assert re.search(r"\x1b\[31m[^\n]*images/0-bad\.jpg: not an image[^\n]*\x1b\[0m", shown)


@POSIX
def test_colours_are_for_terminals_and_never_with_no_color(
    tool: Tool, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    (tool.folder / "images" / "bad.jpg").write_bytes(b"x")
    shown, _ = on_terminal(tool, "images", NO_COLOR="1")
    assert "images/bad.jpg: not an image" in shown
    assert "\x1b[3" not in shown
    assert "\x1b" not in tool("images", code=1).stderr


@POSIX
@pytest.mark.parametrize(
    "command",
    [
        *((), ("--overwrite",), ("-n",), ("--batch",), ("--batch-export", "out")),
        *(("--fix-encoding",), ("--review",), ("--undo",)),
    ],
)
def test_quiet_says_only_what_is_wrong_and_the_summary(
    tool: Tool, make_image: ImageMaker, command: tuple[str, ...]
) -> None:
    for number in range(3):
        make_image(f"{number}.jpg", size=(40 + number, 32))
    if {*command} & {"--overwrite", "--undo", "--review", "--fix-encoding"}:
        tool("images")
        tool("images", "--overwrite", "--trigger", "ohwx")
    shown, code = on_terminal(tool, "-q", "images", *command)
    assert (code, len(shown.splitlines())) in {(0, 0), (0, 1)}, shown
    assert "%|" not in shown


@POSIX
@pytest.mark.parametrize(
    "closed",
    ["2>/dev/full", ">&-", "2>&-", "| true", "2>&1 | true", "--report - | head -1 | grep -q out"],
)
def test_output_that_nobody_reads_harms_nothing(
    tool: Tool, make_image: ImageMaker, closed: str
) -> None:
    for number in range(3):
        make_image(f"{number}.jpg")
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} {TOOL} images {closed}"],
        cwd=tool.folder,
        env=tool.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 or "head" in closed  # which cannot know when its reader goes away
    assert "Traceback" not in done.stderr
    assert len(captions(tool.folder)) == 3


@POSIX
def test_a_closed_reader_makes_no_success_of_a_run_that_was_stopped(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    server.script(then={"status": 401, "body": {"error": {"message": "wrong key"}}})
    command = f"set -o pipefail; {sys.executable} {TOOL} images --report - | true"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tool.folder, env=tool.environment, check=False, stderr=-1
    )
    assert done.returncode == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full")
def test_a_plan_that_cannot_be_printed_is_one_clear_error(
    tool: Tool, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    with open("/dev/full", "w", encoding="ascii") as full:
        done = subprocess.run(
            [sys.executable, str(TOOL), "-n", "--image-dir", "images"],
            cwd=tool.folder,
            env=tool.environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------ memory


@POSIX
def test_memory_does_not_grow_with_the_number_of_images(tool: Tool, server: Server) -> None:
    """Python started for real: a forked process has the memory of this one too."""
    server.script(check=False)
    data = noise((160, 160))

    def most_memory(number: int) -> int:
        folder = tool.folder / str(number)
        folder.mkdir()
        for image in range(number):
            (folder / f"{image}.jpg").write_bytes(data + str(image).encode())
        command = [sys.executable, str(TOOL), "-q", "--image-dir", str(number)]
        process = subprocess.Popen(
            command, cwd=tool.folder, env=tool.environment, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        assert len(captions(folder)) == number
        return usage.ru_maxrss

    few, many = most_memory(200), most_memory(2000)
    assert many < 1.1 * few


def test_what_a_thread_failed_at_is_let_go_at_once() -> None:
    """Else a set with many damaged images fills the memory."""
    left: list[weakref.ref[set[str]]] = []

    def fail() -> None:
        image = {"its bytes"}
        left.append(weakref.ref(image))
        raise ValueError(image)

    async def work() -> None:
        threads = gc.Threads(1)
        for _ in range(3):
            with contextlib.suppress(ValueError):
                await threads.do(fail)

    garbage.disable()
    try:
        asyncio.run(work())
        assert [image() for image in left] == [None] * 3
    finally:
        garbage.enable()
