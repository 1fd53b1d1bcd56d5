"""Traffic: what users send. A named, seeded workload as sessions of one or several turns, all of it from local files.

A workload is a JSON file (benchmarks/workloads/) or a few flags. Lengths are drawn, prompts are cut from text
(:mod:`llama_engine.measure.text`), arrivals are the load's (closed, open) or a trace's own.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from llama_engine.errors import InputError
from llama_engine.files import read_json
from llama_engine.measure.lengths import Length
from llama_engine.measure.text import Text
from llama_engine.sampling import SamplingParams

WORKLOADS = Path(__file__).parents[2] / "benchmarks/workloads"
INPUT_TOKENS, OUTPUT_TOKENS, ONE_TURN = Length(32, 32), Length(128, 128), Length(1, 1)
HASH_TOKENS = 512  # of each entry of hash_ids in a Mooncake trace
ARRIVAL = ("arrival", "arrival_s", "timestamp")  # columns of traces; Mooncake's timestamp is in ms, Azure's a date
INPUT = ("input_tokens", "input_length", "contexttokens", "input")
ROLES = (("human", "gpt"), ("user", "assistant"))  # of ShareGPT files
OUTPUT = ("output_tokens", "output_length", "generatedtokens", "output")


@dataclass(frozen=True)
class Turn:
    """What a user adds to the conversation, how long the answer is to be, and the thinking time before sending it."""

    prompt: list[int]
    new_tokens: int
    think_s: float = 0.0


@dataclass(frozen=True)
class Session:
    """A conversation. ``prefix`` is what stands before the first turn (a system prompt); ``arrival_s`` a trace's."""

    turns: list[Turn]
    prefix: list[int] = field(default_factory=list)
    arrival_s: float | None = None


