"""What the users of several replicas see when one of them dies: a closed loop whose answers are all compared.

Every user asks seeded requests again and again, greedy and sampled ones in turn. The undisturbed run before gives each
request's right answer; what comes in the disturbed run is lost (an error, or too short), duplicated (too long), wrong
(another id), or right.
"""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
import functools
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_engine.measure.generation import GenerationRun
from llama_engine.measure.load import lag_into
from llama_engine.measure.stats import percentile, summary
from llama_engine.sampling import SamplingParams
from llama_engine.serving.client import RequestFailed
from llama_engine.serving.target import Ask, Target

BUCKET_S = 0.5  # of the timeline
SETTLED_S = 2.0  # throughput is back when its mean over so long is
SETTLED_SHARE = 0.9  # so much of what it was


def some_requests(count: int, input_tokens: int, output_tokens: int, vocab: int, seed: int) -> list[Ask]:
    """Distinct ones, every second greedy."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        prompt = tuple(rng.randrange(vocab) for _ in range(input_tokens))
        sampled = SamplingParams(0.8, top_p=0.95, seed=rng.getrandbits(63))
        found.append(Ask((("user", prompt),), output_tokens, sampled if number % 2 else None))
    return found


@dataclass
class Answer:
    """``run`` of request ``number``; ``error`` where it failed; ``resumed_after`` so many tokens another replica went
    on with it, as the gateway says."""

    number: int
    run: GenerationRun
    error: str | None = None
    resumed_after: int | None = None


@dataclass
class Phase:
    """What came of one closed loop, between two ``perf_counter`` times."""

    start: float
    end: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    lag_s: list[float] = field(default_factory=list)

    @functools.cached_property
    def token_times(self) -> list[float]:
        """Of all answers, in order; once the loop has ended."""
        return sorted(at for answer in self.answers for at in answer.run.token_times)

    def tokens_in(self, since: float, until: float) -> int:
        return bisect.bisect_left(self.token_times, until) - bisect.bisect_left(self.token_times, since)

    def rate(self, since: float, until: float) -> float:
        """Tokens a second."""
        return self.tokens_in(since, until) / (until - since)


async def closed_loop(targets: Sequence[Target], requests: Sequence[Ask], users: int, duration_s: float) -> Phase:
    """``users``, spread over ``targets``, ask ``requests`` in turn for ``duration_s``, and until all were asked once.
    What is running at the end is waited for."""
    phase, numbers = Phase(time.perf_counter()), itertools.count()

    async def user(target: Target) -> None:
        while (number := next(numbers)) < len(requests) or time.perf_counter() < phase.start + duration_s:
            number %= len(requests)
            answer = Answer(number, GenerationRun(time.perf_counter()))
            phase.answers.append(answer)
            try:
                async for event in target.stream(requests[number]):
                    answer.run.add(list(event.ids), event.at)
                    if event.usage:
                        answer.resumed_after = event.usage.get("resumed_after")
            except RequestFailed as error:
                answer.error = str(error)[:200] or type(error).__name__
                await asyncio.sleep(0.05)

    async with lag_into(phase.lag_s):
        await asyncio.gather(*(user(targets[i % len(targets)]) for i in range(users)))
    phase.end = time.perf_counter()
    return phase


async def warm(targets: Sequence[Target], requests: Sequence[Ask]) -> None:
    """Ask each once, for a few tokens."""
    short = [dataclasses.replace(request, new_tokens=8) for request in requests]
    await closed_loop(targets, short, len(short), 0)


def compare(phase: Phase, right: dict[int, list[int]], new_tokens: int) -> dict[str, int]:
    """How many answers were lost, duplicated or wrong, of how many.

    One that differs only after a replica went on with it is ``diverged`` instead: a GPU rounds a prompt otherwise than
    the same tokens one by one.
    """
    counts = {"answers": len(phase.answers), "lost": 0, "duplicated": 0, "wrong": 0, "diverged": 0}
    for answer in phase.answers:
        ids, kept = answer.run.token_ids, answer.resumed_after or 0
        if answer.error or len(ids) < new_tokens:
            counts["lost"] += 1
        elif len(ids) > new_tokens:
            counts["duplicated"] += 1
        elif ids != (wanted := right.get(answer.number, ids)):
            counts["diverged" if kept and ids[:kept] == wanted[:kept] else "wrong"] += 1
    return counts


def right_answers(phase: Phase) -> tuple[dict[int, list[int]], int]:
    """{request: ids} of those that were answered alike every time, and how many were not."""
    seen: dict[int, set[tuple[int, ...]]] = {}
    for answer in phase.answers:
        if not answer.error:
            seen.setdefault(answer.number, set()).add(tuple(answer.run.token_ids))
    return {number: list(*ids) for number, ids in seen.items() if len(ids) == 1}, sum(len(x) > 1 for x in seen.values())


def disturbance(phase: Phase, killed_at: float, back_at: float | None, duration_s: float) -> dict[str, Any]:
    """The dip and what came after it; times in seconds from the kill.

    ``longest_gap_s`` is the longest time that any user waited for the next token, first ones included, over the kill;
    ``usual_gap_s`` the longest before it.
    """
    ended = phase.start + duration_s
    before = phase.rate(phase.start + min(1.0, (killed_at - phase.start) / 4), killed_at)
    buckets = [phase.start + i * BUCKET_S for i in range(int(duration_s / BUCKET_S))]
    timeline = [{"s": at - killed_at, "tokens_per_s": phase.rate(at, at + BUCKET_S)} for at in buckets]
    gaps: dict[bool, list[float]] = {True: [0.0], False: [0.0]}
    for answer in phase.answers:
        for start, end in itertools.pairwise([answer.run.t0, *answer.run.token_times]):
            gaps[end > killed_at].append(end - start)
    steps = [killed_at + i * BUCKET_S / 5 for i in range(int((ended - SETTLED_S - killed_at) / BUCKET_S * 5))]
    enough = [phase.rate(at, at + SETTLED_S) >= SETTLED_SHARE * before for at in steps]
    dipped = next((i for i, well in enumerate(enough) if not well), 0)
    settled_at = next((at for at, well in zip(steps[dipped:], enough[dipped:]) if well), None)
    return {
        "before_tokens_per_s": before,
        "lowest_tokens_per_s": min(x["tokens_per_s"] for x in timeline if x["s"] >= -BUCKET_S / 2),
        "longest_gap_s": max(gaps[True]),
        "usual_gap_s": max(gaps[False]),
        "recovery_s": None if settled_at is None else settled_at - killed_at,
        "full_strength_s": None if back_at is None else back_at - killed_at,
        "timeline": timeline,
    }


def summarize_phase(phase: Phase) -> dict[str, Any]:
    """Percentiles of the whole answers, and tokens a second from the first request to the last token."""
    runs = [answer.run for answer in phase.answers if not answer.error]
    times: dict[str, Callable[[GenerationRun], float]] = {
        "ttft_ms": lambda run: run.ttft_s * 1e3,
        "tpot_ms": lambda run: run.tpot_s * 1e3,
        "latency_s": lambda run: run.latency_s,
    }
    found: dict[str, Any] = {name: summary([of(run) for run in runs]) for name, of in times.items()} if runs else {}
    return found | {"output_tokens_per_s": summary([len(phase.token_times) / (phase.end - phase.start)])}


def failures(phases: Sequence[Phase]) -> dict[str, int]:
    """How many requests failed with which message."""
    return dict(Counter(answer.error for phase in phases for answer in phase.answers if answer.error))


def lag_p99_ms(phases: Sequence[Phase]) -> float:
    return percentile([lag for phase in phases for lag in phase.lag_s], 99) * 1e3
