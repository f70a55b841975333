"""Batch: images out as files of requests, and their results back, whatever happens in between."""

from __future__ import annotations

import base64
import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import conftest
import gen_captions as gc
from conftest import TOOL, ImageMaker, Server, Tool, captions

BATCH = ("--image-dir", "images", "--batch")
EIGHT = {*(f"{number}.txt" for number in range(7)), "sub/7.txt"}


@pytest.fixture(autouse=True)
def images(make_image: ImageMaker) -> Path:
    """Eight images, one of them in a folder of its own."""
    for number in range(8):
        path = make_image(f"{'sub/' if number == 7 else ''}{number}.png", size=(64 + number, 48))
    return path.parent.parent


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    source = TOOL.read_text(encoding="utf-8")
    small = source.replace("PART_LINES = 2000", "PART_LINES = 3")
    monkeypatch.setattr(conftest, "SCRIPT", compile(small, str(TOOL), "exec"))


def read_until(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr
    assert any(words in line for line in process.stderr)


def leave_waiting(tool: Tool, server: Server, *arguments: str, number: int = 3) -> None:
    server.batch(hold=True)
    process = tool.start(*BATCH, *arguments)
    for _ in range(number):
        read_until(process, "Ctrl-C loses nothing")
    process.kill()
    process.communicate()


def parts(tool: Tool) -> list[Path]:
    return sorted((tool.folder / "images" / ".gen-captions" / "batch").iterdir())


def sent(server: Server) -> list[str]:
    """Return the ids of all lines of files that were made a batch of."""
    stats = server.stats()
    numbers = [int(name.removeprefix("file-")) for name in stats["batches"]]
    return [line for number in numbers for line in stats["uploads"][number - 1]]


def collect(tool: Tool, server: Server, *arguments: str) -> None:
    """Run again with a server that works; all images are captioned, and none is paid twice."""
    server.batch()
    tool(*BATCH, *arguments)
    assert captions(tool.folder / "images").keys() == EIGHT
    assert len(sent(server)) == len(set(sent(server)))
    assert parts(tool) == []


def test_a_batch_gives_the_captions_of_a_live_run(tool: Tool, server: Server) -> None:
    """The first image is asked at once; files are deleted here and there."""
    shutil.copytree(tool.folder / "images", tool.folder / "live")
    err = tool(*BATCH, "--trigger", "ohwx", "--price", "0.1/0.5").stderr
    assert "9,760 tokens, $0.0010." in err
    stats = server.stats()
    assert stats["statuses"] == {"200": 1}
    assert [len(lines) for lines in stats["uploads"]] == [3, 3, 1]
    assert len(stats["deleted"]) == 6
    assert parts(tool) == []
    tool("--image-dir", "live", "--trigger", "ohwx")
    assert captions(tool.folder / "images") == captions(tool.folder / "live")
    assert captions(tool.folder / "images")["0.txt"].startswith("ohwx, ")


STEPS: list[tuple[dict[str, Any], str]] = [
    ({"hang": "POST files"}, "POST files"),
    ({"hang_after": "POST files"}, "POST files done"),
    ({"hang": "POST batches"}, "POST batches"),
    ({"hang_after": "POST batches"}, "POST batches done"),
    ({"hold": True}, "POST batches done"),
    ({"hang": "GET files"}, "GET files"),
]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize(("wishes", "call"), STEPS)
def test_a_run_that_ends_at_any_step_goes_on_and_pays_for_nothing_twice(
    tool: Tool, server: Server, wishes: dict[str, Any], call: str, number: signal.Signals
) -> None:
    server.batch(**wishes)
    process = tool.start(*BATCH)
    while call not in server.stats()["calls"]:
        pass
    process.send_signal(number)
    if number == signal.SIGINT:
        server.batch(**{"hold": True} if "hold" in wishes else {})
        err = process.communicate(timeout=30)[1]
        assert process.returncode == 130, err
        assert "Run the same command to continue." in err
    process.communicate()
    collect(tool, server)


@pytest.mark.parametrize(
    "wishes",
    [
        {"fail": {"POST files": [2, 500], "GET batches": [3, 0]}},
        {"fail": {"POST files": [1, 0], "GET files": [2, 500]}},
        {"fail": {"POST batches": [2, 503]}},
        {"lose": {"POST batches": [1, 0]}},
        {"lose": {"POST batches": [2, 500]}},
    ],
)
def test_what_fails_on_the_way_is_tried_again_and_paid_once(
    tool: Tool, server: Server, wishes: dict[str, Any]
) -> None:
    server.script(batch=wishes)
    assert "; trying again" in tool(*BATCH).stderr
    assert captions(tool.folder / "images").keys() == EIGHT
    assert len(server.stats()["batches"]) == 3


def test_what_is_wrong_for_all_ends_the_run_before_it_is_paid_for(
    tool: Tool, server: Server
) -> None:
    """A wrong key, a server without batches, and a batch that fails validation as a whole."""
    server.script(key="sk-another-key")
    tool(*BATCH, code=3)
    assert server.stats()["statuses"] == {"401": 1}
    assert server.stats()["calls"] == []
    server.script(batch={"fail": {"POST files": [99, 404]}})
    assert "no batch can be made: " in tool(*BATCH, code=3).stderr
    assert server.stats()["calls"] == ["POST files"]
    said = "The provided model is not supported by the Batch API."
    error = {"code": "model_not_found", "message": said, "param": "body.model"}
    server.script(batch={"errors": [{**error, "line": line} for line in (1, 2, 3)]})
    err = tool(*BATCH, code=3).stderr
    assert f"--batch: the server rejects it: {said}" in err
    assert "failed" not in err
    assert server.stats()["requests"] == 1
    assert len(captions(tool.folder / "images")) == 2


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_what_was_not_answered_in_time_is_asked_by_the_next_run_and_nothing_else(
    tool: Tool, server: Server, status: str
) -> None:
    server.script(batch={"expires_after": 1, "ends": status})
    err = tool(*BATCH, code=3).stderr
    assert f"2 of 3 images were not answered ({status})" in err
    assert "4 captioned, 4 not done yet" in err
    server.batch()
    tool(*BATCH)
    assert captions(tool.folder / "images").keys() == EIGHT
    assert server.stats()["requests"] == 8
    server.script(batch={"without": "output_file_id", "ends": "cancelled"})
    (tool.folder / "images" / "0.txt").unlink()
    (tool.folder / "images" / "1.txt").unlink()
    tool(*BATCH, code=3)
    assert parts(tool) == []  # nothing was answered at all


@pytest.mark.parametrize(
    "wishes", [{"output": ""}, {"output": "<html>"}, {"half": True}, {"without": "output_file_id"}]
)
def test_answers_that_cannot_be_read_are_not_thrown_away(
    tool: Tool, server: Server, wishes: dict[str, Any]
) -> None:
    server.script(batch=wishes)
    err = tool(*BATCH, code=3).stderr
    for part in parts(tool):
        assert f"{part.relative_to(tool.folder)}: not all answers can be read" in err
    collect(tool, server)
    assert len(server.stats()["batches"]) == 3


def test_a_batch_that_the_server_forgot_keeps_no_other_from_being_collected(
    tool: Tool, server: Server
) -> None:
    leave_waiting(tool, server)
    first = parts(tool)[0]
    first.write_text(first.read_text().replace('"batch-', '"batch-0'))
    server.batch()
    err = tool(*BATCH, code=3).stderr
    assert f"{first.relative_to(tool.folder)}: " in err
    assert "run again, or delete it to give it up" in err
    assert len(captions(tool.folder / "images")) == 5
    first.write_text("{")
    assert f"{first.relative_to(tool.folder)}: cannot be read" in tool(*BATCH, code=2).stderr
    first.unlink()
    tool(*BATCH)
    assert captions(tool.folder / "images").keys() == EIGHT


def test_parts_without_room_are_sent_when_others_are_done(tool: Tool, server: Server) -> None:
    server.script(batch={"most_lines": 3, "hold": True})
    process = tool.start(*BATCH)
    read_until(process, "no room yet; trying later: Enqueued token limit reached")
    server.batch(most_lines=3)
    process.communicate(timeout=60)
    assert captions(tool.folder / "images").keys() == EIGHT


def test_a_budget_holds_for_what_earlier_runs_have_sent(tool: Tool, server: Server) -> None:
    arguments = ("--price", "0.1/0.5", "--max-cost", "0.00054")
    leave_waiting(tool, server, *arguments, number=1)
    before = server.stats()
    process = tool.start(*BATCH, *arguments)
    while len(server.stats()["calls"]) < len(before["calls"]) + 2:
        pass
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert server.stats()["uploads"] == before["uploads"]
    server.batch()
    err = tool(*BATCH, *arguments, code=3).stderr
    assert "--max-cost $0.0005: " in err
    assert server.stats()["requests"] * 0.00013 <= 0.00054 + 0.00013  # one was of the first run


def test_who_waits_is_left_alone_by_other_runs(tool: Tool, server: Server) -> None:
    """A live run, -n, and a batch with other settings."""
    leave_waiting(tool, server)
    assert "7 waits in a batch" in tool("--image-dir", "images").stderr
    assert "7 waits in a batch" in tool("-n", *BATCH).stderr
    err = tool(*BATCH, "--prompt", "Another.", code=2).stderr
    assert "a batch with other settings waits; the same command goes on" in err
    assert server.stats()["requests"] == 8
    collect(tool, server)


def test_images_that_came_or_changed_meanwhile_get_no_answer_of_others(
    tool: Tool, server: Server, images: Path, make_image: ImageMaker
) -> None:
    """New images are sent without another live request: the first run has taught enough."""
    leave_waiting(tool, server)
    make_image("new.png")
    (images / "5.png").write_bytes((images / "4.png").read_bytes() + b"5")
    server.batch()
    assert "1 of 3 images were not answered (completed)" in tool(*BATCH, code=3).stderr
    assert captions(images).keys() == {*EIGHT, "new.txt"} - {"5.txt"}
    assert server.stats()["statuses"] == {"200": 1}
    assert len(sent(server)) == 8


def test_the_gate_judges_each_answer_and_the_journal_remembers(tool: Tool, server: Server) -> None:
    refusal = {"content": "I'm sorry, I can't help with that."}
    bad = {"status": 400, "body": {"error": {"message": "Invalid image"}}}
    late = {"body": {"error": {"message": "late", "code": 502}}}
    server.script(steps=[{}, refusal, bad, late, {"status": 401, "body": {"error": "no"}}])
    err = tool(*BATCH, code=1).stderr
    assert "4 captioned, 4 failed (" in err
    assert all(f"1 {reason}" in err for reason in ("refused", "HTTP 400", "HTTP 502", "rejected"))
    assert parts(tool) == []
    again = tool("-n", *BATCH, code=1)
    assert "3 planned (to caption), 1 failed (refused before)" in again.stderr
    assert ": about $0.000" in tool("-n", *BATCH, "--price", "0.1/0.5", code=1).stdout


def test_captions_of_ours_are_updated_and_kept(tool: Tool, server: Server) -> None:
    """By lines without a parameter that the server rejects."""
    tool("--image-dir", "images")
    before = captions(tool.folder / "images")
    mine = tool.folder / "images" / "2.txt"
    mine.write_text("mine", encoding="utf-8")
    body = {"error": {"message": "Unknown parameter.", "param": "reasoning_effort"}}
    server.script(rejects={"reasoning_effort": body})
    assert "7 captioned, 1 skipped" in tool(*BATCH, "--overwrite", "--prompt", "Another.").stderr
    assert mine.read_text(encoding="utf-8") == "mine"
    tool("--undo", "--image-dir", "images")
    assert captions(tool.folder / "images") == {**before, "2.txt": "mine"}


EXPORT = ("--image-dir", "images", "--batch-export", "parts")
IMPORT = ("--image-dir", "images", "--batch-import")
OTHERS = ("model", "messages")


def read_lines(tool: Tool) -> list[dict[str, Any]]:
    files = (tool.folder / "parts").glob("part-00?.jsonl")
    return [json.loads(line) for path in files for line in path.read_bytes().splitlines()]


def test_an_exported_line_is_what_engines_document(tool: Tool, server: Server) -> None:
    assert "8 exported in " in tool(*EXPORT, OPENAI_API_KEY="").stderr
    names = {path.name for path in (tool.folder / "parts").iterdir()}
    assert names == {f"part-00{number}.jsonl" for number in (1, 2, 3)}
    lines = read_lines(tool)
    assert len({line["custom_id"] for line in lines}) == 8
    assert sorted(map(find_width, lines)) == [*range(64, 72)]
    for line in lines:
        assert line.keys() == {"custom_id", "method", "url", "body"}
        assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
        assert len(line["custom_id"]) <= 64
        assert line["body"].keys() == {*OTHERS, "max_completion_tokens", "reasoning_effort"}
    assert server.stats()["requests"] == 0
    assert "--batch-export: parts: " in tool(*EXPORT, code=2).stderr
    shutil.rmtree(tool.folder / "parts")
    tool(*EXPORT, "--model", "Qwen/Qwen2.5-VL-7B-Instruct", GETCAP_SERVICE_TIER="flex")
    for other in read_lines(tool):  # no answer can teach us what it takes
        assert other["body"].keys() == {*OTHERS, "max_tokens"}


def test_an_export_that_ends_early_says_why(tool: Tool) -> None:
    """At the budget, and at a full disk."""
    done = tool(*EXPORT, "--price", "0.1/0.5", "--max-cost", "0.0011", code=3)
    assert "--max-cost $0.0011: " in done.stderr
    exported = len(read_lines(tool))
    assert f"{exported} exported, {8 - exported} not done yet" in done.stderr
    assert 1 < exported < 8
    shutil.rmtree(tool.folder / "parts")
    command = f"cd {tool.folder}; ulimit -f 8; exec {sys.executable} {TOOL} {' '.join(EXPORT)}"
    full = subprocess.run(["sh", "-c", command], check=False, env=tool.environment, stderr=-1)
    assert full.returncode == 3
    assert b"parts/part-001.jsonl: cannot be written: File too large" in full.stderr


def test_a_part_of_nothing_but_broken_images_ends_no_export(tool: Tool) -> None:
    for number in range(3):
        (tool.folder / "images" / f"{number}.png").write_bytes(b"broken")
    assert "5 exported, 3 failed (not an image) in " in tool(*EXPORT, code=1).stderr
    assert len(read_lines(tool)) == 5


def answer(custom_id: str, content: str) -> dict[str, Any]:
    choice = {"message": {"content": content}, "finish_reason": "stop"}
    body = {"choices": [choice], "usage": {"prompt_tokens": 1200, "completion_tokens": 20}}
    return {"custom_id": custom_id, "response": {"status_code": 200, "body": body}, "error": None}


def find_width(line: dict[str, Any]) -> int:
    head, data = line["body"]["messages"][0]["content"][1]["image_url"]["url"].split(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))).width


