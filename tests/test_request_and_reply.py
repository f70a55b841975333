"""Request and reply: what is asked, what an error means, what is a caption and what is none."""

from __future__ import annotations

import base64
import contextlib
import json
import time
from typing import Any

import pytest

import gen_captions as gc

A = "A woman in a red coat stands at a bus stop."


def judged(content: str, finish: str = "stop", style: str = "prose", **fields: Any) -> str:
    """Return the caption, or the reason why there is none in angle brackets."""
    try:
        text: str = gc.judge_reply(gc.Reply(content=content, finish_reason=finish, **fields), style)
    except gc.FailImage as error:
        return f"<{error.reason}>"
    return text


# ------------------------------------------------------------------------------------------ requests


def test_a_request_is_one_user_message_text_first_then_the_image() -> None:
    image = base64.b64encode(b"\xff\xd8jpeg")
    prompt = "Say data:image/jpeg;base64, “naïve”"
    body = json.loads(gc.build_request("m", prompt, {"max_tokens": 300}, image))
    (message,) = body.pop("messages")
    assert body == {"model": "m", "max_tokens": 300}
    assert message["role"] == "user"
    text, picture = message["content"]
    assert text == {"type": "text", "text": prompt}
    assert picture["image_url"]["url"] == "data:image/jpeg;base64," + image.decode()


LIMIT, OLDER, EFFORT = "max_completion_tokens", "max_tokens", "reasoning_effort"
OURS: dict[str, Any] = {LIMIT: 300, EFFORT: "none"}
EXTRA: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
WARM: dict[str, Any] = {"temperature": 0.2}
SENT = [  # settings, what is sent first, and what after that when it is rejected
    ({}, OURS, [{LIMIT: 300}, {OLDER: 300}]),
    ({"temperature": 0.2}, {**OURS, **WARM}, [{LIMIT: 300, **WARM}, {OLDER: 300, **WARM}]),
    ({"reasoning_effort": "none"}, OURS, [{OLDER: 300, EFFORT: "none"}]),
    ({"extra_body": EXTRA}, {**OURS, **EXTRA}, [{LIMIT: 300, **EXTRA}, {OLDER: 300, **EXTRA}]),
    ({"extra_body": {EFFORT: None, LIMIT: None, OLDER: 9}}, {OLDER: 9}, []),
]


@pytest.mark.parametrize(("changes", "first", "others"), SENT)
def test_only_our_own_defaults_are_given_up_and_never_the_limit(
    changes: dict[str, Any], first: dict[str, Any], others: list[dict[str, Any]]
) -> None:
    settings = gc.Settings(base_url="http://localhost:1/v1", **changes)
    assert gc.first_parameters(settings) == first
    assert gc.other_parameters(settings, first) == others


def test_prompt_caches_are_switched_off_where_they_cost() -> None:
    explicit = {"mode": "explicit"}
    for model, sent in (("gpt-6-luna", explicit), ("gpt-5.6-luna", explicit), ("gpt-4o", None)):
        assert gc.first_parameters(gc.Settings(model=model)).get("prompt_cache_options") == sent


# ------------------------------------------------------------------------------------------- replies


def completion(message: Any, **choice: Any) -> str:
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop", **choice}]})


def stream(*deltas: str, end: str = "data: [DONE]", finish: str | None = "stop") -> str:
    choices: list[dict[str, Any]] = [{"delta": {"content": delta}} for delta in deltas]
    choices.append({"delta": {}, "finish_reason": finish})
    events = [f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices]
    return ": keep-alive\n\n" + "".join(events) + end


TEXT, CAT = {"type": "text", "text": "A cat."}, {"content": "A cat."}
ANSWERS = [
    completion(CAT),
    completion(CAT, finish_reason=None),
    completion({"content": [TEXT]}),
    completion({"content": [{"type": "thinking", "thinking": [TEXT]}, TEXT]}),
    completion({"content": [{"type": "text", "text": "A "}, {"type": "text", "text": "cat."}]}),
    stream("A ", "cat."),
    stream("A c", "at\u2028", "."),
    stream("A cat.", end=""),
]


