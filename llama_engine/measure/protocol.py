"""The measuring contract as code: flags, stacks, interleaved runs and the result they become."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llama_engine.checkpoint.hf import model_identity
from llama_engine.device import pick_device
from llama_engine.engine_dir import WEIGHTS, EngineInfo, load_engine_json
from llama_engine.errors import InputError
from llama_engine.measure.cost import Cost, linear_weights
from llama_engine.measure.environment import ceilings, fingerprint
from llama_engine.measure.generation import (
    WAKE_TOKENS,
    EngineStack,
    GenerationRun,
    RunnerStack,
    Stack,
    TransformersStack,
    add_device,
    make_prompts,
    mfu,
    progress_bar,
    run_interleaved,
    samples_of,
    summarize,
)
from llama_engine.measure.result import Result, check_output, new_result, write_result
from llama_engine.measure.stats import RESAMPLES, SEED, bootstrap_ratio, summary
from llama_engine.measure.telemetry import Telemetry
from llama_engine.native import load_engine
from llama_engine.report.show import show
from llama_engine.runner import ModelRunner
from llama_engine.sampling import SamplingParams

BATCH_LEVELS = (8, 32, 64)
DEFAULT_PROMPT = (
    "The lighthouse keeper climbed the stairs each evening with a lamp in one hand and a letter in the other. "
    "Nobody in the village knew who wrote to him, or why the letters always came on the day before a storm. "
)
RATIOS = {"latency": "latency_s", "ttft": "ttft_ms", "tpot": "tpot_ms", "prefill": "prefill_ttft_ms"}  # name: samples


def parser_for(doc: str | None, output: str | None) -> argparse.ArgumentParser:
    """A script's parser, with the flags of every benchmark that loads a model itself; ``output`` is the default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--output", type=Path, default=output, help="where the result goes")
    parser.add_argument("--force", action="store_true", help="replace an existing result")
    return parser


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


def prepare(args: argparse.Namespace) -> str:
    """Check the flags, set the threads, return the device."""
    least = {"input_tokens": 1, "output_tokens": 1, "runs": 1, "warmup": 0, "prefill_tokens": 0}
    for name, low in (least | {"threads": 1, "batch_output_tokens": 1, "batch_runs": 1}).items():
        if (value := getattr(args, name, None)) is not None and value < low:
            raise InputError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return pick_device(args.device).type


def main(doc: str | None, *, engine: bool) -> None:
    """The two scripts that measure one stack: the baseline, or an engine."""
    parser = parser_for(doc, None if engine else "results/local/baseline.json")
    add_arguments(parser)
    if engine:
        add_engine_arguments(parser)
    args = parser.parse_args()
    if args.output is None:
        backend = load_engine_json(args.engine_dir, backend=args.backend).backend
        args.output = Path(f"results/local/optimized-{backend}.json")
    check_output(args.output, args.force, args.model_dir, *([args.engine_dir] if engine else []))
    device = prepare(args)
    stack = open_engine(args, device) if engine else TransformersStack(args.model_dir, device)
    measured = measure([stack], args, device)
    write_result(args.output, measured[stack.name], force=args.force)
    show(measured.values())


def describe(info: EngineInfo, kernels: str) -> dict[str, Any]:
    """What a result says of its engine."""
    return {
        "backend": info.backend,
        "checkpoint_sha256": info.checkpoint_sha256,
        "weights_sha256": info.weights_sha256,
        "config": info.engine.to_dict(),
        "model": info.identity,
        "kernels": kernels,
    }


def open_engine(args: argparse.Namespace, device: str) -> Stack:
    """The engine of ``--engine-dir`` as a stack; ``--backend`` auto reads ``engine.json``.

    Raises :class:`InputError` when it was built from another model than ``--model-dir``, for a smaller ``--batch`` or
    for shorter sequences than the flags ask for.
    """
    info = load_engine_json(args.engine_dir, backend=args.backend)
    if info.identity["sha256"] != model_identity(args.model_dir)["sha256"]:
        name = info.identity["name"]
        raise InputError(f"the engine was built from {name}, not from {args.model_dir}: give its --model-dir")
    if "batch" in args:  # not among the flags of accuracy.py
        check_limits(args, info)
    if info.backend == "native":
        engine = load_engine(args.engine_dir, device=device, threads=args.threads, enable_prefix_cache=False)
        return EngineStack(engine, describe(info, engine.executor.kernels))
    model = info.model
    nbytes = linear_weights(model) + 2 * model.vocab_size * model.hidden_size  # int8 linears, fp16 lm_head
    cost = Cost.of(model, nbytes, model.kv_nbytes())
    return RunnerStack(ModelRunner.from_dir(args.engine_dir), cost, describe(info, info.backend))


