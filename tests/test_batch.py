"""Batch: images out as files of requests, and their results back, whatever happens in between."""

from __future__ import annotations

import base64
import io
import json
import shutil
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image

import gen_captions as gc
from conftest import TOOL, ImageMaker, Server, Tool, captions

SMALL_PARTS = ("--batch-megabytes", "0.01")  # of about six lines


@pytest.fixture
def images(make_image: ImageMaker) -> Path:
    """Eight images, one of them in a folder of its own."""
    for number in range(8):
        path = make_image(f"{'sub/' if number == 7 else ''}{number}.png", size=(64 + number, 48))
    return path.parent.parent


def start_batch(tool: Tool, *arguments: str) -> subprocess.Popen[str]:
    return tool.start("--image-dir", "images", "--batch", *arguments)


def wait_for(condition: Callable[[], Any]) -> None:
    """Ask until something has come true; each ask is a request to the server."""
    while not condition():
        pass


def leave_waiting(tool: Tool, server: Server, *arguments: str) -> None:
    """Submit all images, and end the run while the server holds its batches."""
    server.batch(hold=True)
    process = start_batch(tool, *arguments)
    polls = 2 if SMALL_PARTS[0] in arguments else 1  # the first parts are submitted by then
    wait_for(lambda: server.stats()["calls"].count("GET batches") >= polls)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)


def state_files(tool: Tool) -> list[str]:
    return sorted(path.name for path in (tool.folder / "images" / ".gen-captions" / "batch").iterdir())


def submitted(server: Server) -> list[str]:
    """Return the ids of all lines in files that were made a batch of."""
    stats = server.stats()
    return [line for name in stats["batches"] for line in stats["uploads"][int(name.removeprefix("file-")) - 1]]


@pytest.mark.usefixtures("images")
def test_a_batch_gives_the_captions_that_a_live_run_gives(tool: Tool, server: Server) -> None:
    done = tool("--image-dir", "images", "--batch", "--trigger", "ohwx", "--price", "0.1", "0.5")
    batch = captions(tool.folder / "images")
    assert server.stats()["statuses"] == {"200": 1}  # one image was asked at once, to learn what the server takes
    assert len(submitted(server)) == len(set(submitted(server))) == 7
    assert "Captioned 8, skipped 0, failed 0; 9,600 tokens in, 160 out; $0.0010" in done.stderr
    assert "billed as batch 7, default 1" in done.stderr
    assert state_files(tool) == []
    assert len(server.stats()["deleted"]) == 2  # what went up and what came down
    for path in (tool.folder / "images").rglob("*.txt"):
        path.unlink()
    shutil.rmtree(tool.folder / "images" / ".gen-captions")
    tool("--image-dir", "images", "--trigger", "ohwx")
    assert captions(tool.folder / "images") == batch
    assert all(text.startswith("ohwx, ") for text in batch.values())


@pytest.mark.usefixtures("images")
def test_parts_are_cut_by_bytes_and_all_are_collected(tool: Tool, server: Server) -> None:
    tool("--image-dir", "images", "--batch", *SMALL_PARTS)
    stats = server.stats()
    assert 2 <= len(stats["batches"]) <= 4
    assert len(set(submitted(server))) == 7
    assert len(captions(tool.folder / "images")) == 8


HELD = [
    ({"hang": "POST files"}, "POST files"),
    ({"hang_after": "POST files"}, "POST files done"),
    ({"hang": "POST batches"}, "POST batches"),
    ({"hang_after": "POST batches"}, "POST batches done"),
    ({"hold": True}, "GET batches"),
    ({"hang": "GET files"}, "GET files"),
]


@pytest.mark.parametrize(("wishes", "call"), HELD)
@pytest.mark.usefixtures("images")
def test_a_run_that_is_killed_goes_on_where_it_was_and_submits_nothing_twice(
    tool: Tool, server: Server, wishes: dict[str, Any], call: str
) -> None:
    server.batch(**wishes)
    process = start_batch(tool, *SMALL_PARTS)
    wait_for(lambda: call in server.stats()["calls"])
    process.kill()
    process.communicate()
    server.batch()
    tool("--image-dir", "images", "--batch", *SMALL_PARTS)
    assert len(captions(tool.folder / "images")) == 8
    assert len(submitted(server)) == len(set(submitted(server)))
    assert state_files(tool) == []


