"""What a benchmark of one generation runs: its flags, checked once, as a value that every stack is measured by."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llama_engine.checkpoint.hf import model_identity
from llama_engine.config import EngineConfig, check_length
from llama_engine.engine_dir import WEIGHTS, EngineInfo
from llama_engine.errors import InputError
from llama_engine.measure.generation import WAKE_TOKENS, make_prompts
from llama_engine.sampling import SamplingParams

BATCH_LEVELS = (8, 32, 64)
DEFAULT_PROMPT = (
    "The lighthouse keeper climbed the stairs each evening with a lamp in one hand and a letter in the other. "
    "Nobody in the village knew who wrote to him, or why the letters always came on the day before a storm. "
)
LEAST = {"input_tokens": 1, "output_tokens": 1, "prefill_tokens": 0, "warmup": 0, "runs": 1}
LEAST |= {"batch_output_tokens": 1, "batch_runs": 1}


@dataclass(frozen=True)
class Workload:
    """Exactly so many tokens in and out, so many times; raises :class:`InputError` for a count that is too small.

    ``prompt`` is text, repeated or cut to ``input_tokens``. ``prefill_tokens`` is the length of a second prompt of
    which TTFT alone is timed, 0 for none. ``batch`` lists how many requests the native engine gets at once, each
    answered with ``batch_output_tokens``; with ``sampling``, one request and these batches are also timed sampled.
    """

    model_dir: Path
    input_tokens: int = 32
    output_tokens: int = 512
    prefill_tokens: int = 1024
    warmup: int = 3
    runs: int = 10
    prompt: str = DEFAULT_PROMPT
    batch: tuple[int, ...] = ()
    batch_output_tokens: int = 256
    batch_runs: int = 3
    sampling: SamplingParams | None = None

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if (value := getattr(self, name)) < least:
                raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")

    @cached_property
    def model(self) -> dict[str, str]:
        """Name, source and SHA-256 of the model, hashed once."""
        return model_identity(self.model_dir)

    def prompts(self, length: int, count: int = 1) -> list[list[int]]:
        """Token ids of ``count`` prompts of exactly ``length``."""
        return make_prompts(self.model_dir, self.prompt, length, count)

    def check_limits(self, engine: EngineConfig) -> None:
        """Raise :class:`InputError`, before a long run, for what an engine has no room for."""
        limit = engine.max_batch_size
        if bad := [level for level in self.batch if not 1 <= level <= limit]:
            raise InputError(f"--batch {bad[0]}: this engine was built for 1 to {limit} (max_batch_size)")
        check_length(engine, self.input_tokens, max(self.output_tokens, WAKE_TOKENS), "--output-tokens")
        if self.prefill_tokens:
            check_length(engine, self.prefill_tokens, WAKE_TOKENS, "--prefill-tokens")
        if self.batch or self.sampling:
            check_length(engine, self.input_tokens, self.batch_output_tokens, "--batch-output-tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of one generation."""
    parser.add_argument("--input-tokens", type=int, default=32, help="prompt length, exactly")
    parser.add_argument("--output-tokens", type=int, default=512, help="new tokens a run, exactly")
    parser.add_argument("--warmup", type=int, default=3, help="runs that are not counted")
    parser.add_argument("--runs", type=int, default=10, help="timed runs")
    parser.add_argument("--prefill-tokens", type=int, default=1024, help="also time TTFT of this prompt; 0 to skip")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="text, repeated or cut to --input-tokens")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a benchmark that loads an engine."""
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/smollm2-135m-instruct"))
    parser.add_argument("--backend", choices=("auto", *WEIGHTS), default="auto")
    parser.add_argument("--batch", type=int, nargs="*", help="requests at once, native only (default: 8 32 64)")
    parser.add_argument("--batch-output-tokens", type=int, default=256, help="new tokens a request of a batch")
    parser.add_argument("--batch-runs", type=int, default=3, help="timed runs a batch level")
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0: time 1 and each --batch sampled too")
    parser.add_argument("--top-p", type=float, default=1.0, help="of what is sampled")
    parser.add_argument("--top-k", type=int, default=0, help="likewise")
    parser.add_argument("--seed", type=int, default=0, help="likewise, of a batch's first request")


def workload_of(args: argparse.Namespace, info: EngineInfo | None = None) -> Workload:
    """The flags above as a :class:`Workload`; ``info`` tells of the engine that must have room for it, if there is one.

    ``--batch`` becomes the usual levels that a native engine holds where it is not given. Raises :class:`InputError`.
    """
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Workload) if field.name in args}
    batch = given.pop("batch", None) or ()
    if info and info.backend == "native" and args.batch is None:
        batch = (level for level in BATCH_LEVELS if level <= info.engine.max_batch_size)
    sampling = SamplingParams(args.temperature, args.top_k, args.top_p, args.seed) if info else None
    workload = Workload(**given, batch=tuple(batch), sampling=sampling if sampling and sampling.temperature else None)
    if info:
        check_model(info, workload.model)
        workload.check_limits(info.engine)
        for name in ("input_tokens", "prefill_tokens"):
            info.check_input(getattr(workload, name), f"--{name.replace('_', '-')}")
    return workload


def check_model(info: EngineInfo, identity: dict[str, str]) -> None:
    """Raise :class:`InputError` for an engine that was built from another model than the one of ``identity``."""
    if info.identity["sha256"] != identity["sha256"]:
        ours, theirs = identity["name"], info.identity["name"]
        raise InputError(f"the engine was built from {theirs}, not from {ours}: give its --model-dir")
