"""Does an answer depend on its company? Each prompt alone is the reference; then the same prompts under every condition
that a server makes: again, in batches, joining others, preempted, with prefix hits. Definitions: docs/METRICS.md.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_engine.config import EngineConfig, check_length
from llama_engine.engine import scheduler
from llama_engine.engine.engine import Engine
from llama_engine.engine.kv_cache import BlockManager
from llama_engine.errors import RunError
from llama_engine.measure.generation import now
from llama_engine.measure.stats import bootstrap_ratio, summary, wilson
from llama_engine.sampling import SamplingParams

JOIN_EVERY = 4  # steps: prompts are then read beside decodes, in chunks that alone they never had
PREEMPTED_AT_ONCE = 8
NEXT_TURN_TOKENS = 16  # what a second turn adds to the prompt and the answer before it
COMPANY = ("batch", "joining")  # conditions that batch invariance is about


@dataclass(frozen=True)
class Questions:
    """Prompts of several lengths, each answered with exactly ``output_tokens``; prompt i draws with seed + i, or so
    many successive prompts with one seed each."""

    prompts: list[list[int]]
    output_tokens: int
    batch: tuple[int, ...]
    sampling: SamplingParams | None = None
    sharing_seed: int = 1

    @classmethod
    def of(
        cls, windows: Sequence[list[int]], output_tokens: int, batch: Sequence[int], sampling: SamplingParams | None
    ) -> Questions:
        """The windows, cut to seeded lengths from a quarter of theirs on."""
        rng = random.Random(0)
        cut = [ids[: rng.randint(max(1, len(ids) // 4), len(ids))] for ids in windows]
        return cls(cut, output_tokens, tuple(batch), sampling)

    def params(self, row: int) -> SamplingParams | None:
        seed = self.sampling and self.sampling.seed + row // self.sharing_seed
        return self.sampling and dataclasses.replace(self.sampling, seed=seed)

    def next_turns(self, answers: Sequence[list[int]]) -> list[list[int]]:
        """Each prompt with its answer behind it, and then the beginning of another prompt."""
        tails = [prompt[:NEXT_TURN_TOKENS] for prompt in (*self.prompts[1:], self.prompts[0])]
        return [prompt + answer + tail for prompt, answer, tail in zip(self.prompts, answers, tails)]

    def check(self, engine: EngineConfig) -> None:
        """Raise :class:`InputError` where the longest second turn does not fit the engine."""
        longest = max(map(len, self.prompts)) + self.output_tokens + NEXT_TURN_TOKENS
        check_length(engine, longest, self.output_tokens, "--output-tokens, in a second turn")


@dataclass
class Answers:
    """What came of questions, by their order."""

    tokens: list[list[int]]
    cached: list[int]  # tokens of the prompt found in the prefix cache
    preempted: list[bool] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Output tokens a second, all together."""
        return sum(map(len, self.tokens)) / self.seconds


class _Scheduler(scheduler.Scheduler):
    """Remembers whom it preempted."""

    preempted: frozenset[int] = frozenset()

    def _preempt(self, sequence: scheduler.Sequence) -> None:
        self.preempted |= {sequence.request_id}
        super()._preempt(sequence)


def answer(
    engine: Engine, asked: Questions, at_once: int, *, join_every: int = 0, blocks: int = 0, prefix_cache: bool = False
) -> Answers:
    """All answers, ``at_once`` requests in flight, through ``engine``'s executor and a scheduler of its own.

    With ``join_every`` a request joins only every so many steps. ``blocks`` is how many KV blocks may be used, 0 for
    all. Raises :class:`RunError` for a request that fails.
    """
    config = dataclasses.replace(engine.config, enable_prefix_cache=prefix_cache)
    mine = Engine(engine.model_config, config, engine.executor)
    usable = BlockManager(blocks + 1 if blocks else engine.executor.num_kv_blocks, config.tokens_per_block)
    mine.scheduler = watched = _Scheduler(config, usable)
    count = len(asked.prompts)
    found = Answers([[] for _ in range(count)], [0] * count)
    row_of: dict[int, int] = {}
    waiting, running, steps, start = iter(range(count)), 0, 0, now()
    while len(row_of) < count or running:
        while running < at_once and len(row_of) < count and not (join_every and running and steps % join_every):
            row = next(waiting)
            request_id = mine.add_request(asked.prompts[row], asked.output_tokens, params=asked.params(row))
            row_of[request_id] = row
            running += 1
            if join_every:
                break
        for output in mine.step():
            if isinstance(output.reason, RunError):
                raise output.reason
            row = row_of[output.request_id]
            found.tokens[row] += output.token_ids
            found.cached[row] = output.cached_tokens
            running -= output.finished
        steps += 1
    while mine.has_unfinished:  # a step that an asynchronous executor still holds
        mine.step()
    found.seconds = now() - start
    found.preempted = [False] * count
    for request_id in watched.preempted:
        found.preempted[row_of[request_id]] = True
    return found


