"""Text and Report: names that print, counts, words, exit codes, the report file."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import gen_captions as gc
from conftest import ImageMaker, Server, Tool, captions, snapshot

ANSWER = "A grey cat sits on a blue mat."
WRITTEN = gc.Outcome("a.jpg", "captioned", detail="A cat.", caption="a.txt")
FAILED = gc.Outcome("c.jpg", "failed", "not an image", "it holds text")
REFUSED = FAILED._replace(reason="refused")
SKIPPED = gc.Outcome("d.jpg", "skipped", "has a caption", caption="d.txt")
MASK = SKIPPED._replace(reason="mask")


def report(*outcomes: gc.Outcome, **fields: Any) -> gc.Report:
    made = gc.Report()
    for outcome in outcomes:
        made.record(outcome)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def read_report(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a b.jpg", "a b.jpg"),
        ("line\nbreak", r"line\nbreak"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("byte\udcff", r"byte\udcff"),
        ("猫 café", "猫 café"),
        ("\u202etxt", r"\u202etxt"),
    ],
)
def test_any_name_prints_as_one_harmless_line(name: str, shown: str) -> None:
    assert gc.printable(name) == shown


@pytest.mark.parametrize(
    ("outcomes", "ended_by", "code"),
    [
        ((), None, 0),
        ((WRITTEN, SKIPPED), None, 0),
        ((WRITTEN, FAILED), None, 1),
        ((WRITTEN, FAILED), gc.StopRun("key"), 3),
        ((WRITTEN,), signal.SIGINT, 130),
        ((FAILED,), signal.SIGTERM, 143),
    ],
)
def test_the_exit_code_comes_from_the_report(
    outcomes: tuple[gc.Outcome, ...], ended_by: gc.StopRun | signal.Signals | None, code: int
) -> None:
    assert report(*outcomes, ended_by=ended_by).exit_code == code


STOPPED = "Stopped. Run the same command to continue."
MENDED = "Stopped. Once that is mended, run the same command to continue."
UPDATE = "made with another prompt; --overwrite updates"


@pytest.mark.parametrize(
    ("outcomes", "fields", "lines"),
    [
        ([SKIPPED] * 26, {}, ["Nothing to do: all 26 images have captions."]),
        ([SKIPPED], {}, ["Nothing to do: 1 skipped (has a caption)."]),
        ([SKIPPED, MASK], {}, ["Nothing to do: 2 skipped (1 has a caption, 1 mask)."]),
        (
            [WRITTEN, FAILED, REFUSED, REFUSED],
            {},
            ["1 captioned, 3 failed (2 refused, 1 not an image) in 0.0 s."],
        ),
        (
            [WRITTEN],
            {"left": 12, "ended_by": signal.SIGINT},
            ["1 captioned, 12 not done yet in 0.0 s.", STOPPED],
        ),
        (
            [SKIPPED],
            {"left": 1, "ended_by": gc.StopRun("key")},
            ["1 skipped (has a caption), 1 not done yet in 0.0 s.", MENDED],
        ),
        (
            [WRITTEN, WRITTEN, WRITTEN],
            {"outdated": {"another prompt": 1200}},
            [
                "Worth a look: 2 identical to another.",
                f"1,200 captions were {UPDATE} them.",
                "3 captioned in 0.0 s.",
            ],
        ),
        ([], {}, ["Nothing done in 0.0 s."]),
    ],
)
def test_the_summary_says_what_was_done_in_plain_words(
    outcomes: list[gc.Outcome], fields: dict[str, Any], lines: list[str]
) -> None:
    assert report(*outcomes, **fields).summary().splitlines() == lines


def test_what_was_paid_for_is_said_also_where_nothing_was_written() -> None:
    bill = gc.Bill(gc.Settings(base_url="http://127.0.0.1/v1"))
    bill.settle(0.0, gc.Reply(200, usage=gc.Usage(1200, 20)))
    made = report(SKIPPED._replace(reason="captioned meanwhile"), bill=bill)
    assert made.summary() == "1 skipped (captioned meanwhile) in 0.0 s. 1,220 tokens."


def test_problems_that_have_scrolled_away_are_told_again() -> None:
    outcomes = [FAILED._replace(path=f"{number:02}.jpg") for number in range(60)]
    *told, last = report(*outcomes).summary().splitlines()
    assert told == [
        *(f"{number:02}.jpg: not an image" for number in range(30)),
        "and 10 more; --report FILE lists all",
    ]
    assert last.startswith("60 failed (not an image) in ")


def test_the_report_file_takes_names_that_are_no_text(tmp_path: Path) -> None:
    with gc.open_report(str(tmp_path / "r.jsonl")) as stream:
        made = gc.Report(stream)
        made.record(SKIPPED._replace(path="\udcff.jpg"))
        made.close()
    first, summary = read_report((tmp_path / "r.jsonl").read_text(encoding="ascii"))
    assert first["path"] == "\udcff.jpg"
    assert summary["skipped"] == {"has a caption": 1}


def test_progress_without_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gc, "QUIET_S", 0.0)  # else a test would take half a minute
    monkeypatch.setattr(gc.log, "propagate", True)
    for level in ("WARNING", "INFO"):
        caplog.set_level(level, "gen-captions")
        with gc.show_progress(4000, "image", report()) as update:
            update()
    (said,) = caplog.messages
    assert said == "1 of 4000 images"


# ------------------------------------------------------------------------------ the report file


def test_the_report_has_each_image_and_the_summary(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for name in "abc":
        make_image(f"{name}.jpg")
    images = tool.folder / "images"
    (images / "c.txt").write_text("by hand", encoding="utf-8")
    server.script(steps=[{"content": ANSWER}, {"content": "I can't help with that."}])
    arguments = ("images", "--report", "-", "--thread-pool", "1", "--price", "0.1/0.5")
    lines = read_report(tool(*arguments, code=1).stdout)
    captioned, failed, skipped, summary = sorted(lines, key=lambda line: line.get("path", "z"))
    image, text = os.path.join("images", "a.jpg"), os.path.join("images", "a.txt")
    assert captioned == {
        "outcome": "captioned", "path": image, "caption": text, "reason": "", "detail": ANSWER, "notes": []
    }  # fmt: skip
    assert (failed["outcome"], failed["reason"]) == ("failed", "refused")
    assert (skipped["outcome"], skipped["reason"]) == ("skipped", "has a caption")
    expected = {
        "captioned": 1,
        "failed": {"refused": 1},
        "skipped": {"has a caption": 1},
        "left": 0,
        "prompt_tokens": 2400,
        "answer_tokens": 40,
        "usd": 0.00026,
        "stopped": None,
        "exit_code": 1,
    }
    assert {key: summary[key] for key in expected} == expected


def test_a_plan_on_stdout_is_nothing_but_lines_of_json(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    done = tool("images", "-n", "--report", "-")
    assert [line["outcome"] for line in read_report(done.stdout)] == ["planned", "summary"]
    assert "Model: gpt-6-luna at 127.0.0.1:" in done.stderr


def test_the_report_of_a_run_that_was_stopped_says_why_and_what_is_left(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(3):
        make_image(f"{number}.jpg")
    server.script(then={"status": 401, "body": {"error": {"message": "wrong key"}}})
    (summary,) = read_report(tool("images", "--report", "-", code=3).stdout)
    assert "wrong key" in summary["stopped"]
    assert (summary["left"], summary["exit_code"]) == (3, 3)


def test_a_report_that_cannot_be_written_is_an_error_before_anything_is_asked(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    err = tool("images", "--report", "no/where.jsonl", code=2).stderr
    assert "--report: no/where.jsonl: cannot be written: " in err
    assert server.stats()["requests"] == 0


@pytest.mark.parametrize("name", ["images/a.jpg", "images/a.txt", ".env"])
def test_a_report_is_written_over_no_image_caption_or_setting(
    tool: Tool, make_image: ImageMaker, name: str
) -> None:
    make_image("a.jpg").with_suffix(".txt").write_text("by hand", encoding="utf-8")
    before = snapshot(tool.folder)
    err = tool("images", "--report", name, code=2).stderr
    assert f'--report: "{name}" is not allowed; allowed: a file whose name ends in .jsonl' in err
    assert snapshot(tool.folder) == before


def test_a_usage_error_leaves_the_last_report_as_it_is(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    tool("images", "--report", "r.jsonl")
    before = (tool.folder / "r.jsonl").read_bytes()
    tool("nowhere", "--report", "r.jsonl", code=2)
    tool("images", "--report", "r.jsonl", "--batch", "--undo", code=2)
    assert (tool.folder / "r.jsonl").read_bytes() == before
    tool("images", "--report", "r.jsonl")
    assert (tool.folder / "r.jsonl").read_bytes() != before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full")
def test_a_report_that_fails_in_mid_run_loses_no_caption(
    tool: Tool, make_image: ImageMaker
) -> None:
    for number in range(4):
        make_image(f"{number}.jpg")
    (tool.folder / "full.jsonl").symlink_to("/dev/full")
    err = tool("images", "--report", "full.jsonl", code=1).stderr
    assert err.count("--report: cannot be written any further: No space left on device") == 1
    assert "4 captioned, 1 failed (report not written)" in err
    assert len(captions(tool.folder)) == 4


def test_a_report_replaces_no_file_of_anybody_else(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.png")
    mine = tool.folder / "captions.jsonl"
    mine.write_text('{"file_name": "a.png", "text": "by hand"}\n')
    err = tool("images", "-n", "--report", "captions.jsonl", code=2).stderr
    assert "captions.jsonl: is there already, and is no report of this tool" in err
    assert "by hand" in mine.read_text()
    for _ in range(2):  # its own is replaced
        tool("images", "--report", "report.jsonl")