@pytest.mark.parametrize("text", ANSWERS, ids=range(len(ANSWERS)))
def test_an_answer_is_read_in_whichever_shape_it_comes(text: str) -> None:
    assert gc.judge_reply(gc.parse_reply(200, text)).replace(" .", ".") == "A cat."


def test_an_answer_is_read_with_its_tokens_thoughts_included() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 12}
    body = {**json.loads(completion(CAT)), "usage": usage, "service_tier": "flex"}
    reply = gc.parse_reply(200, json.dumps(body))
    assert (reply.usage, reply.tier, reply.error) == (gc.Usage(5, 7), "flex", "")
    for wrong in (
        None,
        {},
        {"prompt_tokens": 0, "completion_tokens": 1},
        {**usage, "prompt_tokens": "5"},
    ):
        assert gc.parse_reply(200, json.dumps({**body, "usage": wrong})).usage is None


BROKEN = ["", "{", '{"choices": [', "null", "[]", '"text"', "{}", '{"choices": []}', '{"choices": [null]}', '{"choices": [{}]}', "data: {", stream("A ca", finish=None, end=""), "[" * 100_000]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_half_an_answer_is_asked_for_again(text: str) -> None:
    error = gc.judge_error(gc.parse_reply(200, text))
    assert (error.reason, error.retry_after_s) == ("broken answer", 0)


@pytest.mark.parametrize(
    "content", [5, True, {"a": 1}, ["a cat"], [{"type": "text", "text": 5}], None]
)
def test_content_of_a_wrong_type_is_no_text(content: Any) -> None:
    assert gc.parse_reply(200, completion({"content": content})).content == ""


# -------------------------------------------------------------------------------------------- errors

WORDS = [  # a body, and what people read of it
    ('{"error": {"message": "m", "type": "t", "param": "p", "code": "c"}}', "m"),
    ('{"error": "just \\"text\\" \\u6b20"}', 'just "text" 欠'),
    ('[{"error": {"code": 429, "message": "m", "status": "RESOURCE_EXHAUSTED"}}]', "m"),
    ('{"object": "error", "message": "m", "type": "NotFoundError", "code": 404}', "m"),
    ('{"detail": "Not Found"}', "Not Found"),
    ('{"detail": [{"loc": ["body", "top_k"], "msg": "no"}]}', '{"detail": [{"loc": ["body", "top_k"], "msg": "no"}]}'),
    ('{"error": {"message": "Provider error", "metadata": {"raw": "real cause"}}}', "Provider error; real cause"),
    ('{"error": {"message": "cut o', '{"error": {"message": "cut o'),
    ("<html><head><title>502 Bad Gateway</title></head><hr>nginx", "502 Bad Gateway nginx"),
    ("upstream  connect\nerror", "upstream connect error"),
    ("", "an error without a message"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), WORDS)
def test_what_an_error_says_is_found_in_every_shape(text: str, words: str) -> None:
    assert gc.parse_reply(400, text).error == words


def test_a_long_message_is_shortened_in_its_middle() -> None:
    said = gc.parse_reply(400, json.dumps({"error": "begin " + "long " * 200 + "end"})).error
    assert len(said) <= 300
    assert (said[:5], said[-3:]) == ("begin", "end")


def test_an_error_under_http_200_keeps_its_own_status() -> None:
    for text, status in (
        ('{"error": {"message": "m", "code": 502}}', 502),
        ('{"error": {"message": "m", "code": "401"}}', 401),
        ('{"choices": [{"error": {"message": "m", "code": 502}, "message": {"content": "half"}}]}', 502),
        ('data: {"error": {"message": "m", "code": 429}}\n\n', 429),
        ('{"error": "m"}', 200),
    ):  # fmt: skip
        reply = gc.parse_reply(200, text)
        assert (reply.status, reply.error, reply.is_free) == (status, "m", False)


