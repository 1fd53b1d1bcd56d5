"""Several engines on one machine and one clock, in turn: A B C A B C, with paired ratios.

A contestant is a server that runs (any target of :mod:`llama_engine.serving.target`) or a stack in a process of its own
(:mod:`llama_engine.measure.peers`). All get the same prompts in the same round, and other prompts in the next.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_engine.errors import InputError, RunError
from llama_engine.measure.contestants import Cell, Contestant, StackContestant, primers
from llama_engine.measure.demand import sampled
from llama_engine.measure.generation import add_device, now, progress_bar
from llama_engine.measure.load import Load, level
from llama_engine.measure.result import Result, new_result
from llama_engine.measure.stats import RESAMPLES, SEED, bootstrap_ratio
from llama_engine.measure.telemetry import Telemetry
from llama_engine.measure.text import Text

METRICS = {"output_tokens_per_s": False, "ttft": True, "tpot": True, "latency": True}  # whether less is better


@dataclass
class Tournament:
    """Runs ``rounds`` turns of every contestant in every cell, after one that is not counted.

    ``swapped`` loads one contestant at a time, which plays all its cells, twice each, before the next is loaded.
    ``text_of`` gives every contestant a stock of its own, so that all cut the same prompts. ``most_s`` seconds after
    the start no further cell is begun, unless ``swapped``; ``left`` are the names of those that were not.
    """

    contestants: Sequence[Contestant]
    cells: Sequence[Cell]
    rounds: int
    text_of: Callable[[], Text]
    swapped: bool
    seed: int = 0
    most_s: float | None = None
    left: list[str] = field(default_factory=list)
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
        start = now()
        try:
            if not self.swapped:
                for who in self.contestants:
                    await load(who)
            for number, who, index in self.turns():
                cell = self.cells[index]
                first = number < 0 and who is self.contestants[0]
                if first and self.most_s is not None and now() - start > self.most_s and cell.name not in self.left:
                    self.left.append(cell.name)
                if cell.name in self.left:
                    continue
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
        workload={"rounds": tournament.rounds, "seed": tournament.seed, "prefix_cache": prefix_cache}
        | ({"left_out": tournament.left} if tournament.left else {}),
        environment=environment,
        contestants=[who.describe() for who in tournament.contestants],
        levels=levels,
        method="in turn, A B C A B C; the same prompts in a round, others in the next; ratio of the medians of rounds, "
        f"paired by round; percentile bootstrap, {RESAMPLES:,} resamples, seed {SEED}",
    )
    return result | {"ratios": ratios(levels, tournament.contestants[0].name)}
