"""Money: what a run is said to cost, what it did cost, and the budget that nothing passes."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import signal
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import gen_captions as gc
from conftest import KEY, ImageMaker, Server, Tool, captions

OPENAI = gc.Settings(model="gpt-6-luna")
PRICED = ("--price", "0.10", "0.50")
EACH = Decimal("0.00013")  # of the stand-in's 1,200 tokens in and 20 out at that price
TOKENS = [  # model, size, tokens by the family's rule or by what was billed
    ("gpt-6-luna", (512, 512), 308),
    ("gpt-6-luna", (768, 768), 692),
    ("gpt-6-luna", (1024, 1024), 1229),
    ("gpt-6-luna", (1536, 1536), 2765),
    ("gpt-6-luna", (4032, 3024), 14_364),
    ("gpt-6.1-sol", (6000, 4000), 28_200),
    ("gpt-5.6-luna", (1024, 768), 922),
    ("openai/gpt-5.6-luna", (1024, 768), 922),
    ("gpt-5.4", (4000, 3000), 2942),  # box of 2048, then 2,500 patches
    ("gpt-5-mini", (1800, 2400), 1743),  # 1,452 patches
    ("gpt-4.1-mini", (1800, 2400), 2353),
    ("gpt-4o-mini", (1024, 1024), 25_501),
    ("gpt-4o-mini-2024-07-18", (1024, 1024), 25_501),
    ("gpt-4o", (1024, 1024), 765),
    ("ft:gpt-4o-mini:mine", (1024, 1024), 25_501),
    ("chatgpt-4o-latest", (1024, 1024), 765),
    ("gpt-4o", (2048, 4096), 1105),
    ("gpt-4.1", (100, 100), 255),
    ("gpt-5", (1024, 1024), 630),
    ("o3", (512, 512), 225),
    ("qwen2.5-vl", (1008, 756), 972),
    ("gpt-6-luna", (1, 1), 2),
]


@pytest.mark.parametrize(("model", "size", "tokens"), TOKENS)
def test_an_image_takes_the_tokens_of_its_models_family(model: str, size: tuple[int, int], tokens: int) -> None:
    assert gc.image_tokens(model, size) == tokens
    assert gc.image_tokens(model, size[::-1]) == tokens


def test_prices_are_known_and_flex_and_batch_are_half() -> None:
    price = gc.find_price(OPENAI)
    usage = gc.Usage(1_229_000 // 10, 10_000)
    assert [price(usage, tier) for tier in ("default", "flex", "batch")] == [
        Decimal("0.01729"),
        Decimal("0.008645"),
        Decimal("0.008645"),
    ]


def test_a_model_without_flex_costs_the_whole() -> None:
    price = gc.find_price(gc.Settings(model="gpt-4o-mini"))
    assert price(gc.Usage(1000, 0), "flex") == price(gc.Usage(1000, 0), "default") > 0


def test_cached_tokens_are_cheaper_and_cache_writes_dearer() -> None:
    price = gc.find_price(OPENAI)
    plain, read, write = (
        price(gc.Usage(1000, 0, cached, writes), "default") for cached, writes in ((0, 0), (1000, 0), (0, 1000))
    )
    assert (read, write) == (plain / 10, plain * Decimal("1.25"))


@pytest.mark.parametrize(
    ("model", "url"),
    [
        ("gpt-4o-mini", "https://openrouter.ai/api/v1"),  # there it is called openai/gpt-4o-mini
        ("qwen3-vl", "http://localhost:11434/v1"),
        ("no-such-model", gc.OPENAI_URL),
        ("gpt-6-luna", "https://captions.example/v1"),
    ],
)
def test_an_unknown_price_is_unknown_and_not_zero(model: str, url: str) -> None:
    assert gc.find_price(gc.Settings(model=model, base_url=url)) is None


def test_many_small_requests_never_reach_the_price_of_a_long_one() -> None:
    bill = gc.Bill(gc.find_price(OPENAI))
    for _ in range(400):
        bill.settle(bill.hold(gc.Usage()), reply(1200, 100))
    assert bill.spent == 400 * (Decimal("0.00012") + Decimal("0.00005"))


def reply(prompt: int, answer: int, tier: str = "") -> gc.Reply:
    return gc.Reply("A cat.", "stop", "", has_reasoning=False, usage=gc.Usage(prompt, answer), tier=tier)


def own_price(usage: gc.Usage, _tier: str) -> Decimal:
    return Decimal(usage.prompt + usage.answer) / 1000


@pytest.mark.parametrize(
    ("answer", "spent", "held"),
    [
        (reply(900, 100), 1, 0),
        (reply(0, 0), 0, 5),  # a server that does not count: the worst stays
        (None, 0, 5),  # torn on its way
        (gc.ErrorReply(0, "no answer within 120 s"), 0, 5),
        (gc.ErrorReply(0, "cannot connect", "unreachable"), 0, 0),
        (gc.ErrorReply(429, "slow down"), 0, 0),
        (gc.ErrorReply(500, "oops"), 0, 0),
        (gc.ErrorReply(504, "the gateway gave up"), 0, 5),  # what stands behind it may not have
        (gc.ErrorReply(500, "late", usage=gc.Usage(900, 100)), 1, 0),  # HTTP 200, an error inside, and counted
        (gc.Reply("A cat.", "stop", "", False, gc.read_usage({"prompt_tokens": 900, "completion_tokens": "x"})), 0, 5),
        (gc.Reply("A cat.", "stop", "", False, gc.read_usage({"completion_tokens": 9000})), 0, 9),  # more than was held
    ],
)
def test_what_comes_back_is_counted_for_what_it_may_have_cost(answer: Any, spent: int, held: int) -> None:
    bill = gc.Bill(own_price, Decimal(100))
    assert bill.hold(gc.Usage(2000, 1000)) == 5  # twice the prompt, and the longest answer
    bill.settle(5, answer)
    assert (bill.spent, bill.held) == (spent, held)


COUNTS = [
    (1200, 1200), (1200.0, 1200), ("1200", 1200), (0, 0), (None, None), (-5, None), ("many", None), (10**9, None),
    (float("nan"), None), ([1], None),
]  # fmt: skip


@pytest.mark.parametrize(("count", "number"), COUNTS)
def test_a_count_is_read_in_whichever_type_it_comes(count: Any, number: int | None) -> None:
    assert gc.read_count(count) == number


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 1200, "completion_tokens": None}, {"completion_tokens": 20}])
@pytest.mark.usefixtures("images")
def test_what_is_not_counted_is_never_free(tool: Tool, server: Server, usage: Any) -> None:
    server.script(then={"usage": usage})
    err = tool("--image-dir", "images", *PRICED, "--max-cost", "0.0009", "--report", "r.jsonl", code=3).stderr
    assert server.stats()["requests"] < 4
    assert "$0.0000" not in err
    summary = json.loads((tool.folder / "r.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert 0 < summary["usd_at_most"] <= 0.0009


@pytest.mark.usefixtures("images")
def test_a_server_without_any_limit_for_answers_ends_a_run_with_a_budget(tool: Tool, server: Server) -> None:
    rejects = {
        name: {"error": {"message": f"Unknown parameter: '{name}'", "param": name, "code": "unknown_parameter"}}
        for name in ("max_completion_tokens", "max_tokens")
    }
    server.script(rejects=rejects)
    assert "--max-cost cannot be kept" in tool("--image-dir", "images", *PRICED, "--max-cost", "1", code=3).stderr
    assert captions(tool.folder) == {}


def test_what_is_on_its_way_counts_as_spent_and_is_waited_for() -> None:
    bill = gc.Bill(own_price, Decimal(7))
    most = gc.Usage(1000, 1000)
    held = bill.hold(most)
    assert bill.wait_s(most) == 0.0 or bill.held + 3 <= 7
    bill.hold(most)
    assert bill.wait_s(most) > 0
    bill.settle(held, reply(1000, 500))
    assert bill.wait_s(most) > 0
    bill.settle(held, reply(1000, 500))
    assert bill.wait_s(most) == 0.0
    for _ in range(2):
        bill.settle(bill.hold(most), reply(1000, 500))
    with pytest.raises(gc.StopRun, match=r"--max-cost \$7\.0000: \$6\.0000 are spent"):
        bill.wait_s(most)


@pytest.fixture
def images(make_image: ImageMaker) -> None:
    for number in range(4):
        make_image(f"{number}.jpg", size=(800, 600))


@pytest.mark.usefixtures("images")
def test_dry_run_says_what_it_would_cost_without_key_or_connection(tool: Tool) -> None:
    out = tool("-n", "--image-dir", "images", OPENAI_API_KEY="", OPENAI_BASE_URL=gc.OPENAI_URL).stdout
    last = out.splitlines()[-1]
    # 25 x 19 patches, 1.2 tokens each
    assert last.startswith("To ask gpt-6-luna for 4: about 2,280 tokens of images, 7")
    assert "of prompts, 468 of answers; about $0.0005, flex $0.0003, batch $0.0003" in last


@pytest.mark.usefixtures("images")
def test_dry_run_of_an_unknown_price_says_the_tokens_and_how_to_give_one(tool: Tool) -> None:
    last = tool("-n", "--image-dir", "images").stdout.splitlines()[-1]
    assert "tokens of images" in last
    assert "--price IN OUT" in last
    assert "$" not in last


@pytest.mark.usefixtures("images")
def test_dry_run_knows_the_pace_of_the_last_run_and_the_budget(tool: Tool) -> None:
    folder = tool.folder / "images" / ".gen-captions"
    folder.mkdir()
    lines = [
        {"time": f"2026-11-24T10:00:{second:02}+00:00", "caption": "z.txt", "attempts": 1} for second in range(0, 40, 2)
    ]
    before = {"time": "2026-11-23T10:00:00+00:00", "caption": "z.txt", "attempts": 1}
    renewed = [
        {"time": f"2026-11-24T10:00:{second:02}+00:00", "caption": "z.txt", "attempts": 0} for second in range(40)
    ]
    text = "".join(json.dumps(line) + "\n" for line in (before, *lines, *renewed))
    (folder / "journal.jsonl").write_text(text, encoding="utf-8")
    last = tool("-n", "--image-dir", "images", *PRICED, "--max-cost", "0.0001").stdout.splitlines()[-1]
    assert last.endswith(": --max-cost $0.0001 will end it early; about 8 s at 0.5 a second")


@pytest.mark.usefixtures("images")
def test_the_estimate_is_for_images_that_would_be_asked(tool: Tool) -> None:
    (tool.folder / "images" / "0.txt").write_text("mine", encoding="utf-8")
    (tool.folder / "images" / "1.jpg").write_bytes(b"GIF89a, or so it says")
    out = tool("-n", "--image-dir", "images", "--limit", "1", code=1).stdout
    assert "images/1.jpg: not an image" in out.replace("\\", "/")
    assert "To ask gpt-6-luna for 1: " in out


@pytest.mark.usefixtures("images")
def test_the_run_says_what_it_cost_and_how_far_the_estimate_was_off(tool: Tool) -> None:
    done = tool("--image-dir", "images", *PRICED, "--report", "report.jsonl")
    summary = json.loads((tool.folder / "report.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert summary["usd"] == float(4 * EACH)
    more = round(100 * (summary["usd"] / summary["usd_estimated"] - 1))
    assert (
        f"4,800 tokens in, 80 out; $0.0005 ({abs(more)} % {'more' if more > 0 else 'less'} than estimated)"
        in done.stderr
    )
    journal = (tool.folder / "images" / ".gen-captions" / "journal.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["usd"] for line in journal.splitlines()] == [float(EACH)] * 4


@pytest.mark.usefixtures("images")
def test_what_was_paid_for_and_is_no_caption_has_its_line_in_the_journal(tool: Tool, server: Server) -> None:
    server.script(then={"finish_reason": "length"})
    tool("--image-dir", "images", *PRICED, code=1)
    journal = (tool.folder / "images" / ".gen-captions" / "journal.jsonl").read_text(encoding="utf-8")
    entries = [json.loads(line) for line in journal.splitlines()]
    assert [(entry["outcome"], entry["usd"]) for entry in entries] == [("failed", float(2 * EACH))] * 4
    server.script()
    tool("--image-dir", "images")
    assert len(captions(tool.folder / "images")) == 4


@pytest.mark.usefixtures("images")
def test_an_unknown_price_is_not_made_up(tool: Tool) -> None:
    done = tool("--image-dir", "images")
    assert "4,800 tokens in, 80 out; " in done.stderr
    assert "$" not in done.stderr


def test_a_budget_of_a_third_is_never_passed_and_all_that_is_paid_for_is_kept(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(500):
        make_image(f"{number:03}.png", size=(8, 8))
    budget = 500 * EACH / 3
    done = tool("--image-dir", "images", *PRICED, "--max-cost", str(budget), "--thread-pool", "20", code=3)
    answered = server.stats()["requests"]
    assert answered * EACH <= budget
    assert 160 <= answered == len(captions(tool.folder / "images"))
    assert "ERROR   --max-cost $0.0217" in done.stderr
    assert f"left for the next run {500 - answered}" in done.stderr


@pytest.mark.usefixtures("images")
def test_answers_that_are_lost_on_their_way_count_at_their_worst(tool: Tool, server: Server) -> None:
    server.script(then={"fault": "cut"})
    # the longest answer alone is 300 tokens, $0.00015 of the budget for each torn one
    err = tool("--image-dir", "images", *PRICED, "--max-cost", "0.001", "--throttle-retries", "50", code=3).stderr
    assert 1 <= server.stats()["requests"] <= 6
    assert f"with {server.stats()['requests']} answers lost or not counted" in err


@pytest.mark.usefixtures("images")
def test_an_answer_without_choices_is_paid_for_as_it_was_counted(tool: Tool, server: Server) -> None:
    usage = {"prompt_tokens": 1200, "completion_tokens": 3000}
    server.script(steps=[{"body": {"choices": [], "usage": usage}}])
    err = tool("--image-dir", "images", *PRICED).stderr
    assert "broken answer: the answer holds no choices; retry 1 of 10" in err
    assert "6,000 tokens in, 3,080 out" in err
    assert "lost" not in err


ANSWERED = {"prompt_tokens": 1200, "completion_tokens": 20}
PAID_ERRORS = [
    {"status": 500, "body": {"error": {"message": "late"}, "usage": ANSWERED}},
    {"status": 429, "body": {"error": {"message": "late", "usage": ANSWERED}}},
    {"body": {"error": {"message": "late", "code": 500}, "usage": ANSWERED}},
    {"body": {"error": {"message": "late", "code": 500}}},
    {"body": {"error": {"message": "late", "code": 500}, "usage": {"total_tokens": 1220}}},
]


@pytest.mark.parametrize("error", PAID_ERRORS)
@pytest.mark.usefixtures("images")
def test_an_error_that_may_be_billed_counts_against_the_budget(
    tool: Tool, server: Server, error: dict[str, Any]
) -> None:
    server.script(then=error)
    tool("--image-dir", "images", *PRICED, "--max-cost", "0.001", "--throttle-retries", "50", code=3)
    assert server.stats()["requests"] * EACH <= Decimal("0.001")


def test_thoughts_that_only_the_total_shows_are_counted() -> None:
    assert gc.read_usage({**ANSWERED, "total_tokens": 1500}) == gc.Usage(1200, 300)
    assert gc.read_usage({**ANSWERED, "total_tokens": 1220}) == gc.Usage(1200, 20)


def test_the_worst_case_is_that_of_the_dearest_tier_seen() -> None:
    bill = gc.Bill(lambda usage, tier: Decimal(usage.answer * (2 if tier == "priority" else 1)), Decimal(1000))
    most = gc.Usage(100, 100)
    assert bill.hold(most) == 100
    bill.settle(100, gc.Reply("A cat.", "stop", "", has_reasoning=False, usage=most, tier="priority"))
    assert bill.hold(most) == 200


def test_an_absurd_count_does_not_stop_the_pace_for_long() -> None:
    bucket = gc.Bucket()
    room = gc.Limit(200_000, 199_000, 0.3)
    bucket.learn(room, 0, 0, 1)
    taken = bucket.taken
    bucket.take(900_000_000)
    bucket.learn(room, 1, taken, 2)
    assert bucket.wait_s(1000, 2) <= 2 * 200_000 / (1000 / 0.3)


def test_a_small_limit_with_a_short_window_is_used_in_full() -> None:
    bucket = gc.Bucket()
    bucket.learn(gc.Limit(5, 2, 0.6), 0, 0, 0)  # five a second
    bucket.learn(gc.Limit(5, 4, 0.2), 1, bucket.taken, 1)
    bucket.take(4)
    assert bucket.wait_s(1, 1) == pytest.approx(0.3, abs=0.11)


@pytest.mark.usefixtures("images")
def test_an_answer_whose_second_try_the_budget_forbids_has_its_line_in_the_journal(tool: Tool, server: Server) -> None:
    server.script(then={"finish_reason": "length", "usage": {"prompt_tokens": 1200, "completion_tokens": 300}})
    tool("--image-dir", "images", *PRICED, "--max-cost", "0.0004", "--thread-pool", "1", code=3)
    assert server.stats()["requests"] == 1
    [line] = (tool.folder / "images" / ".gen-captions" / "journal.jsonl").read_text().splitlines()
    assert json.loads(line)["outcome"] == "failed"
    assert json.loads(line)["usd"] == pytest.approx(0.00027)


@pytest.mark.usefixtures("images")
def test_a_long_wait_for_a_limit_is_said_once(tool: Tool, server: Server) -> None:
    headers = {
        f"x-ratelimit-{word}-requests": text for word, text in (("limit", "100"), ("remaining", "0"), ("reset", "24h"))
    }
    answer = {"choices": [{"message": {"content": "A red square."}, "finish_reason": "stop"}], "usage": {}}
    server.script(then={"body": answer, "headers": {**headers, "Content-Type": "application/json"}})
    process = tool.start("--image-dir", "images")
    assert process.stderr
    said = next(line for line in process.stderr if "WARNING" in line)
    assert re.search(r"the limits leave no room for about .*; waiting", said)
    process.send_signal(signal.SIGINT)
    assert "leave no room" not in process.communicate(timeout=30)[1]
    assert process.returncode == 130


@pytest.mark.usefixtures("images")
def test_a_budget_without_a_price_is_a_usage_error_before_anything_is_sent(tool: Tool, server: Server) -> None:
    err = tool("--image-dir", "images", "--max-cost", "1", code=2).stderr
    assert "--max-cost: the price of gpt-6-luna at 127.0.0.1" in err
    assert "--price IN OUT" in err
    assert server.stats()["requests"] == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--price", "1", "x"], "two numbers"),
        (["--price", "-1", "2"], "--price"),
        (["--price", "nan", "2"], "two numbers"),
        (["--max-cost", "0"], "dollars, such as 2.50"),
        (["--max-cost", "inf"], "dollars"),
        (["--max-cost", "1e-99999999999999999999"], "dollars"),
        (["--service-tier", "fast"], "one of default, flex"),
    ],
)
def test_amounts_that_are_none_are_named(tool: Tool, flags: list[str], said: str) -> None:
    assert said in tool("--image-dir", "images", *flags, code=2).stderr


def test_a_price_may_stand_in_the_environment() -> None:
    settings = gc.resolve_settings(
        {"verbose": False, "quiet": False}, {"GETCAP_PRICE": " $0.10  0.5 ", "GETCAP_MAX_COST": "$2"}, {}
    )
    assert (settings.price, settings.max_cost) == ((Decimal("0.10"), Decimal("0.5")), Decimal(2))


@pytest.mark.usefixtures("images")
def test_flex_is_asked_for_and_the_summary_counts_what_answers_were_billed_as(tool: Tool, server: Server) -> None:
    err = tool("--image-dir", "images", GETCAP_SERVICE_TIER="flex").stderr
    assert all(body["service_tier"] == "flex" for body in server.stats()["bodies"])
    assert "billed as flex 4" in err
    shutil.rmtree(tool.folder / "images" / ".gen-captions")
    for path in (tool.folder / "images").glob("*.txt"):
        path.unlink()
    server.script(tier="default")
    err = tool("--image-dir", "images", GETCAP_SERVICE_TIER="flex").stderr
    assert "billed as default 4" in err
    assert err.count("flex was asked for, and the server bills answers as default") == 1


def test_flex_waits_longer_unless_told_otherwise() -> None:
    switches = {"verbose": False, "quiet": False}
    flex = {"GETCAP_SERVICE_TIER": "flex"}
    assert gc.resolve_settings(switches, flex, {}).timeout == 900
    assert gc.resolve_settings(switches, {**flex, "GETCAP_TIMEOUT": "60"}, {}).timeout == 60
    assert gc.resolve_settings(switches, {}, {}).timeout == 120


@pytest.mark.usefixtures("images")
def test_a_model_without_flex_ends_the_run_and_is_not_paid_in_full(tool: Tool, server: Server) -> None:
    body = {"error": {"message": "Flex is not available for this model", "param": "service_tier", "code": None}}
    server.script(rejects={"service_tier": body})
    err = tool("--image-dir", "images", GETCAP_SERVICE_TIER="flex", code=3).stderr
    assert "unset GETCAP_SERVICE_TIER" in err
    assert server.stats()["requests"] == 1


@pytest.mark.usefixtures("images")
def test_flex_without_room_waits_and_slows_nobody_down(tool: Tool, server: Server) -> None:
    full = {
        "status": 429,
        "body": {"error": {"message": "no room", "type": "resource_unavailable", "code": "resource_unavailable"}},
    }
    server.script(steps=[{}, full, full])
    err = tool("--image-dir", "images", *PRICED, GETCAP_SERVICE_TIER="flex").stderr
    assert err.count("no room; retry 1 of 10") >= 1
    assert "$0.0005" in err  # four answers, nothing for the two
    assert len(captions(tool.folder / "images")) == 4


CACHES = [
    ("gpt-6-luna", gc.OPENAI_URL, True),
    ("gpt-5.6-luna", gc.OPENAI_URL, True),
    ("gpt-6.1-terra", "https://eu.api.openai.com/v1", True),
    ("gpt-5.5", gc.OPENAI_URL, False),
    ("gpt-5-mini", gc.OPENAI_URL, False),
    ("gpt-4o-mini", gc.OPENAI_URL, False),
    ("gpt-6-luna", "https://openrouter.ai/api/v1", False),
    ("gpt-6-luna", "https://notapi.openai.com.example/v1", False),
]


@pytest.mark.parametrize(("model", "url", "told"), CACHES)
def test_cache_writes_that_nobody_reads_are_switched_off_where_that_is_known(model: str, url: str, told: bool) -> None:
    parameters = gc.first_parameters(gc.Settings(model=model, base_url=url))
    assert (parameters.get("prompt_cache_options") == {"mode": "explicit"}) is told


def test_a_server_that_rejects_the_cache_option_is_asked_without_it() -> None:
    sent = gc.first_parameters(OPENAI)
    error = gc.ErrorReply(
        400, "Unknown parameter: 'prompt_cache_options'.", "unknown_parameter", "prompt_cache_options"
    )
    changed = gc.adapt_parameters(sent, error)
    assert changed == {name: value for name, value in sent.items() if name != "prompt_cache_options"}


@pytest.mark.usefixtures("images")
def test_cache_writes_are_shown_when_they_occur(tool: Tool, server: Server) -> None:
    usage = {"prompt_tokens": 1200, "completion_tokens": 20, "prompt_tokens_details": {"cache_write_tokens": 1100}}
    server.script(then={"usage": usage})
    assert "4,800 tokens in, 80 out; 4,400 of them written to a cache; " in tool("--image-dir", "images").stderr


@pytest.mark.usefixtures("images")
def test_an_image_that_was_not_counted_is_warned_about_once(tool: Tool, server: Server) -> None:
    server.script(then={"usage": {"prompt_tokens": 170, "completion_tokens": 20}})
    err = tool("--image-dir", "images").stderr
    assert err.count("perhaps no image was seen: the server counts 170 prompt tokens") == 1
    assert len(captions(tool.folder / "images")) == 4


@pytest.mark.parametrize(
    ("prompt", "image", "unseen"), [(170, 900, True), (250, 900, False), (0, 900, False), (170, 30, False)]
)
def test_only_counts_that_leave_no_room_for_an_image_are_odd(prompt: int, image: int, unseen: bool) -> None:
    assert gc.looks_unseen(gc.Usage(prompt, 20), gc.Expected(image, 180, 100)) is unseen


@pytest.mark.parametrize(
    ("days", "warned"), [(-1, True), (30, True), (90, True), (91, False), (None, False), ("soon", False)]
)
def test_a_model_that_is_switched_off_soon_is_warned_about(
    server: Server,
    caplog: pytest.LogCaptureFixture,
    days: Any,
    warned: bool,
) -> None:
    today = date(2026, 11, 24)
    day = str(today + timedelta(days=days)) if isinstance(days, int) else days
    server.script(shutdown_date=day)

    async def ask() -> None:
        async with gc.open_client(gc.Settings(api_key=KEY, base_url=server.url)) as client:
            await gc.warn_of_shutdown(client, "gpt-4o-mini", today)

    gc.log.propagate = True
    with caplog.at_level(logging.WARNING, "gen-captions"):
        asyncio.run(ask())
    assert (f"gpt-4o-mini is switched off on {day}" in caplog.text) is warned


def test_a_server_that_cannot_say_when_it_switches_off_costs_nothing(server: Server) -> None:
    async def ask() -> None:
        url = server.url.removesuffix("/v1") + "/nowhere"
        async with gc.open_client(gc.Settings(api_key=KEY, base_url=url)) as client:
            await gc.warn_of_shutdown(client, "gpt-4o-mini", date(2026, 11, 24))

    asyncio.run(ask())


def test_nobody_but_openai_is_asked_about_its_models(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    server.script(shutdown_date="2026-11-25")
    assert "switched off" not in tool("--image-dir", "images").stderr


def test_the_size_of_an_image_is_told_by_its_header(make_image: ImageMaker, tmp_path: Path) -> None:
    path = make_image("a.jpg", size=(4000, 3000))
    whole = path.read_bytes()
    path.write_bytes(whole[:2000])  # no pixels
    settings = gc.Settings(image_dir=tmp_path)
    recipe = gc.Recipe("Caption it.", "", "", "")
    expected = gc.expect(settings, recipe, gc.Job(str(path), str(path.with_suffix(".txt"))))
    assert expected.image == gc.image_tokens("gpt-6-luna", (1024, 768))
