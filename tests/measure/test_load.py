import asyncio

import pytest

from llama_engine.errors import InputError
from llama_engine.measure.generation import GenerationRun
from llama_engine.measure.load import Generator, Length, Load, level, parse_slo
from llama_engine.serving.client import RequestFailed


class FakeClient:
    """Answers one token each ``gap`` seconds; every ``fail``-th request fails, every ``short``-th is a token short."""

    def __init__(self, gap=0.001, fail=0, short=0):
        self.gap, self.fail, self.short = gap, fail, short
        self.sent, self.running, self.most = 0, 0, 0

    async def generate(self, prompt, new_tokens, *, streaming, model="tensorrt_llm", **options):
        self.sent += 1
        number = self.sent
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.fail and number % self.fail == 0:
                raise RequestFailed("queue is full")
            for i in range(new_tokens - (1 if self.short and number % self.short == 0 else 0)):
                await asyncio.sleep(self.gap)
                yield [i]
        finally:
            self.running -= 1

    async def close(self):
        pass


def generator(client, **options):
    return Generator(client, lambda n: [0] * n, Length(4, 4), Length(3, 3), **options)


def test_closed_loop_keeps_its_users_busy_and_counts_every_request():
    client = FakeClient()
    load = asyncio.run(generator(client).closed(4, requests=20))
    assert (client.sent, client.most, len(load.runs)) == (20, 4, 20)
    part = level(load, streaming=True, slo={})
    assert part["checks"]["failed_requests"] == 0
    assert part["samples"]["output_tokens"] == [3] * 20
    in_flight = part["checks"]["requests_per_s"] * part["checks"]["mean_latency_s"]
    assert in_flight == pytest.approx(4, rel=0.3)


def test_failures_and_short_answers_are_counted_not_averaged():
    load = asyncio.run(generator(FakeClient(fail=5, short=7)).closed(2, requests=14))
    part = level(load, streaming=True, slo={})
    assert part["failures"] == {"queue is full": 2, "2 tokens received, 3 requested": 2}
    assert part["checks"]["failed_requests"] == 4
    assert len(part["samples"]["latency_s"]) == 10


def test_client_time_out_is_a_failure():
    load = asyncio.run(generator(FakeClient(gap=5), timeout_s=0.05).closed(2, requests=2))
    assert sum(load.failures.values()) == 2
    assert level(load, streaming=True, slo={})["samples"] == {}


def test_open_loop_is_seeded_and_counts_latency_from_the_schedule():
    def schedule(seed):
        load = asyncio.run(generator(FakeClient(gap=0), seed=seed).open(500, requests=30))
        first = min(run.t0 for run in load.runs)
        return sorted(round(run.t0 - first, 6) for run in load.runs)

    assert schedule(1) == schedule(1)
    assert schedule(1) != schedule(2)


def test_open_loop_does_not_wait_for_answers():
    client = FakeClient(gap=0.1)
    asyncio.run(generator(client).open(200, requests=20))
    assert client.most > 10


def test_level_against_numbers_worked_by_hand():
    runs = [GenerationRun(0.0, [0.1, 0.2, 0.3], [1, 2, 3]), GenerationRun(1.0, [1.3, 1.4, 2.0], [1, 2, 3])]
    part = level(Load(runs=runs, responses=6, tokens=6), streaming=True, slo={"ttft_ms": 200})
    assert part["samples"]["ttft_ms"] == pytest.approx([100, 300])
    assert part["samples"]["tpot_ms"] == pytest.approx([100, 350])
    assert part["summary"]["output_tokens_per_s"]["p50"] == pytest.approx(3.0)
    assert part["summary"]["itl_ms"]["max"] == pytest.approx(600)
    assert part["summary"]["goodput"]["share"] == 0.5
    assert part["summary"]["goodput"]["requests_per_s"] == pytest.approx(0.5)
    assert "ttft_ms" not in level(Load(runs=runs), streaming=False, slo={})["summary"]


@pytest.mark.parametrize("text", ["0", "-3", "x", "5:2", "1:2:3", ""])
def test_bad_lengths(text):
    with pytest.raises(InputError):
        Length.parse(text)


@pytest.mark.parametrize("item", ["ttft_ms", "ttft_ms:0", "speed:3", "tpot_ms:x", "ttft_ms:1.2.3"])
def test_bad_slo(item):
    with pytest.raises(InputError):
        parse_slo([item])
