import asyncio
import time

import pytest

from llama_engine.measure.answers import ServedRun, apportion, settle
from llama_engine.measure.lengths import Length
from llama_engine.measure.load import Generator, Load, level
from llama_engine.measure.slo import Limits
from llama_engine.measure.text import Pieces, RandomIds, Text
from llama_engine.measure.traffic import Traffic
from llama_engine.serving.client import RequestFailed
from llama_engine.serving.target import Ask, Event


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


def test_a_conversation_sends_its_history():
    traffic = Traffic(
        input_tokens=Length(4, 4), output_tokens=Length(3, 3), turns=Length(3, 3), prefix_groups=1, prefix_tokens=32
    )
    target = FakeTarget()
    load = asyncio.run(generator(target, traffic).closed(1, requests=7))
    assert len(load.runs) == 7
    roles = [[role for role, _ in ask.messages] for ask in target.asks[:4]]
    talk = ["system", "user"]
    assert roles == [talk, [*talk, "assistant", "user"], [*talk, *["assistant", "user"] * 2], talk]
    assert target.asks[1].ids[: 32 + 4 + 3] == [*target.asks[0].ids, 0, 1, 2]
    shared = level(load, streaming=True)["checks"]["shared_prompt_tokens"]
    assert shared == 6 * 32  # whole blocks of 16 alone: the turns between are shorter


def test_a_replay_keeps_the_arrivals_of_its_trace(tmp_path):
    trace = tmp_path / "t.csv"
    trace.write_text("arrival,input,output\n5,8,3\n5.1,16,2\n5.3,4,1\n")
    load = asyncio.run(generator(FakeTarget(gap=0), Traffic(trace=trace)).replay(2.0))
    t0 = sorted(run.t0 for run in load.runs)
    assert [round(t - t0[0], 3) for t in t0] == [0, 0.05, 0.15]
    assert sorted(run.input_tokens for run in load.runs) == [4, 8, 16]
    assert load.span_s == pytest.approx(0.15)


def settled(events, new_tokens=4, text=None):
    run = ServedRun(0.0)
    settle(run, events, Ask((("user", (1,)),), new_tokens), text or Text(Pieces()))
    return run


def test_chunks_that_say_how_many_tokens_they_hold_keep_their_times():
    run = settled([Event(1.0, 1, text="a"), Event(2.0, 3, text="bcd"), Event(2.5, None, finish="length")])
    assert run.token_times == [1.0, 2.0, 2.0, 2.0]
    assert run.counted_by == "server"


@pytest.mark.parametrize(
    ("last", "counted_by"),
    [
        ({"finish": "length", "usage": {"completion_tokens": 4, "prompt_tokens": 77}}, "server"),
        ({"finish": "length"}, "length asked for"),
        ({"finish": None}, "tokenizer"),
    ],
)
def test_chunks_without_counts_get_the_total_by_characters(last, counted_by):
    run = settled([Event(1.0, None, text="ab"), Event(2.0, None, text="cdefghijklmnop"), Event(3.0, None, **last)])
    assert run.token_times == [1.0, 2.0, 2.0, 2.0]
    assert run.counted_by == counted_by
    assert run.input_tokens == (77 if "usage" in last else 0)


def test_an_answer_that_ends_by_itself_is_counted_and_another_length_fails():
    assert settled([Event(1.0, 2, text="ab", finish="stop")]).ended_early
    with pytest.raises(RequestFailed, match="2 tokens received, 4 requested"):
        settled([Event(1.0, 2, text="ab", finish="length")])
    with pytest.raises(RequestFailed, match="without a token"):
        settled([])


@pytest.mark.parametrize(
    ("total", "weights", "parts"),
    [
        (5, [1, 4], [1, 4]),
        (3, [9], [3]),
        (2, [1, 1, 1], [1, 0, 1]),
        (6, [0, 0], [3, 3]),
        (1, [1, 1], [0, 1]),
        (0, [2, 2], [0, 0]),
    ],
)
def test_apportioning(total, weights, parts):
    assert apportion(total, weights) == parts


def test_what_the_server_counts_is_checked_against_the_tokenizer():
    class Exact(Pieces):
        exact = True

    usage = {"completion_tokens": 9, "prompt_tokens": 4, "cached_tokens": 2}
    runs = [ServedRun(0.0, [0.1] * 9, text="abcd" * 2, usage=usage), ServedRun(0.0, [0.1], text="abcd")]
    checks = level(Load(runs=runs), streaming=True, text=Text(Exact()))["checks"]
    assert (checks["tokenizer_disagrees"], checks["usage_missing"], checks["prefix_cache_hit_tokens"]) == (1, 1, 2)
    assert (checks["tokens_by_server"], checks["tokens_by_tokenizer"]) == (10, 3)
