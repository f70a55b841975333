"""Request and reply: what is asked, what an error means, what is a caption and what is none."""

from __future__ import annotations

import base64
import contextlib
import json
import time
from datetime import UTC, datetime
from typing import Any

import pytest

import gen_captions as gc

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


def judged(content: str, finish: str = "stop", refusal: str = "", reasoning: bool = False) -> str:
    text: str = gc.judge_reply(gc.Reply(content, finish, refusal, reasoning, gc.Usage()))
    return text


# ------------------------------------------------------------------------------------------------ requests


def test_a_request_is_one_user_message_text_first_then_the_image() -> None:
    image = base64.b64encode(b"\xff\xd8jpeg")
    parameters = {"max_completion_tokens": 300, "reasoning_effort": "none"}
    body = json.loads(gc.build_request("m", "Say IMAGE \u201cna\u00efve\u201d", parameters, 2, image))
    (message,) = body.pop("messages")
    assert body == {"model": "m", "max_completion_tokens": 600, "reasoning_effort": "none"}
    assert message["role"] == "user"
    text, picture = message["content"]
    assert text == {"type": "text", "text": "Say IMAGE \u201cna\u00efve\u201d"}
    assert picture["image_url"]["url"] == "data:image/jpeg;base64," + image.decode()


def rejection(message: str, param: str = "", code: str = "unsupported_parameter", status: int = 400) -> gc.ErrorReply:
    return gc.ErrorReply(status, message, code, param)


SENT = {"max_completion_tokens": 300, "reasoning_effort": "none", "temperature": 0.5}
TOKENS, EFFORT, TEMPERATURE = SENT
ADAPTED = [
    (
        gc.parse_error(
            422,
            '{"detail":[{"type":"extra_forbidden","loc":["body","temperature"],"msg":"Extra inputs are not permitted"}]}',
        ),
        {TOKENS: 300, EFFORT: "none"},
    ),
    (rejection('"mymodel" does not support thinking', code=""), {TOKENS: 300, TEMPERATURE: 0.5}),
    (
        rejection("not supported with this model when reasoning_effort is 'none'", TEMPERATURE),
        {TOKENS: 300, EFFORT: "none"},
    ),
    (
        rejection("Unsupported parameter: 'max_completion_tokens'", TOKENS),
        {"max_tokens": 300, EFFORT: "none", TEMPERATURE: 0.5},
    ),
    (
        rejection(
            "'reasoning_effort' does not support 'none'. Supported values are: 'minimal', 'low'.",
            EFFORT,
            "unsupported_value",
        ),
        {TOKENS: 300, EFFORT: "minimal", TEMPERATURE: 0.5},
    ),
    (rejection("Unrecognized request argument supplied: reasoning_effort", code="x"), {TOKENS: 300, TEMPERATURE: 0.5}),
    (
        rejection("Only the default (1) value is supported", TEMPERATURE, "unsupported_value"),
        {TOKENS: 300, EFFORT: "none"},
    ),
    (rejection("body.temperature: Extra inputs are not permitted", code="", status=422), {TOKENS: 300, EFFORT: "none"}),
    (
        rejection(
            "'max_completion_tokens' is too large: 300. The context length is 4096", code="invalid_request_error"
        ),
        None,
    ),
    (rejection("Unsupported parameter: 'top_p'", "top_p"), None),
    (rejection("max_completion_tokens unsupported", status=500), None),
]


@pytest.mark.parametrize(("error", "expected"), ADAPTED)
def test_a_rejected_parameter_is_changed_or_dropped(error: gc.ErrorReply, expected: dict[str, Any] | None) -> None:
    assert gc.adapt_parameters(SENT, error) == expected


def test_an_effort_that_is_rejected_again_and_again_comes_to_an_end() -> None:
    error = rejection("reasoning_effort is not supported. Supported values are: 'none', 'low', 'high'")
    sent = {"reasoning_effort": "none"}
    efforts = []
    while (changed := gc.adapt_parameters(sent, error)) is not None:
        efforts.append(changed.get("reasoning_effort"))
        sent = changed
    assert efforts == ["low", "high", None]


@pytest.mark.parametrize("content", [5, True, {"a": 1}, ["a cat"], [{"type": "text", "text": 5}], None])
def test_content_of_a_wrong_type_is_no_text(content: Any) -> None:
    assert gc.parse_reply(reply({"content": content})).content == ""


def test_a_reasoning_part_is_no_content() -> None:
    parts = [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "A cat."}]
    assert gc.parse_reply(reply({"content": parts})).content == "A cat."


@pytest.mark.parametrize("text", ["[" * 100_000, '{"error":' * 20_000, '{"error":' * 400 + "1" + "}" * 400])
def test_a_body_nested_too_deep_is_an_error_like_others(text: str) -> None:
    assert isinstance(gc.parse_error(500, text).message, str)