END, FIRST = "end", "first"  # the run ends; so too unless the server has answered
IMAGE, AGAIN = "image", "again"  # the image fails; it is tried again
MEANINGS = [  # status, what is said, what it means, and a word of what people read
    (400, "invalid_value: 30001 patches after processing", IMAGE, "image too large"),
    (400, "request (4165 tokens) exceeds the available context size (4096 tokens)", IMAGE, "GETCAP_MAX_SIDE"),
    (429, "Request too large for gpt", IMAGE, "image too large"),
    (413, "<html><title>413 Request Entity Too Large</title>", IMAGE, "image too large"),
    (400, "image_parse_error: You uploaded an unsupported image", IMAGE, "HTTP 400"),
    (422, "no", IMAGE, "HTTP 422"),
    (400, "data_inspection_failed: Input data may contain inappropriate content.", IMAGE, "refused"),
    (400, "content_policy_violation", IMAGE, "refused"),
    (400, "The request was rejected because it was considered high risk", IMAGE, "refused"),
    (400, "系统检测到输入或生成内容可能包含不安全或敏感内容", IMAGE, "refused"),
    (403, "Content violates usage guidelines. API key ID: x, Failed check: SAFETY_CHECK_TYPE_BIO", IMAGE, "refused"),
    (500, "InputImageSensitiveContentDetected", IMAGE, "refused"),
    (401, "no", END, "OPENAI_API_KEY"),
    (402, "no credits", END, "money"),
    (429, "insufficient_quota", END, "money"),
    (403, "Sorry, your account balance is insufficient", END, "money"),
    (429, "Rate limit exceeded: free-models-per-day", END, "limit of this account"),
    (429, "GenerateRequestsPerDayPerProjectPerModel-FreeTier", END, "limit of this account"),
    (400, "API key not valid. Please pass a valid API key.", FIRST, "OPENAI_API_KEY"),
    (400, "foo/bar is not a valid model ID", FIRST, "GETCAP_MODEL"),
    (400, "Invalid content type. image_url is only supported by certain models.", FIRST, "GETCAP_MODEL"),
    (400, "unknown variant `image_url`, expected `text`", FIRST, "GETCAP_MODEL"),
    (404, "No endpoints found that support image input", FIRST, "takes images"),
    (404, "model_not_found", FIRST, "GETCAP_MODEL"),
    (403, "country not supported", FIRST, "OPENAI_API_KEY"),
    (405, "no", FIRST, "/v1"),
    (307, "moved", FIRST, "OPENAI_BASE_URL"),
    (429, "You exceeded your current quota, please check your plan and billing details", AGAIN, "HTTP 429"),
    (408, "", AGAIN, "HTTP 408"),
    (503, "Loading model", AGAIN, "HTTP 503"),
    (524, "", AGAIN, "HTTP 524"),
    (500, "model requires more system memory (11.1 GiB) than is available (8.2 GiB)", AGAIN, "smaller model"),
    (200, "Unexpected endpoint or method. (POST /chat/completions)", AGAIN, "/v1"),
    (0, "no answer within 120 s", AGAIN, "no answer"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "said", "meaning", "word"), MEANINGS)
def test_an_error_means_the_end_another_try_or_a_failed_image(
    status: int, said: str, meaning: str, word: str
) -> None:
    reply = gc.parse_reply(status, said if said[:1] == "<" else json.dumps({"error": said}))
    first = gc.judge_error(reply, has_answered=False)
    later = gc.judge_error(reply, has_answered=True)
    kinds = {END: (gc.StopRun, gc.StopRun), FIRST: (gc.StopRun, gc.FailImage)}
    assert (type(first), type(later)) == kinds.get(meaning, (gc.FailImage, gc.FailImage))
    assert word in str(first)
    assert said[:1] == "<" or said in str(later)
    if meaning in {IMAGE, AGAIN}:
        assert (first.retry_after_s is not None) == (meaning == AGAIN)
        assert gc.is_answered(reply) == (first.reason == "refused")