@pytest.mark.parametrize(("wishes", "call"), [HELD[0], HELD[3], HELD[4], HELD[5]])
@pytest.mark.usefixtures("images")
def test_ctrl_c_ends_the_waiting_only(tool: Tool, server: Server, wishes: dict[str, Any], call: str) -> None:
    server.batch(**wishes)
    process = start_batch(tool)
    wait_for(lambda: call in server.stats()["calls"])
    process.send_signal(signal.SIGINT)
    if "hold" not in wishes:
        server.batch()
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "left for the next run 7" in err
    assert "the same command goes on where it was" in err
    server.batch()
    tool("--image-dir", "images", "--batch")
    assert len(captions(tool.folder / "images")) == 8
    assert len(submitted(server)) == len(set(submitted(server))) == 7


@pytest.mark.parametrize(
    "wishes",
    [
        {"fail": {"POST files": [2, 500]}},
        {"fail": {"POST files": [1, 0]}},
        {"fail": {"POST batches": [2, 503]}},
        {"lose": {"POST batches": [1, 0]}},
        {"lose": {"POST batches": [2, 500]}},
        {"fail": {"GET batches": [3, 0]}},
        {"fail": {"GET files": [2, 500]}},
    ],
)
@pytest.mark.usefixtures("images")
def test_what_fails_on_the_way_is_tried_again_and_paid_once(tool: Tool, server: Server, wishes: dict[str, Any]) -> None:
    server.script(batch=wishes)
    err = tool("--image-dir", "images", "--batch").stderr
    assert "retry 1 of 10" in err
    assert len(captions(tool.folder / "images")) == 8
    assert len(server.stats()["batches"]) == 1


@pytest.mark.usefixtures("images")
def test_a_server_without_batches_is_named(tool: Tool, server: Server) -> None:
    server.script(batch={"fail": {"POST files": [99, 404]}})
    err = tool("--image-dir", "images", "--batch", code=3).stderr
    assert "uploading " in err
    assert "(HTTP 404)" in err
    assert len(captions(tool.folder / "images")) == 1


@pytest.mark.usefixtures("images")
def test_a_wrong_key_is_known_after_one_request(tool: Tool, server: Server) -> None:
    server.script(key="sk-another-key")
    tool("--image-dir", "images", "--batch", code=3)
    assert server.stats()["statuses"] == {"401": 1}
    assert server.stats()["calls"] == []


@pytest.mark.usefixtures("images")
def test_a_parameter_that_the_server_rejects_is_in_no_line(tool: Tool, server: Server) -> None:
    body = {"error": {"message": "Unknown parameter: 'reasoning_effort'.", "param": "reasoning_effort"}}
    server.script(rejects={"reasoning_effort": body})
    tool("--image-dir", "images", "--batch")
    assert len(captions(tool.folder / "images")) == 8


@pytest.mark.usefixtures("images")
def test_a_line_that_fails_validation_is_named_by_its_image(tool: Tool, server: Server) -> None:
    error = {"code": "invalid_image", "message": "cannot be read", "line": 2, "param": None}
    server.script(batch={"errors": [error]})
    done = tool("--image-dir", "images", "--batch", code=1)
    assert "rejected: line 2 of its batch: invalid_image: cannot be read" in done.stderr
    assert "failed 1 (rejected 1), left for the next run 6" in done.stderr
    server.batch()
    tool("--image-dir", "images", "--batch")
    assert len(captions(tool.folder / "images")) == 8


@pytest.mark.usefixtures("images")
def test_a_batch_that_is_rejected_as_a_whole_stops_the_run_and_says_why(tool: Tool, server: Server) -> None:
    error = {"code": "model_not_found", "message": "The model does not support batches", "line": None, "param": None}
    server.script(batch={"errors": [error]})
    err = tool("--image-dir", "images", "--batch", code=3).stderr
    assert "the server rejects the batch: model_not_found: The model does not support batches" in err
    assert state_files(tool) == []


@pytest.mark.usefixtures("images")
def test_what_expired_is_asked_again_by_the_next_run_and_nothing_else_is(tool: Tool, server: Server) -> None:
    server.script(batch={"expires_after": 3})
    done = tool("--image-dir", "images", "--batch", code=1)
    assert "4 images have no result; run again" in done.stderr
    assert "Captioned 4, skipped 0, failed 0, left for the next run 4" in done.stderr
    server.batch()
    tool("--image-dir", "images", "--batch")
    assert len(captions(tool.folder / "images")) == 8
    twice = [line for line in submitted(server) if submitted(server).count(line) > 1]
    assert len(set(twice)) == 3  # the fourth was asked at once


@pytest.mark.usefixtures("images")
def test_a_line_whose_answer_is_none_is_a_failure_of_its_image_only(tool: Tool, server: Server) -> None:
    server.script(steps=[{}, {"body": {"choices": []}}, {"body": {"error": {"message": "late", "code": 502}}}])
    err = tool("--image-dir", "images", "--batch", code=1).stderr
    assert "failed 2" in err
    assert state_files(tool) == []