@pytest.fixture
def ids(tool: Tool) -> list[str]:
    tool(*EXPORT)
    return [line["custom_id"] for line in sorted(read_lines(tool), key=find_width)]


def write_results(path: Path, *results: Any) -> str:
    path.write_bytes(b"".join(json.dumps(result).encode() + b"\n" for result in results))
    return path.name


def test_results_come_back_in_any_order_from_several_files(tool: Tool, ids: list[str]) -> None:
    """Doubled, torn, unknown, with an id that would be a path elsewhere; all at half price."""
    late = {"custom_id": ids[0], "response": None, "error": {"code": "x", "message": "late"}}
    results = [answer(custom_id, f"A cat {number}.") for number, custom_id in enumerate(ids)]
    others = [answer(ids[5], "Second."), answer("../../evil", "A dog.")]
    files = [
        write_results(tool.folder / "1.jsonl", late, *reversed(results[4:])),
        write_results(tool.folder / "2.jsonl", *results[:4], *others),
    ]
    data = (tool.folder / "2.jsonl").read_bytes()
    (tool.folder / "2.jsonl").write_bytes(b"\xef\xbb\xbf" + data + b'{"custom_id": "gc-12')
    url = "https://api.openai.com/v1"  # is not asked; its price is known
    err = tool(*IMPORT, *files, OPENAI_API_KEY="", OPENAI_BASE_URL=url).stderr
    assert [*captions(tool.folder / "images").values()] == [f"A cat {n}.\n" for n in range(8)]
    assert "--batch-import: lines that are torn or no results: 1" in err
    assert "9,760 tokens, $0.0005." in err
    assert not list(tool.folder.parent.rglob("evil*"))
    assert "Nothing to do" in tool(*IMPORT, *files).stderr


