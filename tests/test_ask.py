"""Ask: what each kind of answer does to the run, over real connections."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conftest import KEY, ImageMaker, Server, Tool, captions

LIMIT = {"status": 429, "body": {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}}


@pytest.fixture
def five(make_image: ImageMaker) -> None:
    for number in range(5):
        make_image(f"{number}.jpg")


def error(status: int, code: str, message: str = "no") -> dict[str, Any]:
    return {"status": status, "body": {"error": {"message": message, "code": code}}}


FATAL = [
    ({"key": "sk-another"}, "OPENAI_API_KEY"),
    ({"model": "gpt-other"}, "GETCAP_MODEL"),
    ({"then": error(429, "insufficient_quota")}, "out of money"),
    ({"then": error(402, "")}, "credit"),
    ({"then": error(403, "unsupported_country")}, "country"),
    ({"then": error(400, "unsupported_value", "top_k is odd")}, "top_k is odd"),
    ({"then": error(500, "", "image input is not supported - hint: mmproj")}, "vision model"),
    ({"then": {"fault": "html"}}, "OPENAI_BASE_URL"),
    ({"then": {"status": 429, "headers": {"Retry-After": "3600"}, "body": {"error": "later"}}}, "come back after"),
]


@pytest.mark.parametrize(("script", "said"), FATAL)
@pytest.mark.usefixtures("five")
def test_what_is_wrong_for_all_costs_one_request(tool: Tool, server: Server, script: dict[str, Any], said: str) -> None:
    server.script(**script)
    done = tool("--image-dir", "images", "--thread-pool", "5", code=3)
    assert server.stats()["requests"] == 1
    assert [line for line in done.stderr.splitlines() if "ERROR" in line and said in line]
    assert done.stderr.count("ERROR") == 1
    assert captions(tool.folder) == {}
    assert "left for the next run 5" in done.stderr


@pytest.mark.usefixtures("five")
def test_a_server_that_does_not_run_is_tried_once(tool: Tool) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    err = tool("--image-dir", "images", code=3, OPENAI_BASE_URL=url).stderr
    assert "cannot connect to 127.0.0.1" in err
    assert "refused" in err
    assert "retry" not in err


@pytest.mark.usefixtures("five")
def test_a_name_that_does_not_resolve_is_tried_once(tool: Tool) -> None:
    err = tool("--image-dir", "images", code=3, OPENAI_BASE_URL="http://no-such-host.invalid/v1").stderr
    assert "cannot connect to no-such-host.invalid: " in err
    assert "retry" not in err


@pytest.mark.usefixtures("five")
def test_a_server_that_speaks_no_tls_is_tried_once(tool: Tool, server: Server) -> None:
    err = tool("--image-dir", "images", code=3, OPENAI_BASE_URL=server.url.replace("http:", "https:")).stderr
    assert "SSL" in err
    assert "retry" not in err


PASSING = {
    "429": LIMIT,
    "500": error(500, "server_error"),
    "503": error(503, ""),
    "529": error(529, "overloaded"),
    "408": error(408, ""),
    "reset": {"fault": "reset"},
    "cut": {"fault": "cut"},
    "no choices": {"fault": "no choices"},
    "late error": {"body": {"error": {"message": "late", "code": 502}}},
}
ONE_IMAGE = [
    (error(400, "image_parse_error", "cannot read this image"), "HTTP 400: cannot read this image"),
    (error(400, "content_policy_violation", "not this one"), "refused: not this one"),
    (error(403, "", "flagged by moderation"), "refused: flagged by moderation"),
    ({"status": 413, "body": "<html><title>Too Large</title></html>"}, "HTTP 413: Too Large"),
    (error(422, "", "what"), "HTTP 422: what"),
    ({"content": "I'm sorry, but I can't help with that."}, "refused: I'm sorry"),
    ({"content": None, "message": {"refusal": "No."}}, "refused: No;"),
    ({"content": "A ca", "finish_reason": "content_filter"}, "refused"),
    ({"content": ""}, "empty"),
    ({"content": "", "message": {"reasoning_content": "hmm"}}, "reasoning only"),
    ({"content": "the cat and " * 30}, "looping"),
    ({"content": "Error: upstream is down"}, "error text"),
]


@dataclass
class Run:
    """What one run with one worker left, for tests that each look at one image of it."""

    err: str
    written: set[str]
    requests: int


def run_scripted(folder: Path, server: Server, steps: list[dict[str, Any]], images: int, code: int) -> Run:
    """Run the tool on numbered images, one worker, the steps met in order."""
    (folder / "images").mkdir()
    for number in range(images):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "images" / f"{number:02}.png")
    server.script(steps=steps)
    err = Tool(folder, server.url)("--image-dir", "images", "--thread-pool", "1", code=code).stderr
    return Run(err, {Path(name).stem for name in captions(folder)}, server.stats()["requests"])


@pytest.fixture(scope="module")
def passing_run(tmp_path_factory: pytest.TempPathFactory, server_process: Server) -> Run:
    """Each image meets one passing fault, twice."""
    steps = [step for step in PASSING.values() for _ in range(2)]
    for number in range(len(PASSING)):
        steps.insert(3 * number + 2, {})
    return run_scripted(tmp_path_factory.mktemp("passing"), server_process, steps, len(PASSING), 0)


@pytest.mark.parametrize("number", range(len(PASSING)), ids=list(PASSING))
def test_what_passes_is_tried_again_and_said_once_each_time(passing_run: Run, number: int) -> None:
    said = [line for line in passing_run.err.splitlines() if f"{number:02}.png: " in line and "same answer" not in line]
    assert ["retry 1 of 10" in said[0], "retry 2 of 10" in said[1], len(said)] == [True, True, 2]
    assert f"{number:02}" in passing_run.written
    assert passing_run.requests == 3 * len(PASSING)


@pytest.fixture(scope="module")
def one_image_run(tmp_path_factory: pytest.TempPathFactory, server_process: Server) -> Run:
    """Each image meets one of the faults that are its own; the last one meets none."""
    steps = [step for step, _ in ONE_IMAGE]
    return run_scripted(tmp_path_factory.mktemp("one"), server_process, steps, len(ONE_IMAGE) + 1, 1)


@pytest.mark.parametrize(("number", "reason"), list(enumerate(reason for _, reason in ONE_IMAGE)))
def test_what_is_wrong_with_one_image_fails_that_image_alone(one_image_run: Run, number: int, reason: str) -> None:
    assert f"images/{number:02}.png: {reason}" in one_image_run.err.replace("\\", "/")
    assert one_image_run.written == {f"{len(ONE_IMAGE):02}"}
    assert one_image_run.requests == len(ONE_IMAGE) + 1


@pytest.mark.usefixtures("five")
def test_a_retryable_error_that_outlives_its_retries_fails_the_image(tool: Tool, server: Server) -> None:
    server.script(steps=[error(500, "")] * 3)
    err = tool("--image-dir", "images", "--throttle-retries", "2", "--thread-pool", "1", code=1).stderr
    assert "images/0.jpg: HTTP 500: no; run again later" in err
    assert server.stats()["requests"] == 3 + 4
    assert len(captions(tool.folder)) == 4


def test_retry_after_is_honoured(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    server.script(steps=[{**LIMIT, "headers": {"retry-after-ms": "700"}}])
    tool("--image-dir", "images", GETCAP_THROTTLE_BACKOFF_FACTOR="0.001")
    first, second = server.stats()["arrivals"]
    assert second - first >= 0.7


@pytest.mark.parametrize("fault", ["hang", "slow"])
def test_an_answer_that_takes_too_long_is_asked_for_again(
    tool: Tool, server: Server, make_image: ImageMaker, fault: str
) -> None:
    make_image("a.jpg")
    server.script(steps=[{"fault": fault}])
    err = tool("--image-dir", "images", "--timeout", "0.5").stderr
    assert "no answer within 0.5 s (GETCAP_TIMEOUT)" in err
    assert len(captions(tool.folder)) == 1


def test_a_cut_off_answer_is_asked_once_more_with_twice_the_budget(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    server.script(steps=[{"content": "A cat on", "finish_reason": "length"}])
    tool("--image-dir", "images")
    assert [body["max_completion_tokens"] for body in server.stats()["bodies"]] == [300, 600]
    assert len(captions(tool.folder)) == 1


def test_an_answer_cut_off_twice_fails_and_says_which_budget_to_set(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    server.script(then={"content": "A cat on", "finish_reason": "length"})
    err = tool("--image-dir", "images", code=1).stderr
    assert "images/a.jpg: cut off: also with 600 tokens; set GETCAP_MAX_TOKENS=1200" in err
    assert server.stats()["requests"] == 2
    assert captions(tool.folder) == {}


def rejected(message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, "code": "unsupported_parameter"}, **more}


@pytest.mark.usefixtures("five")
def test_a_rejected_parameter_is_changed_once_for_the_run_and_said_once(tool: Tool, server: Server) -> None:
    server.script(
        rejects={
            "max_completion_tokens": rejected("Unsupported parameter: 'max_completion_tokens'"),
            "reasoning_effort": rejected(
                "'reasoning_effort' does not support 'none'. Supported values are: 'minimal', 'low'.", only="none"
            ),
            "temperature": rejected("temperature is not supported"),
        }
    )
    err = tool("--image-dir", "images", "--thread-pool", "5", "--temperature", "0.2").stderr
    stats = server.stats()
    assert stats["requests"] == 5 + 3
    assert {key: stats["bodies"][-1].get(key) for key in ("max_tokens", "reasoning_effort", "temperature")} == {
        "max_tokens": 300,
        "reasoning_effort": "minimal",
        "temperature": None,
    }
    assert err.count("the server rejects") == 3
    assert "sending max_tokens=300 from now on" in err
    assert len(captions(tool.folder)) == 5


def test_what_stops_the_run_later_keeps_what_is_there_and_what_is_on_its_way(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(30):
        make_image(f"{number:02}.jpg")
    server.script(steps=[{}, {}, {}, {**error(401, ""), "latency": 0.3}], latency=0.6)
    err = tool("--image-dir", "images", "--thread-pool", "4", code=3).stderr
    assert server.stats()["requests"] in {4, 5, 6, 7}
    assert len(captions(tool.folder)) == server.stats()["requests"] - 1
    assert err.count("ERROR") == 1


def test_ten_images_in_a_row_with_one_server_error_stop_the_run(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(30):
        make_image(f"{number:02}.jpg")
    server.script(steps=[{}, *[error(500, "")] * 9, {}], then=error(500, ""))
    err = tool("--image-dir", "images", "--throttle-retries", "0", "--thread-pool", "1", code=3).stderr
    assert server.stats()["requests"] == 1 + 9 + 1 + 10
    assert "10 images in a row ended in HTTP 500" in err
    assert "left for the next run 9" in err


def test_refusals_in_a_row_do_not_stop_the_run(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    for number in range(15):
        make_image(f"{number:02}.jpg")
    server.script(then={"content": "I can't help with that."})
    tool("--image-dir", "images", "--thread-pool", "1", code=1)
    assert server.stats()["requests"] == 15


def test_the_first_image_goes_alone(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    for number in range(10):
        make_image(f"{number}.jpg")
    server.script(steps=[{"latency": 0.5}], latency=0.01)
    tool("--image-dir", "images", "--thread-pool", "10")
    arrivals = server.stats()["arrivals"]
    assert arrivals[1] - arrivals[0] >= 0.5


@pytest.mark.parametrize("workers", [1, 7])
def test_as_many_requests_are_in_flight_as_there_are_workers(
    tool: Tool, server: Server, make_image: ImageMaker, workers: int
) -> None:
    for number in range(4 * workers):
        make_image(f"{number}.jpg")
    server.script(latency=0.4)
    tool("--image-dir", "images", "--thread-pool", str(workers))
    assert server.stats()["peak_in_flight"] == workers


def test_the_submission_rate_is_a_hard_cap_without_a_burst(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    for number in range(12):
        make_image(f"{number}.jpg")
    tool("--image-dir", "images", "--thread-pool", "12", "--throttle-submission-rate", "20")
    gaps = [b - a for a, b in pairwise(server.stats()["arrivals"][1:])]  # the first had to connect
    assert sum(gaps) >= 10 * 0.05 * 0.98
    assert min(gaps) > 0.02


def test_one_in_five_requests_failing_loses_no_image(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    for number in range(300):
        make_image(f"{number}.jpg", size=(8, 8))
    server.script(faults=0.2, check=False)
    tool("--image-dir", "images", "--thread-pool", "20", "--timeout", "1", GETCAP_THROTTLE_BACKOFF_FACTOR="0.3")
    stats = server.stats()
    assert len(captions(tool.folder)) == 300
    assert stats["requests"] > 350


@pytest.mark.usefixtures("five")
def test_a_key_that_the_server_repeats_is_not_shown(tool: Tool, server: Server) -> None:
    server.script(steps=[error(400, "", f"bad request with {KEY}"), {"content": f"A cat with {KEY} on its collar."}])
    tool("-v", "--image-dir", "images", "--report", "report.jsonl", code=1)
    assert KEY not in (tool.folder / "report.jsonl").read_text(encoding="utf-8")
    assert not [text for text in captions(tool.folder).values() if KEY in text]


def raw_answer(answer: bytes) -> tuple[str, socket.socket]:
    """Return the URL of a server that answers each connection with these bytes, and its socket."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1", listener


