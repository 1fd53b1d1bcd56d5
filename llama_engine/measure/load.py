"""Load on a served engine: closed loop (each of N users waits for its answer), open loop (Poisson arrivals), traces.

The generator measures itself too: how late its event loop and its sends are, and, against a server that answers at
once, how many responses a second it could take.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_engine.measure.answers import ServedRun, settle
from llama_engine.measure.generation import samples_of, summarize
from llama_engine.measure.slo import Limits
from llama_engine.measure.stats import percentile
from llama_engine.measure.text import Prefixes, Text
from llama_engine.measure.traffic import Session, Traffic
from llama_engine.serving.client import RequestFailed
from llama_engine.serving.target import Ask, Event, Target

TICK_S = 0.005
PAUSE_S = 0.05  # after a failure: a dead server must not be asked a thousand times a second
RECOUNT_TOLERANCE = 2  # tokens by which server and tokenizer may differ: text does not always cut the same way again


@dataclass
class Load:
    """What happened at one level. Times are ``perf_counter`` seconds."""

    runs: list[ServedRun] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    lag_s: list[float] = field(default_factory=list)
    prefixes: Counter[str] = field(default_factory=Counter)  # prompt_tokens, shared_tokens, hit_tokens
    responses: int = 0
    tokens: int = 0
    sent: int = 0
    span_s: float = 0.0  # from the first arrival of a plan to the last
    rounds: list[Load] = field(default_factory=list)  # that this one was pooled from

    @classmethod
    def pooled(cls, rounds: Sequence[Load]) -> Load:
        """Several rounds as one load: samples together, tokens/s one a round."""
        whole = cls(rounds=[part for part in rounds if part.runs])
        for part in rounds:
            whole.runs += part.runs
            whole.failures += part.failures
            whole.lag_s += part.lag_s
            whole.prefixes += part.prefixes
            whole.responses += part.responses
            whole.tokens += part.tokens
            whole.sent += part.sent
        return whole

    @property
    def rates(self) -> list[float]:
        """Output tokens received a second, one a round."""
        return [sum(len(run.token_times) for run in part.runs) / part.wall_s for part in self.rounds or [self]]

    @property
    def wall_s(self) -> float:
        """First t0 to last tN of the successful requests, of all rounds together."""
        if self.rounds:
            return sum(part.wall_s for part in self.rounds)
        return max(run.token_times[-1] for run in self.runs) - min(run.t0 for run in self.runs)


@dataclass
class Generator:
    """Sends a workload's requests to one target. The same seed sends the same lengths at the same times."""

    target: Target
    traffic: Traffic
    text: Text
    streaming: bool = True
    seed: int = 0
    timeout_s: float = 600.0
    on_progress: Callable[[Load], None] = lambda load: None
    prefixes: Prefixes = field(default_factory=Prefixes)

    async def closed(self, concurrency: int, *, requests: int = 0, duration_s: float = 0.0) -> Load:
        """``concurrency`` users, each sending its next request when its last is answered, until ``requests`` are
        sent or ``duration_s`` is over, or a workload from a file ends."""
        load = Load()
        end = time.perf_counter() + duration_s if duration_s else float("inf")
        numbers = iter(range(requests)) if requests else itertools.count()
        sessions = self.traffic.sessions(self.text, self.seed)

        def more() -> bool:
            return time.perf_counter() < end and next(numbers, None) is not None

        async def user() -> None:
            while time.perf_counter() < end and (not requests or load.sent < requests):
                session = next(sessions, None)
                if session is None:
                    return
                await self._converse(load, session, None, more)

        await self._watched(load, [user() for _ in range(concurrency)])
        return load

    async def open(self, rate: float, *, requests: int = 0, duration_s: float = 0.0) -> Load:
        """Poisson arrivals of sessions at ``rate`` a second whatever the server does; latency counts from the
        scheduled time. A later turn is due when its thinking time after the last answer is over."""
        rng, due, plan = random.Random(f"arrivals {self.seed}"), 0.0, []
        sessions = self.traffic.sessions(self.text, self.seed)
        while (len(plan) < requests) if requests else (due < duration_s):
            due += rng.expovariate(rate)
            session = next(sessions, None)
            if session is None:
                break
            plan.append((due, session))
        return await self._arrive(plan)

    async def replay(self, speed: float = 1.0, *, requests: int = 0, duration_s: float = 0.0) -> Load:
        """A trace's own arrivals, ``speed`` times as fast."""
        found = itertools.islice(self.traffic.sessions(self.text, self.seed), requests or None)
        plan = [((session.arrival_s or 0.0) / speed, session) for session in found]
        return await self._arrive([item for item in plan if not duration_s or item[0] < duration_s])

    async def _arrive(self, plan: Sequence[tuple[float, Session]]) -> Load:
        load = Load(span_s=plan[-1][0] - plan[0][0] if plan else 0.0)
        start = time.perf_counter() + 0.1

        async def arrival(due: float, session: Session) -> None:
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            load.lag_s.append(time.perf_counter() - start - due)
            await self._converse(load, session, start + due, lambda: True)

        await self._watched(load, [arrival(*item) for item in plan])
        return load

    async def _converse(self, load: Load, session: Session, t0: float | None, more: Callable[[], bool]) -> None:
        """The turns of one session; the first is due at ``t0``, or now."""
        messages: list[tuple[str, tuple[int, ...]]] = []
        if session.prefix:
            messages.append(("system", tuple(session.prefix)))
        for turn in session.turns:
            if turn.think_s:
                await asyncio.sleep(turn.think_s)
            if not more():
                return
            messages.append(("user", tuple(turn.prompt)))
            sampling = self.traffic.sampling
            if sampling:  # each request draws for itself
                sampling = dataclasses.replace(sampling, seed=(sampling.seed + load.sent) % (1 << 63))
            ask = Ask(tuple(messages), turn.new_tokens, sampling)
            run = await self._send(load, ask, time.perf_counter() if t0 is None else t0, turn.think_s)
            if run is None:
                return
            messages.append(("assistant", tuple(run.token_ids if run.token_ids else self.text.codec.encode(run.text))))
            t0 = None

    async def _send(self, load: Load, ask: Ask, t0: float, think_s: float) -> ServedRun | None:
        run = ServedRun(t0, input_tokens=len(ask.ids), think_s=think_s)
        load.sent += 1
        load.prefixes["shared_tokens"] += self.prefixes.add(ask.ids)
        load.prefixes["prompt_tokens"] += run.input_tokens
        try:
            events = await asyncio.wait_for(self._receive(load, ask), self.timeout_s)
            settle(run, events, ask, self.text)
        except (RequestFailed, asyncio.TimeoutError) as error:
            load.failures[str(error)[:200] or type(error).__name__] += 1
            await asyncio.sleep(PAUSE_S)
            run = None
        else:
            load.runs.append(run)
        self.on_progress(load)
        return run

    async def _receive(self, load: Load, ask: Ask) -> list[Event]:
        events = []
        async for event in self.target.stream(ask, streaming=self.streaming):
            events.append(event)
            load.responses += 1
            load.tokens += event.tokens or (1 if event.text else 0)
        return events

    async def _watched(self, load: Load, work: list[Any]) -> None:
        async with lag_into(load.lag_s):
            await asyncio.gather(*work)


