"""Ask: what each kind of answer does to the run, over real connections."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from conftest import KEY, ImageMaker, Server, Tool, captions

LIMIT = {"status": 429, "body": {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}}
HOUR = {"status": 429, "headers": {"Retry-After": "3600"}, "body": {"error": "later"}}
LATE = {"body": {"error": {"message": "late", "code": 502}}}
Images = Callable[[int], None]
ONE_WORKER = ("--image-dir", "images", "--thread-pool", "1")


@pytest.fixture
def images(make_image: ImageMaker) -> Images:
    def make(number: int) -> None:
        for index in range(number):
            make_image(f"{index:03}.jpg", size=(32, 32))

    return make


def error(status: int, message: str = "no", code: str = "") -> dict[str, Any]:
    return {"status": status, "body": {"error": {"message": message, "code": code}}}


FATAL = [
    ({"key": "sk-another"}, "OPENAI_API_KEY"),
    ({"model": "gpt-other"}, "GETCAP_MODEL"),
    ({"then": error(429, "", "insufficient_quota")}, "no money left"),
    ({"then": error(402, "pay first")}, "no money left"),
    ({"then": error(403, "not in your country")}, "not in your country"),
    ({"then": error(500, "image input is not supported - hint: mmproj")}, "takes images"),
    ({"then": {"fault": "html"}}, "OPENAI_BASE_URL"),
    ({"then": HOUR}, "wait until"),
]


@pytest.mark.parametrize(("script", "said"), FATAL)
def test_what_is_wrong_for_all_costs_one_request(
    tool: Tool, server: Server, images: Images, script: dict[str, Any], said: str
) -> None:
    images(5)
    server.script(**script)
    err = tool("--image-dir", "images", "--thread-pool", "5", code=3).stderr
    assert server.stats()["requests"] == 1
    assert [line for line in err.splitlines() if "ERROR" in line and said in line]
    assert err.count("ERROR") == 1
    assert captions(tool.folder) == {}
    assert "5 not done yet" in err


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


NOWHERE = [  # scheme, address (blank: the server's), what the system says
    ("http", "127.0.0.1:FREE", "Connect call failed"),
    ("http", "no-such-host.invalid", "not known"),
    ("https", "", "SSL"),
]


@pytest.mark.parametrize(("scheme", "address", "said"), NOWHERE)
def test_a_server_that_cannot_be_reached_is_tried_once(
    tool: Tool, server: Server, images: Images, scheme: str, address: str, said: str
) -> None:
    images(5)
    address = address.replace("FREE", free_port()) or server.url.split("/")[2]
    url = f"{scheme}://{address}/v1"
    err = tool("--image-dir", "images", code=3, OPENAI_BASE_URL=url).stderr
    assert f"cannot connect to {address}: " in err
    assert said in err
    assert "retry" not in err


BAD_CONNECTIONS = [
    {"HTTP_PROXY": "foo://bar", "OPENAI_BASE_URL": "http://example.com/v1"},
    {"HTTP_PROXY": "garbage:::", "OPENAI_BASE_URL": "http://example.com/v1"},
    {"SSL_CERT_FILE": "/nowhere.pem", "OPENAI_BASE_URL": "https://localhost:9/v1"},
    {"OPENAI_ORG_ID": "a\nb"},
]


@pytest.mark.parametrize("environment", BAD_CONNECTIONS, ids=str)
def test_a_connection_that_cannot_be_set_up_is_one_clear_error(
    tool: Tool, images: Images, environment: dict[str, str]
) -> None:
    images(1)
    err = tool("--image-dir", "images", code=3, **environment).stderr
    assert "Traceback" not in err
    assert err.count("ERROR") == 1


PASSING = {
    "429": LIMIT,
    "500": error(500),
    "503": error(503),
    "529": error(529, "overloaded"),
    "408": error(408),
    "reset": {"fault": "reset"},
    "cut": {"fault": "cut"},
    "no choices": {"fault": "no choices"},
    "late error": LATE,
}


def test_what_passes_is_tried_again_and_said_once_each_time(
    tool: Tool, server: Server, images: Images
) -> None:
    images(1 + len(PASSING))
    server.script(steps=[{}, *(step for fault in PASSING.values() for step in (fault, fault, {}))])
    err = tool(*ONE_WORKER, GETCAP_THROTTLE_BACKOFF_FACTOR="0.01").stderr
    for number, name in enumerate(PASSING, 1):
        said = [line for line in err.splitlines() if f"{number:03}.jpg: " in line][:2]
        assert ["retry 1 of 10" in said[0], "retry 2 of 10" in said[1]] == [True, True], name
    assert err.count("retry") == 2 * len(PASSING)
    assert len(captions(tool.folder)) == 1 + len(PASSING)
    assert server.stats()["requests"] == 1 + 3 * len(PASSING)


ONE_IMAGE = [
    (error(400, "cannot read this image"), "HTTP 400: cannot read this image"),
    (error(403, "flagged by moderation"), "refused: flagged by moderation"),
    (error(404, "odd"), "HTTP 404: odd"),
    ({"status": 413, "body": "<title>Too Large</title>"}, "image too large: Too Large"),
    ({"content": "I'm sorry, but I can't help with that."}, "refused: I'm sorry"),
    ({"content": ""}, "empty"),
    ({"content": "", "message": {"reasoning_content": "hmm"}}, "reasoning only"),
    ({"content": "Error: upstream is down"}, "error text"),
]


def test_after_the_first_answer_what_is_wrong_with_one_image_fails_that_image_alone(
    tool: Tool, server: Server, images: Images
) -> None:
    images(2 + len(ONE_IMAGE))
    server.script(steps=[{}, *(step for step, _ in ONE_IMAGE)])
    err = tool(*ONE_WORKER, code=1).stderr
    for number, (_, reason) in enumerate(ONE_IMAGE, 1):
        assert f"images/{number:03}.jpg: {reason}" in err.replace("\\", "/")
    assert len(captions(tool.folder)) == 2
    assert server.stats()["requests"] == 2 + len(ONE_IMAGE)


def test_an_error_that_outlives_its_retries_fails_one_image_and_says_to_run_again(
    tool: Tool, server: Server, images: Images
) -> None:
    images(3)
    server.script(steps=[{}, *[error(503)] * 3])
    err = tool(*ONE_WORKER, "--throttle-retries", "2", code=1).stderr
    assert "images/001.jpg: HTTP 503: no" in err.replace("\\", "/")
    assert (server.stats()["requests"], len(captions(tool.folder))) == (5, 2)


def test_before_the_first_answer_one_images_retries_are_the_runs(
    tool: Tool, server: Server, images: Images
) -> None:
    images(5)
    server.script(then=error(503, "busy, sorry"))
    err = tool("--image-dir", "images", "--throttle-retries", "3", code=3).stderr
    assert server.stats()["requests"] == 4
    assert "busy, sorry" in err.partition("ERROR")[2]


def test_before_the_first_answer_the_same_error_three_times_ends_the_run(
    tool: Tool, server: Server, images: Images
) -> None:
    images(5)
    server.script(then=error(500, "model requires more system memory"))
    tool("--image-dir", "images", code=3)
    assert server.stats()["requests"] == 3


def test_a_refusal_counts_as_an_answer(tool: Tool, server: Server, images: Images) -> None:
    images(3)
    moderated = error(400, "Input data may contain inappropriate content.")
    server.script(steps=[moderated, error(404, "odd"), {}])
    tool(*ONE_WORKER, code=1)
    assert (server.stats()["requests"], len(captions(tool.folder))) == (3, 1)


def test_ten_images_in_a_row_with_one_fault_end_the_run(
    tool: Tool, server: Server, images: Images
) -> None:
    images(30)
    odd = error(500, "odd")
    server.script(steps=[{}, *[odd] * 9, {}], then=odd)
    err = tool(*ONE_WORKER, "--throttle-retries", "0", code=3).stderr
    assert server.stats()["requests"] == 1 + 9 + 1 + 10
    assert "10 images in a row ended in HTTP 500: odd" in err
    assert "10 not done yet" in err


def test_other_faults_and_refusals_between_do_not_make_a_row_shorter_or_longer(
    tool: Tool, server: Server, images: Images
) -> None:
    images(41)
    refused = {"content": "I can't help with that."}
    turns = [refused, {"content": ""}, refused, {"content": "Error: down"}]
    server.script(steps=[{}, *turns * 10])
    err = tool(*ONE_WORKER, code=1).stderr
    assert server.stats()["requests"] == 41
    assert "in a row" not in err


def test_a_wait_grows_by_the_backoff_factor_and_is_never_shorter_than_retry_after(
    tool: Tool, server: Server, images: Images
) -> None:
    images(1)
    asked = {**LIMIT, "headers": {"Retry-After": "0.7"}}
    server.script(steps=[LIMIT, LIMIT, LIMIT, asked])
    tool("--image-dir", "images", GETCAP_THROTTLE_BACKOFF_FACTOR="0.2")
    first, second, third, fourth = (b - a for a, b in pairwise(server.stats()["arrivals"]))
    # 0.1 s times 1, since a factor below one does not grow, and up to 0.1 s more at random
    assert all(0.1 <= wait_s < 0.6 for wait_s in (first, second, third))
    assert 0.7 <= fourth < 1.2


@pytest.mark.parametrize("fault", ["hang", "slow"])
def test_an_answer_that_takes_too_long_is_asked_for_again(
    tool: Tool, server: Server, images: Images, fault: str
) -> None:
    images(1)
    server.script(steps=[{"fault": fault}])
    err = tool("--image-dir", "images", "--timeout", "0.5").stderr
    assert "no answer: none came within 0.5 s (GETCAP_TIMEOUT); retry 1" in err
    assert len(captions(tool.folder)) == 1


REJECTED = {
    "reasoning_effort": {"error": {"message": "Reasoning is mandatory and cannot be disabled."}},
    "max_completion_tokens": {"error": {"message": "Unrecognized argument"}},
}


def sent(server: Server) -> list[tuple[Any, Any, Any]]:
    """Return the effort and both limits of the requests that were let in."""
    names = ("reasoning_effort", "max_completion_tokens", "max_tokens")
    bodies = server.stats()["bodies"]
    return [tuple(body.get(name) for name in names) for body in bodies]


@pytest.mark.parametrize(
    ("names", "requests", "accepted"),
    [
        (["reasoning_effort"], 6 + 2, (None, 300, None)),
        (["reasoning_effort", "max_completion_tokens"], 6 + 4, (None, None, 300)),
        (["max_completion_tokens"], 6 + 4, (None, None, 300)),
    ],
    ids=str,
)
def test_our_own_defaults_are_left_out_for_an_image_and_dropped_with_the_second(
    tool: Tool,
    server: Server,
    images: Images,
    names: list[str],
    requests: int,
    accepted: tuple[Any, Any, Any],
) -> None:
    images(6)
    server.script(rejects={name: REJECTED[name] for name in names})
    err = tool("--image-dir", "images", "--thread-pool", "3").stderr
    assert server.stats()["requests"] == requests
    assert sent(server) == [accepted] * 6
    assert err.count("not sent any more") == 1
    assert len(captions(tool.folder)) == 6


def test_the_next_image_carries_the_defaults_again(
    tool: Tool, server: Server, images: Images
) -> None:
    images(4)
    server.script(steps=[error(400, "this image is odd")])
    err = tool(*ONE_WORKER).stderr
    default, plain = ("none", 300, None), (None, 300, None)
    assert sent(server) == [default, plain, default, default, default]
    assert "not sent any more" not in err


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("temperature", {"GETCAP_TEMPERATURE": "0.2"}),
        ("service_tier", {"GETCAP_SERVICE_TIER": "flex"}),
    ],
)
def test_what_the_user_set_is_never_dropped(
    tool: Tool, server: Server, images: Images, name: str, environment: dict[str, str]
) -> None:
    images(3)
    server.script(rejects={name: {"error": {"message": f"{name} cannot be had"}}})
    err = tool("--image-dir", "images", code=1, **environment).stderr
    assert err.count(f"HTTP 400: {name} cannot be had") == 3
    assert "tokens" not in err.splitlines()[-1]  # nothing was paid
    assert captions(tool.folder) == {}


def test_what_stops_the_run_later_keeps_what_is_there_and_what_is_on_its_way(
    tool: Tool, server: Server, images: Images
) -> None:
    images(30)
    server.script(steps=[{}, {}, {}, {**error(401), "latency": 0.3}], latency=0.6)
    err = tool("--image-dir", "images", "--thread-pool", "4", code=3).stderr
    requests = server.stats()["requests"]
    assert 4 <= requests <= 7
    assert len(captions(tool.folder)) == requests - 1
    assert err.count("ERROR") == 1


def test_the_first_image_goes_alone_and_then_there_are_as_many_as_workers(
    tool: Tool, server: Server, images: Images
) -> None:
    images(28)
    server.script(steps=[{"latency": 0.5}], latency=0.4)
    tool("--image-dir", "images", "--thread-pool", "7")
    stats = server.stats()
    assert stats["arrivals"][1] - stats["arrivals"][0] >= 0.5
    assert stats["peak_in_flight"] == 7


def test_every_image_arrives_whole_and_as_what_it_says(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for suffix in ("png", "webp", "gif", "bmp", "tiff", "avif", "jpg"):
        make_image(f"{suffix}.{suffix}", size=(1500, 1000))
    tool("--image-dir", "images")
    stats = server.stats()
    assert stats["wrong"] == []
    assert [image[:3] for image in stats["images"]] == [["JPEG", 1024, 683]] * 7


def raw_answer(answer: str) -> tuple[str, socket.socket]:
    """Return the URL of a server that answers each connection with this, and its socket."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer.encode())

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1", listener


