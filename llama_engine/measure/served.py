"""One served engine under load, level by level: any target, one generator, one form of result."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from rich.console import Console

from llama_engine.config import ModelConfig
from llama_engine.errors import RunError
from llama_engine.measure.cost import Cost
from llama_engine.measure.demand import Demand, sampled, workload_of
from llama_engine.measure.generation import add_device, progress_bar
from llama_engine.measure.load import Generator, Load, level
from llama_engine.measure.result import Result, new_result
from llama_engine.measure.slo import Search, sweep
from llama_engine.measure.telemetry import Nvml, Telemetry
from llama_engine.measure.text import Prefixes, Text
from llama_engine.serving.null_server import null_server
from llama_engine.serving.openai_target import OpenAITarget
from llama_engine.serving.server import read_metrics
from llama_engine.serving.target import Target, TritonTarget, describe_target

NULL_S = 2.0
PUBLISHED_S = 0.5  # twice as long as a server takes to publish what it counted
PREFIX_CACHE = ("prefix_cache_hit_tokens", "prefix_cache_query_tokens")
OPEN_WARMUP = 4  # users
console = Console(stderr=True)
Null = Callable[[], AbstractAsyncContextManager["Target | None"]]


class Bench:
    """Measures one level after the other on a target and remembers what they share."""

    def __init__(
        self,
        asked: Demand,
        target: Target,
        text: Text,
        environment: dict[str, Any],
        telemetry: Telemetry,
        null_rate: float | None,
        metrics_url: str | None = None,
    ) -> None:
        self.asked, self.target, self.text, self.environment = asked, target, text, environment
        self.telemetry, self.null_rate, self.metrics_url = telemetry, null_rate, metrics_url
        self.cost: Cost | None = None
        self.values: dict[str, float] = {}
        self._generator = Generator(target, asked.traffic, text, asked.streaming, asked.seed, asked.timeout)
        self._warm = dataclasses.replace(self._generator, traffic=asked.traffic.plain, prefixes=Prefixes())
        self._count = 0

    @property
    def shared(self) -> float:
        return self._generator.prefixes.share

    async def level(self, kind: str, value: float, requests: int, bar: Callable[[str], None]) -> dict[str, Any]:
        """One load after a warm-up: ``kind`` is concurrency, rate or replay."""
        asked, closed = self.asked, kind == "concurrency"
        value = int(value) if closed else value
        units = {"concurrency": "at once", "rate": "requests/s", "replay": "times the trace's speed"}
        self._count += 1
        name = f"{value:g} {units[kind]}"
        bar(f"{name}: warm-up")
        await self._warm.closed(value if closed else OPEN_WARMUP, requests=int(max(value, OPEN_WARMUP)))
        started = time.perf_counter()

        def progress(load: Load) -> None:
            rate, failed = load.tokens / (time.perf_counter() - started), sum(load.failures.values())
            bar(f"{name}: {rate:,.0f} tok/s" + (f", {failed} failed" if failed else ""))

        self._generator.on_progress = progress
        send = {"concurrency": self._generator.closed, "rate": self._generator.open, "replay": self._generator.replay}
        section = f"{self._count}: {name}"
        self.text.fresh()
        with self.telemetry.section(section):
            load = await send[kind](value, requests=requests, duration_s=asked.duration)
        part: dict[str, Any] = {"mode": {"concurrency": "closed", "rate": "open", "replay": "trace"}[kind]}
        if kind == "replay":  # a rate too, if not an even one
            part |= {"speed": value, "rate": load.sent / max(load.span_s, 1e-9)}
        else:
            part[kind] = value
        if drawn := asked.traffic.sampling:
            part["workload"] = {"sampling": sampled(drawn)}
        part |= level(load, streaming=asked.streaming, limits=asked.limits, text=self.text)
        part["checks"]["null_responses_per_s"] = self.null_rate
        await self._read_metrics(part)
        lengths = part["samples"].get("input_tokens"), part["samples"].get("output_tokens")
        nbytes = None
        if self.cost and closed and all(lengths):
            nbytes = self.cost.decode_nbytes(*(sum(x) / len(x) for x in lengths), value)
        return add_device(part, self.telemetry.summary(section), nbytes, self.environment)

    async def _read_metrics(self, part: dict[str, Any]) -> None:
        if self.values and self.metrics_url:
            await asyncio.sleep(PUBLISHED_S)
            before, (self.values, _) = self.values, await asyncio.to_thread(read_metrics, self.metrics_url)
            counted = {key: int(self.values[key] - before[key]) for key in PREFIX_CACHE if key in self.values}
            part["checks"] |= counted


async def null_rate_of(null: Target | None, asked: Demand, text: Text) -> tuple[float | None, dict[str, Any] | None]:
    """Responses a second that this client takes from a server that answers at once, and what a result says of it."""
    if null is None:
        return None, None
    users = max([*asked.concurrency, 8])
    generator = Generator(null, asked.traffic.plain, text, asked.streaming, asked.seed)
    load = await generator.closed(users, duration_s=NULL_S)
    rate = load.responses / load.wall_s if load.runs else None
    return rate, {"responses_per_s": rate, "concurrency": users, "failures": dict(load.failures), "url": null.url}


def triton_null(protocol: str, url: str) -> Null:
    """The null model beside the engine in the same server, where it was started with one."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Target | None]:
        target = TritonTarget(protocol, url, "null_model")
        try:
            yield target if await target.ready() else None
        finally:
            await target.close()

    return opened