@contextlib.asynccontextmanager
async def lag_into(lag_s: list[float]) -> AsyncIterator[None]:
    """While it is open, how late this event loop wakes, every :data:`TICK_S`, is added to ``lag_s``."""

    async def tick() -> None:
        while True:
            due = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            lag_s.append(time.perf_counter() - due)

    ticking = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticking.cancel()


def level(load: Load, *, streaming: bool, limits: Limits | None = None, text: Text | None = None) -> dict[str, Any]:
    """The ``samples``, ``summary``, ``checks`` and ``failures`` of one level; goodput when there are ``limits``.

    Goodput = requests that met every limit / wall. Without streaming there is no first token, so no TTFT or TPOT.
    ``text`` counts each answer again where the server sent text.
    """
    failed = sum(load.failures.values())
    checks: dict[str, Any] = {
        "failed_requests": failed,
        "client_lag_p99_ms": percentile(load.lag_s, 99) * 1e3 if load.lag_s else None,
        "client_lag_max_ms": max(load.lag_s, default=0.0) * 1e3,
        "prompt_tokens": load.prefixes["prompt_tokens"],
        "shared_prompt_tokens": load.prefixes["shared_tokens"],
    }
    part: dict[str, Any] = {"samples": {}, "summary": {}, "checks": checks, "failures": dict(load.failures)}
    if not load.runs:
        return part
    runs, wall = load.runs, load.wall_s
    samples = samples_of(runs, streaming=streaming) | {"input_tokens": [run.input_tokens for run in runs]}
    summed = summarize(samples, load.rates)
    samples.pop("itl_ms", None)  # too many to keep
    summed["requests_per_s"] = len(runs) / wall
    summed["total_tokens_per_s"] = (sum(samples["input_tokens"]) + sum(samples["output_tokens"])) / wall
    checks |= {
        "requests_per_s": len(runs) / wall,
        "mean_latency_s": summed["latency_s"]["mean"],
        "mean_think_s": sum(run.think_s for run in runs) / len(runs),
        "responses_per_s": load.responses / wall,
        "clock_backwards": sum(run.clock_backwards for run in runs),
        "ended_early": sum(run.ended_early for run in runs),
    }
    checks |= dict(_counted(runs, text))
    if "hit_tokens" in load.prefixes:
        checks["prefix_cache_hit_tokens"] = load.prefixes["hit_tokens"]
    if limits:
        summed["goodput"] = limits.judge(runs, failed, wall)
    return part | {"samples": samples, "summary": summed, "wall_s": wall}


def _counted(runs: Sequence[ServedRun], text: Text | None) -> Iterator[tuple[str, Any]]:
    """What the server counted, and whether the tokenizer agrees."""
    spoken = [run for run in runs if run.text]
    if not spoken:
        return
    cached = [run.usage["cached_tokens"] for run in spoken if run.usage and "cached_tokens" in run.usage]
    if cached:
        yield "prefix_cache_hit_tokens", sum(cached)
    yield "usage_missing", sum(run.usage is None for run in spoken)
    yield "tokens_counted_by", dict(Counter(run.counted_by for run in spoken))
    if text and text.codec.exact:
        again = [(len(run.token_times), len(text.codec.encode(run.text))) for run in spoken]
        yield "tokenizer_disagrees", sum(abs(a - b) > RECOUNT_TOLERANCE for a, b in again)
        yield "tokens_by_server", sum(a for a, _ in again)
        yield "tokens_by_tokenizer", sum(b for _, b in again)
