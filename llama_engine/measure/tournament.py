"""Several engines on one machine and one clock, in turn: A B C A B C, with paired ratios.

A contestant is a server that runs (any target of :mod:`llama_engine.serving.target`) or a stack in a process of its own
(:mod:`llama_engine.measure.peers`). All get the same prompts in the same round, and other prompts in the next.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import statistics
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_engine.errors import InputError, RunError
from llama_engine.measure.demand import sampled
from llama_engine.measure.generation import add_device, progress_bar
from llama_engine.measure.load import Generator, Load, ServedRun, level
from llama_engine.measure.result import Result, new_result
from llama_engine.measure.stack_worker import StackProcess
from llama_engine.measure.stats import RESAMPLES, SEED, bootstrap_ratio
from llama_engine.measure.telemetry import Telemetry
from llama_engine.measure.text import Prefixes, Text
from llama_engine.measure.traffic import Traffic
from llama_engine.serving.client import RequestFailed
from llama_engine.serving.target import Ask, Target, describe_target

WAKE = Ask((("user", tuple(range(1, 9))),), 2)
METRICS = {"output_tokens_per_s": False, "ttft": True, "tpot": True, "latency": True}  # whether less is better


@dataclass(frozen=True)
class Cell:
    """A workload at a number of requests at once."""

    traffic: Traffic
    users: int

    @property
    def name(self) -> str:
        return f"{self.traffic.name}, {self.users} at once"


class Contestant:
    """``memory`` says whether it is loaded while others are timed: alone, shared, swapped, or unknown to us."""

    name: str
    kind: str
    memory: str
    null_rate: float | None = None
    failed = ""  # why it left the tournament
    most = 1 << 30  # requests at once
    max_seq_len: int | None = None  # tokens of prompt and answer, where it is known

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def wake(self, asks: Sequence[Ask]) -> None:
        """Answer these uncounted, right before a turn."""
        self.prefixes = Prefixes()
        for ask in asks:
            self.prefixes.add(ask.ids)

    async def play(self, cell: Cell, text: Text, seed: int) -> Load:
        """One turn."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        said = {"name": self.name, "kind": self.kind, "memory": self.memory}
        return said | ({"failed": self.failed} if self.failed else {})


class ServedContestant(Contestant):
    """A server that was started by somebody else; ``per_user`` requests of each user make a turn."""

    memory = "unknown"

    def __init__(self, name: str, url: str, opened: Callable[[], Target], per_user: int, timeout_s: float) -> None:
        self.name, self.url, self._open, self._per_user, self._timeout_s = name, url, opened, per_user, timeout_s

    async def start(self) -> None:
        self.target = self._open()
        await self.target.prepare()
        self.kind = self.target.api

    async def stop(self) -> None:
        if hasattr(self, "target"):
            await self.target.close()

    async def wake(self, asks: Sequence[Ask]) -> None:
        await super().wake(asks)
        for ask in asks:
            try:
                async for _ in self.target.stream(ask):
                    pass
            except RequestFailed as error:
                raise RunError(f"{self.name}: {error}") from None

    async def play(self, cell: Cell, text: Text, seed: int) -> Load:
        generator = Generator(
            self.target, cell.traffic, text, seed=seed, timeout_s=self._timeout_s, prefixes=self.prefixes
        )
        return await generator.closed(cell.users, requests=cell.users * self._per_user)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"target": describe_target(self.target)}


class StackContestant(Contestant):
    """An engine in a process of its own, which gets all requests of a turn at once."""

    def __init__(self, name: str, job: dict[str, Any], memory: str) -> None:
        self.name, self.kind, self._job, self.memory = name, job["kind"], job, memory
        self._process: StackProcess | None = None
        self._hits = 0  # tokens that its prefix cache has found since it was loaded

    async def start(self) -> None:
        if self._process is None:
            self._process = await asyncio.to_thread(StackProcess, self._job)
            self.most, self.about, self._hits = self._process.most, self._process.about, 0
            limits = self.about.get("config", {}).get("max_seq_len"), self.about.get("options", {}).get("max_model_len")
            self.max_seq_len = next(filter(None, limits), None)

    async def stop(self) -> None:
        if self._process is not None:
            await asyncio.to_thread(self._process.stop)
            self._process = None

    async def wake(self, asks: Sequence[Ask]) -> None:
        await super().wake(asks)
        await self._generate([ask.ids for ask in asks], [ask.new_tokens for ask in asks], None)

    async def play(self, cell: Cell, text: Text, seed: int) -> Load:
        asks = batch(cell, text, seed)
        sampling = cell.traffic.sampling
        drawn = dataclasses.asdict(dataclasses.replace(sampling, seed=sampling.seed + seed)) if sampling else None
        before = self._hits
        answer = await self._generate([ask.ids for ask in asks], [ask.new_tokens for ask in asks], drawn)
        load = Load(sent=len(asks))
        for ask, t0, times in zip(asks, answer["t0"], answer["times"]):
            load.prefixes["shared_tokens"] += self.prefixes.add(ask.ids)
            load.prefixes["prompt_tokens"] += len(ask.ids)
            if len(times) == ask.new_tokens:
                load.runs.append(ServedRun(t0, times, input_tokens=len(ask.ids)))
            else:
                load.failures[f"{len(times)} tokens received, {ask.new_tokens} requested"] += 1
        if answer["hits"] is not None:
            load.prefixes["hit_tokens"] = answer["hits"] - before
        return load

    async def _generate(self, prompts: list[list[int]], counts: list[int], sampling: Any) -> dict[str, Any]:
        if self._process is None:
            raise RunError(f"{self.name} is not started")
        try:
            answer = await asyncio.to_thread(self._process.generate, prompts, counts, sampling)
        except (InputError, RunError) as error:
            raise RunError(f"{self.name}: {error}") from None
        self._hits = answer["hits"] or 0
        return answer

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"about": self.about, "path": self._job["path"]}


