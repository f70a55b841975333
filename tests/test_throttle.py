"""Throttle: the pace of all workers, in virtual time and once for real."""

from __future__ import annotations

import asyncio
import logging
import random
import selectors
import signal
from collections.abc import Coroutine, Iterator
from itertools import pairwise
from typing import Any, TypeVar

import httpx2
import openai
import pytest
from vision_server import Bucket

import gen_captions as gc
from conftest import KEY, ImageMaker, Server, Tool, captions

Result = TypeVar("Result")
TOKENS = 1000  # of each answer
LATENCY_S = 0.2
ANSWER = {
    "choices": [{"message": {"content": "A red barn."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": TOKENS - 20, "completion_tokens": 20},
}
REFUSAL = {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}


class Clock(selectors.DefaultSelector):
    """Waits for no timer but jumps to it; only for threads it waits."""

    now = 1000.0
    threads = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or (timeout > 0 and self.threads):
            return super().select(None)
        found = super().select(0)
        if not found:
            self.now += max(0.0, timeout)
        return found


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time: code takes none, and each wait is over at once."""

    def __init__(self) -> None:
        self.clock = Clock()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now

    def run_in_executor(self, executor: Any, func: Any, *arguments: Any) -> Any:  # type: ignore[override]
        def done(_: object) -> None:
            self.clock.threads -= 1

        self.clock.threads += 1
        future = super().run_in_executor(executor, func, *arguments)
        future.add_done_callback(done)
        return future


def in_virtual_time(work: Coroutine[Any, Any, Result]) -> Result:
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(work)


class VirtualServer(httpx2.AsyncBaseTransport):
    """A server behind the SDK's client, in virtual time.

    It has limits, which its headers show or not, and refuses a share of all requests at random.
    """

    def __init__(
        self, *limits: Bucket, headers: bool = True, retry_after: bool = True, refused: float = 0
    ) -> None:
        self.limits, self.has_headers, self.has_retry_after = limits, headers, retry_after
        self.refused = refused
        self.random = random.Random(7)
        self.good: list[float] = []  # when requests came that were answered
        self.bad: list[float] = []  # and that were refused

    def headers(self) -> dict[str, str]:
        found = [limit.headers() for limit in self.limits if self.has_headers]
        return {name: value for each in found for name, value in each.items()}

    def refuses(self, _request: httpx2.Request) -> bool:
        return self.random.random() < self.refused

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await asyncio.sleep(self.random.uniform(0, 0.02))  # requests overtake each other
        now = asyncio.get_running_loop().time()
        costs = {"requests": 1, "tokens": TOKENS}
        wait_s = max((limit.wait_s(costs[limit.unit]) for limit in self.limits), default=0.0)
        if not wait_s and self.refuses(request):
            wait_s = 1.0
        if wait_s:
            self.bad.append(now)
            asked = {"Retry-After": f"{wait_s:.3f}"} if self.has_retry_after else {}
            return httpx2.Response(
                429, json=REFUSAL, headers=self.headers() | asked, request=request
            )
        for limit in self.limits:
            limit.left -= costs[limit.unit]
        self.good.append(now)
        await asyncio.sleep(LATENCY_S)
        return httpx2.Response(200, json=ANSWER, headers=self.headers(), request=request)


async def ask_all(server: VirtualServer, images: int, workers: int) -> list[str]:
    """Ask about so many images as a run does; return what became of those that failed."""
    settings = gc.Settings(api_key=KEY, base_url="http://server.example/v1")
    http_client = openai.DefaultAsyncHttpxClient(transport=server)
    client = openai.AsyncOpenAI(
        api_key=KEY, base_url=settings.base_url, max_retries=0, http_client=http_client
    )
    failed: list[str] = []
    queue = iter(range(images))
    async with client:
        asker = gc.Asker(
            (client, http_client), settings, gc.Recipe("", ""), gc.Bill(settings), gc.Stop()
        )

        async def ask(number: int) -> None:
            job = gc.Job(f"{number}.jpg", f"{number}.txt")
            try:
                await asker.ask(gc.Question(job, "Caption it.", gc.Entry(), b"image-%d" % number))
            except (gc.FailImage, gc.StopRun) as error:
                failed.append(str(error))

        async def work() -> None:
            for number in queue:
                await ask(number)

        await ask(next(queue))
        await asyncio.gather(*(work() for _ in range(workers)))
    return failed


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    gc.log.setLevel(logging.CRITICAL)
    yield
    gc.log.setLevel(logging.NOTSET)


def limit(unit: str, per_minute: float) -> Bucket:
    return Bucket(unit, per_minute, asyncio.get_running_loop().time)


@pytest.mark.parametrize(
    ("images", "requests", "tokens"),
    [(1000, 3000, 0), (300, 500, 0), (300, 6000, 200_000)],
    ids=["3,000 requests", "500 requests", "200,000 tokens"],
)
def test_limits_that_the_headers_show_are_used_in_full_and_hardly_met(
    images: int, requests: float, tokens: float
) -> None:
    async def run() -> VirtualServer:
        units = {"requests": requests, "tokens": tokens}
        limits = [limit(unit, most) for unit, most in units.items() if most]
        server = VirtualServer(*limits)
        assert await ask_all(server, images, workers=100) == []
        return server

    server = in_virtual_time(run())
    a_second = min(requests, tokens / TOKENS if tokens else requests) / 60
    allowed = a_second * (1 + server.good[-1] - server.good[0])  # it begins with a second's worth
    assert images >= 0.99 * allowed
    assert len(server.bad) <= 0.015 * images


@pytest.mark.parametrize(
    ("images", "workers", "requests", "retry_after", "share"),
    [(1000, 100, 3000, True, 0.87), (600, 20, 600, False, 0.97), (150, 20, 60, False, 0.97)],
)
def test_limits_that_nobody_tells_are_found_and_used(
    images: int, workers: int, requests: float, retry_after: bool, share: float
) -> None:
    async def run() -> float:
        server = VirtualServer(limit("requests", requests), headers=False, retry_after=retry_after)
        assert await ask_all(server, images, workers) == []
        return max(server.good) - server.good[0]

    assert images / in_virtual_time(run()) >= share * requests / 60


def test_one_request_in_ten_refused_at_random_leaves_a_third_of_the_full_rate() -> None:
    async def run() -> float:
        server = VirtualServer(refused=0.1)
        assert await ask_all(server, 1000, workers=20) == []
        return 1000 / (max(server.good) - server.good[0])

    rates = sorted(in_virtual_time(run()) for _ in range(3))  # how long to wait is random
    assert rates[1] >= 20 / LATENCY_S / 3


def test_one_request_in_ten_refused_at_random_leaves_a_third_for_real_too(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(400):
        make_image(f"{number}.jpg", size=(8, 8))
    refusal = {"status": 429, "headers": {"Retry-After": "1"}, "body": REFUSAL}
    server.script(faults=0.1, fault=refusal, latency=LATENCY_S, check=False)
    tool("-q", "--image-dir", "images", "--thread-pool", "20", GETCAP_THROTTLE_BACKOFF_FACTOR="2")
    arrivals = server.stats()["arrivals"]
    assert len(captions(tool.folder)) == 400
    middle = arrivals[len(arrivals) // 10 : -len(arrivals) // 10]  # the last images wait alone
    answered = len(middle) * 400 / len(arrivals)
    assert answered / (middle[-1] - middle[0]) >= 20 / LATENCY_S / 3


def wait_for_turn(throttle: gc.Throttle) -> Coroutine[Any, Any, tuple[gc.Ticket, float]]:
    """Return what waits for a turn, and says how long that took."""

    async def wait() -> tuple[gc.Ticket, float]:
        loop = asyncio.get_running_loop()
        started = loop.time()
        ticket = await throttle.turn()
        await asyncio.sleep(0.1)  # until an answer comes
        return ticket, round(ticket.sent_at - started, 3)

    return wait()


@pytest.mark.parametrize(
    ("good_between", "sent_after", "pause_s"),
    [(False, True, 5), (True, True, 0), (False, False, 0)],
)
def test_the_second_429_in_a_row_pauses_all(
    good_between: bool, sent_after: bool, pause_s: float
) -> None:
    async def run() -> tuple[float, float]:
        throttle = gc.Throttle(None, gc.Stop())
        refusal = gc.Reply(429, error="slow down", retry_after_s=5.0)
        early, _ = await wait_for_turn(throttle)
        throttle.learn(early, refusal, {})
        late, after_one = await wait_for_turn(throttle)
        if good_between:
            throttle.learn(late, gc.Reply(content="A red barn."), {})
        throttle.learn(late if sent_after else early, refusal, {})
        return after_one, (await wait_for_turn(throttle))[1]

    assert in_virtual_time(run()) == (0, pause_s)


def test_where_headers_show_the_limits_429s_pause_nobody() -> None:
    headers = {"x-ratelimit-limit-requests": "6000", "x-ratelimit-remaining-requests": "5000"}

    class Refusing(VirtualServer):
        def headers(self) -> dict[str, str]:
            return headers

    async def run() -> list[float]:
        server = Refusing(refused=0.2)
        assert await ask_all(server, 2000, workers=100) == []
        return sorted(server.good + server.bad)

    times = in_virtual_time(run())[10:-200]  # the first image and the last ones wait alone
    assert max(b - a for a, b in pairwise(times)) < 0.5


def test_the_waits_of_an_image_grow_while_no_image_gets_an_answer() -> None:
    async def run() -> list[float]:
        server = VirtualServer(refused=1.0, retry_after=False)
        [failure] = await ask_all(server, 1, workers=0)
        assert "slow down" in failure
        return server.bad

    waits = [b - a for a, b in pairwise(in_virtual_time(run()))]
    assert len(waits) == 10
    for wait_s, least in zip(waits, (1, 2, 4, 8, 16, 30, 30, 30, 30, 30), strict=True):
        assert least - 0.1 <= wait_s <= least + 1.1  # the server's distance varies


def test_a_server_that_stops_answering_uses_up_the_retries_within_minutes() -> None:
    class Ending(VirtualServer):
        def refuses(self, _request: httpx2.Request) -> bool:
            return len(self.good) > 2

    async def run() -> float:
        loop = asyncio.get_running_loop()
        started = loop.time()
        failed = await ask_all(Ending(headers=False), 20, workers=20)
        assert any("10 images in a row" in failure for failure in failed)
        return loop.time() - started

    assert in_virtual_time(run()) < 300


def test_an_image_that_always_fails_does_not_wait_ever_longer_while_others_get_answers() -> None:
    class Odd(VirtualServer):
        def refuses(self, request: httpx2.Request) -> bool:
            return b'image-50"' in request.content

    async def run() -> list[float]:
        server = Odd()
        assert len(await ask_all(server, 300, workers=2)) == 1
        return server.bad

    waits = [b - a for a, b in pairwise(in_virtual_time(run()))]
    assert len(waits) == 10
    assert max(waits) < 3


def test_the_submission_rate_is_a_hard_cap_without_a_burst(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(12):
        make_image(f"{number}.jpg")
    words = ("--thread-pool", "12", "--throttle-submission-rate", "20")
    tool("--image-dir", "images", *words)
    gaps = [b - a for a, b in pairwise(server.stats()["arrivals"][1:])]  # the first had to connect
    assert sum(gaps) >= 10 * 0.05 * 0.98
    assert min(gaps) > 0.02


LIMITS = [
    {"requests_per_minute": 1200},
    {"requests_per_minute": 60_000, "tokens_per_minute": 1200 * 1220},
]


@pytest.mark.parametrize("limits", LIMITS)
def test_limits_that_headers_show_are_kept_without_a_refusal_for_real(
    tool: Tool, server: Server, make_image: ImageMaker, limits: dict[str, float]
) -> None:
    for number in range(90):
        make_image(f"{number}.jpg", size=(8, 8))
    server.script(check=False, latency=0.3, **limits)
    tool("--image-dir", "images", "--thread-pool", "60")
    stats = server.stats()
    assert stats["statuses"] == {"200": 90}
    assert stats["peak_in_flight"] > 1


def test_a_long_wait_for_a_limit_is_said_once(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(3):
        make_image(f"{number}.jpg")
    headers = {"limit": "100", "remaining": "0", "reset": "24h"}
    shown = {f"x-ratelimit-{word}-requests": text for word, text in headers.items()}
    server.script(then={"body": ANSWER, "headers": shown})
    process = tool.start("--image-dir", "images")
    assert process.stderr
    assert any("The limits leave no room for" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    assert "no room" not in process.communicate(timeout=30)[1]
    assert process.returncode == 130


def test_a_bucket_is_unlimited_until_the_server_speaks() -> None:
    bucket = gc.Bucket()
    bucket.take(10**9)
    assert bucket.wait_s(10**9, 5.0) == 0


@pytest.mark.parametrize(
    ("limit", "rate"),
    [
        ((3000, 0, 60), 50),  # a minute's limit
        ((14_400, 0, 86_400), 1 / 6),  # a day's
        ((3000, 0, 0), 50),  # unsaid: a minute's
        ((3000, 2999, 30), 50),  # too little is missing to tell
        ((5, 2, 0.6), 5),  # a small one with a short window
    ],
)
def test_a_bucket_refills_in_the_limits_own_period(
    limit: tuple[float, float, float], rate: float
) -> None:
    bucket = gc.Bucket()
    bucket.take(1)
    bucket.learn(limit, taken=1, now=0)
    bucket.take(limit[1])
    wait_s = bucket.wait_s(1, 0)
    assert wait_s == pytest.approx(min(1 + gc.RESERVE_S * rate, limit[0]) / rate)
    assert bucket.wait_s(1, wait_s) == pytest.approx(0, abs=1e-9)


def test_what_was_sent_since_counts_against_what_the_server_says_is_left() -> None:
    bucket = gc.Bucket()
    for _ in range(15):
        bucket.take(1)
    bucket.learn((60, 20, 0), taken=1, now=0)  # the answer to the first of them
    assert bucket.wait_s(1, 0) == 0
    bucket.learn((60, 8, 0), taken=12, now=0)  # to the twelfth; others share the account
    for _ in range(5):
        bucket.take(1)
    assert bucket.wait_s(1, 0) > 0


def test_an_absurd_count_does_not_stop_the_pace_for_long() -> None:
    bucket = gc.Bucket()
    room = (200_000, 199_000, 0.3)
    bucket.learn(room, taken=0, now=1)
    bucket.take(900_000_000)
    assert bucket.wait_s(1000, 2) <= 2 * 60


def test_a_stop_wakes_who_waits_and_its_first_cause_counts() -> None:
    async def run() -> tuple[float, str]:
        loop, stop = asyncio.get_running_loop(), gc.Stop()
        throttle = gc.Throttle(0.001, stop)
        await throttle.turn()
        started = loop.time()
        loop.call_later(3, stop.set, gc.StopRun("first"))
        loop.call_later(4, stop.set, signal.SIGINT)
        with pytest.raises(gc.StopRun):
            await throttle.turn()
        took = loop.time() - started
        await asyncio.sleep(2)
        with pytest.raises(gc.StopRun):
            await throttle.turn()
        return took, str(stop.cause)

    took, cause = in_virtual_time(run())
    assert (round(took, 6), cause) == (3, "first")


class Jobs:
    """Jobs that are made when somebody takes them, and what became of them."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.taken: list[str] = []
        self.handled: list[str] = []
        self.most_ahead = 0

    def __iter__(self) -> Iterator[gc.Job]:
        for number in range(self.number):
            self.taken.append(str(number))
            self.most_ahead = max(self.most_ahead, len(self.taken) - len(self.handled))
            yield gc.Job(str(number), "")

    def handle(self, workers: int, ends_at: str = "") -> gc.Stop:
        """Handle them all and return the run's Stop."""

        async def handle(job: gc.Job) -> None:
            if job.image == ends_at:
                raise gc.StopRun("enough")
            await asyncio.sleep(random.random())
            self.handled.append(job.image)

        async def run() -> gc.Stop:
            stop = gc.Stop()
            parts: Any = (None, None, None, None, gc.Report(), None, stop)
            await gc.handle_all(gc.Run(*parts), self, handle, workers)
            return stop

        return in_virtual_time(run())


def test_each_job_is_handled_once_and_none_is_taken_before_a_worker_is_free() -> None:
    jobs = Jobs(100)
    assert jobs.handle(workers=8).cause is None
    assert sorted(jobs.handled) == sorted(jobs.taken)
    assert (len(jobs.handled), jobs.most_ahead) == (100, 8)


def test_a_stop_begins_nothing_new_and_waits_for_what_is_begun() -> None:
    jobs = Jobs(100)
    assert str(jobs.handle(workers=4, ends_at="3").cause) == "enough"
    assert sorted(jobs.handled) == ["0", "1", "2"]