def check_limits(args: argparse.Namespace, info: EngineInfo) -> None:
    """Refuse, before a long run, what this engine has no room for, and resolve the default of ``--batch``."""
    limit, room = info.engine.max_batch_size, info.engine.max_seq_len
    if args.batch is None:
        args.batch = [level for level in BATCH_LEVELS if level <= limit] if info.backend == "native" else []
    if bad := [level for level in args.batch if not 1 <= level <= limit]:
        raise InputError(f"--batch {bad[0]}: this engine was built for 1 to {limit} (max_batch_size)")
    requests = {"--output-tokens": (args.input_tokens, max(args.output_tokens, WAKE_TOKENS))}
    if args.prefill_tokens:
        requests["--prefill-tokens"] = (args.prefill_tokens, WAKE_TOKENS)
    if args.batch:
        requests["--batch-output-tokens"] = (args.input_tokens, args.batch_output_tokens)
    if sampling_of(args):
        requests["--batch-output-tokens"] = (args.input_tokens, args.batch_output_tokens)
    for flag, (prompt, new) in requests.items():
        if prompt + new > room:
            raise InputError(
                f"{flag}: {prompt} prompt tokens + {new} new tokens exceed this engine's max_seq_len {room}"
            )


def measure(stacks: Sequence[Stack], args: argparse.Namespace, device: str) -> dict[str, Result]:
    """Run the stacks interleaved, then the native engine's batches; one complete result each, by stack name."""
    environment = fingerprint(device) | ceilings(device)
    prompt = make_prompts(args.model_dir, args.prompt, args.input_tokens)[0]
    workload = {
        "input_tokens": args.input_tokens,
        "output_tokens": args.output_tokens,
        "concurrency": 1,
        "warmup_runs": args.warmup,
        "timed_runs": args.runs,
        "wake_tokens": WAKE_TOKENS,
        "prompt_ids": prompt,
        "interleaved_with": [stack.name for stack in stacks],
    }
    times: dict[str, Any] = {"warmup": args.warmup, "runs": args.runs}
    with Telemetry(device) as telemetry:
        timed = run_interleaved(stacks, prompt, args.output_tokens, telemetry=telemetry, **times)
        sections = {stack.name: telemetry.summary(stack.name) for stack in stacks}
        prefill = {}
        if args.prefill_tokens:
            long = make_prompts(args.model_dir, args.prompt, args.prefill_tokens)[0]
            prefill = run_interleaved(stacks, long, 1, telemetry=telemetry, **times)
    results = {}
    for stack in stacks:
        runs, cost = timed[stack.name], stack.cost
        samples = samples_of(runs)
        summed = summarize(samples, [len(run.token_ids) / run.latency_s for run in runs])  # N / (tN - t0)
        summed["step_nbytes"] = cost.decode_nbytes(args.input_tokens, args.output_tokens)
        summed["mfu"] = mfu(cost, args.input_tokens, summed["ttft_ms"]["p50"] / 1e3, environment)
        if prefill:
            samples["prefill_ttft_ms"] = [run.ttft_s * 1e3 for run in prefill[stack.name]]
            long_ttft = summary(samples["prefill_ttft_ms"])
            summed["prefill_ttft_ms"] = long_ttft | {"input_tokens": args.prefill_tokens}
            summed["prefill_mfu"] = mfu(cost, args.prefill_tokens, long_ttft["p50"] / 1e3, environment)
        part = {"samples": samples, "summary": summed, "checks": run_checks(runs), "cost": dataclasses.asdict(cost)}
        part = add_device(part, sections[stack.name], summed["step_nbytes"], environment)
        if stack.about:
            part["engine"] = stack.about
        if isinstance(stack, EngineStack):
            part["checks"]["prefix_cache_hit_tokens"] = stack.engine.scheduler.prefix_cache_hit_tokens
            part["levels"] = measure_batches(stack, args, device, environment)
        results[stack.name] = new_result(
            "optimized" if stack.about else "baseline",
            stack.name,
            model=model_identity(args.model_dir),
            workload=workload,
            environment=environment,
            **part,
        )
    return results


def run_checks(runs: Sequence[GenerationRun]) -> dict[str, Any]:
    """What :mod:`llama_engine.measure.validity` asks of runs in this process, and a hash of the tokens."""
    return {
        "failed_requests": 0,  # an in-process failure ends the benchmark instead
        "clock_backwards": sum(run.clock_backwards for run in runs),
        "distinct_outputs": len({tuple(run.token_ids) for run in runs}),
        "token_ids_sha256": hashlib.sha256(repr(runs[0].token_ids).encode()).hexdigest(),
        "first_token_ids": runs[0].token_ids[:16],
    }