def batch(cell: Cell, text: Text, seed: int) -> list[Ask]:
    """The first turn of as many sessions as there are users."""
    sessions = itertools.islice(cell.traffic.sessions(text, seed), cell.users)
    return [Ask((("user", tuple(x.prefix + x.turns[0].prompt)),), x.turns[0].new_tokens) for x in sessions]


def primers(cell: Cell, text: Text) -> list[Ask]:
    """What a turn is woken with: something short, and with shared prefixes each of them, so that it may be found."""
    groups = [text.named(f"group {i}", cell.traffic.prefix_tokens) for i in range(cell.traffic.prefix_groups)]
    return [*(Ask((("system", tuple(ids)),), 1) for ids in groups), WAKE]


@dataclass
class Tournament:
    """Runs ``rounds`` turns of every contestant in every cell, after one that is not counted.

    ``swapped`` loads one contestant at a time, which plays all its cells, twice each, before the next is loaded.
    ``text_of`` gives every contestant a stock of its own, so that all cut the same prompts.
    """

    contestants: Sequence[Contestant]
    cells: Sequence[Cell]
    rounds: int
    text_of: Callable[[], Text]
    swapped: bool
    seed: int = 0
    played: dict[tuple[str, int], list[Load]] = field(default_factory=dict)

    def turns(self) -> Iterator[tuple[int, Contestant, int]]:
        """(round, contestant, cell) in the order of play; round -1 is not counted."""
        cells = range(len(self.cells))
        if self.swapped:
            for number, who in itertools.product(range(self.rounds), self.contestants):
                yield from itertools.chain.from_iterable(((-1, who, cell), (number, who, cell)) for cell in cells)
        else:
            for cell, number in itertools.product(cells, range(-1, self.rounds)):
                yield from ((number, who, cell) for who in self.contestants)

    async def run(self, telemetry: Telemetry, show: Callable[[str], None]) -> None:
        texts = {who.name: self.text_of() for who in self.contestants}

        async def load(who: Contestant) -> None:
            show(f"loading {who.name}")
            await who.start()
            if who.max_seq_len and (bad := [x for x in self.cells if sum(x.traffic.longest) > who.max_seq_len]):
                tokens = f"{sum(bad[0].traffic.longest)} tokens, {who.name} holds {who.max_seq_len}"
                raise InputError(
                    f"workload {bad[0].traffic.name} has requests of {tokens}: give it more, or leave one out"
                )

        loaded: Contestant | None = None
        try:
            if not self.swapped:
                for who in self.contestants:
                    await load(who)
            for number, who, index in self.turns():
                cell = self.cells[index]
                if self.swapped and who is not loaded:
                    if loaded:
                        await loaded.stop()
                    await load(who)
                    loaded = who
                if cell.users > who.most or who.failed:
                    continue
                show(f"{cell.name}: {who.name}, {f'round {number + 1}' if number >= 0 else 'warm-up'}")
                try:
                    await self._turn(number, who, index, texts[who.name], telemetry)
                except RunError as error:  # the others play on
                    who.failed = f"{cell.name}: {error}"
        finally:
            for who in self.contestants:
                await who.stop()

    async def _turn(self, number: int, who: Contestant, index: int, text: Text, telemetry: Telemetry) -> None:
        cell, seed = self.cells[index], self.seed + 1000 * (number + 1) + index
        text.at(seed)  # whatever it cut before: all contestants get the same in this turn
        await who.wake(primers(cell, text))
        if number < 0:
            await who.play(cell, text, seed)
            return
        with telemetry.section(f"{who.name}: {index}"):
            load = await who.play(cell, text, seed)
        self.played.setdefault((who.name, index), []).append(load)

    def levels(self, telemetry: Telemetry, environment: dict[str, Any], prefix_cache: bool) -> list[dict[str, Any]]:
        """One level a contestant and cell, its rounds pooled."""
        found = []
        for index, who in itertools.product(range(len(self.cells)), self.contestants):
            if (who.name, index) not in self.played:
                continue
            cell, loads = self.cells[index], self.played[who.name, index]
            whole = Load.pooled(loads)
            part: dict[str, Any] = {"contestant": who.name, "concurrency": cell.users}
            part["mode"] = "in_process" if isinstance(who, StackContestant) else "closed"
            part["workload"] = self._workload(cell, whole, prefix_cache)
            part |= level(whole, streaming=True, text=self.text_of())
            part["checks"] |= {"timed_rounds": len(loads), "null_responses_per_s": who.null_rate}
            if part["mode"] == "in_process":
                del part["checks"]["responses_per_s"], part["checks"]["client_lag_p99_ms"]
            part["rounds"] = {"output_tokens_per_s": whole.rates if whole.runs else []}
            for name, value in (("ttft", "ttft_s"), ("tpot", "tpot_s"), ("latency", "latency_s")):
                medians = [statistics.median(getattr(run, value) for run in x.runs) for x in whole.rounds]
                part["rounds"][name] = medians
            found.append(add_device(part, telemetry.summary(f"{who.name}: {index}"), None, environment))
        return found

    def _workload(self, cell: Cell, whole: Load, prefix_cache: bool) -> dict[str, Any]:
        traffic = cell.traffic
        shared = whole.prefixes["shared_tokens"] / max(1, whole.prefixes["prompt_tokens"])
        said: dict[str, Any] = {"traffic": traffic.about(self.text_of(), shared), "prefix_cache": prefix_cache}
        if traffic.output_tokens.low == traffic.output_tokens.high:
            said["output_tokens"] = traffic.output_tokens.low
        if traffic.sampling:
            said["sampling"] = sampled(traffic.sampling)
        return said