def openai_null(text: Text, chat: bool) -> Null:
    """A null server of OpenAI's API on this machine."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Target | None]:
        async with null_server() as url:
            target = OpenAITarget(url, chat=chat, decode=text.codec.decode, model="null", key_variable="")
            try:
                yield target
            finally:
                await target.close()

    return opened


async def measure(
    asked: Demand,
    open_target: Callable[[], Target],
    text: Text,
    environment: dict[str, Any],
    *,
    null: Null,
    metrics_url: str | None = None,
    own_processes: int = 0,
    model: ModelConfig | None = None,
    cost: Cost | None = None,
    about: Callable[[Target, str], dict[str, Any]],
) -> Result:
    """The client's own ceiling first, then every level, sweep and search.

    ``about`` gives benchmark, backend, model and engine of the result, from the target and its kernels' name. On a GPU
    ``own_processes`` are those that may use it, 0 for all that do at the start. ``model`` and ``metrics_url`` are
    known for a server of this repository, and give MBU; ``cost`` does where the page is another's.
    """
    target = open_target()
    try:
        await target.prepare()
        null_rate, null_model = None, None
        async with null() as idle:
            if idle is not None:
                null_rate, null_model = await null_rate_of(idle, asked, text)
        if not own_processes and environment["device"] == "cuda":
            own_processes = len(Nvml().read("nvmlDeviceGetComputeRunningProcesses") or ())
        with Telemetry(environment["device"], own_processes=max(1, own_processes)) as telemetry:
            bench = Bench(asked, target, text, environment, telemetry, null_rate, metrics_url)
            bench.cost = cost
            kernels = "unknown"
            if metrics_url:
                try:
                    bench.values, kernels = await asyncio.to_thread(read_metrics, metrics_url)
                    bench.cost = cost_of(model, bench.values) or cost
                except OSError:
                    console.print(f"no metrics at {metrics_url}: MBU is left out (give --metrics-url)")
            levels, search = await run_levels(asked, bench)
    finally:
        await target.close()
    if not any(part["samples"] for part in levels):
        raise RunError(f"no request succeeded at {target.url}: {next(iter(levels[0]['failures']), 'no answer')}")
    more = {"search": search} if search else {}
    return new_result(
        **about(target, kernels),
        workload=workload_of(asked, text, bench.shared),
        environment=environment,
        target=describe_target(target),
        null_model=null_model,
        levels=levels,
        **more,
    )


def cost_of(model: ModelConfig | None, values: dict[str, float]) -> Cost | None:
    """What a token costs, from the metrics page of an engine of ours; another's says nothing of it."""
    sizes = [values.get(name) for name in ("step_nbytes", "kv_nbytes_per_token")]
    return Cost.of(model.share(int(values.get("tp_size", 1))), *map(int, sizes)) if model and all(sizes) else None


async def run_levels(asked: Demand, bench: Bench) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The levels that were asked for one by one, then those of a sweep, then those of a search."""
    search = None
    with progress_bar() as bar:
        task = bar.add_task("", total=None)

        def show(text: str) -> None:
            bar.update(task, description=text)

        def attempt(kind: str) -> Any:
            async def one(value: float, requests: int) -> dict[str, Any]:
                part = await bench.level(kind, value, requests, show)
                bar.advance(task)
                return part

            return one

        levels = []
        plan = [("concurrency", x, 4 * x) for x in asked.concurrency] + [("rate", x, 32) for x in asked.rate]
        plan += [("replay", asked.replay, 0)] if asked.replay else []
        for kind, value, usual in plan:
            requests = asked.requests or (0 if asked.duration else usual)
            levels.append(await attempt(kind)(value, requests))
        if asked.sweep:
            levels += await sweep(attempt("concurrency"), 1, asked.most, 4)
        if asked.find:
            finder = Search(asked.limits, asked.find, 1.0, float(asked.most), asked.most_requests)
            search, tried = await finder.run(attempt(asked.find))
            for step in search["steps"]:
                step["level"] += len(levels)
            levels += tried
    return levels, search
