"""Throttle and Pool: each job once, none early, ending in order."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime

import pytest

import gen_captions as gc

Handle = Callable[[int], Awaitable[None]]


def pool(jobs: Iterator[int], handle: Handle, workers: int, stop: gc.Stop | None = None) -> gc.Stop:
    """Run a pool in an event loop of its own and return its Stop."""

    async def run() -> gc.Stop:
        mine = stop or gc.Stop()
        await gc.run_pool(jobs, handle, workers, mine)
        return mine

    return asyncio.run(run())


def test_each_job_is_handled_once_by_a_named_worker() -> None:
    seen: list[tuple[int, str]] = []

    async def handle(job: int) -> None:
        await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task
        seen.append((job, task.get_name()))

    pool(iter(range(100)), handle, 12)
    assert sorted(job for job, _ in seen) == list(range(100))
    assert {name for _, name in seen} == {f"worker-{n:02}" for n in range(1, 13)}


def test_no_job_is_taken_before_a_worker_is_free() -> None:
    taken = handled = 0
    most_ahead = 0

    def jobs() -> Iterator[int]:
        nonlocal taken, most_ahead
        for number in range(1000):
            taken += 1
            most_ahead = max(most_ahead, taken - handled)
            yield number

    async def handle(_job: int) -> None:
        nonlocal handled
        await asyncio.sleep(0)
        handled += 1

    pool(jobs(), handle, 8)
    assert (handled, most_ahead) == (1000, 8)


def test_a_stop_begins_nothing_new_and_waits_for_what_is_begun() -> None:
    begun, ended = [], []

    async def handle(job: int) -> None:
        begun.append(job)
        if job == 3:
            raise gc.StopRun("enough")
        await asyncio.sleep(0.02)
        ended.append(job)

    stop = pool(iter(range(100)), handle, 4)
    assert (begun, sorted(ended)) == ([0, 1, 2, 3], [0, 1, 2])
    assert str(stop.cause) == "enough"


def test_the_first_cause_of_a_stop_counts() -> None:
    stop = gc.Stop()
    stop.set(gc.StopRun("first"))
    stop.set(signal.SIGINT)
    assert str(stop.cause) == "first"


def test_a_stop_wakes_who_sleeps() -> None:
    async def run() -> float:
        stop = gc.Stop()
        started = time.monotonic()
        asyncio.get_running_loop().call_later(0.05, stop.set, gc.StopRun("now"))
        with pytest.raises(gc.StopRun):
            await stop.sleep(60)
        return time.monotonic() - started

    assert asyncio.run(run()) < 5


def test_the_throttle_spaces_requests_evenly() -> None:
    async def run() -> list[float]:
        throttle = gc.Throttle(100, gc.Bill(), gc.Stop())
        turns: list[float] = []

        async def take() -> None:
            await throttle.turn(gc.Usage())
            turns.append(time.monotonic())

        await asyncio.gather(*(take() for _ in range(21)))
        return turns

    turns = asyncio.run(run())
    assert turns[-1] - turns[0] >= 0.19


def test_nobody_gets_a_turn_once_the_run_ends() -> None:
    async def run() -> None:
        stop = gc.Stop()
        stop.set(gc.StopRun("end"))
        await gc.Throttle(None, gc.Bill(), stop).turn(gc.Usage())

    with pytest.raises(gc.StopRun):
        asyncio.run(run())


NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("12ms", 0.012),
        ("6m0s", 360),
        ("2s81ms", 2.081),
        ("1h2m3.5s", 3723.5),
        ("1s", 1),
        ("20", 20),
        ("0.5", 0.5),
        (str(int(NOW.timestamp()) + 30), 30),
        (str((int(NOW.timestamp()) + 30) * 1000), 30),
        (str(int(NOW.timestamp()) - 30), 0),
        ("", None),
        ("soon", None),
        ("1s and more", None),
        ("-5", None),
    ],
)
def test_the_time_to_reset_comes_in_many_forms(text: str, seconds: float | None) -> None:
    found = gc.parse_reset(text, NOW)
    assert found is None if seconds is None else math.isclose(found, seconds, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("headers", "limits"),
    [
        ({}, {}),
        ({"x-ratelimit-limit-requests": "60"}, {}),
        (
            {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "59"},
            {"requests": gc.Limit(60, 59, None)},
        ),
        (
            {
                "x-ratelimit-limit-tokens": "2000",
                "x-ratelimit-remaining-tokens": "-5",
                "x-ratelimit-reset-tokens": "1m0s",
            },
            {"tokens": gc.Limit(2000, 0, 60)},
        ),
        ({"x-ratelimit-limit-tokens": "many", "x-ratelimit-remaining-tokens": "1"}, {}),
        ({"x-ratelimit-limit-tokens": "0", "x-ratelimit-remaining-tokens": "0"}, {}),
        ({"x-ratelimit-limit-tokens": "inf", "x-ratelimit-remaining-tokens": "nan"}, {}),
    ],
)
def test_limits_are_what_both_headers_say(headers: dict[str, str], limits: dict[str, gc.Limit]) -> None:
    assert gc.parse_limits(headers, NOW) == limits


def test_a_bucket_is_unlimited_until_the_server_speaks() -> None:
    bucket = gc.Bucket()
    bucket.take(10**9)
    assert bucket.wait_s(10**9, 5.0) == 0


@pytest.mark.parametrize(
    ("limit", "rate"),
    [
        (gc.Limit(3000, 0, 60), 50),  # a minute's limit
        (gc.Limit(14_400, 0, 86_400), 1 / 6),  # a day's
        (gc.Limit(3000, 0, None), 50),  # unsaid: a minute's
        (gc.Limit(3000, 2999, 30), 50),  # too little is missing to tell
    ],
)
def test_a_bucket_refills_in_the_limits_own_period(limit: gc.Limit, rate: float) -> None:
    bucket = gc.Bucket()
    bucket.take(1)
    bucket.learn(limit, 0.0, 1.0, 0.0)
    bucket.take(limit.left)
    assert math.isclose(bucket.wait_s(1, 0.0), (1 + gc.RESERVE_S * rate) / rate)


def test_what_is_on_its_way_counts_against_what_the_server_says_is_left() -> None:
    bucket = gc.Bucket()
    bucket.take(1)
    bucket.learn(gc.Limit(60, 20, None), 0.0, 1.0, 0.0)
    for _ in range(15):
        bucket.take(1)
    assert bucket.wait_s(1, 0.0) == 0
    bucket.learn(gc.Limit(60, 8, None), 0.0, 12.0, 0.0)  # the answer to the twelfth; others share the account
    for _ in range(8):
        bucket.take(1)
    assert bucket.wait_s(1, 0.0) > 0


def test_a_server_that_says_less_than_we_thought_is_believed() -> None:
    bucket = gc.Bucket()
    bucket.take(1)
    bucket.learn(gc.Limit(60, 50, None), 0.0, 1.0, 0.0)
    bucket.take(1)
    bucket.learn(gc.Limit(60, 0, None), 0.0, 2.0, 0.0)
    assert bucket.wait_s(1, 0.0) > 0
