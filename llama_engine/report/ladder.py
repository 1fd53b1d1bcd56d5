"""The precision ladder: what each quantization costs in bytes, speed and accuracy, from the results of one folder.

``scripts/run_all.sh --schemes`` writes ``ladder-<scheme>.json``, an engine measured as the folder's own is, and
``ladder-<scheme>-accuracy.json``, its accuracy on a model with real weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama_engine.report.story import Story, best_load

NAMES = {
    "base": "16-bit baseline",
    "fp16": "native, 16-bit",
    "int8": "INT8",
    "fp8": "FP8",
    "int4": "INT4",
    "int8-head": "INT8, lm_head too",
}


@dataclass(frozen=True)
class Rung:
    """One scheme. ``file`` and ``accuracy`` are aliases of its results, ``level`` where its saturated load lies."""

    name: str
    file: str
    accuracy: str
    level: str
    users: int
    passed: bool  # the accuracy gate, on real weights

    @property
    def shown(self) -> str:
        """Its name, and that it makes no claim where it may make none."""
        return self.name if self.passed else f"{self.name} (no claim)"


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
        if story.aliases.get(file) not in story.files:
            continue
        levels = {level["concurrency"]: i for i, level in story.levels(file)}
        users = best_load(story.throughput(file))[0] if levels else 1
        level = f"{file}.levels.{levels[users]}" if levels else file
        gate = story.get(accuracy, "gate.status") == "PASSED" and story.get(accuracy, "summary.kl_mean") is not None
        passed = story.valid(file) and (scheme == "base" or gate)
        found.append(Rung(name, file, accuracy, level, users, passed))
    return found if len(found) > 2 else []