HUGE = [
    "A long sentence about a cat. " * 4000,
    "caption: " * 10_000,
    '"' * 50_000,
    "a" + "\n" * 80_000 + "b",
    "a" + " " * 80_000 + "b",
    "*a " * 30_000,
    "<think>" * 12_000,
    "“a " * 30_000,
    "<|x" * 30_000,
    "``` " * 20_000,
    "ha" * 45_000,
    "." * 60_000,
    "„" * 60_000,
    "‘a’b" * 15_000,
    "' " * 30_000,
    '"' * 40_000,
    "[" * 40_000,
    "<b>" * 20_000,
]


@pytest.mark.parametrize("text", HUGE, ids=range(len(HUGE)))
def test_an_endless_answer_is_judged_at_once(text: str) -> None:
    started = time.process_time()
    with contextlib.suppress(gc.FailImage):
        judged(text)
    gc.parse_error(502, text)
    assert time.process_time() - started < 2


def test_a_token_limit_rejected_under_both_names_is_dropped() -> None:
    sent = gc.adapt_parameters({"max_completion_tokens": 9}, rejection("max_completion_tokens is not supported"))
    assert sent == {"max_tokens": 9}
    assert gc.adapt_parameters(sent, rejection("max_tokens is not supported")) == {}


# -------------------------------------------------------------------------------------------------- errors

SHAPES = [
    ('{"error": {"message": "m", "type": "t", "param": "p", "code": "c"}}', "m", "c t", "p"),
    ('{"error": "just text"}', "just text", "", ""),
    ('[{"error": {"code": 429, "message": "m", "status": "RESOURCE_EXHAUSTED"}}]', "m", "429 RESOURCE_EXHAUSTED", ""),
    ('{"object": "error", "message": "m", "type": "NotFoundError", "code": 404}', "m", "404 NotFoundError", ""),
    ('{"detail": [{"loc": ["body", "model"], "msg": "field required"}]}', "field required", "", "model"),
    ('{"detail": "Not Found"}', "Not Found", "", ""),
    ('{"error": {"message": "Provider error", "code": 400, "metadata": {"raw": "real cause"}}}', "Provider error (real cause)", "400", ""),
    ("<html><head><title>502 Bad Gateway</title></head><body>x</body></html>", "502 Bad Gateway", "", ""),
    ("<h1>Down</h1> for   now", "Down for now", "", ""),
    ("upstream connect error", "upstream connect error", "", ""),
    ('{"error": {"code": "overloaded"}}', "overloaded", "overloaded", ""),
    ("", "an error without a message", "", ""),
    ("null", "an error without a message", "", ""),
    ('{"error": {"message": null, "code": null}}', "an error without a message", "", ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message", "code", "param"), SHAPES)
def test_an_error_text_is_found_in_every_shape(text: str, message: str, code: str, param: str) -> None:
    assert gc.parse_error(400, text) == gc.ErrorReply(400, message, code, param)


STOP, FAIL, AGAIN = gc.StopRun, gc.FailImage, gc.TryAgain
MEANINGS = [
    (400, "unsupported_value", "top_k", STOP, ""),
    (400, "invalid_value", "30001 patches after processing", FAIL, "image too large"),
    (400, "image_parse_error", "You uploaded an unsupported image", FAIL, "HTTP 400"),
    (400, "", "bad request", FAIL, "HTTP 400"),
    (400, "content_policy_violation", "no", FAIL, "refused"),
    (400, "invalid_prompt", "no", FAIL, "refused"),
    (400, "", "foo/bar is not a valid model ID", STOP, ""),
    (400, "", "llava-text is not a multimodal model", STOP, ""),
    (400, "billing_hard_limit_reached", "no", STOP, ""),
    (400, "", "API key not valid. Please pass a valid API key.", STOP, "OPENAI_API_KEY"),
    (400, "", "Incorrect API key provided: xa***", STOP, "OPENAI_API_KEY"),
    (429, "", "Insufficient balance", STOP, "money"),
    (400, "", "Model Not Exist", STOP, "GETCAP_MODEL"),
    (400, "", "Invalid content type. image_url is only supported by certain models.", STOP, "vision model"),
    (307, "", "moved", STOP, "OPENAI_BASE_URL"),
    (401, "invalid_api_key", "no", STOP, "OPENAI_API_KEY"),
    (402, "", "no credits", STOP, "credit"),
    (403, "", "country not supported", STOP, ""),
    (403, "", "Your input was flagged by moderation", FAIL, "refused"),
    (404, "model_not_found", "no", STOP, "GETCAP_MODEL"),
    (404, "", "No endpoints found that support image input", STOP, "vision model"),
    (408, "", "", AGAIN, "HTTP 408"),
    (409, "", "", AGAIN, "HTTP 409"),
    (413, "", "too big", FAIL, "HTTP 413"),
    (422, "", "no", FAIL, "HTTP 422"),
    (429, "rate_limit_exceeded", "slow", AGAIN, "HTTP 429"),
    (429, "RESOURCE_EXHAUSTED", "You exceeded your current quota, please check your billing details", AGAIN, "HTTP 429"),
    (429, "resource_unavailable", "flex", AGAIN, "HTTP 429"),
    (429, "insufficient_quota", "no", STOP, "money"),
    (429, "credit_balance_exhausted", "no", STOP, "money"),
    (429, "project_spend_limit_exceeded", "no", STOP, "money"),
    (429, "organization_usage_limit_exceeded", "no", STOP, "money"),
    (429, "", "exceeds the maximum usage size", FAIL, "image too large"),
    (429, "", "Request too large for gpt", FAIL, "image too large"),
    (500, "", "boom", AGAIN, "HTTP 500"),
    (500, "", "image input is not supported - hint: you may need to provide the mmproj", STOP, "vision model"),
    (502, "", "", AGAIN, "HTTP 502"),
    (503, "", "", AGAIN, "HTTP 503"),
    (504, "", "", AGAIN, "HTTP 504"),
    (524, "", "", AGAIN, "HTTP 524"),
    (0, "", "no answer within 120 s", AGAIN, "no answer"),
    (0, "unreachable", "cannot connect", AGAIN, "no answer"),
    (200, "web_page", "a web page", FAIL, "web page"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "code", "message", "kind", "word"), MEANINGS)
def test_an_error_means_stop_fail_or_again(status: int, code: str, message: str, kind: type, word: str) -> None:
    outcome = gc.judge_error(gc.ErrorReply(status, message, code), NOW, first=False)
    assert type(outcome) is kind
    assert word in str(outcome)
    assert message in str(outcome)


@pytest.mark.parametrize("code", ["unreachable", "web_page"])
def test_what_is_wrong_with_the_address_stops_the_run_when_it_is_the_first_answer(code: str) -> None:
    assert isinstance(gc.judge_error(gc.ErrorReply(0, "x", code), NOW, first=True), gc.StopRun)


def test_a_wait_of_more_than_ten_minutes_stops_the_run_and_says_until_when() -> None:
    assert isinstance(gc.judge_error(gc.ErrorReply(429, "x", "", "", 600), NOW, first=False), gc.TryAgain)
    later = gc.judge_error(gc.ErrorReply(429, "x", "", "", 7200), NOW, first=False)
    assert isinstance(later, gc.StopRun)
    assert f"{NOW.replace(hour=14).astimezone():%d %B %H:%M}" in str(later)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after": "Mon, 23 Nov 2026 12:01:30 GMT"}, 90),
        ({"retry-after": "Mon, 23 Nov 2026 11:00:00 GMT"}, 0),
        ({"retry-after": "soon"}, 0),
        ({"retry-after": "-5"}, 0),
        ({"retry-after": "nan"}, 0),
        ({"retry-after": "99999999999999"}, 30 * 86_400),
        ({"retry-after": "1e308"}, 30 * 86_400),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, 30 * 86_400),
    ],
)
def test_retry_after_is_read_in_every_form(headers: dict[str, str], seconds: float) -> None:
    assert gc.parse_retry_after(headers, NOW) == seconds


