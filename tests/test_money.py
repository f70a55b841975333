"""Money: what a run is said to cost, what it did cost, and the budget that nothing passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import gen_captions as gc
from conftest import ImageMaker, Server, Tool, captions

PRICED = ("--image-dir", "images", "--price", "0.10/0.50")
ANSWERED = {"prompt_tokens": 1200, "completion_tokens": 20}  # as the stand-in counts
EACH = 0.00013  # dollars of that
OPENAI = {"OPENAI_API_KEY": "", "OPENAI_BASE_URL": gc.OPENAI_URL}
Images = Callable[[int], None]


@pytest.fixture
def images(make_image: ImageMaker) -> Images:
    def make(number: int) -> None:
        for index in range(number):
            make_image(f"{index:03}.jpg", size=(800, 600) if number < 10 else (32, 32))

    return make


def journal(tool: Tool) -> list[dict[str, Any]]:
    text = (tool.folder / "images" / ".gen-captions" / "journal.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line]


TOKENS = [  # model, size, tokens by the family's rule or by what was billed
    ("gpt-6-luna", (512, 512), 308),
    ("gpt-6-luna", (1024, 1024), 1229),
    ("gpt-6-luna", (4032, 3024), 14_364),
    ("gpt-6.1-sol", (6000, 4000), 28_200),
    ("openai/gpt-5.6-luna", (1024, 768), 922),
    ("gpt-5.4", (4000, 3000), 2942),
    ("gpt-4.1-mini", (1800, 2400), 2353),
    ("ft:gpt-4o-mini:mine", (1024, 1024), 25_501),
    ("gpt-4o", (1024, 1024), 765),
    ("chatgpt-4o-latest", (1024, 1024), 765),
    ("gpt-5", (1024, 1024), 630),
    ("qwen3-vl", (1024, 768), 768),
]


@pytest.mark.parametrize(("model", "size", "tokens"), TOKENS)
def test_an_image_takes_about_the_tokens_of_its_models_family(
    model: str, size: tuple[int, int], tokens: int
) -> None:
    assert tokens <= gc.image_tokens(model, size) <= 1.06 * tokens
    assert gc.image_tokens(model, size) == gc.image_tokens(model, size[::-1])


def test_a_model_that_thinks_is_expected_to_use_its_whole_limit() -> None:
    answers = [
        gc.estimate(gc.Settings(reasoning_effort=effort, **more), "Caption it.", (32, 32)).answer
        for effort, more in ((None, {}), ("none", {}), ("low", {}), (None, {"max_tokens": 20}))
    ]
    assert answers == [117, 117, 300, 20]


RATES = [
    ("gpt-6-luna", gc.OPENAI_URL, "", (0.10, 0.50)),
    ("gpt-6-luna", gc.OPENAI_URL, "flex", (0.05, 0.25)),
    ("gpt-6-luna", gc.OPENAI_URL, "batch", (0.05, 0.25)),
    ("gpt-4o-mini", gc.OPENAI_URL, "flex", (0.15, 0.60)),  # has no flex
    ("gpt-4o-mini", gc.OPENAI_URL, "priority", (0.25, 1.00)),
    ("gpt-4o-mini", gc.OPENAI_URL, "new-tier", (0.15, 0.60)),
    ("gpt-4o-mini", "https://openrouter.ai/api/v1", "", None),  # it is openai/gpt-4o-mini there
    ("qwen3-vl", "http://localhost:11434/v1", "", None),
    ("no-such-model", gc.OPENAI_URL, "", None),
    ("gpt-6-luna", "https://captions.example/v1", "", None),
]


@pytest.mark.parametrize(("model", "url", "tier", "rates"), RATES)
def test_prices_are_known_by_model_server_and_tier_and_else_unknown_and_not_zero(
    model: str, url: str, tier: str, rates: tuple[float, float] | None
) -> None:
    cost = gc.find_cost(gc.Settings(model=model, base_url=url), gc.Usage(10**6, 10**6), tier)
    assert cost == (rates and pytest.approx(sum(rates)))


def test_the_users_own_price_counts_before_any_other() -> None:
    settings = gc.resolve_settings([], {"GETCAP_PRICE": "1.5/2"})
    assert gc.find_cost(settings, gc.Usage(10**6, 10**6), "flex") == 3.5


def test_dry_run_says_tokens_and_dollars_without_a_key_a_connection_or_a_file(
    tool: Tool, images: Images
) -> None:
    images(4)
    before = sorted(tool.folder.rglob("*"))
    out = tool("-n", "--image-dir", "images", code=0, **OPENAI).stdout
    # 25 x 19 patches of 1.2 tokens, 117 tokens for an answer, and the prompt's
    prompt = gc.text_tokens(gc.read_recipe(gc.Settings()).prompt)
    tokens = 4 * (570 + 117 + prompt)
    assert f"{tokens:,} tokens with gpt-6-luna: about $0.0005\n" in out
    assert sorted(tool.folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        ((), {}, "the price at 127.0.0.1:"),
        ((), {}, "--price IN/OUT says it"),
        (("--price", "0.10/0.50"), {}, "about $0.0005"),
        ((), {**OPENAI, "GETCAP_SERVICE_TIER": "flex"}, "about $0.0003"),
        (("--batch",), OPENAI, "about $0.0003"),
    ],
)
def test_dry_run_says_what_the_price_is_for_what_is_asked(
    tool: Tool, images: Images, words: tuple[str, ...], environment: dict[str, str], said: str
) -> None:
    images(4)
    out = tool("-n", "--image-dir", "images", *words, code=0, **environment).stdout
    assert said in out.splitlines()[-1]


def test_the_estimate_is_for_images_that_would_be_asked(tool: Tool, images: Images) -> None:
    images(4)
    (tool.folder / "images" / "000.txt").write_text("mine", encoding="utf-8")
    (tool.folder / "images" / "001.jpg").write_bytes(b"GIF89a, or so it says")
    done = tool("-n", "--image-dir", "images", "--limit", "2", code=1)
    assert "001.jpg: not an image" in done.stderr
    assert "tokens with gpt-6-luna; the price at" in done.stdout


def test_the_size_of_an_image_is_told_by_its_header(make_image: ImageMaker, tool: Tool) -> None:
    path = make_image("a.jpg", size=(4000, 3000))
    path.write_bytes(path.read_bytes()[:2000])  # no pixels
    expected = gc.estimate(gc.Settings(), gc.read_recipe(gc.Settings()).prompt, (1024, 768))
    tokens = expected.prompt + expected.answer
    assert f"{tokens:,} tokens with gpt-6-luna" in tool("-n", "--image-dir", "images").stdout


def test_the_run_says_what_it_cost(tool: Tool, images: Images) -> None:
    images(4)
    err = tool(*PRICED, "--report", "report.jsonl").stderr
    assert "4,880 tokens, $0.0005." in err
    summary = json.loads((tool.folder / "report.jsonl").read_text().splitlines()[-1])
    counted = [summary[name] for name in ("prompt_tokens", "answer_tokens", "usd")]
    assert counted == [4800, 80, pytest.approx(4 * EACH)]
    assert [entry["usd"] for entry in journal(tool)] == [pytest.approx(EACH)] * 4


def test_an_unknown_price_is_not_made_up(tool: Tool, images: Images) -> None:
    images(4)
    err = tool("--image-dir", "images").stderr
    assert "4,880 tokens." in err
    assert "$" not in err


def test_what_was_paid_for_and_is_no_caption_has_its_line_in_the_journal(
    tool: Tool, server: Server, images: Images
) -> None:
    images(4)
    server.script(then={"content": ""})
    tool(*PRICED, code=1)
    found = [(entry["outcome"], entry["usd"]) for entry in journal(tool)]
    assert found == [("failed", pytest.approx(EACH))] * 4


@pytest.mark.parametrize(("workers", "least"), [(1, 160), (10, 150), (100, 60)])
def test_a_budget_of_a_third_is_never_passed_and_all_that_is_paid_for_is_kept(
    tool: Tool, server: Server, images: Images, workers: int, least: int
) -> None:
    images(500)
    server.script(latency=0.02, check=False)
    words = ("--max-cost", f"{500 * EACH / 3:.6f}", "--thread-pool", str(workers))
    err = tool(*PRICED, *words, code=3).stderr
    answered = server.stats()["requests"]
    assert answered * EACH <= 500 * EACH / 3
    assert least <= answered == len(captions(tool.folder / "images"))
    assert "ERROR   --max-cost $0.0217" in err
    assert f"{500 - answered} not done yet" in err


MAY_BE_BILLED = {
    "torn": {"fault": "cut"},
    "not counted": {"usage": None},
    "late and counted": {"body": {"error": {"message": "late", "code": 500}, "usage": ANSWERED}},
    "HTTP 503 and counted": {"status": 503, "body": {"error": "late", "usage": ANSWERED}},
    "HTTP 429 and counted": {"status": 429, "body": {"error": "late", "usage": ANSWERED}},
    "HTTP 504": {"status": 504, "body": "the gateway gave up"},
}


@pytest.mark.parametrize("answer", MAY_BE_BILLED.values(), ids=MAY_BE_BILLED.keys())
def test_what_may_be_billed_counts_against_the_budget_at_its_worst(
    tool: Tool, server: Server, images: Images, answer: dict[str, Any]
) -> None:
    images(12)
    server.script(steps=[{}], then=answer)
    words = ("--max-cost", "0.001", "--throttle-retries", "50")
    backoff = {"GETCAP_THROTTLE_BACKOFF_FACTOR": "0.001"}
    err = tool(*PRICED, *words, code=3, **backoff).stderr
    assert "ERROR   --max-cost $0.0010" in err
    is_counted = str(ANSWERED) in str(answer)
    assert ("(answers lost or not counted: " in err) is not is_counted
    assert server.stats()["requests"] * EACH <= 0.001


def test_what_is_not_billed_does_not_count(tool: Tool, server: Server, images: Images) -> None:
    images(4)
    free = [{"status": status, "body": {"error": "no"}} for status in (429, 500, 503, 408)]
    server.script(steps=[{}, *free * 3])
    assert "4,880 tokens, $0.0005." in tool(*PRICED, "--max-cost", "0.001").stderr


def test_an_answer_without_choices_is_paid_for_as_it_was_counted(
    tool: Tool, server: Server, images: Images
) -> None:
    images(1)
    server.script(steps=[{"body": {"choices": [], "usage": ANSWERED}}])
    assert "2,440 tokens, $0.0003." in tool(*PRICED).stderr


def bill() -> gc.Bill:
    return gc.Bill(gc.Settings(price="1000/1000", max_cost=10.0))


SETTLED = [  # what came back for a request that was held at 5 dollars; what it cost, if known
    (gc.Reply(usage=gc.Usage(900, 100)), 1),
    (gc.Reply(0), 5),
    (gc.Reply(0, error="none came within 120 s"), 5),
    (gc.Reply(0, error="cannot connect", is_free=True), 0),
]


@pytest.mark.parametrize(("reply", "dollars"), SETTLED)
def test_what_comes_back_is_counted_for_what_it_may_have_cost(
    reply: gc.Reply, dollars: float
) -> None:
    own = bill()
    assert own.hold(gc.Usage(2000, 50), longest=1000) == 5  # twice the prompt, the longest answer
    assert own.settle(5, reply) == own.spent == dollars


def test_what_is_on_its_way_counts_as_spent() -> None:
    own = bill()
    for _ in range(2):
        own.hold(gc.Usage(2000, 50), longest=1000)
    with pytest.raises(gc.StopRun, match=r"--max-cost \$10.00: \$0.0000 spent, up to"):
        own.hold(gc.Usage(1, 1), longest=1)
    own.settle(5, gc.Reply(usage=gc.Usage(900, 100)))
    own.hold(gc.Usage(1000, 50), longest=1000)


def test_the_worst_of_a_request_is_at_least_the_dearest_answer_so_far() -> None:
    own = bill()
    own.settle(0, gc.Reply(usage=gc.Usage(4000, 0)))  # an image was far larger than thought
    assert own.hold(gc.Usage(10, 10), longest=10) == 4


def test_a_dearer_tier_than_was_asked_for_is_counted() -> None:
    own = gc.Bill(gc.Settings(model="gpt-4o-mini", max_cost=10.0, service_tier="flex"))
    usage = gc.Usage(10**6, 0)
    assert own.settle(0, gc.Reply(usage=usage, tier="priority")) == pytest.approx(0.25)
    assert own.hold(gc.Usage(10, 10), longest=10) == pytest.approx(0.25)


COUNTS = [
    ((1200.0, 20, 1220), gc.Usage(1200, 20)),
    ((1200, 20, 1500), gc.Usage(1200, 300)),  # thoughts that only the total shows
    ((0, 0, 0), None),
    ((1200, None, None), None),
    ((1200, -5, None), None),
    ((10**9, 20, None), None),
    ((float("nan"), 20, None), None),
]


@pytest.mark.parametrize(("counts", "usage"), COUNTS)
def test_a_count_that_cannot_be_is_no_count(counts: Any, usage: gc.Usage | None) -> None:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert gc.read_usage(dict(zip(names, counts, strict=True))) == usage


def test_a_budget_without_a_price_is_a_usage_error_before_anything_is_sent(
    tool: Tool, server: Server, images: Images
) -> None:
    images(1)
    err = tool("--image-dir", "images", "--max-cost", "1", code=2).stderr
    assert "--max-cost: the price of gpt-6-luna at 127.0.0.1" in err
    assert "--price IN/OUT" in err
    assert server.stats()["requests"] == 0


def test_a_token_limit_of_the_users_own_counts_for_the_budget(
    tool: Tool, server: Server, images: Images
) -> None:
    images(1)
    own = {"GETCAP_EXTRA_BODY": '{"max_completion_tokens": 5000}'}
    tool(*PRICED, "--max-cost", "0.001", code=3, **own)
    assert server.stats()["requests"] == 0


EXCLUDED = "A woman with freckles and red hair."
SECOND_ANSWERS = [
    ({"content": "A woman."}, "A woman."),
    ({"content": "A woman with red hair."}, "A woman with red hair."),
    ({"content": "A woman with freckles, blue eyes and red hair."}, EXCLUDED),
    ({"content": "I'm sorry, I can't help with that."}, EXCLUDED),
    ({"status": 400, "body": {"error": "odd"}}, EXCLUDED),
]


@pytest.mark.parametrize(("second", "kept"), SECOND_ANSWERS)
def test_excluded_words_are_asked_about_once_more_and_the_better_answer_is_taken(
    tool: Tool, server: Server, images: Images, second: dict[str, Any], kept: str
) -> None:
    images(1)
    (tool.folder / "config").mkdir()
    (tool.folder / "config" / "exclude.txt").write_text("blue eyes, freckles\nred hair\n")
    server.script(steps=[{"content": EXCLUDED}, second], then={"content": "A third answer."})
    err = tool(*PRICED, "--config-dir", "config").stderr
    stats = server.stats()
    assert stats["requests"] == 2
    assert "freckles, red hair" in stats["bodies"][1]["messages"][0]["content"][0]["text"]
    assert captions(tool.folder / "images") == {"000.txt": f"{kept}\n"}
    assert ("with excluded words" in err) == (kept != "A woman.")
    [entry] = journal(tool)
    is_paid = "status" not in second
    assert entry["usd"] == pytest.approx((1 + is_paid) * EACH)


def test_an_answer_whose_second_try_the_budget_forbids_is_kept(
    tool: Tool, server: Server, images: Images
) -> None:
    images(3)
    (tool.folder / "config").mkdir()
    (tool.folder / "config" / "exclude.txt").write_text("freckles")
    server.script(then={"content": EXCLUDED})
    tool(*PRICED, "--config-dir", "config", "--max-cost", "0.0004", code=3)
    assert captions(tool.folder / "images") == {"000.txt": f"{EXCLUDED}\n"}


def test_flex_is_asked_for(tool: Tool, server: Server, images: Images) -> None:
    images(2)
    tool("--image-dir", "images", code=0, GETCAP_SERVICE_TIER="flex")
    assert [body["service_tier"] for body in server.stats()["bodies"]] == ["flex"] * 2


def test_an_image_that_was_not_counted_is_warned_about_once(
    tool: Tool, server: Server, images: Images
) -> None:
    images(4)
    server.script(then={"usage": {"prompt_tokens": 100, "completion_tokens": 20}})
    err = tool("--image-dir", "images").stderr
    assert err.count("perhaps no image was seen") == 1
    assert len(captions(tool.folder / "images")) == 4
