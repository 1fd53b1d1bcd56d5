"""The precision ladder: what each quantization costs in bytes, speed and accuracy, from the results of one folder.

``scripts/run_all.sh --schemes`` writes ``ladder-<scheme>.json``, an engine measured as the folder's own is, and
``ladder-<scheme>-accuracy.json``, its accuracy on a model with real weights; that alone where the scheme runs by
emulation in PyTorch operations, whose speed says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llama_engine.report.story import Derived, Story, best_load

NAMES = {
    "base": "16-bit baseline",
    "fp16": "native, 16-bit",
    "int8": "INT8",
    "int8-head": "INT8, lm_head too",
    "fp8-kv": "INT8, FP8 KV cache",
    "fp8": "FP8",
    "int4": "INT4",
}
# What makes a scheme, in a result of an engine.
SCHEME = ("engine.quantization", "engine.config.lm_head", "engine.config.kv_cache")
NEAR = 0.03  # runs one after the other differ by so much (docs/LOG.md): no choice between what lies closer
CACHED = 100_000  # tokens in the KV cache, where memory decides
MEMORY = "memory"
LOADS = (  # kind of load, the figure that decides, is more better?
    ("alone", "summary.output_tokens_per_s.p50", True),
    ("many", "level.summary.output_tokens_per_s.p50", True),
    ("prompts", "summary.prefill_ttft_ms.p50", False),
    ("memory", MEMORY, False),
)


@dataclass(frozen=True)
class Rung:
    """One scheme. ``file`` and ``accuracy`` are aliases of its results, ``level`` where its saturated load lies."""

    name: str
    file: str
    accuracy: str
    level: str
    users: int
    measured: bool  # its speed
    passed: bool  # the accuracy gate, on real weights

    @property
    def shown(self) -> str:
        """Its name, and that it makes no claim where it may make none."""
        return self.name if self.passed else f"{self.name} (no claim)"


class Choice(NamedTuple):
    """Which scheme to choose for a kind of load, its figure, and (scheme, figure) of what lies within :data:`NEAR`."""

    load: str
    rung: Rung
    figure: Derived
    near: tuple[tuple[Rung, Derived], ...]


def rungs(story: Story) -> list[Rung]:
    """The baseline and every scheme that was measured, none where only one was."""
    found = []
    for scheme, name in NAMES.items():
        file = scheme if scheme == "base" else f"ladder-{scheme}"
        accuracy = f"{file}-accuracy"
        if scheme == "int8" and story.aliases.get(file) not in story.files:
            file = "engine"
        if scheme == "int8" and story.aliases.get(accuracy) not in story.files:
            accuracy = "accuracy"
        measured = story.aliases.get(file) in story.files
        if not measured and story.aliases.get(accuracy) not in story.files:
            continue
        levels = {level["concurrency"]: i for i, level in story.levels(file)}
        users = best_load(story.throughput(file))[0] if levels else 1
        level = f"{file}.levels.{levels[users]}" if levels else file
        gate = story.get(accuracy, "gate.status") == "PASSED" and story.get(accuracy, "summary.kl_mean") is not None
        pairs = ((story.get(file, key), story.get(accuracy, key)) for key in SCHEME)
        alike = all(a == b for a, b in pairs if a is not None and b is not None)
        passed = (story.valid(file) or not measured) and (scheme == "base" or (gate and alike))
        found.append(Rung(name, file, accuracy, level, users, measured, passed))
    return found if sum(rung.measured for rung in found) > 2 else []


def choices(story: Story, found: Sequence[Rung]) -> Iterator[Choice]:
    """Which scheme to choose for which load, of those that may make a claim; left out is a load that fewer than two
    of them were put to."""
    for load, place, more in LOADS:
        figures = [(rung, figure) for rung in found if rung.passed and (figure := _figure(story, rung, place))]
        if len(figures) < 2:
            continue
        best, figure = (max if more else min)(figures, key=lambda item: item[1].value)
        near = [(x, y) for x, y in figures if x is not best and abs(y.value / figure.value - 1) <= NEAR]
        yield Choice(load, best, figure, tuple(near))


def _figure(story: Story, rung: Rung, place: str) -> Derived | None:
    """The figure of one scheme that decides; of :data:`MEMORY` the bytes of weights and of so many cached tokens."""
    if place == MEMORY:
        places = tuple(f"{rung.file}.cost.{key}" for key in ("weight_nbytes", "kv_nbytes_per_token"))
        weights, token = map(story.at, places)
        return None if None in (weights, token) else Derived(weights + CACHED * token, places)
    if place.startswith("level.") and rung.users == 1:
        return None  # put to one request at a time alone
    at = f"{rung.level if place.startswith('level.') else rung.file}.{place.removeprefix('level.')}"
    value = story.at(at)
    return None if value is None else Derived(value, (at,))
