"""Load on a server: closed loop (each of N users waits for its answer) and open loop (Poisson arrivals).

The generator measures itself too: how late its event loop and its sends are, and, against a null model in the same
server, how many responses a second it could take.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_engine.errors import InputError
from llama_engine.measure.generation import GenerationRun, samples_of, summarize
from llama_engine.measure.stats import percentile
from llama_engine.serving.client import Client, RequestFailed

TICK_S = 0.005
SLO: dict[str, Callable[[GenerationRun], float]] = {
    "ttft_ms": lambda run: run.ttft_s * 1e3,
    "tpot_ms": lambda run: run.tpot_s * 1e3,
    "latency_ms": lambda run: run.latency_s * 1e3,
}


@dataclass(frozen=True)
class Length:
    """A token count: fixed, or drawn uniformly from ``low .. high``."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Length:
        """``"128"`` or ``"16:512"``. Raises :class:`InputError`."""
        low, _, high = text.partition(":")
        if not (low.isdecimal() and (high or low).isdecimal() and 1 <= int(low) <= int(high or low)):
            raise InputError(
                f"--input-tokens and --output-tokens take N or LOW:HIGH with 1 <= LOW <= HIGH, got {text!r}"
            )
        return cls(int(low), int(high or low))

    @property
    def mean(self) -> float:
        return (self.low + self.high) / 2

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


def parse_slo(items: Sequence[str]) -> dict[str, float]:
    """``["ttft_ms:200", "tpot_ms:30"]``. Raises :class:`InputError`."""
    limits = {}
    for item in items:
        found = re.fullmatch(rf"({'|'.join(SLO)}):(\d+\.?\d*)", item)
        if not found or not 0 < float(found[2]) < math.inf:
            raise InputError(f"--slo takes {', '.join(f'{key}:MS' for key in SLO)}, got {item!r}")
        limits[found[1]] = float(found[2])
    return limits


@dataclass
class Load:
    """What happened at one level. Times are ``perf_counter`` seconds; ``t0`` of a run is its scheduled send time."""

    runs: list[GenerationRun] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    lag_s: list[float] = field(default_factory=list)
    responses: int = 0
    tokens: int = 0

    @property
    def wall_s(self) -> float:
        """First t0 to last tN of the successful requests."""
        return max(run.token_times[-1] for run in self.runs) - min(run.t0 for run in self.runs)


@dataclass
class Generator:
    """Sends drawn requests through one client. ``prompts(n)`` gives a prompt of n ids."""

    client: Client
    prompts: Callable[[int], list[int]]
    input_tokens: Length
    output_tokens: Length
    streaming: bool = True
    model: str = "tensorrt_llm"
    seed: int = 0
    timeout_s: float = 600.0
    on_progress: Callable[[Load], None] = lambda load: None

    async def closed(self, concurrency: int, *, requests: int = 0, duration_s: float = 0.0) -> Load:
        """``concurrency`` users, each sending its next request when its last is answered, until ``requests`` are
        sent or ``duration_s`` is over."""
        load, rng = Load(), random.Random(self.seed)
        end = time.perf_counter() + duration_s if duration_s else float("inf")
        numbers = iter(range(requests)) if requests else itertools.count()

        async def user() -> None:
            while time.perf_counter() < end and next(numbers, None) is not None:
                await self._send(load, time.perf_counter(), self.input_tokens.draw(rng), self.output_tokens.draw(rng))

        await self._watched(load, [user() for _ in range(concurrency)])
        return load

    async def open(self, rate: float, *, requests: int = 0, duration_s: float = 0.0) -> Load:
        """Poisson arrivals at ``rate`` a second whatever the server does; latency counts from the scheduled time."""
        load, rng = Load(), random.Random(self.seed)
        due, plan = 0.0, []
        while (len(plan) < requests) if requests else (due < duration_s):
            due += rng.expovariate(rate)
            plan.append((due, self.input_tokens.draw(rng), self.output_tokens.draw(rng)))
        start = time.perf_counter() + 0.1

        async def arrival(due: float, input_tokens: int, output_tokens: int) -> None:
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            load.lag_s.append(time.perf_counter() - start - due)
            await self._send(load, start + due, input_tokens, output_tokens)

        await self._watched(load, [arrival(*item) for item in plan])
        return load

    async def _send(self, load: Load, t0: float, input_tokens: int, output_tokens: int) -> None:
        run = GenerationRun(t0)
        try:
            await asyncio.wait_for(self._receive(load, run, input_tokens, output_tokens), self.timeout_s)
        except (RequestFailed, asyncio.TimeoutError) as error:
            load.failures[str(error)[:200] or type(error).__name__] += 1
            await asyncio.sleep(0.05)  # a dead server must not be asked a thousand times a second
        else:
            if len(run.token_ids) == output_tokens:
                load.runs.append(run)
            else:
                load.failures[f"{len(run.token_ids)} tokens received, {output_tokens} requested"] += 1
        self.on_progress(load)

    async def _receive(self, load: Load, run: GenerationRun, input_tokens: int, output_tokens: int) -> None:
        prompt = self.prompts(input_tokens)
        async for ids in self.client.generate(prompt, output_tokens, streaming=self.streaming, model=self.model):
            run.add(ids, time.perf_counter())
            load.responses += 1
            load.tokens += len(ids)

    async def _watched(self, load: Load, work: list[Any]) -> None:
        async def tick() -> None:
            while True:
                due = time.perf_counter() + TICK_S
                await asyncio.sleep(TICK_S)
                load.lag_s.append(time.perf_counter() - due)

        ticking = asyncio.create_task(tick())
        try:
            await asyncio.gather(*work)
        finally:
            ticking.cancel()


def level(load: Load, *, streaming: bool, slo: dict[str, float]) -> dict[str, Any]:
    """The ``samples``, ``summary``, ``checks`` and ``failures`` of one level; goodput when ``slo`` is given.

    Goodput = requests that met every limit / wall. Without streaming there is no first token, so no TTFT or TPOT.
    """
    failed = sum(load.failures.values())
    checks: dict[str, Any] = {
        "failed_requests": failed,
        "client_lag_p99_ms": percentile(load.lag_s, 99) * 1e3 if load.lag_s else None,
        "client_lag_max_ms": max(load.lag_s, default=0.0) * 1e3,
    }
    part: dict[str, Any] = {"samples": {}, "summary": {}, "checks": checks, "failures": dict(load.failures)}
    if not load.runs:
        return part
    runs, wall = load.runs, load.wall_s
    samples = samples_of(runs, streaming=streaming)
    summed = summarize(samples, [sum(samples["output_tokens"]) / wall])
    samples.pop("itl_ms", None)  # too many to keep
    summed["requests_per_s"] = len(runs) / wall
    checks |= {
        "requests_per_s": len(runs) / wall,
        "mean_latency_s": summed["latency_s"]["mean"],
        "responses_per_s": load.responses / wall,
        "clock_backwards": sum(run.clock_backwards for run in runs),
    }
    if slo:
        met = sum(all(SLO[key](run) <= limit for key, limit in slo.items()) for run in runs)
        summed["goodput"] = {"slo": slo, "requests_per_s": met / wall, "share": met / (len(runs) + failed)}
    return part | {"samples": samples, "summary": summed, "wall_s": wall}