@pytest.mark.usefixtures("images")
def test_half_an_output_is_kept_though_nothing_was_counted(tool: Tool, server: Server) -> None:
    server.script(batch={"without": "request_counts", "half": True})
    assert "answers can be read" in tool("--image-dir", "images", "--batch", code=3).stderr
    server.batch()
    tool("--image-dir", "images", "--batch")
    assert len(captions(tool.folder / "images")) == 8
    assert len(server.stats()["batches"]) == 1


def test_what_is_answered_is_collected_before_anything_is_asked(
    tool: Tool, server: Server, images: Path, make_image: ImageMaker
) -> None:
    leave_waiting(tool, server)
    make_image("new.png")
    server.batch(live={"error": {"message": "no money", "code": "insufficient_quota"}})
    assert "out of money" in tool("--image-dir", "images", "--batch", code=3).stderr
    assert len(captions(images)) == 8


@pytest.mark.usefixtures("images")
def test_a_run_names_what_waits_in_the_batch_of_a_shard(tool: Tool, server: Server) -> None:
    leave_waiting(tool, server, "--shard", "1/1")
    assert "waits in a batch 7" in tool("--image-dir", "images", "--batch").stderr


def test_a_file_in_place_of_a_caption_folder_loses_no_answer(tool: Tool, server: Server, images: Path) -> None:
    (images / "sub" / "8.png").write_bytes((images / "1.png").read_bytes() + b"8")
    server.batch(hold=True)
    process = start_batch(tool, "--caption-dir", "captions")
    wait_for(lambda: "GET batches" in server.stats()["calls"])
    process.kill()
    process.communicate()
    shutil.rmtree(tool.folder / "captions" / "sub")
    (tool.folder / "captions" / "sub").touch()
    server.batch()
    tool("--image-dir", "images", "--caption-dir", "captions", "--batch", code=3)
    (tool.folder / "captions" / "sub").unlink()
    tool("--image-dir", "images", "--caption-dir", "captions", "--batch")
    assert len(captions(tool.folder / "captions")) == 9
    assert len(submitted(server)) == len(set(submitted(server)))


def test_a_plan_that_another_run_has_overtaken_is_not_carried_out(tmp_path: Path) -> None:
    journal, other = gc.Journal(tmp_path), gc.Journal(tmp_path)
    assert journal.history == {}
    other.open()
    other.append(str(tmp_path / "a.txt"), gc.Entry("captioned"))
    other.close()
    with pytest.raises(gc.StopRun, match="another run wrote there since this one looked"):
        journal.open(as_read=True)
    journal.close()


@pytest.mark.usefixtures("images")
def test_an_output_that_is_missing_is_looked_for_again_and_can_be_given_up(tool: Tool, server: Server) -> None:
    server.script(batch={"without": "output_file_id"})
    err = tool("--image-dir", "images", "--batch", code=3).stderr
    assert "0 of 7 answers can be read; the same command downloads them again" in err
    [state] = [name for name in state_files(tool) if name.endswith("001.json")]
    assert state in err
    (tool.folder / "images" / ".gen-captions" / "batch" / state).unlink()
    server.batch()
    tool("--image-dir", "images", "--batch")
    assert len(captions(tool.folder / "images")) == 8


@pytest.mark.usefixtures("images")
def test_an_error_file_that_is_missing_leaves_its_images_for_the_next_run(tool: Tool, server: Server) -> None:
    bad = {"status": 400, "body": {"error": {"message": "Invalid image", "code": "invalid_image"}}}
    server.script(steps=[{}, bad, bad], batch={"without": "error_file_id"})
    err = tool("--image-dir", "images", "--batch", code=1).stderr
    assert "2 images have no result; run again" in err
    tool("--image-dir", "images", "--batch")
    assert len(captions(tool.folder / "images")) == 8


@pytest.mark.usefixtures("images")
def test_a_budget_holds_what_earlier_runs_have_sent(tool: Tool, server: Server) -> None:
    arguments = ("--image-dir", "images", "--batch", "--price", "0.1", "0.5", "--max-cost", "0.0011")
    sent: list[int] = []
    server.batch(hold=True)
    for _ in range(2):
        process = tool.start(*arguments)
        before = server.stats()["calls"].count("GET batches")
        wait_for(lambda: server.stats()["calls"].count("GET batches") > before)  # noqa: B023 - used at once
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        sent.append(len(submitted(server)))
    assert sent[0] == sent[1] < 7
    server.batch()
    tool(*arguments, code=3)  # what came back was cheaper than was held for it
    assert sent[0] <= len(submitted(server))
    assert 1200 * 0.1e-6 * server.stats()["requests"] <= 0.0011