def sampling_of(args: argparse.Namespace) -> SamplingParams | None:
    """What the sampled levels ask for; None when ``--temperature`` is 0. Raises :class:`InputError`."""
    params = SamplingParams(args.temperature, args.top_k, args.top_p, args.seed)
    return params if args.temperature else None


def about(sampling: SamplingParams | None) -> dict[str, Any]:
    """What a level's workload says of its sampling; nothing when greedy."""
    fields = ("temperature", "top_k", "top_p", "seed")
    return {"sampling": {name: getattr(sampling, name) for name in fields}} if sampling else {}


def measure_batches(
    stack: EngineStack, args: argparse.Namespace, device: str, environment: dict[str, Any]
) -> list[dict[str, Any]]:
    """In-process levels: that many requests handed over at once, ``--batch-runs`` times after one to warm up.

    Throughput is tokens received / wall time from the first t0 to the last tN. With ``--temperature``, 1 and the
    levels once more, sampled.
    """
    new_tokens, results = args.batch_output_tokens, []
    levels: list[tuple[int, SamplingParams | None]] = [(level, None) for level in args.batch]
    if drawn := sampling_of(args):
        levels += [(level, drawn) for level in sorted({1, *args.batch})]
    with Telemetry(device) as telemetry, progress_bar() as bar:
        task = bar.add_task("", total=len(levels) * (args.batch_runs + 1))
        for level, sampling in levels:
            name = f"{level} at once{', sampled' * bool(sampling)}"
            bar.update(task, description=name)
            prompts = make_prompts(args.model_dir, args.prompt, args.input_tokens, level)
            stack.generate_batch(prompts, new_tokens, sampling)
            bar.advance(task)
            runs, walls, rates, outputs = [], [], [], set()
            for _ in range(args.batch_runs):
                with telemetry.section(name):
                    batch = stack.generate_batch(prompts, new_tokens, sampling)
                runs += batch
                outputs.add(tuple(tuple(run.token_ids) for run in batch))
                walls.append(max(run.token_times[-1] for run in batch) - batch[0].t0)
                rates.append(sum(len(run.token_ids) for run in batch) / walls[-1])
                bar.advance(task)
            samples = samples_of(runs)
            del samples["itl_ms"]
            part = {
                "concurrency": level,
                "mode": "in_process",
                "workload": {"input_tokens": args.input_tokens, "output_tokens": new_tokens} | about(sampling),
                "samples": samples | {"wall_s": walls},
                "summary": summarize(samples, rates),
                "checks": {
                    "failed_requests": 0,
                    "distinct_outputs": len(outputs),
                    "clock_backwards": sum(run.clock_backwards for run in runs),
                    "prefix_cache_hit_tokens": stack.engine.scheduler.prefix_cache_hit_tokens,
                    "requests_per_s": len(runs) / sum(walls),
                    "mean_latency_s": sum(samples["latency_s"]) / len(runs),
                },
            }
            nbytes = stack.cost.decode_nbytes(args.input_tokens, new_tokens, level)
            results.append(add_device(part, telemetry.summary(name), nbytes, environment))
    return results


def comparison(baseline: Result, engine: Result) -> Result:
    """Paired bootstrap ratios of an interleaved pair; none when either run is INVALID."""
    reasons = [f"{r['benchmark']}: {reason}" for r in (baseline, engine) for reason in r["validity"]["reasons"]]
    speedup = {}
    if not reasons:
        before, after = baseline["samples"], engine["samples"]
        for name, key in RATIOS.items():
            if key in before and key in after:
                speedup[name] = bootstrap_ratio(before[key], after[key])
        rates = [[n / s for n, s in zip(x["output_tokens"], x["latency_s"])] for x in (after, before)]
        speedup["output_tokens_per_s"] = bootstrap_ratio(*rates)
    result = new_result(
        "comparison",
        engine["backend"],
        model=baseline["model"],
        workload=baseline["workload"],
        environment=baseline["environment"],
        speedup=speedup,
        engine=engine.get("engine"),
        method="interleaved A B A B; median ratio of pairs; percentile bootstrap, "
        f"{RESAMPLES:,} resamples, seed {SEED}",
    )
    cautions = [f"{r['benchmark']}: {x}" for r in (baseline, engine) for x in r["validity"].get("cautions", [])]
    result["validity"] = {"status": "INVALID" if reasons else "VALID", "reasons": reasons, "cautions": cautions}
    return result