@pytest.mark.parametrize(
    ("attempt", "factor", "asked", "jitter", "expected"),
    [
        (1, 2, 0, 1, 2),
        (3, 2, 0, 1, 8),
        (3, 2, 0, 0, 4),
        (10, 2, 0, 1, 60),
        (100, 60, 0, 1, 60),
        (1, 2, 30, 0, 30),
        (1, 2, 300, 1, 301),
        (5, 2, 1, 1, 32),
    ],
)
def test_waits_grow_to_a_minute_unless_the_server_asks_for_more(
    attempt: int, factor: float, asked: float, jitter: float, expected: float
) -> None:
    assert gc.backoff_s(attempt, factor, asked, jitter) == expected


# ------------------------------------------------------------------------------------------------- replies


def reply(message: dict[str, Any], **choice: Any) -> str:
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop", **choice}], "usage": None})


def test_an_answer_is_read_with_its_tokens() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "completion_tokens_details": {"reasoning_tokens": 2}}
    text = json.dumps({"choices": [{"message": {"content": "A cat."}, "finish_reason": "stop"}], "usage": usage})
    assert gc.parse_reply(text) == gc.Reply("A cat.", "stop", "", True, gc.Usage(5, 3))


@pytest.mark.parametrize("parts", [[{"type": "text", "text": "A "}, {"type": "text", "text": "cat."}]])
def test_an_answer_in_parts_is_joined(parts: list[dict[str, str]]) -> None:
    answer = gc.parse_reply(reply({"content": parts}, finish_reason=None))
    assert (answer.content, answer.finish_reason) == ("A cat.", "")


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"choices": [', "null", "[]", '"text"', "{}", '{"choices": []}', '{"choices": [{}]}', '{"choices": [null]}', '{"choices": null}'],
)  # fmt: skip
def test_an_answer_that_is_cut_or_has_no_choices_is_asked_again(text: str) -> None:
    answer = gc.parse_reply(text)
    assert answer.code == gc.BROKEN
    assert isinstance(gc.judge_error(answer, NOW, first=False), gc.TryAgain)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ('{"error": {"message": "m", "code": 502}}', 502),
        ('{"error": {"message": "m", "code": 401}}', 401),
        ('{"error": "m"}', 500),
        ('[{"error": {"message": "m", "code": 429}}]', 429),
        ('{"error": {"message": "m", "code": "server_error"}, "choices": null}', 500),
        ('{"choices": [{"error": {"message": "m", "code": 502}, "message": {"content": "half"}}]}', 502),
    ],
)
def test_an_error_under_http_200_keeps_its_own_status(text: str, status: int) -> None:
    answer = gc.parse_reply(text)
    assert isinstance(answer, gc.ErrorReply)
    assert (answer.status, answer.message) == (status, "m")


