"""Servers and models as people met them: captions, requests, exit code and message of whole runs.

Each case stands for its kind; the words are those of public reports, shortened.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest

from conftest import ImageMaker, Server, Tool, captions

BARN = "A red barn stands in a field."
Step = dict[str, Any]


def error(status: int, message: Any, **more: Any) -> Step:
    return {"status": status, "body": {"error": {"message": message, **more}}}


@dataclass
class Case:
    """What a run of so many images meets, one worker, and what comes of it."""

    steps: list[Step]
    then: Step | None = None
    images: int = 1
    code: int = 0
    captions: int = 1
    requests: int = 1
    words: tuple[str, ...] = ()  # of what people read


def run(tool: Tool, server: Server, make_image: ImageMaker, case: Case) -> str:
    """Run a case and compare; return what was said."""
    for number in range(case.images):
        make_image(f"{number:02}.png", size=(8, 8))
    server.script(steps=case.steps, then=case.then or {})
    err = tool("--image-dir", "images", "--thread-pool", "1", code=case.code).stderr
    assert (len(captions(tool.folder)), server.stats()["requests"]) == (
        case.captions,
        case.requests,
    )
    for words in case.words:
        assert words in err
    return err


def stream(*events: Any) -> Step:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return {"body": "".join(lines) + "data: [DONE]\n\n"}


def delta(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


TEXT = {"type": "text", "text": BARN}
READ: dict[str, Step] = {  # answers that hold the caption
    "gemma": {"content": f"<|channel>thought\nThe user wants a caption.\n<channel|>{BARN}"},
    "gpt-oss": {
        "content": f"<|channel|>analysis<|message|>Hm<|end|><|channel|>final<|message|>{BARN}"
    },
    "qwen": {"content": f"<think>A barn.</think>\n\n{BARN}<|im_end|>"},
    "stream": stream(delta(BARN[:9]), delta(BARN[9:], "stop")),
    "parts": {"content": [TEXT]},
    "thoughts in parts": {"content": [{"type": "thinking", "thinking": [TEXT]}, TEXT]},
    "cut off": {"content": f"{BARN} In front of it a", "finish_reason": "length"},
}


@pytest.mark.parametrize("name", READ)
def test_a_caption_is_found_in_the_answer(
    tool: Tool, server: Server, make_image: ImageMaker, name: str
) -> None:
    run(tool, server, make_image, Case([READ[name]]))
    assert captions(tool.folder) == {"images/00.txt": f"{BARN}\n"}


FILTERED = {"finish_reason": "content_filter: PROHIBITED_CONTENT", "index": 0}
REFUSALS: dict[str, Step] = {  # of one image: asked once, remembered, and the run goes on
    "gemini": {"body": {"choices": [FILTERED], "usage": {"prompt_tokens": 1300}}},
    "zhipu": {"content": "", "finish_reason": "sensitive"},
    "dashscope": error(400, "Input data may contain inappropriate content.", code="data_inspection_failed"),
    "azure": error(400, "The response was filtered", code="content_filter"),
    "xai": {"status": 403, "body": {"error": "Content violates usage guidelines. SAFETY_CHECK_TYPE_BIO"}},
    "openai": {"content": None, "message": {"refusal": "I can't help with that."}},
    "preamble": {"content": "Due to the explicit nature of this image, I'm unable to describe it."},
    "no image": {"content": "Please provide me with the image you would like me to describe."},
    "in passing": {"content": "The image contains nudity, which I am unable to describe."},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_in_whatever_form_is_of_one_image_and_is_remembered(
    tool: Tool, server: Server, make_image: ImageMaker, name: str
) -> None:
    case = Case([REFUSALS[name]] * 12, images=15, code=1, captions=3, requests=15)
    err = run(tool, server, make_image, case)
    assert err.count("refused: ") >= 12
    server.script()
    assert "12 failed (refused before)" in tool("--image-dir", "images", code=1).stderr
    assert server.stats()["requests"] == 0


def test_moderation_in_unknown_words_leaves_the_good_images_for_the_second_run(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    unknown = error(400, "E-4711: no entry")
    case = Case(
        [], unknown, images=15, code=3, captions=0, requests=30, words=("E-4711", "10 images")
    )
    run(tool, server, make_image, case)  # each with three sets of parameters
    # three are left before the good ones: the tenth ended the run, so it counts as not tried
    server.script(steps=[unknown] * 9 + [{}] * 3, then=unknown)
    tool("--image-dir", "images", "--thread-pool", "1", code=1)
    assert sorted(captions(tool.folder)) == [f"images/{number}.txt" for number in (12, 13, 14)]


@pytest.mark.parametrize("content", ["", None])
@pytest.mark.parametrize("finish", ["length", "stop"])
def test_a_model_that_only_thinks_ends_the_run_after_ten_images(
    tool: Tool, server: Server, make_image: ImageMaker, content: str | None, finish: str
) -> None:
    thoughts = {"reasoning": "Hm."} if content is None else {"reasoning_content": "Hm."}
    answer = {"content": content, "message": thoughts, "finish_reason": finish}
    words = (
        "10 images in a row ended in reasoning only",
        "GETCAP_REASONING_EFFORT",
        "enable_thinking",
    )
    run(
        tool,
        server,
        make_image,
        Case([], answer, images=14, code=3, captions=0, requests=10, words=words),
    )


def test_extra_body_goes_into_each_request(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("a.png")
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": None}
    server.script()
    tool("--image-dir", "images", GETCAP_EXTRA_BODY=json.dumps(extra))
    (body,) = server.stats()["bodies"]
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "reasoning_effort" not in body
    for wrong in ("[1]", "{", "3"):
        assert (
            "GETCAP_EXTRA_BODY"
            in tool("--image-dir", "images", code=2, GETCAP_EXTRA_BODY=wrong).stderr
        )


MANDATORY = "Reasoning is mandatory for this endpoint and cannot be disabled."
REJECTIONS = {  # what a server does not want, in its words; the images are captioned all the same
    "openrouter": {"reasoning_effort": error(400, MANDATORY)["body"]},
    "ollama": {"reasoning_effort": error(400, '"m" does not support thinking')["body"]},
    "odd": {"reasoning_effort": error(400, "E17")["body"]},
    "mistral": {
        name: {"detail": [{"type": "extra_forbidden", "loc": ["body", name]}]}
        for name in ("reasoning_effort", "max_completion_tokens")
    },
}


@pytest.mark.parametrize("name", REJECTIONS)
def test_what_nobody_asked_for_is_no_reason_to_fail(
    tool: Tool, server: Server, make_image: ImageMaker, name: str
) -> None:
    for number in range(5):
        make_image(f"{number}.png")
    server.script(rejects=REJECTIONS[name])
    err = tool("--image-dir", "images").stderr
    assert len(captions(tool.folder)) == 5
    # two images are asked with our defaults first, the other three without
    assert server.stats()["requests"] == (9 if name == "mistral" else 7)
    assert err.count("The server rejects") == 1
    assert not set(server.stats()["bodies"][-1]).isdisjoint({"max_tokens", "max_completion_tokens"})


def test_what_the_user_set_is_never_dropped(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("a.png")
    server.script(rejects=REJECTIONS["openrouter"])
    err = tool("--image-dir", "images", "--reasoning-effort", "high", code=1).stderr
    assert MANDATORY in err
    assert server.stats()["requests"] == 2  # the limit's other name is tried


MEMORY = "model requires more system memory (11.1 GiB) than is available (8.2 GiB)"
ENDPOINT = "Unexpected endpoint or method. (POST /chat/completions)"
CONTEXT = "request (4165 tokens) exceeds the available context size (4096 tokens)"
DAY = "Rate limit exceeded: free-models-per-day"
TONIGHT = int(time.time()) + 7200
UNTIL = time.strftime("%d %B %H:%M", time.localtime(TONIGHT))
RESET = {"headers": {"X-RateLimit-Reset": f"{TONIGHT}000"}}
AT_FIRST = {  # what ends the run before the server has answered: requests, and what people read
    "ollama memory": (error(500, MEMORY), 3, (MEMORY, "smaller model")),
    "cuda memory": (error(500, "CUDA error: out of memory"), 3, ("CUDA", "smaller model")),
    "lm studio": ({"body": {"error": ENDPOINT}}, 3, (ENDPOINT, "/v1")),
    "no page": ({"status": 404, "body": "404 page not found"}, 1, ("404 page not found", "/v1")),
    "web page": ({"body": "<!DOCTYPE html><title>Sign in</title>"}, 1, ("Sign in", "/v1")),
    "busy": (error(503, "Loading model"), 4, ("Loading model",)),
    "gateway": ({"status": 502, "body": "<title>502 Bad Gateway</title>"}, 4, ("502 Bad Gateway",)),
    "bad key": (error(400, "API key not valid."), 1, ("OPENAI_API_KEY", "API key not valid")),
    "no vision": (error(404, "No endpoints found that support image input"), 1, ("takes images",)),
    "deepseek": (error(400, "unknown variant `image_url`, expected `text`"), 1, ("takes images",)),
    "openrouter's day": (error(429, DAY, metadata=RESET), 1, (DAY, UNTIL)),
    "openai's day": (error(429, "on requests per day (RPD): try again in 7m12s."), 1, ("RPD", "until")),
    "forbidden": (error(403, "Access denied"), 1, ("Access denied", "OPENAI_API_KEY")),
}  # fmt: skip


@pytest.mark.parametrize("name", AT_FIRST)
def test_what_is_wrong_for_all_ends_the_run_with_the_advice_that_fits(
    tool: Tool, server: Server, make_image: ImageMaker, name: str
) -> None:
    answer, requests, words = AT_FIRST[name]
    tool.environment["GETCAP_THROTTLE_RETRIES"] = "3"
    err = run(tool, server, make_image, Case([], answer, 20, 3, 0, requests, words))
    assert err.count("ERROR") == 1


def test_without_retries_only_the_image_fails(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    tool.environment["GETCAP_THROTTLE_RETRIES"] = "0"
    run(tool, server, make_image, Case([error(503, "busy")], None, 3, 1, 2, 3, ("HTTP 503: busy",)))


LATER = {  # what one image meets after the server has answered: requests, and what people read
    "404": (error(404, "no such thing"), 1, "HTTP 404: no such thing"),
    "403": (error(403, "Access denied"), 1, "HTTP 403: Access denied"),
    "400": (error(400, "E17"), 1, "HTTP 400: E17"),
    "llama.cpp": (error(400, CONTEXT), 1, f"image too large: {CONTEXT}; lower GETCAP_MAX_SIDE"),
    "lm studio": (error(400, "greater than the context length"), 1, "a larger context"),
    "500": (error(500, "boom"), 4, "HTTP 500: boom"),
    "late": ({"body": {"error": {"message": "down", "code": 502}}}, 4, "HTTP 502: down"),
    "page": ({"body": "<!DOCTYPE html><title>Portal</title>"}, 4, "broken answer"),
    "long": (error(400, f"begin {'x ' * 900}end"), 1, "x end"),
}


@pytest.mark.parametrize("name", LATER)
def test_once_the_server_has_answered_one_image_does_not_end_the_run(
    tool: Tool, server: Server, make_image: ImageMaker, name: str
) -> None:
    answer, requests, words = LATER[name]
    tool.environment["GETCAP_THROTTLE_RETRIES"] = "3"
    steps = [{}, *[answer] * requests]
    run(tool, server, make_image, Case(steps, None, 4, 1, 3, 3 + requests, (words,)))


@pytest.mark.parametrize(
    "answer", [error(401, "no"), error(402, "no credits"), error(429, DAY, metadata=RESET)]
)
def test_key_money_and_a_day_s_limit_end_the_run_at_any_time(
    tool: Tool, server: Server, make_image: ImageMaker, answer: Step
) -> None:
    run(tool, server, make_image, Case([{}, answer], None, 4, 3, 1, 2))


def test_google_s_wait_is_waited_for(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "0.7s"}
    answer = {
        "status": 429,
        "body": [{"error": {"code": 429, "message": "quota", "details": [info]}}],
    }
    run(tool, server, make_image, Case([{}, answer], None, 2, 0, 2, 3, ("HTTP 429: quota",)))
    arrivals = server.stats()["arrivals"]
    assert max(later - earlier for earlier, later in pairwise(arrivals)) >= 0.7
