"""Limits, their intervals, and the search for the highest load that meets them, on servers made of a formula."""

import asyncio
import random

import pytest

from llama_engine.errors import InputError
from llama_engine.measure.generation import GenerationRun
from llama_engine.measure.slo import Limits, Search, least_requests, sweep
from llama_engine.measure.stats import wilson


@pytest.mark.parametrize("item", ["ttft_ms", "ttft_ms:0", "speed:3", "tpot_ms:x", "ttft_ms:1.2.3", "mlperf"])
def test_bad_limits(item):
    with pytest.raises(InputError, match="--slo takes ttft_ms:MS"):
        Limits.parse([item])


def test_mlperfs_limits_by_name():
    assert Limits.parse(["mlperf-interactive"]) == Limits({"ttft_ms": 500, "tpot_ms": 30}, 0.99, "mlperf-interactive")
    assert Limits.parse(["mlperf-server"], 0.5).attainment == 0.5
    assert Limits.parse([]) is None
    with pytest.raises(InputError, match="--attainment"):
        Limits.parse(["ttft_ms:3"], 1.5)


def test_goodput_counts_failures_as_missed():
    runs = [GenerationRun(0.0, [0.1, 0.2], [1, 2]), GenerationRun(0.0, [0.4, 0.5], [1, 2])]
    found = Limits.parse(["ttft_ms:200"]).judge(runs, failed=2, wall_s=0.5)
    assert (found["share"], found["requests_per_s"], found["requests"]) == (0.25, 2.0, 4)


def test_the_interval_of_a_share():
    assert wilson(9, 10) == pytest.approx([0.596, 0.982], abs=1e-3)  # by hand
    assert wilson(0, 5)[0] == 0
    assert wilson(5, 5)[1] == 1
    for attainment in (0.9, 0.99):
        count = least_requests(attainment)
        assert wilson(count, count)[0] >= attainment > wilson(count - 1, count - 1)[0]


def server(capacity, seed=0, noise=0.0):
    """A server whose requests meet the limits below ``capacity``; near it, ``noise`` of them by chance."""
    rng, tried = random.Random(seed), []

    async def attempt(value, requests):
        tried.append((value, requests))
        chance = 0.999 if value < capacity * (1 - noise) else 0.5 if value > capacity * (1 + noise) else 0.9
        met = sum(rng.random() < chance for _ in range(requests))
        goodput = {"share": met / requests, "ci95": wilson(met, requests), "requests_per_s": value * met / requests}
        return {"summary": {"goodput": goodput, "output_tokens_per_s": {"p50": min(value, capacity)}}}

    return attempt, tried


@pytest.mark.parametrize("by", ["rate", "concurrency"])
@pytest.mark.parametrize("capacity", [0.7, 3.2, 41.5, 97.5])
def test_bisection_closes_in_on_what_the_server_can_do(by, capacity):
    attempt, tried = server(capacity)
    search = Search(Limits({"ttft_ms": 1}), by, 1.0, 256.0, most=2000)
    found, levels = asyncio.run(search.run(attempt))
    assert len(levels) == len(found["steps"]) == len(tried)
    if by == "concurrency":
        if capacity < 20:
            assert found["highest_met"] == (int(capacity) or None)
        else:
            assert capacity * 0.94 <= found["highest_met"] <= capacity
        assert all(value == int(value) >= 1 for value, _ in tried)
    else:
        assert capacity * 0.95 <= found["highest_met"] <= capacity <= found["lowest_missed"]
    for step in found["steps"]:
        assert step["verdict"] == ("met" if step["value"] < capacity else "missed")


def test_a_doubtful_load_gets_more_requests_and_is_called_undecided():
    attempt, tried = server(10, noise=0.3)
    found, _ = asyncio.run(Search(Limits({"ttft_ms": 1}), "rate", 1.0, 256.0, most=300).run(attempt))
    doubtful = [step for step in found["steps"] if step["verdict"] == "undecided"]
    assert doubtful
    assert max(count for _, count in tried) == 300
    assert all(step["ci95"][0] < 0.9 <= step["ci95"][1] for step in doubtful)


def test_a_server_that_meets_every_load_ends_at_the_ceiling():
    attempt, tried = server(1e9)
    found, _ = asyncio.run(Search(Limits({"ttft_ms": 1}), "rate", 1.0, 48.0).run(attempt))
    assert (found["highest_met"], found["lowest_missed"]) == (48.0, None)
    assert [value for value, _ in tried] == [1, 2, 4, 8, 16, 32, 48]


def test_a_sweep_ends_where_no_more_is_gained():
    attempt, tried = server(24)
    levels = asyncio.run(sweep(attempt, 1, 256, 4))
    assert [value for value, _ in tried] == [1, 2, 4, 8, 16, 32, 64]
    assert len(levels) == 7