@pytest.mark.usefixtures("images")
def test_a_batch_that_the_server_forgot_keeps_no_other_from_being_collected(tool: Tool, server: Server) -> None:
    leave_waiting(tool, server, *SMALL_PARTS)
    folder = tool.folder / "images" / ".gen-captions" / "batch"
    first = min(folder.glob("*Z-???.json"))
    first.write_text(first.read_text().replace('"batch-', '"batch-0'))
    server.batch()
    err = tool("--image-dir", "images", "--batch", code=3).stderr
    assert f"delete images/.gen-captions/batch/{first.name}" in err
    assert 1 < len(captions(tool.folder / "images")) < 8


def test_a_caption_folder_that_went_away_is_made_anew(tool: Tool, server: Server, images: Path) -> None:
    server.batch(hold=True)
    process = start_batch(tool, "--caption-dir", "captions")
    wait_for(lambda: "GET batches" in server.stats()["calls"])
    process.kill()
    process.communicate()
    shutil.rmtree(tool.folder / "captions" / "sub")
    server.batch()
    start_batch(tool, "--caption-dir", "captions").communicate(timeout=60)
    assert len(captions(tool.folder / "captions")) == len(list(images.rglob("*.png")))


@pytest.mark.usefixtures("images")
def test_a_full_disk_stops_before_anything_is_sent(tool: Tool) -> None:
    command = f"ulimit -f 8; exec {sys.executable} {TOOL} --image-dir images --batch-export parts"
    done = subprocess.run(
        ["sh", "-c", command], check=False, cwd=tool.folder, env=tool.environment, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "batch files cannot be written: File too large" in done.stderr
    assert "unexpected" not in done.stderr


@pytest.mark.usefixtures("images")
def test_captions_to_renew_are_renewed_by_a_later_run_without_the_flag(tool: Tool, server: Server) -> None:
    tool("--image-dir", "images")
    leave_waiting(tool, server, "--overwrite", "--prompt", "Another.")
    server.batch()
    assert "captioned 7" in tool("--image-dir", "images", "--batch", "--prompt", "Another.").stderr.lower()


@pytest.mark.usefixtures("images")
def test_parts_without_room_are_submitted_when_others_are_done(tool: Tool, server: Server) -> None:
    server.script(batch={"most_lines": 5, "hold": True})
    process = start_batch(tool, "--batch-megabytes", "0.009")
    wait_for(lambda: len(server.stats()["batches"]) >= 2 and server.stats()["calls"].count("GET batches") >= 3)
    server.batch(most_lines=5)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 0, err
    assert "no room yet, tried again later: token_limit_exceeded" in err
    assert len(captions(tool.folder / "images")) == 8


DAMAGED = [b"", b"<html>no</html>", b'{"custom_id": "gc-']


@pytest.mark.parametrize("output", DAMAGED)
@pytest.mark.usefixtures("images")
def test_answers_that_cannot_be_read_are_not_thrown_away(tool: Tool, server: Server, output: bytes) -> None:
    server.script(batch={"output": output.decode()})
    err = tool("--image-dir", "images", "--batch", code=3).stderr
    assert "0 of 7 answers can be read; the same command downloads them again" in err
    server.batch()
    tool("--image-dir", "images", "--batch")
    assert len(captions(tool.folder / "images")) == 8
    assert len(server.stats()["batches"]) == 1


@pytest.mark.usefixtures("images")
def test_one_failure_for_all_lines_ends_no_collecting(tool: Tool, server: Server, images: Path) -> None:
    for number in range(8):
        shutil.copy(images / f"{number % 7}.png", images / f"more{number}.png")
        (images / f"more{number}.png").write_bytes((images / f"{number % 7}.png").read_bytes() + bytes([number]))
    server.script(steps=[{}], then={"status": 500, "body": {"error": {"message": "late"}}})
    assert "failed 15 (HTTP 500 15)" in tool("--image-dir", "images", "--batch", code=1).stderr
    assert state_files(tool) == []


STATES = [
    ({"status": "completed"}, gc.BatchState("completed", 0, 0, (), ())),
    ({"status": "in_progress", "request_counts": {"completed": None, "failed": None}}, gc.BatchState("in_progress", 0, 0, (), ())),
    ({"status": "failed", "errors": "bad"}, gc.BatchState("failed", 0, 0, (), ((0, "bad"),))),
    ({"status": "failed", "errors": [{"message": "bad"}]}, gc.BatchState("failed", 0, 0, (), ((0, "error: bad"),))),
    (
        {"status": "failed", "errors": {"data": [{"code": "c", "message": "bad", "line": 3}, {"line": "x"}]}},
        gc.BatchState("failed", 0, 0, (), ((3, "c: bad"), (0, "error: no reason"))),
    ),
    (
        {"request_counts": {"completed": 3, "failed": 1}, "output_file_id": "a", "error_file_id": None},
        gc.BatchState("None", 3, 4, (("output", "a"),), ()),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "state"), STATES)
def test_a_batch_is_read_whatever_a_server_leaves_out(body: dict[str, Any], state: Any) -> None:
    assert gc.read_batch(body) == state


def test_an_image_that_changed_meanwhile_gets_no_answer_of_another(tool: Tool, server: Server, images: Path) -> None:
    server.batch(hold=True)
    process = start_batch(tool)
    wait_for(lambda: "GET batches" in server.stats()["calls"])
    (images / "5.png").write_bytes((images / "4.png").read_bytes() + b"new")
    server.batch()
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert "5.png: changed since: " in err
    assert len(captions(images)) == 7


@pytest.mark.usefixtures("images")
def test_the_gate_judges_each_answer_and_the_journal_remembers(tool: Tool, server: Server) -> None:
    refusal = {"content": "I'm sorry, I can't help with that."}
    cut = {"content": "A red square on a", "finish_reason": "length"}
    bad = {"status": 400, "body": {"error": {"message": "Invalid image", "code": "invalid_image"}}}
    policy = {"status": 400, "body": {"error": {"message": "No.", "code": "content_policy_violation"}}}
    server.script(steps=[{}, refusal, cut, bad, policy])
    done = tool("--image-dir", "images", "--batch", code=1)
    assert "Captioned 4, skipped 0, failed 4" in done.stderr
    for reason in ("refused 2", "cut off 1", "HTTP 400 1"):
        assert reason in done.stderr
    again = tool("-n", "--image-dir", "images", "--batch", code=1).stdout
    assert again.count("refused before") == 2
    assert "To caption 2, " in again


@pytest.mark.usefixtures("images")
def test_a_live_run_leaves_alone_what_waits_in_a_batch(tool: Tool, server: Server) -> None:
    leave_waiting(tool, server)
    assert "waits in a batch 7" in tool("--image-dir", "images").stderr
    assert "skipped: waits in a batch" in tool("-n", "--image-dir", "images").stdout
    err = tool("--image-dir", "images", "--batch", "--prompt", "Another.", code=2).stderr
    assert "was made with another model, prompt or style" in err
    server.batch()
    tool("--image-dir", "images", "--batch")
    assert len(captions(tool.folder / "images")) == 8


@pytest.mark.usefixtures("images")
def test_the_batch_price_counts_for_the_estimate_and_the_budget(tool: Tool, server: Server) -> None:
    last = tool("-n", "--image-dir", "images", "--batch", "--price", "0.1", "0.5").stdout.splitlines()[-1]
    assert " as batch" in last
    worst = 2 * 900 * 0.1e-6 + 300 * 0.5e-6  # of one image, about
    done = tool("--image-dir", "images", "--batch", "--price", "0.1", "0.5", "--max-cost", f"{4 * worst:.6f}", code=3)
    assert "--max-cost: leaves no room for the other images" in done.stderr
    assert 1 <= len(submitted(server)) < 7
    assert len(captions(tool.folder / "images")) == len(submitted(server)) + 1
    assert 1200 * 0.1e-6 * server.stats()["requests"] <= 4 * worst


def test_the_same_image_is_one_line(tool: Tool, server: Server, images: Path) -> None:
    for name in ("a.png", "b.png"):
        shutil.copy(images / "6.png", images / name)
    tool("--image-dir", "images", "--batch")
    assert len(captions(images)) == 10
    assert len(submitted(server)) == 7


@pytest.mark.usefixtures("images")
def test_captions_of_ours_are_renewed_and_kept(tool: Tool) -> None:
    tool("--image-dir", "images")
    before = captions(tool.folder / "images")
    (tool.folder / "images" / "2.txt").write_text("mine", encoding="utf-8")
    tool("--image-dir", "images", "--batch", "--overwrite", "--prompt", "Another.")
    assert (tool.folder / "images" / "2.txt").read_text(encoding="utf-8") == "mine"
    tool("--undo", "--image-dir", "images")
    assert captions(tool.folder / "images") == {**before, "2.txt": "mine"}


# ------------------------------------------------------------------------------------------ out and back by hand

BODY = {"model", "messages", "max_completion_tokens", "reasoning_effort", "temperature"}


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("part-*.jsonl")) for line in path.read_bytes().splitlines()]