@pytest.mark.parametrize("text", ["<!DOCTYPE html><title>Hi</title>", "\n<html>", "<?xml version='1.0'?>"])
def test_a_web_page_is_an_error(text: str) -> None:
    answer = gc.parse_reply(text)
    assert isinstance(answer, gc.ErrorReply)
    assert answer.code == "web_page"


# ------------------------------------------------------------------------------------------------ the gate

A = "A woman in a red coat stands at a bus stop."
HONEST = [
    A,
    'A shop window with a sign that reads "SORRY, WE\'RE CLOSED" above a brown door.',
    '"I\'m sorry" is written in icing on a round cake.',
    '"OPEN" glows in red neon beside a door marked "EXIT"',
    "Sorry! board game box on a wooden table, its lid half open.",
    "A greeting card on a desk says I can't wait to see you.",
    "A t-shirt with the text 5 * 3 = 15 and a star * below it.",
    'A poster that reads "*SALE*" in yellow letters.',
    'A cap with the slogan "F**K IT" and "S**T" in white.',
    "A terminal window with snake_case names and __init__.py in a file list.",
    "Error message on a blue laptop screen, photographed from above.",
    "Error 404 page on a monitor.",
    "Caption contest winner holding a trophy.",
    "Description of a plant on a museum label, close-up.",
    "'Tis the season, written on a mug.",
    "Here is where the road ends: a gravel turnaround by a lake.",
    "A chalkboard that lists 1. soup 2. bread 3. pie.",
    "3. Bezirk street sign in Vienna.",
    "1 red apple, 2 green apples, 1 red apple on a white plate.",
    "A crowd of people, people on balconies, people in windows.",
    "ha ha ha written in a speech bubble.",
    "Ein Mann kann nicht schwimmen, steht auf einem Schild.",
    "一只黑猫坐在窗台上，窗外下着雨。",
    "Please do not feed the ducks, says a sign by the pond.",
    "No image of the king hangs on the bare wall.",
    "It looks like a painted backdrop, with a man seated before it.",
    "A cat <3 a dog, drawn in chalk.",
    "An ai-generated looking robot portrait.",
    "As an airplane lands, two men watch from a fence.",
    "Unfortunately placed sign in front of a statue.",
    "We can see a bridge over a river.",
    "I ♥ NY printed on a white shirt.",
    "Http spelled out in balloon letters.",
    'This is a meme with the caption: "hello world" above a cat.',
    "This is a terminal with a green prompt: a black window with white text.",
    'A poster reading "Come in, feel free to look around" hangs on a door.',
    'A T-shirt that reads "<think> different" worn by a boy.',
    '"def __init__(self)" in white on a black screen',
    '"50% *OFF* TODAY" in a shop window',
    "'50s diner with a neon sign reading 'EAT'",
    "I Can't Believe It's Not Butter tub on a table.",
    "I'm sorry tattoo on an arm.",
    "Please Share the Road sign beside a highway.",
    "HTTP 404 page on a laptop screen.",
    'A blackboard filled with "I will not talk in class. I will not talk in class. I will not talk in class. I will not."',
    "[Analysis] tab highlighted in a spreadsheet window, screenshot.",
    'A T-shirt that says "</think> outside the box" on a mannequin.',
    "The image of a saint on a church wall.",
    "My cat sits on a mat.",
    'A speech bubble with "' + "ha" * 12 + '".',
    "I can't believe it's not butter, a yellow tub on a table.",
    "We cannot see the face of the man, who turns to the wall.",
    "Please share the road, a yellow sign by a bicycle lane.",
    "As an AI, the robot in the poster wears a suit.",
    "Мне жаль тебя, книга на столе.",
    "Ich kann dich heute nicht sehen, Graffiti an einer Wand.",
    "Désolée, une jeune fille regarde par la fenêtre.",
    "Ledsen, en pojke sitter på en bänk.",
    "미안해 라고 적힌 쪽지가 책상 위에 있다.",
    "عذراء مع طفل في لوحة قديمة.",
    "Terror: a horror film poster with a red hand.",
    "<body> printed on a black T-shirt.",
    "Let me think, says the thought bubble above a boy.",
    "A happy girl (*^_^*) drawn in ink.",
    "A blackboard with 「私は*できません*」 in chalk.",
    'An email screenshot that reads "Hi team. Let me know if you have questions. Thanks, Bob" in a plain font.',
    'A sign says "Questions? Feel free to ask!" at a counter.',
    "A poster: 'Welcome! Feel free to ask our staff.' above a desk.",
    "A chat in which Tom answers 'Sure, I'll take a look. Let me know if there's a deadline.'",
    "A slide with the tag </s> on it.",
    'A 12" screen with the text "Wait! I\'m sorry, I was late." on a desk.',
    "A meme with the caption 'Come to the party? Sorry, I have a cat.' over a photo of a tabby.",
    "A note on a door: ‘Back in 5 minutes. Sorry, I had to run.’",
    "말로 설명할 수 없을 만큼 아름다운 노을이 바다 위로 펼쳐져 있다.",
    "无法识别的文字写在一面斑驳的墙上，旁边停着一辆自行车。",
    "作为装饰的汽车模型摆放在书架上，旁边有几本书。",
    "Je ne suis pas un robot : une case à cocher sur un écran d'ordinateur.",
    "对不起三个字写在沙滩上，海浪拍打着岸边。",
    "ごめんなさいと書かれた手紙が机の上に置かれている。",
    "죄송합니다라고 적힌 안내문이 문에 붙어 있다.",
    "No puedo vivir sin café, frase impresa en una taza blanca.",
    "Извините за неудобства — табличка на двери магазина.",
    "Lorem ipsum placeholder text on a business card mockup.",
    "502 Bad Gateway page in a browser window, black text on white.",
    "Internal server error page on a monitor, next to a coffee cup.",
    "TypeError: undefined is not a function, printed on a black T-shirt.",
    '{"name": "demo"} in white monospace on a black background.',
    "I'm sorry for your loss, a sympathy card with white lilies.",
    "Let's keep our city clean, reads a banner across the street.",
    "Please share photos with #ourwedding, a chalkboard sign on an easel.",
    "No image found, a grey placeholder tile in an online shop.",
    "Request denied stamp in red ink on a paper form.",
    "Not able to swim, the kitten clings to a log.",
    "It seems that the image is nearly symmetrical, two swans facing each other.",
    "Let's see some ID, says a bouncer in a comic panel.",
    "OK, so the user manual is upside down on the table.",
    "A slide that explains the HTML tags <b>, <i> and <u> in large type.",
    "A search field containing *.py/*.js in a code editor.",
    "A folder window with the address D:\\N64\\roms and D:\\nes.",
    "A form with a line for the signature: ________________________________",
    "여성이 뒤돌아 서 있어 얼굴은 볼 수 없습니다. 배경은 바다입니다.",
    "女性の表情は後ろ姿のため説明できません。",
    "The image contains explicit lyrics sticker on a record.",
    "Network error icon, a broken wifi symbol in grey on white.",
    "404 Not Found illustration with a lost astronaut.",
    "The task is shown step by step on a board.",
    "A poster. (12 words are legible.) The rest is blurred.",
    "A clipboard with a form. Word count: 120 is written on it.",
    "A sticker. Feel free to ask! is printed on the mug.",
    "Absolutely! Vodka bottle on ice.",
]  # fmt: skip