@dataclass(frozen=True)
class Traffic:
    """A workload. Raises :class:`InputError`.

    ``prefix_groups`` groups of sessions share ``prefix_tokens`` each. ``think_s`` is the mean of an exponential
    distribution. ``trace`` and ``sharegpt`` are files that take the place of drawn lengths.
    """

    name: str = "flags"
    input_tokens: Length = INPUT_TOKENS
    output_tokens: Length = OUTPUT_TOKENS
    prefix_groups: int = 0
    prefix_tokens: int = 0
    turns: Length = ONE_TURN
    think_s: float = 0.0
    trace: Path | None = None
    sharegpt: Path | None = None
    sampling: SamplingParams | None = None

    def __post_init__(self) -> None:
        if bool(self.prefix_groups) != bool(self.prefix_tokens) or min(self.prefix_groups, self.prefix_tokens) < 0:
            raise InputError(f"workload {self.name}: prefix_groups and prefix_tokens are both given, or neither")
        if not 0 <= self.think_s < float("inf"):
            raise InputError(f"workload {self.name}: think_s must be finite and not negative, got {self.think_s}")
        if self.trace and self.sharegpt:
            raise InputError(f"workload {self.name}: give trace or sharegpt, not both")
        for path in filter(None, (self.trace, self.sharegpt)):
            if not path.is_file():
                raise InputError(f"workload {self.name}: {path} does not exist")

    @classmethod
    def named(cls, name: str) -> Traffic:
        """The workload of a file, or of that name in benchmarks/workloads/. Raises :class:`InputError`."""
        path = Path(name) if name.endswith(".json") else WORKLOADS / f"{name}.json"
        if not path.is_file():
            known = ", ".join(sorted(x.stem for x in WORKLOADS.glob("*.json")))
            raise InputError(f"--workload {name}: no such file, and no workload of that name (there are {known})")
        data = read_json(path)
        fields = {x.name for x in dataclasses.fields(cls)} | {"description"}
        if strange := sorted(data.keys() - fields):
            raise InputError(f"{path}: {', '.join(strange)}: unknown")
        data.pop("description", None)
        try:
            for key in ("input_tokens", "output_tokens", "turns"):
                if key in data:
                    data[key] = Length.parse(data[key], f"{path}: {key}")
            for key in ("trace", "sharegpt"):
                if data.get(key):
                    data[key] = path.parent / data[key]
            if data.get("sampling"):
                data["sampling"] = SamplingParams(**data["sampling"])
            return cls(**{"name": path.stem} | data)
        except TypeError as error:
            raise InputError(f"{path}: {error}") from None

    @property
    def plain(self) -> Traffic:
        """The same lengths, every prompt by itself: for a warm-up."""
        return dataclasses.replace(self, prefix_groups=0, prefix_tokens=0, turns=ONE_TURN, trace=None, sharegpt=None)

    @property
    def longest(self) -> tuple[int, int]:
        """(prompt, answer) tokens of the longest request of drawn lengths."""
        turns = self.turns.high
        before = (turns - 1) * (self.input_tokens.high + self.output_tokens.high)
        return self.prefix_tokens + before + self.input_tokens.high, self.output_tokens.high

    def sessions(self, text: Text, seed: int) -> Iterator[Session]:
        """Endless where lengths are drawn, once through where they come from a file."""
        rng = random.Random(seed)
        if self.trace:
            yield from self._replayed(text)
        elif self.sharegpt:
            yield from self._shared(text, rng)
        else:
            while True:
                yield self._drawn(text, rng)

    def _drawn(self, text: Text, rng: random.Random) -> Session:
        prefix: list[int] = []
        if self.prefix_groups:
            prefix = text.named(f"group {rng.randrange(self.prefix_groups)}", self.prefix_tokens)
        turns = []
        for i in range(self.turns.draw(rng)):
            new, wanted = self.input_tokens.draw(rng), self.output_tokens.draw(rng)
            think = rng.expovariate(1 / self.think_s) if i and self.think_s else 0.0
            turns.append(Turn(text.take(new), wanted, think))
        return Session(turns, prefix)

    def _replayed(self, text: Text) -> Iterator[Session]:
        for arrival_s, new, wanted, hashes in read_trace(self.trace):
            prompt: list[int] = []
            for name in hashes[: new // HASH_TOKENS]:
                prompt += text.named(f"block {name}", HASH_TOKENS)
            yield Session([Turn(prompt + text.take(new - len(prompt)), wanted)], arrival_s=arrival_s)

    def _shared(self, text: Text, rng: random.Random) -> Iterator[Session]:
        """Conversations of a ShareGPT file: people's own words, answers as long as those they got."""
        for talk in read_sharegpt(self.sharegpt):
            turns = []
            for i, (asked, answered) in enumerate(talk[: self.turns.high]):
                prompt, wanted = text.codec.encode(asked), len(text.codec.encode(answered))
                think = rng.expovariate(1 / self.think_s) if i and self.think_s else 0.0
                if prompt and wanted:
                    turns.append(Turn(prompt, wanted, think))
            if turns:
                yield Session(turns)

    def about(self, text: Text, shared: float) -> dict[str, Any]:
        """``workload.traffic`` of a result; ``shared`` is the share of prompt tokens that a prefix cache could know."""
        said: dict[str, Any] = {"name": self.name, "text": text.about}
        said |= {key: str(getattr(self, key)) for key in ("input_tokens", "output_tokens", "turns")}
        said |= {key: getattr(self, key) for key in ("prefix_groups", "prefix_tokens", "think_s")}
        said |= {key: getattr(self, key).name for key in ("trace", "sharegpt") if getattr(self, key)}
        for key in ("trace", "sharegpt"):
            if key in said:
                said["input_tokens"] = said["output_tokens"] = f"as in {said[key]}"
        return said | {"prefix_cache_can_help": shared > 0, "shared_prompt_share": shared}


def read_trace(path: Path) -> Iterator[tuple[float, int, int, list[int]]]:
    """(arrival in s since the first, input, output, hash_ids) of each line: Mooncake's JSONL, Azure's CSV, or either
    with columns ``arrival`` in seconds, ``input`` and ``output``. Raises :class:`InputError` with the line."""
    first = None
    with path.open(encoding="utf-8", newline="") as file:
        csv_rows = None if path.suffix in (".jsonl", ".json") else csv.DictReader(file)
        for number, row in enumerate(csv_rows or (line for line in file if line.strip()), 2 if csv_rows else 1):
            try:
                found = row if csv_rows else json.loads(row)
                found = {key.lower().strip(): value for key, value in found.items() if key}
                key = next(key for key in ARRIVAL if key in found)
                arrival = _seconds(found[key], milliseconds=key == "timestamp")
                new, wanted = (int(next(found[x] for x in names if x in found)) for names in (INPUT, OUTPUT))
            except (StopIteration, ValueError, TypeError, AttributeError):
                form = "an arrival (arrival, timestamp), an input and an output length"
                raise InputError(f"{path}, line {number}: not {form}") from None
            first = arrival if first is None else first
            if new < 1 or wanted < 1:
                continue  # recorded failures
            yield arrival - first, new, wanted, found.get("hash_ids") or []


def _seconds(value: Any, *, milliseconds: bool) -> float:
    try:
        return float(value) / (1e3 if milliseconds else 1)
    except ValueError:
        whole, _, part = str(value).strip().partition(".")  # Azure writes seven digits, more than Python 3.10 reads
        return datetime.fromisoformat(whole).timestamp() + float(f"0.{part or 0}")


def read_sharegpt(path: Path) -> Iterator[list[tuple[str, str]]]:
    """The (question, answer) pairs of each conversation. Raises :class:`InputError`."""
    data = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size else []
    try:
        for talk in data:
            said = [(str(part["from"]), str(part["value"])) for part in talk["conversations"]]
            pairs = [(a[1], b[1]) for a, b in itertools.pairwise(said) if (a[0], b[0]) in ROLES]
            if pairs:
                yield pairs
    except (TypeError, KeyError):
        raise InputError(f"{path}: not a list of {{conversations: [{{from, value}}]}}") from None