def test_a_web_page_ends_the_run_unless_the_server_has_answered() -> None:
    page = gc.parse_reply(200, "<!DOCTYPE html><title>Sign in</title>")
    assert "/v1" in str(gc.judge_error(page, has_answered=False))
    assert gc.judge_error(page, has_answered=True).retry_after_s == 0


NOW = 1_700_000_000.0
WAITS = [
    ({}, "no", 0),
    ({"retry-after": "7"}, "no", 7),
    ({"retry-after": "1.5"}, "no", 1.5),
    ({"retry-after": "soon"}, "no", 0),
    ({"retry-after": "Mon, 23 Nov 2026 12:01:30 GMT"}, "no", 0),
    ({"retry-after": "1700000000"}, "no", 0),  # an epoch
    ({"retry-after": "9" * 400}, "no", 0),
    ({}, '{"@type": "google.rpc.RetryInfo", "retryDelay": "47.5s"}', 47.5),
    ({}, "Please try again in 7m12s.", 432),
    ({}, "Your quota will reset after 1h0m16s.", 3616),
    ({}, "Please retry after 26 seconds.", 26),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "said", "seconds"), WAITS)
def test_a_wait_is_read_wherever_servers_put_it(
    headers: dict[str, str], said: str, seconds: float
) -> None:
    assert gc.parse_reply(429, said, headers, NOW).retry_after_s == seconds


def test_a_long_wait_ends_the_run_and_says_until_when() -> None:
    headers = {"X-RateLimit-Reset": f"{(NOW + 7200) * 1000:.0f}"}
    error = {"message": "Slow down", "code": 429, "metadata": {"headers": headers}}
    reply = gc.parse_reply(429, json.dumps({"error": error}), now_s=NOW)
    assert reply.retry_after_s == 7200
    until = time.strftime("%d %B %H:%M", time.localtime(NOW + 7200))
    end = gc.judge_error(reply)
    assert isinstance(end, gc.StopRun)
    assert until in str(end)


def test_limits_are_read_from_headers() -> None:
    def limit(most: str, left: str, reset: str) -> Any:
        values = {"limit": most, "remaining": left, "reset": reset}
        headers = {f"x-ratelimit-{name}-tokens": value for name, value in values.items()}
        return gc.read_limit(headers, "tokens")

    assert limit("100", "90", "6m0s") == (100, 90, 360)
    assert limit("100", "90", "12ms") == (100, 90, 0.012)
    assert limit("100", "90", "1700000000") == (100, 90, 0)
    assert limit("", "90", "1s") is limit("0", "0", "1s") is limit("many", "1", "") is None


# ------------------------------------------------------------------------------------------ the gate

HONEST = [
    A,
    'A shop window with a sign that reads "SORRY, WE\'RE CLOSED" above a brown door.',
    '"I\'m sorry" is written in icing on a round cake.',
    '"OPEN" glows in red neon beside a door marked "EXIT"',
    "Sorry! board game box on a wooden table, its lid half open.",
    "A greeting card on a desk says I can't wait to see you.",
    'A blackboard filled with "I will not talk in class. I cannot help it."',
    "A t-shirt with the text 5 * 3 = 15 and a star * below it.",
    "Error code 0x80070057 in white letters on a blue screen.",
    "404 Not Found illustration with a lost astronaut.",
    "Caption contest winner holding a trophy.",
    "Here is where the road ends: a gravel turnaround by a lake.",
    "Unable to stand, a man leans on a crutch.",
    "No image of the king hangs on the bare wall.",
    "There are no people in the photo, only a dog on a pier.",
    "The image of a saint on a church wall, its frame not gilded.",
    "The image shows a block of flats and a truck blocking the road.",
    "The photo does not include the top of the tower.",
    "The woman in the photo is missing a shoe.",
    "There is no one in the picture, which displays an empty pier.",
    "This photo shows a sign that is not attached to its post.",
    "The photo stops at the shins, so the feet cannot be seen.",
    "Please do not feed the ducks, says a sign by the pond.",
    "I ♥ NY printed on a white shirt.",
    "I Can't Believe It's Not Butter tub on a table.",
    "I see a red barn in a field of wheat.",
    "My cat sits on a mat.",
    "A World War I biplane that cannot fly hangs from the ceiling.",
    'An email screenshot that reads "Hi team. Let me know if you have questions."',
    "A happy girl (*^_^*) drawn in ink.",
    "一只黑猫坐在窗台上，窗外下着雨。",
]