@pytest.mark.parametrize("text", HONEST)
def test_an_honest_caption_is_left_alone(text: str) -> None:
    assert judged(text) == text


CLEANED = [
    (f"  {A}\n", A),
    (f'"{A}"', A),
    (f"“{A}”", A),
    (f"'{A}'", A),
    ("'A man's hat on a peg.'", "A man's hat on a peg."),
    ('"A sign reads "OPEN" on a door"', 'A sign reads "OPEN" on a door'),
    (f"```\n{A}\n```", A),
    (f"```text\n{A}\n```", A),
    (f"`{A}`", A),
    (f"Here is a caption: {A}", A),
    (f"Here's a detailed caption for the image:\n\n{A}", A),
    (f"Sure! Here is the caption you asked for:\n{A}", A),
    (f"Caption: {A}", A),
    (f"**Caption:** {A}", A),
    (f'Caption: "{A}"', A),
    (f"## Caption\n{A}", A),
    (f"Image description: {A}", A),
    ("A **red** car beside a *blue* house.", "A red car beside a blue house."),
    ("# A red car\n\nbeside a house", "A red car beside a house"),
    ("- a red car\n- a blue house", "a red car a blue house"),
    ("A red car.\n\nA blue house.\u2028A tree.", "A red car. A blue house. A tree."),
    ("A red car.\r\n\tA house.", "A red car. A house."),
    ('A poster.\nIt reads *SALE* and "*NOW*".', 'A poster. It reads SALE and "*NOW*".'),
    (f"analysisWe need to caption the image.assistantfinal{A}", A),
    (f"<|begin_of_thought|>hm the user<|end_of_thought|>{A}", A),
    (f"{A}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{A}", A),
    (f"<|im_start|>assistant\n{A}<end_of_turn>", A),
    (f"<answer>{A}</answer>", A),
    (f"[THINK]Let me see.[/THINK]{A}", A),
    (f"<|channel|>analysis<|message|>The user wants<|end|><|start|>assistant<|channel|>final<|message|>{A}", A),
    (f"<|START_THINKING|>hm<|END_THINKING|>{A}", A),
    (f"<seed:think>hm</seed:think>{A}", A),
    (f"Thinking...\nIt is a photo.\n...done thinking.\n\n{A}", A),
    (f"<think>The user wants a caption.</think>\n\n{A}", A),
    (f"<thinking>one</thinking><think>two</think>{A}", A),
    (f"I should describe this.\n</think>\n\n{A}", A),
    (f"</think>{A}", A),
    (f"\n</think>\n\n{A}", A),
    (f"The user wants a caption.</think>\n\n{A}", A),
    (f"<think>{'hm ' * 2000}</think>{A}", A),
    (f"◁think▷hm◁/think▷{A}", A),
    (f"<|begin_of_box|>{A}<|end_of_box|>", A),
    (f"{A}<|im_end|>", A),
    (f"{A}</s>", A),
    (f"{A}</s></s>", A),
    (f"{A}</s><|im_end|>", A),
    (f"{A}</s> User: what else? Assistant: a dog.", A),
    (f"<|im_start|>assistant\n<s> {A}", A),
    (f"\ufeff{A}\x00", A),
    ("A caf\u00e9 sign \ud83d here.", "A café sign here."),
    (f"{A}\n\nLet me know if you would like changes!", A),
    (f"{A} Let me know if you need anything else!", A),
    (f"{A} I hope this helps!", A),
    (f"{A} Would you like me to change anything?", A),
    (f"Sure! {A}", A),
    (f"Answer: {A}", A),
    (f"Detailed description: {A}", A),
    (f"Caption 1: {A}", A),
    (f"<output>{A}</output>", A),
    ("A &quot;red&quot; car &amp; a house.", 'A "red" car & a house.'),
    (f"{A} (Word count: 10)", A),
    ("__A red car__ beside a house.", "A red car beside a house."),
    (f"![photo](https://example.org/a.png) {A}", f"photo {A}"),
    (f"[{A}](https://example.org)", A),
    (f"<p>{A}</p>", A),
    (f"<caption>{A}</caption>", A),
    ("A red car.<br>A house.", "A red car. A house."),
    ("A red car.\\nA house.", "A red car. A house."),
    ("A red\u00ad car\u202e on a road.", "A red car on a road."),
]