MALFORMED = {
    "status line": f"Bearer {KEY} rejected\r\n\r\n",
    "header": f"HTTP/1.1 200 OK\r\nX-Key {KEY}\r\n\r\n",
    "redirect": f"HTTP/1.1 307 Moved\r\nLocation: {KEY}://x/\r\nContent-Length: 0\r\n\r\n",
    "escaped": "HTTP/1.1 400 Bad\r\nContent-Length: 49\r\n\r\n"
    + '{"error": "\\u0073'
    + KEY[1:]
    + '"}      ',
}


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_key_in_a_malformed_answer_is_not_shown(tool: Tool, images: Images, answer: str) -> None:
    images(1)
    url, listener = raw_answer(answer)
    with listener:
        words = ("-v", "--image-dir", "images", "--throttle-retries", "1")
        process = tool.start(*words, OPENAI_BASE_URL=url)
        out, err = process.communicate(timeout=30)
    assert process.returncode in {1, 3}
    assert KEY not in out + err


def test_a_redirect_is_not_followed(tool: Tool, server: Server, images: Images) -> None:
    images(1)
    location = f"Location: {server.url}/chat/completions"
    url, listener = raw_answer(f"HTTP/1.1 307 Moved\r\n{location}\r\nContent-Length: 0\r\n\r\n")
    with listener:
        err = tool("--image-dir", "images", code=3, OPENAI_BASE_URL=url).stderr
    assert "OPENAI_BASE_URL: set the URL" in err
    assert server.stats()["requests"] == 0