@pytest.mark.parametrize("text", HONEST)
def test_an_honest_caption_is_left_alone(text: str) -> None:
    assert judged(text) == text


CLEANED = [  # the answer, and the caption where it is not A
    f'"{A}"',
    f"  ```text\n{A}\n```\n",
    f"Here's a detailed caption for the image:\n\n{A}",
    f"**Caption:** {A}",
    f'Caption 1: "{A}"',
    f"{A}\n\nLet me know if you would like changes!",
    f"<p>{A}</p>",
    f"<answer>{A}</answer>",
    f"<|im_start|>assistant\n<s> {A}</s>",
    f"<|turn>model\n{A}<turn|>",
    f"{A}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{A}",
    f"{A}</s> User: what else? Assistant: a dog.",
    f"<|begin_of_box|>{A}<|end_of_box|>",
    f"<think>The user wants a caption.</think>\n\n{A}",
    f"I should describe this.\n</think>\n\n{A}",
    f"◁think▷hm◁/think▷{A}",
    f"[THINK]Let me see.[/THINK]{A}",
    f"<|START_THINKING|>hm<|END_THINKING|>{A}",
    f"<|channel>thought\nThe user wants a caption.\n<channel|>{A}",
    f"<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>{A}",
    f"\ufeff{A}\x00",
    ("A **red** car\nbeside a **blue** house", "A red car beside a blue house"),
    ("- a red car\n- a blue house", "a red car a blue house"),
    ("A red car.\r\n\r\n\tA house.\u2028A tree.", "A red car. A house. A tree."),
    ("A &quot;red&quot; car &amp; a house.<br>A tree.", 'A "red" car & a house. A tree.'),
    ("A caf\u00e9 sign \ud83d here.", "A café sign here."),
]


@pytest.mark.parametrize("row", CLEANED)
def test_what_is_around_a_caption_is_taken_off(row: str | tuple[str, str]) -> None:
    answer, caption = (row, A) if isinstance(row, str) else row
    assert judged(answer) == caption
    assert gc.clean_caption(caption) == caption  # cleaning twice is cleaning once


def test_tags_are_tidied() -> None:
    assert judged("1girl\n- Red_Hair, smile,smile.", style="tags") == "1girl, red hair, smile"


REFUSED = [
    "I'm sorry, but I can't help with that.",
    "Sorry, I cannot describe this image.",
    "Unfortunately, I can't view images.",
    "I apologize, but this goes too far.",
    "My apologies, I wasn't able to read the picture.",
    "As an AI language model, I have no eyes.",
    "I'd rather not describe this picture.",
    "Due to the explicit nature of this image, I'm unable to describe it.",
    "The image contains nudity, which I am unable to describe.",
    "This picture may show a private person, so I won't describe it.",
    "A man in a suit. I'm sorry, I can't identify who he is.",
    "The photo is too dark for me to describe.",
    "This is against my guidelines.",
    "Cannot describe this image.",
    "The content violates our usage policies.",
    "Please provide me with the image you would like me to describe.",
    "Could you please upload the image?",
    "No image was provided.",
    "There is no image attached to your message.",
    "Hello! It looks like the image wasn't uploaded.",
    "It seems that no image came through.",
    "Hello! How can I help you today?",
    "<think>This is not allowed.</think>I'm sorry, but I can't help with that.",
    "\"I'm sorry, but I can't help with that.\"",
    "抱歉，我不能描述这张图片。",
    "我无法识别图中的人物。",
    "Es tut mir leid, aber dabei kann ich nicht helfen.",
    "申し訳ありませんが、お手伝いできません。",
]


@pytest.mark.parametrize("answer", REFUSED)
def test_a_refusal_is_no_caption(answer: str) -> None:
    assert judged(answer) == "<refused>"