@pytest.mark.parametrize(("answer", "caption"), CLEANED)
def test_what_is_around_a_caption_is_taken_off(answer: str, caption: str) -> None:
    assert judged(answer) == caption


@pytest.mark.parametrize(("answer", "caption"), CLEANED)
def test_cleaning_twice_is_cleaning_once(answer: str, caption: str) -> None:
    assert gc.clean_caption(caption) == caption
    assert gc.clean_caption(gc.clean_caption(answer)) == caption


REFUSED = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, I can’t assist with this request.",
    "I am very sorry, this is not possible.",
    "Sorry, I can't describe this image.",
    "Sorry, but I cannot assist.",
    "I can't help with that.",
    "I cannot identify people in images.",
    "I can not do that.",
    "I'm unable to help with this image.",
    "I'm not able to describe this.",
    "I won't describe this.",
    "Unfortunately, I can't view images.",
    "Unfortunately I am unable to process it.",
    "I apologize, but I cannot.",
    "My apologies, this is beyond me.",
    "As an AI language model, I cannot see.",
    "As a language model I do not see.",
    "I don't see an image.",
    "Please provide the image you'd like me to caption.",
    "No image was provided.",
    "It seems that no image was attached.",
    "It looks like the image wasn't uploaded.",
    "\"I'm sorry, but I can't help with that.\"",
    "Es tut mir leid, aber dabei kann ich nicht helfen.",
    "Ich kann dieses Bild leider nicht beschreiben.",
    "Je suis désolé, mais je ne peux pas vous aider.",
    "Désolé, je ne peux pas.",
    "Lo siento, no puedo ayudar con eso.",
    "No puedo describir esta imagen.",
    "Sinto muito, mas não posso ajudar.",
    "Desculpe, não posso ajudar com isso.",
    "Mi dispiace, non posso aiutarti.",
    "Het spijt me, daar kan ik niet mee helpen.",
    "Przykro mi, nie mogę pomóc.",
    "Üzgünüm, bu konuda yardımcı olamam.",
    "As a large language model, I can't see.",
    "I must respectfully decline.",
    "Unable to process the image.",
    "Your request was rejected as a result of our safety system.",
    "There is no image attached.",
    "I'm not going to describe this image.",
    "Thank you for sharing, but I can't help.",
    "作为一个AI语言模型，我无法查看图片。",
    "无法识别该图片。",
    "Mi scuso, ma non posso.",
    "\u200bI'm sorry, I can't.",
    "Sorry, but I'm unable to provide that.",
    "Unfortunately, I'm not able to help with this image.",
    "Sorry.",
    "I appreciate you sharing this, but I can't describe it.",
    "I'm just a language model and can't help you with that.",
    "I'd be happy to caption the image, but no image was attached.",
    "You haven't provided an image.",
    "Could you please upload the image you'd like me to caption?",
    "There doesn't appear to be an image attached to your message.",
    "The image could not be loaded.",
    "No image detected.",
    "I have to decline this request.",
    "This content may violate our usage policies.",
    "My guidelines prevent me from describing this.",
    "As a vision model, I cannot identify people.",
    "Hello! How can I help you today?",
    "عذرًا، لا يمكنني المساعدة في ذلك.",
    "क्षमा करें, मैं इसमें मदद नहीं कर सकता।",
    "Xin lỗi, tôi không thể giúp việc này.",
    "Maaf, saya tidak bisa membantu.",
    "ขออภัย ฉันช่วยเรื่องนี้ไม่ได้",
    "Omlouvám se, s tím nemohu pomoci.",
    "Tyvärr kan jag inte hjälpa till med det.",
    "Извините, я не могу помочь с этим.",
    "К сожалению, я не могу описать это изображение.",
    "很抱歉，我无法协助处理此请求。",
    "抱歉，我不能描述这张图片。",
    "我无法识别图中的人物。",
    "申し訳ありませんが、お手伝いできません。",
    "すみませんが、対応できません。",
    "죄송하지만 도와드릴 수 없습니다.",
    "<think>This is not allowed.</think>I'm sorry, but I can't help with that.",
    "I am programmed to be a harmless assistant, so no.",
    "Sorry, this image cannot be described.",
    "I regret that I am unable to do this.",
    "I must refuse to caption this.",
    "This request cannot be completed due to content policy.",
    "Content policy violation.",
    "Request blocked by safety filter.",
    "Not able to comply with this.",
    "I'd rather not describe this picture.",
    "Let's keep our conversation respectful.",
    "It is against my guidelines to describe this.",
    "Identifying people in photographs isn't something I can do.",
    "[Content removed]",
    "Cannot describe this image.",
    "We can't help with that.",
    "A man in a suit. I'm sorry, I can't identify who he is.",
    "A man in a suit stands in a park. However, I cannot identify him.",
    "No es posible describir esta imagen.",
    "Não consigo descrever esta imagem.",
    "Non sono in grado di descrivere l'immagine.",
    "Je regrette, je ne peux pas décrire cette image.",
    "作为AI，我无法描述。",
    "While I can't identify the person, I can describe: a man in a suit.",
    "For safety reasons, I cannot describe this image.",
    "I currently cannot view images.",
    "As an artificial intelligence, I can't see.",
    "I'd prefer not to describe this image.",
    "I have to respectfully decline.",
    "Hmm, I don't see any image here.",
    "Hello! It looks like the image wasn't attached.",
    "There seems to be no image attached.",
    "Can you please upload the image?",
    "Image not found.",
    "Das kann ich leider nicht tun.",
    "Als KI-Modell kann ich keine Bilder sehen.",
    "En tant qu'IA, je ne peux pas le faire.",
    "Como modelo de lenguaje, no puedo verla.",
    "Desculpa, mas não posso.",
    "Mi spiace, ma non posso.",
    "Nie jestem w stanie opisać tego obrazu.",
    "Не могу описать изображение.",
    "很遗憾，我无法描述。",
    "请上传图片。",
    "이미지를 볼 수 없습니다.",
    "للأسف، لا يمكنني وصف هذه الصورة.",
    "Beklager, jeg kan ikke hjelpe.",
    "Rất tiếc, tôi không thể giúp.",
    "この画像については対応できません。",
    "이 이미지를 설명할 수 없습니다.",
]