@pytest.mark.parametrize(
    "answer",
    [
        f"Bearer {KEY} rejected\r\n\r\n",
        f"HTTP/1.1 200 OK\r\nX-Key {KEY}\r\n\r\n",
        f"HTTP/1.1 307 Moved\r\nLocation: {KEY}://x/\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 400 Bad\r\nContent-Length: 49\r\n\r\n" + '{"error": "\\u0073' + KEY[1:] + '"}      ',
    ],
    ids=["status line", "header", "redirect", "escaped"],
)
def test_a_key_in_a_malformed_answer_is_not_shown(tool: Tool, make_image: ImageMaker, answer: str) -> None:
    make_image("a.jpg")
    url, listener = raw_answer(answer.encode())
    with listener:
        process = tool.start("-v", "--image-dir", "images", "--throttle-retries", "1", OPENAI_BASE_URL=url)
        out, err = process.communicate(timeout=30)
    assert process.returncode in {1, 3}
    assert KEY not in out + err


def test_a_redirect_is_not_followed(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    location = f"Location: {server.url}/chat/completions"
    url, listener = raw_answer(f"HTTP/1.1 307 Moved\r\n{location}\r\nContent-Length: 0\r\n\r\n".encode())
    with listener:
        err = tool("--image-dir", "images", code=3, OPENAI_BASE_URL=url).stderr
    assert "set OPENAI_BASE_URL to the address it means" in err
    assert server.stats()["requests"] == 0


@pytest.mark.parametrize(
    "environment",
    [
        {"HTTP_PROXY": "foo://bar", "OPENAI_BASE_URL": "http://example.com/v1"},
        {"HTTP_PROXY": "garbage:::", "OPENAI_BASE_URL": "http://example.com/v1"},
        {"SSL_CERT_FILE": "/nowhere.pem", "OPENAI_BASE_URL": "https://localhost:9/v1"},
        {"OPENAI_ORG_ID": "a\nb"},
    ],
    ids=str,
)
def test_a_connection_that_cannot_be_set_up_is_one_clear_error(
    tool: Tool, make_image: ImageMaker, environment: dict[str, str]
) -> None:
    make_image("a.jpg")
    err = tool("--image-dir", "images", code=3, **environment).stderr
    assert "Traceback" not in err
    assert err.count("ERROR") == 1


def test_every_image_arrives_whole_and_as_what_it_says(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    for number, suffix in enumerate(("png", "webp", "gif", "bmp", "tiff", "avif", "jpg")):
        make_image(f"{number}.{suffix}", size=(1500, 1000))
    make_image("small.jpg", size=(30, 20))
    tool("--image-dir", "images")
    stats = server.stats()
    assert stats["wrong"] == []
    assert sorted(image[:3] for image in stats["images"]) == [["JPEG", 30, 20], *[["JPEG", 1024, 683]] * 7]


@pytest.mark.parametrize(
    "limits", [{"requests_per_minute": 1200}, {"requests_per_minute": 60_000, "tokens_per_minute": 1200 * 1220}]
)
def test_limits_that_nobody_told_are_kept_without_a_refusal(
    tool: Tool, server: Server, make_image: ImageMaker, limits: dict[str, float]
) -> None:
    for number in range(90):
        make_image(f"{number}.jpg", size=(8, 8))
    server.script(check=False, latency=0.3, **limits)
    tool("--image-dir", "images", "--thread-pool", "60")
    stats = server.stats()
    assert stats["statuses"] == {"200": 90}
    assert stats["peak_in_flight"] > 1


def test_a_429_pauses_everybody_until_its_retry_after(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    for number in range(30):
        make_image(f"{number:02}.jpg", size=(8, 8))
    limit = {"status": 429, "headers": {"Retry-After": "2"}, "body": {"error": {"code": "rate_limit_exceeded"}}}
    server.script(steps=[{}, {}, {}, limit], latency=0.05, check=False)
    tool("--image-dir", "images", "--thread-pool", "3")
    arrivals = server.stats()["arrivals"]
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    assert max(gaps) >= 1.9
    assert len(arrivals) == 31