def read_url(line: dict[str, Any]) -> str:
    [message] = line["body"]["messages"]
    text, image = message["content"]
    assert (message["role"], text["type"], image["type"]) == ("user", "text", "image_url")
    return str(image["image_url"]["url"])


@pytest.mark.usefixtures("images")
def test_an_exported_line_is_what_engines_document(tool: Tool, server: Server) -> None:
    done = tool("--image-dir", "images", "--batch-export", "parts", *SMALL_PARTS, OPENAI_API_KEY="")
    assert "exported 8" in done.stderr
    lines = read_lines(tool.folder / "parts")
    assert len({line["custom_id"] for line in lines}) == 8
    for line in lines:
        assert line.keys() == {"custom_id", "method", "url", "body"}
        assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
        assert len(line["custom_id"]) <= 64
        assert {"model", "messages"} <= line["body"].keys() <= BODY
        head, data = read_url(line).split(",")
        assert head == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).height == 48
    assert all(path.stat().st_size <= 10_000 for path in (tool.folder / "parts").glob("part-*"))
    manifest = [json.loads(line) for line in (tool.folder / "parts" / "manifest.jsonl").read_bytes().splitlines()]
    assert {row["custom_id"] for row in manifest} == {line["custom_id"] for line in lines}
    assert "sub/7.png" in {row["image"] for row in manifest}
    assert server.stats()["requests"] == 0
    text = b"".join(path.read_bytes() for path in (tool.folder / "parts").iterdir())
    assert b"sk-test" not in text
    tool("--image-dir", "images", "--batch-export", "again")
    assert {line["custom_id"] for line in read_lines(tool.folder / "again")} == {line["custom_id"] for line in lines}


