"""Who plays in a tournament: a server that runs, or a stack in a process of its own, and what a turn of theirs is."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llama_engine.errors import InputError, RunError
from llama_engine.measure.answers import ServedRun
from llama_engine.measure.load import Generator, Load
from llama_engine.measure.stack_worker import StackProcess
from llama_engine.measure.text import Prefixes, Text
from llama_engine.measure.traffic import Traffic
from llama_engine.serving.client import RequestFailed
from llama_engine.serving.target import Ask, Target, describe_target

WAKE = Ask((("user", tuple(range(1, 9))),), 2)


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