def compared(
    kind: str, at_once: int, reference: Answers, found: Answers, rows: Sequence[int] | None = None
) -> dict[str, Any]:
    """How many of ``rows`` (all) were answered otherwise than in ``reference``: the share, its 95 % interval, and the
    fewest tokens before a difference."""
    firsts = []
    for row in range(len(found.tokens)) if rows is None else rows:
        pairs = enumerate(zip(reference.tokens[row], found.tokens[row]))
        firsts.append(next((i for i, (a, b) in pairs if a != b), None))
    changed = [first for first in firsts if first is not None]
    return {
        "kind": kind,
        "concurrency": at_once,
        "compared": len(firsts),
        "changed": len(changed),
        "share": len(changed) / len(firsts) if firsts else None,
        "ci95": wilson(len(changed), len(firsts)) if firsts else None,
        "first_difference_tokens": min(changed, default=None),
        "output_tokens_per_s": found.rate,
    }


def conditions(engine: Engine, asked: Questions) -> Iterator[dict[str, Any]]:
    """Every condition in turn against every prompt alone. Their rates are of one pass; :func:`price` times well."""
    alone = answer(engine, asked, 1)
    yield compared("again", 1, alone, answer(engine, asked, 1))
    for n in asked.batch:
        yield compared("batch", n, alone, answer(engine, asked, n))
    most = max(asked.batch)
    yield compared("joining", most, alone, answer(engine, asked, most, join_every=JOIN_EVERY))
    needs = sorted(-(-(len(x) + asked.output_tokens) // engine.config.tokens_per_block) for x in asked.prompts)
    few = min(PREEMPTED_AT_ONCE, most)
    short = answer(engine, asked, few, blocks=max(needs[-1], sum(needs[-few:]) // 2))
    yield compared("preempted", few, alone, short, [i for i, was in enumerate(short.preempted) if was])
    turns = asked.next_turns(alone.tokens)
    behind = {"prefix": (asked.prompts, alone), "next_turn": (turns, None)}
    for kind, (prompts, reference) in behind.items():
        reference = reference or answer(engine, dataclasses.replace(asked, prompts=turns), 1)
        pairs = [prompt for pair in zip(asked.prompts, prompts) for prompt in pair]
        found = answer(engine, dataclasses.replace(asked, prompts=pairs, sharing_seed=2), 1, prefix_cache=True)
        second = dataclasses.replace(found, tokens=found.tokens[1::2], cached=found.cached[1::2])
        # a second turn is one where blocks of the answer itself were found, not of its prompt alone
        least = [len(prompt) if kind == "next_turn" else 0 for prompt in asked.prompts]
        hit = [i for i, (cached, floor) in enumerate(zip(second.cached, least)) if cached > floor]
        yield compared(kind, 1, reference, second, hit) | {"output_tokens_per_s": found.rate}


def price(engines: dict[str, Engine], variants: Sequence[dict[str, Any]], asked: Questions, runs: int) -> dict:
    """What answers without company's influence cost: tokens/s of the first variant over the fastest invariant one's.

    ``variants`` are in the order of ``engines``. The engines take turns at each load, A B A B. "nil" where the first
    itself changed nothing in any company, "unknown" where none is so.
    """
    invariant = [name for name, x in zip(engines, variants) if not changed_in_company(x["conditions"])]
    first = next(iter(engines))
    loads = []
    for n in (1, *asked.batch):
        few = dataclasses.replace(asked, prompts=asked.prompts[:n])
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for run in range(runs + 1):  # the first warms up
            for name, engine in engines.items():
                rate = answer(engine, few, n).rate
                rates[name] += [rate] * (run > 0)
        loads.append({"concurrency": n, "output_tokens_per_s": rates})
        if invariant and first not in invariant:
            best = max(invariant, key=lambda name: summary(rates[name])["p50"])
            loads[-1] |= {"invariant": best} | bootstrap_ratio(rates[first], rates[best])
    status = "nil" if first in invariant else "measured" if invariant else "unknown"
    return {"status": status, "of": first, "loads": loads}


def changed_in_company(found: Sequence[dict[str, Any]]) -> int:
    return sum(condition["changed"] for condition in found if condition["kind"] in COMPANY)