def test_a_file_reference_is_the_images_own_path(tool: Tool, make_image: ImageMaker) -> None:
    path = make_image("ä #1?.png", size=(640, 480))
    tool(
        "--image-dir", "images", "--batch-export", "parts", "--image-ref", "file", "--model", "Qwen/Qwen2.5-VL-7B"
    )  # fmt: skip
    [line] = read_lines(tool.folder / "parts")
    url = urlsplit(read_url(line))
    assert url.scheme == "file"
    assert Path(unquote(url.path)) == path.resolve()
    assert line["body"].keys() == {"model", "messages", "max_completion_tokens"}
    assert len(json.dumps(line)) < 2000


def answer(line: dict[str, Any], content: str, **more: Any) -> dict[str, Any]:
    """Return a result as OpenAI writes it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    body = {"choices": [choice], "usage": {"prompt_tokens": 1200, "completion_tokens": 20}}
    response = {"status_code": 200, "request_id": "r", "body": body}
    return {"id": "b", "custom_id": line["custom_id"], "response": response, "error": None, **more}


@pytest.fixture
def exported(tool: Tool, images: Path) -> list[dict[str, Any]]:
    """The lines of eight images, in the order of their names."""
    tool("--image-dir", "images", "--batch-export", "parts")
    rows = [json.loads(line) for line in (tool.folder / "parts" / "manifest.jsonl").read_bytes().splitlines()]
    assert len(rows) == len(list(images.rglob("*.png")))
    return sorted(rows, key=lambda row: str(row["image"]))


def write_results(path: Path, *results: Any) -> None:
    path.write_bytes(b"".join(json.dumps(result).encode() + b"\n" for result in results))


def test_results_come_back_in_any_order_from_several_files(tool: Tool, exported: list[dict[str, Any]]) -> None:
    failed = {"custom_id": exported[0]["custom_id"], "response": None, "error": {"code": "x", "message": "late"}}
    unknown = answer({"custom_id": "gc-unknown"}, "A dog.")
    write_results(
        tool.folder / "parts" / "one.jsonl", failed, *(answer(row, f"One {n}.") for n, row in enumerate(exported[4:]))
    )
    write_results(tool.folder / "two.jsonl", *(answer(row, f"Two {n}.") for n, row in enumerate(exported[:5])), unknown)
    two = tool.folder / "two.jsonl"
    two.write_bytes(b"\xef\xbb\xbf" + two.read_bytes() + b'{"custom_id": "gc-12')
    done = tool("--image-dir", "images", "--batch-import", "parts/one.jsonl", "two.jsonl", OPENAI_API_KEY="")
    assert captions(tool.folder / "images") == {
        **{f"{n}.txt": f"Two {n}.\n" for n in range(4)},
        **{f"{n}.txt": f"One {n - 4}.\n" for n in range(4, 7)},
        "sub/7.txt": "One 3.\n",
    }
    assert "1 lines belong to no image of the manifest" in done.stderr
    assert "1 lines are torn" in done.stderr
    assert "Captioned 8, skipped 0, failed 0" in done.stderr
    again = tool("--image-dir", "images", "--batch-import", "parts/one.jsonl", "two.jsonl").stderr
    assert "Captioned 0, skipped 8 (has a caption 8), failed 0" in again


SHAPES = [
    (answer({"custom_id": "a"}, "A cat."), "A cat."),
    ({"custom_id": "a", "response": {"choices": [{"message": {"content": "A cat."}, "finish_reason": "stop"}]}}, "A cat."),
    ({"custom_id": "a", "response": {"status_code": 400, "body": {"error": {"message": "bad", "code": "c"}}}, "error": None}, 400),
    ({"custom_id": "a", "response": None, "error": {"code": "batch_expired", "message": "late"}}, 0),
    ({"custom_id": "a", "response": {"status_code": 500, "body": None}, "error": "it broke"}, 500),
    ({"custom_id": "a", "response": {"status_code": 200, "body": None}, "error": {"message": "it broke"}}, 0),
    ({"custom_id": "a", "response": None, "error": None}, 0),
    ({"custom_id": "a"}, 0),
]  # fmt: skip


@pytest.mark.parametrize(("result", "expected"), SHAPES)
def test_each_shape_of_a_result_is_read(result: dict[str, Any], expected: Any) -> None:
    found = gc.parse_result(json.dumps(result).encode())
    assert found
    assert found[0] == "a"
    assert getattr(found[1], "content", getattr(found[1], "status", None)) == expected


@pytest.mark.parametrize(
    "line", [b"", b"{", b"[]", b'"a"', b'{"custom_id": 1}', b"{}", b"\xff\xfe{}", b'{"custom_id": "a", "body": {}}']
)
def test_what_is_no_result_is_none(line: bytes) -> None:
    assert gc.parse_result(line) is None


def test_an_image_that_changed_since_the_export_is_named(
    tool: Tool, exported: list[dict[str, Any]], images: Path
) -> None:
    write_results(tool.folder / "parts" / "out.jsonl", *(answer(row, f"A cat {n}.") for n, row in enumerate(exported)))
    (images / "3.png").write_bytes(b"another")
    (images / "4.png").unlink()
    done = tool("--image-dir", "images", "--batch-import", "parts/out.jsonl", code=1)
    assert done.stderr.count("changed since: ") == 2
    assert len(captions(images)) == 6


def test_an_answer_that_is_read_twice_is_counted_once(tool: Tool, exported: list[dict[str, Any]]) -> None:
    refusal = answer(exported[0], "I'm sorry, I can't help with that.")
    cut = answer(exported[1], "A red", id="c")
    cut["response"]["body"]["choices"][0]["finish_reason"] = "length"
    write_results(tool.folder / "parts" / "out.jsonl", refusal, cut)
    arguments = ("--image-dir", "images", "--batch-import", "parts/out.jsonl")
    assert "2,400 tokens in, 40 out" in tool(*arguments, code=1).stderr
    assert "0 tokens in, 0 out" in tool(*arguments, code=1).stderr
    lines = (tool.folder / "images" / ".gen-captions" / "journal.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["prompt_tokens"] for line in lines) == 2400


def test_images_without_a_result_are_left_and_said(tool: Tool, exported: list[dict[str, Any]]) -> None:
    write_results(tool.folder / "parts" / "out.jsonl", *(answer(row, f"A cat {row['image']}.") for row in exported[:5]))
    done = tool("--image-dir", "images", "--batch-import", "parts/out.jsonl", code=1)
    assert "3 images of the manifest have no result in these files" in done.stderr
    assert "Captioned 5, skipped 0, failed 0, left for the next run 3" in done.stderr


def test_an_import_with_other_settings_is_refused(tool: Tool, exported: list[dict[str, Any]]) -> None:
    write_results(tool.folder / "parts" / "out.jsonl", *(answer(row, "A cat.") for row in exported))
    err = tool("--image-dir", "images", "--batch-import", "parts/out.jsonl", "--style", "tags", code=2).stderr
    assert "manifest.jsonl: was made with another model, prompt or style" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch-import", "out.jsonl"], "manifest.jsonl of the export is missing"),
        (["--batch-import", "parts/manifest.jsonl"], "a file of results is missing"),
        (["--batch-import", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--batch-export", "parts"], "holds batch files already"),
        (["--batch-export", "out.jsonl"], "--batch-export: out.jsonl"),
        (["--batch-export", "images/.gen-captions/batch"], "a folder of this tool's own"),
        (["--batch", "--batch-export", "x"], "--batch and --batch-export: take one of them"),
        (["--batch", "--review"], "take one of them"),
        (["--batch", "--image-ref", "file"], "--image-ref file: belongs to --batch-export"),
        (["--batch", "--service-tier", "flex"], "a batch has a price of its own"),
        (["--batch-import", "out.jsonl", "--limit", "3"], "--limit: belongs to asking"),
        (["--shard", "0/3"], "--shard"),
        (["--shard", "4/3"], "I/N"),
        (["--shard", "foo"], "I/N"),
        (["--shard", "/8"], "I/N"),
        (["--shard", "1/2/3"], "I/N"),
        (["--shard", "1/2", "--review"], "--shard: belongs to captioning"),
        (["--shard", "1/2", "--metadata", "m.jsonl"], "--metadata: is for a run with all captions"),
        (["--batch-megabytes", "201"], "up to 200"),
    ],
)
def test_what_cannot_be_is_a_usage_error(tool: Tool, arguments: list[str], said: str) -> None:
    (tool.folder / "images").mkdir()
    (tool.folder / "out.jsonl").write_bytes(b"{}\n")
    (tool.folder / "parts").mkdir()
    row = {
        "custom_id": "gc-1",
        "image": "1.png",
        "image_sha256": "",
        "image_size": 1,
        "image_mtime_ns": 1,
        "recipe": "",
    }
    write_results(tool.folder / "parts" / "manifest.jsonl", row)
    assert said in tool("--image-dir", "images", *arguments, code=2).stderr


# ------------------------------------------------------------------------------------------------------- shards


@pytest.mark.usefixtures("images")
def test_shards_share_a_set_without_talking_to_each_other(tool: Tool, server: Server) -> None:
    runs = [tool.start("--image-dir", "images", "--shard", f"{number}/3") for number in (1, 2, 3)]
    for run in runs:
        err = run.communicate(timeout=60)[1]
        assert run.returncode == 0, err
    assert len(captions(tool.folder / "images")) == 8
    assert server.stats()["requests"] == 8
    journals = sorted(path.name for path in (tool.folder / "images" / ".gen-captions").glob("*.jsonl"))
    assert set(journals) <= {"journal.jsonl", *(f"journal-{number}-of-3.jsonl" for number in (1, 2, 3))}
    assert "up to date 8" in tool("--image-dir", "images", "--overwrite").stderr


@pytest.mark.usefixtures("images")
def test_a_shard_is_not_at_work_beside_a_run_of_the_whole_set(tool: Tool, server: Server) -> None:
    server.script(latency=30)
    process = tool.start("--image-dir", "images")
    wait_for(lambda: server.stats()["requests"])
    assert "another run is at work there" in tool("--image-dir", "images", "--shard", "1/2", code=3).stderr
    process.kill()
    process.communicate()


@pytest.mark.usefixtures("images")
def test_shards_have_batches_of_their_own(tool: Tool, server: Server) -> None:
    runs = [start_batch(tool, "--shard", f"{number}/2", *SMALL_PARTS) for number in (1, 2)]
    for run in runs:
        err = run.communicate(timeout=60)[1]
        assert run.returncode == 0, err
    assert len(captions(tool.folder / "images")) == 8
    assert len(submitted(server)) == len(set(submitted(server))) == 6  # each asked one at once


ROW = {"custom_id": "gc-1", "image": "a.png", "image_sha256": "0", "image_size": 1, "image_mtime_ns": 1, "recipe": "r"}


@pytest.mark.parametrize(
    "fault",
    [
        {"image": "../a.png"}, {"image": "/a.png"}, {"image": "a/../../b.png"}, {"image": ""}, {"image": "README"},
        {"image": "a\0.png"}, {"image": "\ud800.png"}, {"image": ".gen-captions/a.png"}, {"image": 3}, {"recipe": []},
        {"image_mtime_ns": {}}, {"image_sha256": [1]}, {"custom_id": None}, {"image_size": "1"},
    ],
)  # fmt: skip
def test_a_row_that_leads_elsewhere_or_is_none_is_not_read(fault: dict[str, Any]) -> None:
    assert gc.parse_row(json.dumps(ROW).encode()) is not None
    assert gc.parse_row(json.dumps({**ROW, **fault}).encode()) is None


def test_a_shard_is_the_same_on_every_machine() -> None:
    names = [f"folder/{number}.png" for number in range(1000)]
    sizes = [sum(gc.is_in_shard(name, number, 4) for name in names) for number in (1, 2, 3, 4)]
    assert sum(sizes) == 1000
    assert min(sizes) > 200
    for number in (1, 2, 3):
        composed, decomposed = (unicodedata.normalize(form, "müller/größe.png") for form in ("NFC", "NFD"))
        assert gc.is_in_shard(composed, number, 3) == gc.is_in_shard(decomposed, number, 3)


def test_a_temporary_file_of_another_machine_is_not_taken_for_a_dead_one() -> None:
    assert not gc.is_abandoned(".gc-1-abcdef-12345678", 1000.0, 1100.0)
    assert gc.is_abandoned(".gc-1-abcdef-12345678", 1000.0, 9999.0)
    assert gc.is_abandoned(f".gc-99999999-{gc.this_machine()}-12345678", 1000.0, 1001.0)