NONE = [
    *[("refused", {"content": "A red", "finish": end}) for end in ("content_filter", "SAFETY", "sensitive", "refusal")],
    *[("broken answer", {"content": "A red square", "finish": end}) for end in ("error", "abort", "network_error")],
    *[("cut off", {"content": "A red square on a", "finish": end}) for end in ("length", "MAX_TOKENS", "model_length")],
    *[("empty", {"content": text}) for text in ("", " \n ", "...", "null", "None", "N/A", "[caption]")],
    ("reasoning only", {"content": "", "has_reasoning": True}),
    ("reasoning only", {"content": "", "has_reasoning": True, "finish": "length"}),
    *[("reasoning only", {"content": text}) for text in (
        "<think>Let me look at", "<think>all of it</think>", "A man in a park.</think>", "[THINK]The image",
        "<|channel>thought\nThe user", "<|channel|>analysis<|message|>The user wants", "Thinking Process:\n\n1. Look",
        "The user wants a caption for an image. I need to", "Okay, so I need to describe this image. There is a man.",
        "We need to write a caption. First", "Let me look at the image.",
    )],
    ("looping", {"content": "A red car on a road, " + "a red car, " * 60}),
    ("looping", {"content": "A hall. " + "To the left, a door is seen. To the right, a wall is seen. " * 12}),
    ("looping", {"content": "ha" * 400}),
    ("looping", {"content": "非常" * 200, "finish": "length"}),
    *[("error text", {"content": text}) for text in (
        "Internal Server Error", "503 Service Unavailable", "Error: upstream timed out", "[ERROR] timed out",
        "RateLimitError: too many requests", "An error occurred while processing", "Request timed out.",
        "Traceback (most recent call last):", '{"caption": "A woman in a red coat."}', '["cat", "dog"]',
        "<!DOCTYPE html><html><body>Hi</body></html>",
    )],
]  # fmt: skip


@pytest.mark.parametrize(("reason", "answer"), NONE)
def test_what_is_no_caption_is_a_named_failure(reason: str, answer: dict[str, Any]) -> None:
    assert judged(**answer) == f"<{reason}>"


def test_of_an_answer_that_met_the_limit_the_whole_sentences_are_kept() -> None:
    assert judged("A cat. A dog on a", "length") == "A cat."
    assert judged("a cat, a dog, a ho", "length", "tags") == "a cat, a dog"


def test_a_finish_reason_that_tells_all_is_read_without_a_message() -> None:
    choice = {"finish_reason": "content_filter: PROHIBITED_CONTENT", "index": 0}
    reply = gc.parse_reply(200, json.dumps({"choices": [choice], "usage": {"prompt_tokens": 1300}}))
    with pytest.raises(gc.FailImage, match="refused: content_filter: PROHIBITED_CONTENT"):
        gc.judge_reply(reply)


def test_who_only_thinks_is_told_what_helps() -> None:
    with pytest.raises(
        gc.FailImage, match=r"GETCAP_REASONING_EFFORT.*GETCAP_EXTRA_BODY.*enable_thinking"
    ):
        gc.judge_reply(gc.Reply(content="", has_reasoning=True))


HUGE = [
    "A long sentence about a cat. " * 4000, "caption: " * 10_000, '"' * 50_000, "a" + "\n" * 80_000 + "b",
    "a" + " " * 80_000 + "b", "*a " * 30_000, "<think>" * 12_000, "“a " * 30_000, "<|x" * 30_000, "``` " * 20_000,
    "ha" * 45_000, "." * 60_000, "I am not " * 10_000, "no image " * 9_000, "' " * 30_000, "the image " * 9_000,
    "[" * 40_000, "<b " * 20_000,
]  # fmt: skip


def test_endless_answers_are_judged_at_once() -> None:
    started = time.process_time()
    for text in HUGE:
        with contextlib.suppress(gc.FailImage):
            judged(text)
        gc.judge_error(gc.parse_reply(502, text))
    assert time.process_time() - started < 2
