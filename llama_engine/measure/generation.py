"""Time generation on any stack by the same clock: exactly N new tokens, greedy, EOS ignored."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from tokenizers import Tokenizer

from llama_engine.checkpoint.hf import HFModel
from llama_engine.errors import InputError, RunError
from llama_engine.measure.cost import Cost
from llama_engine.measure.stats import summary
from llama_engine.measure.telemetry import Telemetry

WAKE_TOKENS = 2  # of the uncounted request at the start of a turn

now = time.perf_counter


@dataclass
class GenerationRun:
    """One request: ``t0`` sent, ``token_times[i]`` when token i was on the host (``perf_counter`` seconds)."""

    t0: float
    token_times: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def add(self, ids: list[int], stamp: float) -> None:
        """Record tokens that the caller can use since ``stamp``."""
        self.token_times += [stamp] * len(ids)
        self.token_ids += ids

    @property
    def ttft_s(self) -> float:
        """t1 - t0."""
        return self.token_times[0] - self.t0

    @property
    def tpot_s(self) -> float:
        """(tN - t1) / (N - 1); 0 for one token."""
        return (self.token_times[-1] - self.token_times[0]) / max(1, len(self.token_times) - 1)

    @property
    def latency_s(self) -> float:
        """tN - t0."""
        return self.token_times[-1] - self.t0

    @property
    def itl_s(self) -> list[float]:
        """Gaps between successive tokens, N - 1 of them."""
        return [b - a for a, b in itertools.pairwise(self.token_times)]

    @property
    def clock_backwards(self) -> int:
        return sum(b < a for a, b in itertools.pairwise([self.t0, *self.token_times]))


Mark = Callable[[str], AbstractContextManager[None]]  # opens a profiler's range of that name


class Stack(Protocol):
    name: str
    cost: Cost
    about: dict[str, Any]  # what a result says of the engine; empty for the baseline

    def generate(self, prompt_ids: list[int], new_tokens: int) -> GenerationRun:
        """Exactly ``new_tokens`` greedy tokens, each stamped when the caller could use it."""
        ...

    def marked(self, mark: Mark) -> AbstractContextManager[None]:
        """Ranges named prefill and decode around the steps of whatever is generated inside."""
        ...


def tokenize(model_dir: Path | str, text: str) -> list[int]:
    """Ids of ``text`` with the special tokens the model's tokenizer adds."""
    return Tokenizer.from_file(str(Path(model_dir) / "tokenizer.json")).encode(text).ids


def make_prompts(model_dir: Path | str, text: str, length: int, count: int = 1) -> list[list[int]]:
    """``count`` prompts of exactly ``length`` ids: successive windows of the tokenized text, wrapped around.

    A model without a tokenizer gets seeded random ids. Raises :class:`InputError` for an unusable text or length.
    """
    if length < 1:
        raise InputError(f"--input-tokens must be at least 1, got {length}")
    if (Path(model_dir) / "tokenizer.json").is_file():
        ids = tokenize(model_dir, text)
        if not ids:
            raise InputError("the prompt holds no tokens: give some text")
    else:
        vocab = HFModel(model_dir).config.vocab_size
        ids = torch.randint(vocab, (4096,), generator=torch.Generator().manual_seed(0)).tolist()
    return [[ids[(row * length + i) % len(ids)] for i in range(length)] for row in range(count)]


def run_interleaved(
    stacks: Sequence[Stack], prompt: list[int], new_tokens: int, *, warmup: int, runs: int, telemetry: Telemetry
) -> dict[str, list[GenerationRun]]:
    """Warm every stack up, then time A B A B ...; telemetry sections are named after the stacks.

    A timed run comes right behind a short one of its own stack: otherwise its first token would pay for caches and
    clocks that went cold while the other stack had its turn.
    """
    timed: dict[str, list[GenerationRun]] = {stack.name: [] for stack in stacks}
    with progress_bar() as bar:
        task = bar.add_task("", total=(warmup + runs) * len(stacks))
        for index in range(warmup + runs):
            for stack in stacks:
                bar.update(task, description=f"{stack.name}: {'warm-up' if index < warmup else 'timed'}")
                if index < warmup:
                    stack.generate(prompt, new_tokens)
                else:
                    stack.generate(prompt, WAKE_TOKENS)
                    with telemetry.section(stack.name):
                        timed[stack.name].append(stack.generate(prompt, new_tokens))
                bar.advance(task)
    for name, finished in timed.items():
        if not all(run.token_times for run in finished):
            raise RunError(f"{name} returned no tokens")
    return timed


def progress_bar() -> Progress:
    """The bar every long measurement shows, on stderr."""
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def samples_of(runs: Sequence[GenerationRun], *, streaming: bool = True) -> dict[str, list[Any]]:
    """Raw samples: latency and output_tokens one a request; if it streamed also ttft and tpot, and itl pooled."""
    samples: dict[str, list[Any]] = {
        "latency_s": [run.latency_s for run in runs],
        "output_tokens": [len(run.token_times) for run in runs],
    }
    if streaming:
        samples["ttft_ms"] = [run.ttft_s * 1e3 for run in runs]
        samples["tpot_ms"] = [run.tpot_s * 1e3 for run in runs]
        samples["itl_ms"] = [round(gap * 1e3, 4) for run in runs for gap in run.itl_s]
    return samples


def summarize(samples: dict[str, list[Any]], rates: Sequence[float]) -> dict[str, Any]:
    """Percentiles of every time in ``samples``, and of ``rates`` as output tokens a second."""
    times = {key: summary(values) for key, values in samples.items() if key != "output_tokens" and values}
    return times | {"output_tokens_per_s": summary(rates)}


def add_device(
    part: dict[str, Any], section: dict[str, Any], nbytes: float | None, ceilings: dict[str, Any]
) -> dict[str, Any]:
    """Add to a result or level its telemetry ``section``, and to its summary utilization, power, energy and MBU."""
    summed, tokens, energy = part["summary"], sum(part["samples"].get("output_tokens", [])), section["gpu_energy_j"]
    summed |= {key: section[key] for key in ("gpu_utilization_pct", "gpu_power_w")}
    summed["energy_j_per_token"] = energy / tokens if energy and tokens else None
    if nbytes and "tpot_ms" in summed:
        summed["mbu"] = mbu(nbytes, summed["tpot_ms"]["p50"] / 1e3, ceilings)
    return part | {"telemetry": section}


def mbu(nbytes: float, seconds: float, ceilings: dict[str, Any]) -> float | None:
    """bytes a decode step must read / seconds a step / peak read bandwidth measured in this run."""
    return nbytes / seconds / ceilings["read_bandwidth"]["bytes_per_s"] if seconds > 0 else None


def mfu(cost: Cost, input_tokens: int, ttft_s: float, ceilings: dict[str, Any]) -> float | None:
    """FLOP of the prompt's linear layers / TTFT / peak matmul rate measured in this run."""
    return cost.flop_per_token * input_tokens / ttft_s / ceilings["matmul"]["flop_per_s"] if ttft_s > 0 else None