def ratios(levels: Sequence[dict[str, Any]], over: str) -> list[dict[str, Any]]:
    """Speed of each contestant over that of ``over``, paired by round, above 1 where it is faster; of VALID levels."""
    found = []
    base = {place(x): x for x in levels if x["contestant"] == over and x["validity"]["status"] == "VALID"}
    for part in levels:
        other = base.get(place(part))
        if part["contestant"] == over or other is None or part["validity"]["status"] != "VALID":
            continue
        for metric, less in METRICS.items():
            ours, theirs = part["rounds"][metric], other["rounds"][metric]
            if len(ours) != len(theirs) or not all(x > 0 for x in (*ours, *theirs)):
                continue
            ratio = bootstrap_ratio(theirs, ours) if less else bootstrap_ratio(ours, theirs)
            names = {"contestant": part["contestant"], "over": over, "metric": metric}
            found.append(names | dict(zip(("workload", "concurrency"), place(part))) | ratio)
    return found


def place(part: dict[str, Any]) -> tuple[str, int]:
    return part["workload"]["traffic"]["name"], part["concurrency"]


async def play(
    tournament: Tournament,
    environment: dict[str, Any],
    model: dict[str, Any],
    *,
    prefix_cache: bool,
    null: Callable[[Contestant], Awaitable[float | None]],
    own_processes: int,
) -> Result:
    """The whole tournament as a result. Raises :class:`RunError`."""
    with Telemetry(environment["device"], own_processes=own_processes) as telemetry, progress_bar() as bar:
        task = bar.add_task("", total=None)

        def show(text: str) -> None:
            bar.update(task, description=text)
            bar.advance(task)

        for who in tournament.contestants:
            who.null_rate = await null(who)
        await tournament.run(telemetry, show)
        levels = tournament.levels(telemetry, environment, prefix_cache)
    result = new_result(
        "tournament",
        "several",
        model=model,
        workload={"rounds": tournament.rounds, "seed": tournament.seed, "prefix_cache": prefix_cache},
        environment=environment,
        contestants=[who.describe() for who in tournament.contestants],
        levels=levels,
        method="in turn, A B C A B C; the same prompts in a round, others in the next; ratio of the medians of rounds, "
        f"paired by round; percentile bootstrap, {RESAMPLES:,} resamples, seed {SEED}",
    )
    return result | {"ratios": ratios(levels, tournament.contestants[0].name)}