def test_an_import_leaves_what_has_no_answer_or_no_file_of_its_own(
    tool: Tool, ids: list[str], images: Path, make_image: ImageMaker
) -> None:
    """An image that changed, one that another shares a caption with by now, one without answer."""
    results = [answer(custom_id, f"A cat {number}.") for number, custom_id in enumerate(ids[:7])]
    name = write_results(tool.folder / "out.jsonl", *results)
    make_image("0.jpg")
    (images / "3.png").write_bytes((images / "4.png").read_bytes() + b"3")
    err = tool(*IMPORT, name, code=1).stderr
    assert captions(images).keys() == {"1.txt", "2.txt", "4.txt", "5.txt", "6.txt"}
    assert err.count("shared caption file") == 3
    assert "--batch-import: 2 of 7 images have no answer there" in err
    assert "2 no answer" in err
    assert "not those of the export" not in err
    assert "same command" not in err


def test_an_import_that_fits_nothing_says_so_once(tool: Tool, ids: list[str]) -> None:
    """Results of other settings, requests in place of results, and no file at all."""
    name = write_results(tool.folder / "out.jsonl", *(answer(each, "A cat.") for each in ids))
    err = tool(*IMPORT, name, "--style", "tags", code=1).stderr
    assert err.count("prompt, model, style or images are not those of the export") == 1
    assert "no results: 3" in tool(*IMPORT, "parts/part-001.jsonl", code=1).stderr
    assert "--batch-import: nowhere.jsonl: " in tool(*IMPORT, "nowhere.jsonl", code=2).stderr
    assert captions(tool.folder / "images") == {}


COMPLETION = {"choices": [{"message": {"content": "A cat."}, "finish_reason": "stop"}]}
SHAPES: list[tuple[Any, str, int]] = [
    (answer("a", "A cat."), "A cat.", 200),
    ({"custom_id": "a", "response": COMPLETION}, "A cat.", 200),
    ({"custom_id": "a", "response": {"status_code": 400, "body": {"error": "bad"}}}, "", 400),
    ({"custom_id": "a", "response": {"status_code": 500, "body": None}, "error": "broke"}, "", 500),
    ({"custom_id": "a", "response": None, "error": {"code": "batch_expired"}}, "", 0),
]


@pytest.mark.parametrize(("result", "content", "status"), SHAPES)
def test_each_shape_of_a_result_is_read(result: Any, content: str, status: int) -> None:
    custom_id, reply = gc.parse_result(json.dumps(result).encode())
    assert (custom_id, reply.content, reply.status) == ("a", content, status)
    assert bool(reply.error) is not bool(content)


def test_what_is_no_result_is_none() -> None:
    for line in (b'{"custom_id": 1}', b'{"custom_id": "a", "body": 0}', b'["a"]', b"{"):
        with pytest.raises((ValueError, TypeError)):
            gc.parse_result(line)