@pytest.mark.parametrize("answer", REFUSED)
def test_a_refusal_is_no_caption(answer: str) -> None:
    with pytest.raises(gc.FailImage) as failure:
        judged(answer)
    assert failure.value.reason == "refused"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"content": "", "refusal": "I cannot."}, "refused"),
        ({"content": "A cat", "finish": "content_filter"}, "refused"),
        ({"content": ""}, "empty"),
        ({"content": " \n "}, "empty"),
        ({"content": "..."}, "empty"),
        ({"content": "", "reasoning": True}, "reasoning only"),
        ({"content": "<think>Let me look at"}, "reasoning only"),
        ({"content": "<think>all of it</think>"}, "reasoning only"),
        ({"content": "A cat sits on", "finish": "length"}, "cut off"),
        ({"content": "", "finish": "length", "reasoning": True}, "cut off"),
        ({"content": "A red car on a road, " + "a red car, " * 40}, "looping"),
        ({"content": "A cat. " + "It sits on a mat near the door. " * 3}, "looping"),
        ({"content": "red " * 30, "finish": "length"}, "looping"),
        ({"content": "A hall. " + "the light, the floor, " * 50 + "the li", "finish": "length"}, "cut off"),
        *[
            ({"content": "A red square on a", "finish": end}, "cut off")
            for end in ("max_tokens", "MAX_TOKENS", "model_length")
        ],
        *[({"content": "A red square", "finish": end}, "broken answer") for end in ("error", "abort", "timeout")],
        *[({"content": "A red", "finish": end}, "refused") for end in ("SAFETY", "content_filter: PROHIBITED_CONTENT")],
        *[
            ({"content": text}, "reasoning only")
            for text in (
                "<|channel|>analysis<|message|>The user wants",
                "Thinking Process:\n\n1. **Analyze the Request:** caption",
                "The user wants a caption for an image. I need to",
                "Okay, let's see. The user wants me to",
                "We need to write a caption. First",
                "Okay, so I need to describe this image. There is a man.",
                "First, I need to look at the image.",
                "Hmm, the user wants a caption.",
                "Let's tackle this. The image",
                "So the task is to describe a man.",
                "I should describe the man first.",
                "The user has provided an image.",
                "My task is to caption the image.",
                "Let's look at the image.",
                "I'll start by looking at the image.",
                "A man in a park.</think>",
            )
        ],
        ({"content": "非常" * 100}, "looping"),
        ({"content": "ha" * 400}, "looping"),
        ({"content": "A long walk through a town with many houses. " * 9000 + "The end"}, "looping"),
        *[
            ({"content": text}, "error text")
            for text in (
                "Internal Server Error",
                "CUDA error: out of memory",
                "Error processing image.",
                "Failed to load image",
                "Request timed out.",
                "Oops! Something went wrong. Please try again later.",
                "503 Service Unavailable",
                "Rate limit exceeded, try later",
                "[ERROR] upstream timed out",
                "⚠️ Error: timeout",
                "An error occurred while processing",
                '{"detail":"Not Found"}',
                "<!-- x --><html>",
                "<title>502",
                "<center><h1>502 Bad Gateway",
                "<?xml version='1.0'?>",
                "API rate limit exceeded",
                "CUDA out of memory.",
                "ConnectionError('refused')",
                "<class 'str'>",
                "Unable to load model",
                "Request failed with status code 429",
                "Quota exceeded for this key",
                "Lorem ipsum dolor sit amet",
                "404 Not Found",
                '{"caption": "A woman in a red coat on a wall."}',
                '["cat", "dog"]',
                '"caption": "A woman in a red coat."',
                "Error: invalid value in a request",
                "Invalid API key",
                "There was an error generating a response",
                "The model is currently overloaded.",
                "'NoneType' object has no attribute 'text'",
            )
        ],
        *[
            ({"content": text}, "empty")
            for text in ("null", "None", "N/A", "nan", "TODO", "[caption here]", "No description available.")
        ],
        ({"content": "Error: rate limit exceeded"}, "error text"),
        ({"content": "RateLimitError: too many requests"}, "error text"),
        ({"content": '{"error": {"message": "no"}}'}, "error text"),
        ({"content": "HTTP 500 Internal Server Error"}, "error text"),
        ({"content": "Traceback (most recent call last):"}, "error text"),
        ({"content": "<!DOCTYPE html><html><body>Hi</body></html>"}, "error text"),
    ],
)
def test_what_is_no_caption_is_a_named_failure(answer: dict[str, Any], reason: str) -> None:
    with pytest.raises(gc.FailImage) as failure:
        judged(**answer)
    assert failure.value.reason == reason
