"""Text and Report: names that print, counts, exit codes."""

from __future__ import annotations

import io
import json
import signal

import pytest

import gen_captions as gc

WRITTEN = gc.Written(gc.Job("a.jpg", "a.txt"), "A cat.")
SERVER_ERROR = gc.Failed("b.jpg", "HTTP 500", "boom", by_server=True)
OWN_ERROR = gc.Failed("c.jpg", "not an image", "text")


def report(*outcomes: gc.Outcome) -> gc.Report:
    made = gc.Report(started=100.0)
    for outcome in outcomes:
        made.record(outcome)
    return made


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
        ((WRITTEN,), None, 0),
        ((gc.Skipped("a", "has a caption", "a.txt"),), None, 0),
        ((WRITTEN, OWN_ERROR), None, 1),
        ((WRITTEN, OWN_ERROR), gc.StopRun("key"), 3),
        ((WRITTEN,), signal.SIGINT, 130),
        ((OWN_ERROR,), signal.SIGTERM, 143),
    ],
)
def test_the_exit_code_comes_from_the_report(
    outcomes: tuple[gc.Outcome, ...], ended_by: gc.StopRun | signal.Signals | None, code: int
) -> None:
    made = report(*outcomes)
    made.ended_by = ended_by
    assert made.exit_code == code


@pytest.mark.parametrize(
    ("outcomes", "reason"),
    [
        ([SERVER_ERROR] * 10, "HTTP 500"),
        ([SERVER_ERROR] * 9, ""),
        ([SERVER_ERROR] * 9 + [WRITTEN] + [SERVER_ERROR] * 9, ""),
        ([SERVER_ERROR] * 5 + [OWN_ERROR] * 3 + [SERVER_ERROR] * 5, "HTTP 500"),
        ([SERVER_ERROR] * 9 + [gc.Failed("d.jpg", "HTTP 503", "", by_server=True)], ""),
        ([OWN_ERROR] * 20, ""),
    ],
)
def test_ten_times_the_same_server_error_without_a_success_is_noticed(outcomes: list[gc.Outcome], reason: str) -> None:
    assert report(*outcomes).same_failure == reason


def test_the_summary_names_each_failure_by_reason_and_counts_once() -> None:
    made = report(gc.Failed("z.jpg", "refused", "no"), WRITTEN, OWN_ERROR, gc.Skipped("d", "has a caption", "d.txt"))
    made.bill.usage = gc.Usage(12_345, 67)
    assert made.summary(104.0).splitlines() == [
        "c.jpg: not an image",
        "z.jpg: refused",
        "Captioned 1, skipped 1 (has a caption 1), failed 2 (refused 1, not an image 1); "
        "12,345 tokens in, 67 out; 4.0 s, 0.2 a second",
    ]


def test_the_report_file_takes_names_that_are_no_text() -> None:
    stream = io.StringIO()
    made = gc.Report(0.0, stream)
    made.record(gc.Failed("\udcff.jpg", "refused", "…"))
    made.close(1.0)
    lines = [json.loads(line) for line in stream.getvalue().encode("ascii").splitlines()]
    assert lines[0]["image"] == "\udcff.jpg"
    assert lines[1]["failed"] == {"refused": 1}
