import asyncio
import time

import pytest

from llama_engine.measure.lengths import Length
from llama_engine.measure.load import Generator, Load, ServedRun, level
from llama_engine.measure.slo import Limits
from llama_engine.measure.text import RandomIds, Text
from llama_engine.measure.traffic import Traffic
from llama_engine.serving.client import RequestFailed
from llama_engine.serving.target import Event


class FakeTarget:
    """Answers one token each ``gap`` seconds; every ``fail``-th request fails, every ``short``-th is a token short."""

    def __init__(self, gap=0.001, fail=0, short=0):
        self.gap, self.fail, self.short = gap, fail, short
        self.sent, self.running, self.most, self.asks = 0, 0, 0, []

    async def stream(self, ask, *, streaming=True):
        self.sent += 1
        self.asks.append(ask)
        number = self.sent
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.fail and number % self.fail == 0:
                raise RequestFailed("queue is full")
            for i in range(ask.new_tokens - (1 if self.short and number % self.short == 0 else 0)):
                await asyncio.sleep(self.gap)
                yield Event(time.perf_counter(), 1, [i])
        finally:
            self.running -= 1


def generator(target, traffic=None, **options):
    text = Text(RandomIds(512))
    return Generator(target, traffic or Traffic(input_tokens=Length(4, 4), output_tokens=Length(3, 3)), text, **options)


def test_closed_loop_keeps_its_users_busy_and_counts_every_request():
    target = FakeTarget()
    load = asyncio.run(generator(target).closed(4, requests=20))
    assert (target.sent, target.most, len(load.runs)) == (20, 4, 20)
    part = level(load, streaming=True)
    assert part["checks"]["failed_requests"] == 0
    assert part["samples"]["output_tokens"] == [3] * 20
    in_flight = part["checks"]["requests_per_s"] * part["checks"]["mean_latency_s"]
    assert in_flight == pytest.approx(4, rel=0.3)


def test_failures_and_short_answers_are_counted_not_averaged():
    load = asyncio.run(generator(FakeTarget(fail=5, short=7)).closed(2, requests=14))
    part = level(load, streaming=True)
    assert part["failures"] == {"queue is full": 2, "2 tokens received, 3 requested": 2}
    assert part["checks"]["failed_requests"] == 4
    assert len(part["samples"]["latency_s"]) == 10


def test_client_time_out_is_a_failure():
    load = asyncio.run(generator(FakeTarget(gap=5), timeout_s=0.05).closed(2, requests=2))
    assert sum(load.failures.values()) == 2
    assert level(load, streaming=True)["samples"] == {}


def test_open_loop_is_seeded_and_counts_latency_from_the_schedule():
    def schedule(seed):
        load = asyncio.run(generator(FakeTarget(gap=0), seed=seed).open(500, requests=30))
        first = min(run.t0 for run in load.runs)
        return sorted(round(run.t0 - first, 6) for run in load.runs)

    assert schedule(1) == schedule(1)
    assert schedule(1) != schedule(2)


def test_open_loop_does_not_wait_for_answers():
    target = FakeTarget(gap=0.1)
    asyncio.run(generator(target).open(200, requests=20))
    assert target.most > 10


def test_level_against_numbers_worked_by_hand():
    runs = [ServedRun(0.0, [0.1, 0.2, 0.3], [1, 2, 3]), ServedRun(1.0, [1.3, 1.4, 2.0], [1, 2, 3])]
    part = level(Load(runs=runs, responses=6, tokens=6), streaming=True, limits=Limits.parse(["ttft_ms:200"]))
    assert part["samples"]["ttft_ms"] == pytest.approx([100, 300])
    assert part["samples"]["tpot_ms"] == pytest.approx([100, 350])
    assert part["summary"]["output_tokens_per_s"]["p50"] == pytest.approx(3.0)
    assert part["summary"]["itl_ms"]["max"] == pytest.approx(600)
    assert part["summary"]["goodput"]["share"] == 0.5
    assert part["summary"]["goodput"]["requests_per_s"] == pytest.approx(0.5)
    assert "ttft_ms" not in level(Load(runs=runs), streaming=False)["summary"]
