"""The whole tool, as a process: what is kept, whatever happens to it."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import TOOL, ImageMaker, Server, Tool, captions
from test_pixels import BAD, NOISE, encode

POSIX = pytest.mark.skipif(os.name == "nt", reason="signals, pipes and permissions that Windows does not have")
ANSWER = "A grey cat sits on a blue mat."


def read_report(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def wait_until_captions(folder: Path, number: int) -> None:
    """Return when that many captions are there; the limit is for a tool that hangs."""
    deadline = time.monotonic() + 30
    while len(list(folder.rglob("*.txt"))) < number:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_folder_is_captioned_end_to_end(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    for name in ("a.jpg", "b.PNG", "sub/deep/c.webp"):
        make_image(name)
    server.script(then={"content": f'  "{ANSWER}"\n'})
    done = tool("--image-dir", "./images", "--caption-dir", "./captions", "--config-dir", "./config")
    assert captions(tool.folder / "captions") == {
        "a.txt": ANSWER + "\n",
        "b.txt": ANSWER + "\n",
        "sub/deep/c.txt": ANSWER + "\n",
    }
    assert done.stdout == ""
    assert "config: does not exist; nothing is read from it" in done.stderr
    last = done.stderr.splitlines()[-1]
    counts = r"Captioned 3, skipped 0, failed 0, to look at 2 \(same answer 2\)"
    assert re.fullmatch(rf"{counts}; 3,600 tokens in, 60 out; \d+\.\d s, \d+\.\d a second", last)


def test_log_lines_carry_time_worker_and_level(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    err = tool("-v", "--image-dir", "images").stderr
    assert re.search(r"^\d\d:\d\d:\d\d main      INFO    prompt: built in, prose; trigger: none$", err, re.MULTILINE)
    assert re.search(r"^\d\d:\d\d:\d\d worker-01 DEBUG   images.a\.jpg: Stand-in", err, re.MULTILINE)


def test_quiet_says_only_what_is_wrong_and_the_summary(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    assert len(tool("-q", "--image-dir", "images").stderr.splitlines()) == 1


def test_a_second_run_makes_no_request(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    for number in range(4):
        make_image(f"{number}.jpg")
    tool("--image-dir", "images")
    before = captions(tool.folder)
    err = tool("--image-dir", "images").stderr
    assert server.stats()["requests"] == 4
    assert captions(tool.folder) == before
    assert "skipped 4 (has a caption 4)" in err


def test_a_caption_edited_by_hand_is_left_alone_and_a_blank_one_is_made_anew(
    tool: Tool, make_image: ImageMaker
) -> None:
    for name in ("a.jpg", "b.jpg"):
        make_image(name)
    (tool.folder / "images" / "a.txt").write_bytes(b"mine \x92\n\n")
    (tool.folder / "images" / "b.txt").write_text("\n", encoding="utf-8")
    tool("--image-dir", "images")
    assert (tool.folder / "images" / "a.txt").read_bytes() == b"mine \x92\n\n"
    assert "Stand-in" in (tool.folder / "images" / "b.txt").read_text(encoding="utf-8")


def test_a_caption_written_by_hand_while_the_answer_is_on_its_way_is_left_alone(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    path = make_image("a.jpg").with_suffix(".txt")
    server.script(latency=1)
    process = tool.start("--image-dir", "images")
    while not server.stats()["requests"]:
        time.sleep(0.01)
    path.write_text("mine", encoding="utf-8")
    err = process.communicate(timeout=30)[1]
    assert path.read_text(encoding="utf-8") == "mine"
    assert "has a caption by now 1" in err
    assert process.returncode == 0


def test_a_caption_is_utf8_without_bom_and_one_line(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    path = make_image("a.jpg").with_suffix(".txt")
    server.script(then={"content": "A caf\u00e9\r\nwith “quotes”\u2028and 🐈.\n\n"})
    tool("--image-dir", "images")
    assert path.read_bytes() == "A café with “quotes” and 🐈.\n".encode()


@POSIX
def test_another_user_may_read_the_captions(tool: Tool, make_image: ImageMaker) -> None:
    path = make_image("a.jpg").with_suffix(".txt")
    before = os.umask(0o022)
    try:
        tool("--image-dir", "images")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_images_are_neither_changed_nor_touched(tool: Tool, make_image: ImageMaker) -> None:
    path = make_image("a.png", size=(2000, 1000))
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    tool("--image-dir", "images")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_the_prompt_is_the_config_folders_prompt_txt(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    (tool.folder / "config").mkdir()
    (tool.folder / "config" / "prompt.txt").write_text("\ufeffDescribe {{this}} “café”.\n", encoding="utf-8")
    tool("--image-dir", "images", "--config-dir", "config")
    assert server.stats()["bodies"][0]["messages"][0]["content"][0]["text"] == "Describe {this} “café”."


def test_good_and_bad_images_side_by_side(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    for number in range(50):
        make_image(f"good-{number}.jpg", size=(32 + number, 32))
    bad = [data for files in BAD.values() for data in files]
    bad += [encode(NOISE, "JPEG")[: 200 * number] for number in range(2, 52 - len(bad))]
    assert len(bad) == 50
    for number, data in enumerate(bad):
        (tool.folder / "images" / f"bad-{number}.{('jpg', 'png', 'webp')[number % 3]}").write_bytes(data)
    err = tool("--image-dir", "images", "--report", "report.jsonl", code=1).stderr
    assert len(captions(tool.folder)) == 50
    failed = [line for line in read_report(tool.folder / "report.jsonl") if line["outcome"] == "failed"]
    assert len({line["image"] for line in failed}) == 50
    assert len([line for line in err.splitlines() if re.match(r"images.bad-\d+\.\w+: \w", line)]) == 50
    assert server.stats()["requests"] == 50
    assert server.stats()["wrong"] == []


@POSIX
def test_a_pipe_and_a_giant_among_the_images_do_not_hang_the_run(tool: Tool, make_image: ImageMaker) -> None:
    folder = make_image("a.jpg").parent
    os.mkfifo(folder / "pipe.jpg")
    with (folder / "giant.png").open("wb") as file:
        file.truncate(300 << 30)
    err = tool("--image-dir", "images", code=1).stderr
    assert "images/pipe.jpg: not a file" in err
    assert "images/giant.png: file too large: 307200 MiB, at most 256" in err
    assert len(captions(tool.folder)) == 1


# ------------------------------------------------------------------------------------------- crash and stop


@POSIX
def test_kill_9_at_any_moment_leaves_whole_captions_and_nothing_is_paid_twice(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(120):
        make_image(f"{number:03}.jpg", size=(8, 8))
    server.script(latency=0.05, then={"content": ANSWER}, check=False)
    out = tool.folder / "out"
    arguments = ("--image-dir", "images", "--caption-dir", out, "--thread-pool", "4")
    for moment in range(10):
        process = tool.start(*arguments)
        wait_until_captions(out, min(120, 1 + 11 * moment))
        process.kill()
        process.communicate()
        assert {*captions(out).values()} == {ANSWER + "\n"}
    written = len(captions(out))
    before = server.stats()["requests"]
    tool(*arguments)
    assert server.stats()["requests"] - before == 120 - written
    assert [name for name in os.listdir(out) if not name.endswith(".txt")] == [".gen-captions"]
    assert {*captions(out).values()} == {ANSWER + "\n"}


def test_what_a_dead_run_left_is_cleaned_up_and_nothing_else(tool: Tool, make_image: ImageMaker) -> None:
    folder = make_image("a.jpg").parent
    left, alive, foreign = folder / ".gc-4194999-7", folder / f".gc-{os.getpid()}-7", folder / ".gc-notes"
    for path in (left, alive, foreign):
        path.write_text("half a capt", encoding="utf-8")
    if os.name == "nt":
        os.utime(left, (1, 1))
    tool("--image-dir", "images")
    assert [path.exists() for path in (left, alive, foreign)] == [False, True, True]


@POSIX
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_what_is_on_its_way_kept(
    tool: Tool, server: Server, make_image: ImageMaker, number: signal.Signals, code: int
) -> None:
    for image in range(40):
        make_image(f"{image:02}.jpg")
    server.script(latency=0.7)
    process = tool.start("--image-dir", "images", "--thread-pool", "4")
    wait_until_captions(tool.folder, 1)
    while server.stats()["in_flight"] < 4:
        time.sleep(0.01)
    process.send_signal(number)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == code
    assert server.stats()["requests"] == len(captions(tool.folder)) == 5
    assert err.count(f"{number.name}: no new requests") == 1
    assert "left for the next run 35" in err.splitlines()[-1]


@POSIX
def test_a_first_signal_after_the_run_was_stopped_still_waits_for_what_is_paid(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for image in range(10):
        make_image(f"{image}.jpg")
    server.script(steps=[{}, {"status": 401, "body": "no"}], then={"latency": 2})
    process = tool.start("--image-dir", "images", "--thread-pool", "4")
    assert process.stderr
    while "no new requests" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 3
    assert len(captions(tool.folder)) == server.stats()["requests"] - 1


@POSIX
def test_a_second_signal_ends_the_run_at_once(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    server.script(then={"fault": "hang"})
    process = tool.start("--image-dir", "images")
    while not server.stats()["requests"]:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.stderr
    while "once more" not in (line := process.stderr.readline()):
        assert line
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=10)[1]
    assert process.returncode == 130
    assert "Captioned 0" in err.splitlines()[-1]
    assert "Traceback" not in err


@POSIX
def test_a_signal_does_not_wait_for_a_backoff(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    server.script(then={"status": 429, "headers": {"Retry-After": "500"}, "body": "later"})
    process = tool.start("--image-dir", "images")
    assert process.stderr
    while "retry 1 of 10" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 143


@POSIX
def test_a_disk_that_takes_no_more_stops_the_run_and_shows_the_answer(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    import resource

    for number in range(30):
        make_image(f"{number:02}.jpg")
    server.script(then={"content": ANSWER})
    process = subprocess.run(
        [sys.executable, str(TOOL), "--image-dir", "images", "--thread-pool", "2"],
        cwd=tool.folder,
        env=tool.environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 3
    assert re.search(rf"images/\d\d\.txt: not written: .*the answer was: {ANSWER}", process.stderr)
    assert server.stats()["requests"] <= 4
    assert [name for name in os.listdir(tool.folder / "images") if not name.endswith(".jpg")] == [".gen-captions"]


@POSIX
def test_a_caption_folder_that_vanishes_stops_the_run(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    for number in range(30):
        make_image(f"{number:02}.jpg")
    server.script(latency=0.3)
    process = tool.start("--image-dir", "images", "--caption-dir", "out", "--thread-pool", "2")
    wait_until_captions(tool.folder, 1)
    (tool.folder / "out").rename(tool.folder / "gone")
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 3
    assert "captions cannot be written: No such file or directory" in err
    assert server.stats()["requests"] <= 6


@POSIX
def test_a_caption_folder_that_cannot_be_made_stops_before_anything_is_paid_for(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    (tool.folder / "file").touch()
    err = tool("--image-dir", "images", "--caption-dir", "file/captions", code=3).stderr
    assert "file/captions" in err
    assert server.stats()["requests"] == 0


@POSIX
def test_a_sub_folder_that_cannot_be_made_fails_its_images_alone(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    make_image("sub/b.jpg")
    (tool.folder / "out").mkdir()
    (tool.folder / "out" / "sub").write_text("a file", encoding="utf-8")
    err = tool("--image-dir", "images", "--caption-dir", "out", code=1).stderr
    assert "images/sub/b.jpg: caption folder: out/sub: File exists" in err
    assert server.stats()["requests"] == 1


# --------------------------------------------------------------------------------------------------- report


def test_the_report_has_each_image_and_the_summary(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    make_image("b.jpg")
    server.script(steps=[{"content": ANSWER}, {"content": "I can't help with that."}])
    out = tool("--image-dir", "images", "--report", "-", "--thread-pool", "1", code=1).stdout
    captioned, failed, summary = (json.loads(line) for line in out.splitlines())
    image, text = os.path.join("images", "a.jpg"), os.path.join("images", "a.txt")
    assert captioned == {"outcome": "captioned", "image": image, "file": text, "caption": ANSWER}
    assert (failed["outcome"], failed["reason"]) == ("failed", "refused")
    assert {key: summary[key] for key in ("captioned", "failed", "exit_code", "prompt_tokens", "answer_tokens")} == {
        "captioned": 1,
        "failed": {"refused": 1},
        "exit_code": 1,
        "prompt_tokens": 2400,
        "answer_tokens": 40,
    }


def test_a_report_that_cannot_be_written_is_an_error_before_anything_is_asked(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    assert "--report: no/where.jsonl: " in tool("--image-dir", "images", "--report", "no/where.jsonl", code=2).stderr
    assert server.stats()["requests"] == 0


@pytest.mark.parametrize("name", ["images/a.jpg", "images/a.txt", ".env"])
def test_a_report_replaces_nothing_but_a_report(tool: Tool, make_image: ImageMaker, name: str) -> None:
    make_image("a.jpg")
    for other in ("images/a.txt", ".env"):
        (tool.folder / other).write_text("# mine\n", encoding="utf-8")
    before = (tool.folder / name).read_bytes()
    assert "is there already and is no report" in tool("--image-dir", "images", "--report", name, code=2).stderr
    assert (tool.folder / name).read_bytes() == before


def test_a_usage_error_leaves_the_last_report_as_it_is(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    tool("--image-dir", "images", "--report", "r.jsonl")
    before = (tool.folder / "r.jsonl").read_bytes()
    tool("--image-dir", "nowhere", "--report", "r.jsonl", code=2)
    assert (tool.folder / "r.jsonl").read_bytes() == before
    tool("--image-dir", "images", "--report", "r.jsonl")
    assert (tool.folder / "r.jsonl").read_bytes() != before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full")
def test_a_report_that_fails_in_mid_run_loses_no_caption(tool: Tool, make_image: ImageMaker) -> None:
    for number in range(4):
        make_image(f"{number}.jpg")
    err = tool("--image-dir", "images", "--report", "/dev/full", code=1).stderr
    assert err.count("--report: not written any further") == 1
    assert "Traceback" not in err
    assert len(captions(tool.folder)) == 4


@POSIX
@pytest.mark.parametrize(
    "closed", ["2>/dev/full", ">&-", "2>&-", "| true", "2>&1 | true", "--report - | head -1 | grep -q outcome"]
)
def test_output_that_nobody_reads_harms_nothing(tool: Tool, make_image: ImageMaker, closed: str) -> None:
    for number in range(3):
        make_image(f"{number}.jpg")
    command = f"{sys.executable} {TOOL} --image-dir images {closed}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=tool.folder,
        env=tool.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 or "head" in closed  # which cannot know when its reader goes away
    assert "Traceback" not in done.stderr
    assert len(captions(tool.folder)) == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full")
def test_a_plan_that_cannot_be_printed_is_one_clear_error(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    with open("/dev/full", "w", encoding="ascii") as full:
        command = [sys.executable, str(TOOL), "-n", "--image-dir", "images"]
        done = subprocess.run(
            command, cwd=tool.folder, env=tool.environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_a_dry_run_writes_no_report(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    tool("-n", "--image-dir", "images", "--report", "r.jsonl", code=2)
    assert not (tool.folder / "r.jsonl").exists()


# ------------------------------------------------------------------------------------------------- progress


def test_progress_off_a_terminal_is_a_line_every_five_per_cent(tool: Tool, make_image: ImageMaker) -> None:
    for number in range(100):
        make_image(f"{number}.jpg", size=(8, 8))
    err = tool("--image-dir", "images", "--thread-pool", "8").stderr
    lines = re.findall(r"(\d+) of 100, 0 failed, [\d.]+ a second, 0:00:\d\d left, [\d,]+ tokens", err)
    assert [int(number) for number in lines] == list(range(5, 101, 5))


@POSIX
def test_progress_on_a_terminal_is_a_bar(tool: Tool, make_image: ImageMaker) -> None:
    import fcntl
    import pty
    import struct
    import termios

    for number in range(5):
        make_image(f"{number}.jpg")
    (tool.folder / "images" / "bad.jpg").write_bytes(b"x")
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    arguments = [sys.executable, str(TOOL), "--image-dir", "images"]
    process = subprocess.Popen(arguments, cwd=tool.folder, env=tool.environment, stderr=follower)
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 65536):
            shown += chunk
    except OSError:  # Linux reports the end of a terminal so
        pass
    os.close(leader)
    assert process.wait() == 1
    text = shown.decode()
    assert re.search(r"6/6 .*1 failed, 6,100 tokens", text)
    assert "images/bad.jpg: not an image" in text
    assert "\x1b[3" not in text  # no colours
