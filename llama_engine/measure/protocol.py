"""The measuring contract as code: flags, stacks, interleaved runs and the result they become."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from llama_engine import build
from llama_engine.engine import Engine, pick_device
from llama_engine.errors import InputError
from llama_engine.hf import model_identity
from llama_engine.measure.environment import fingerprint
from llama_engine.measure.generation import (
    Cost,
    EngineStack,
    GenerationRun,
    RunnerStack,
    Stack,
    ceilings,
    make_prompts,
    mbu,
    mfu,
    progress_bar,
    run_checks,
    run_interleaved,
    samples_of,
    summarize,
)
from llama_engine.measure.result import Result, new_result
from llama_engine.measure.stats import bootstrap_ratio, summary
from llama_engine.measure.telemetry import Telemetry
from llama_engine.measure.validity import judge

BATCH_LEVELS = (8, 32, 64)
DEFAULT_PROMPT = (
    "The lighthouse keeper climbed the stairs each evening with a lamp in one hand and a letter in the other. "
    "Nobody in the village knew who wrote to him, or why the letters always came on the day before a storm. "
)
console = Console(stderr=True)


def add_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """The flags that every generation benchmark shares."""
    parser.add_argument("--model-dir", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--input-tokens", type=int, default=32, help="prompt length, exactly")
    parser.add_argument("--output-tokens", type=int, default=512, help="new tokens a run, exactly")
    parser.add_argument("--warmup", type=int, default=3, help="runs that are not counted")
    parser.add_argument("--runs", type=int, default=10, help="timed runs")
    parser.add_argument("--prefill-tokens", type=int, default=1024, help="also time TTFT of this prompt; 0 to skip")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="text, repeated or cut to --input-tokens")
    parser.add_argument("--output", type=Path, default=Path(output), help="result file")
    parser.add_argument("--force", action="store_true", help="replace an existing result")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a benchmark that loads an engine."""
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/smollm2-135m-instruct"))
    parser.add_argument("--backend", choices=("auto", "native", "tensorrt_llm"), default="auto")
    parser.add_argument("--batch", type=int, nargs="*", help="requests at once (default: 8 32 64 up to the engine's)")
    parser.add_argument("--batch-output-tokens", type=int, default=256, help="new tokens a request of a batch")
    parser.add_argument("--batch-runs", type=int, default=3, help="timed runs a batch level")


def prepare(args: argparse.Namespace) -> str:
    """Check the flags, set the threads, return the device."""
    for name in ("input_tokens", "output_tokens", "runs"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.warmup < 0 or args.prefill_tokens < 0:
        raise InputError("--warmup and --prefill-tokens must not be negative")
    if args.threads is not None:
        if args.threads < 1:
            raise InputError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    return pick_device(args.device).type


def backend_of(args: argparse.Namespace) -> str:
    """What ``--backend`` means for ``--engine-dir``: auto reads ``engine.json``."""
    return build.engine_backend(args.engine_dir) if args.backend == "auto" else args.backend


def check_same_model(model_dir: Path, about: dict[str, Any]) -> None:
    """Refuse to measure an engine under another model's name. Raises :class:`InputError`."""
    model = model_identity(model_dir)
    if about["model"]["sha256"] != model["sha256"]:
        raise InputError(
            f"the engine was built from {about['model']['name']}, not from {model_dir}: give its --model-dir"
        )


def add_levels(result: Result, stack: EngineStack, args: argparse.Namespace, device: str) -> None:
    """Measure the batch levels into ``result`` and judge it again."""
    if args.batch_runs < 1 or args.batch_output_tokens < 1:
        raise InputError("--batch-runs and --batch-output-tokens must be at least 1")
    result["levels"] = measure_batches(stack, args, args.batch, device, result["environment"])
    result["validity"] = judge(result)


def open_engine(engine_dir: Path, backend: str, device: str, threads: int | None) -> tuple[Stack, dict[str, Any]]:
    """The engine as a stack, and what a result says about it. ``backend`` auto reads ``engine.json``."""
    if backend == "auto":
        backend = build.engine_backend(engine_dir)
    info = build.load_engine_json(engine_dir, backend=backend)
    about = {
        "backend": backend,
        "checkpoint_sha256": info.checkpoint_sha256,
        "weights_sha256": info.weights_sha256,
        "config": info.engine.to_dict(),
        "model": info.identity,
    }
    if backend == "native":
        engine = Engine.from_dir(engine_dir, device=device, threads=threads)
        return EngineStack(engine), about | {"kernels": engine.executor.kernels}
    from llama_engine.runner import ModelRunner

    model = info.model
    layer = model.hidden_size * (model.qkv_size + model.q_size + 3 * model.intermediate_size)
    nbytes = model.num_layers * layer + 2 * model.vocab_size * model.hidden_size  # int8 linears, fp16 lm_head
    cost = Cost.of(model, nbytes, 4 * model.num_layers * model.kv_size)
    return RunnerStack(ModelRunner.from_dir(engine_dir), cost), about | {"kernels": "tensorrt_llm"}


def measure(stacks: Sequence[Stack], args: argparse.Namespace, device: str, about: dict[str, Any]) -> dict[str, Result]:
    """Run the stacks interleaved and return one complete result each, by stack name."""
    environment = fingerprint(device) | ceilings(device)
    model = model_identity(args.model_dir)
    workload = {
        "input_tokens": args.input_tokens,
        "output_tokens": args.output_tokens,
        "concurrency": 1,
        "warmup_runs": args.warmup,
        "timed_runs": args.runs,
        "prompt_ids": make_prompts(args.model_dir, args.prompt, args.input_tokens)[0],
        "interleaved_with": [stack.name for stack in stacks],
    }
    with Telemetry(device) as telemetry:
        timed = run_interleaved(
            stacks,
            workload["prompt_ids"],
            args.output_tokens,
            warmup=args.warmup,
            runs=args.runs,
            telemetry=telemetry,
            console=console,
        )
        sections = {stack.name: telemetry.summary(stack.name) for stack in stacks}
        prefill = _measure_prefill(stacks, args, telemetry)
    results = {}
    for stack in stacks:
        baseline = stack.name == "transformers"
        samples = samples_of(timed[stack.name])
        summed = summarize(samples, stack.cost, workload, environment, sections[stack.name])
        more: dict[str, Any] = {} if baseline else {"engine": about}
        if stack.name in prefill:
            times = prefill[stack.name]
            summed["prefill_ttft_ms"] = summary(times) | {"input_tokens": args.prefill_tokens}
            summed["prefill_mfu"] = mfu(
                stack.cost, args.prefill_tokens, summed["prefill_ttft_ms"]["p50"] / 1e3, environment
            )
            samples["prefill_ttft_ms"] = times
        results[stack.name] = new_result(
            "baseline" if baseline else "optimized",
            stack.name,
            model=model,
            workload=workload,
            environment=environment,
            samples=samples,
            summary=summed,
            checks=run_checks(timed[stack.name]),
            cost=dataclasses.asdict(stack.cost),
            telemetry=sections[stack.name],
            **more,
        )
    return results


def _measure_prefill(stacks: Sequence[Stack], args: argparse.Namespace, telemetry: Telemetry) -> dict[str, list[float]]:
    """TTFT in ms of the long prompt, one token generated, interleaved like everything else."""
    if not args.prefill_tokens:
        return {}
    prompt = make_prompts(args.model_dir, args.prompt, args.prefill_tokens)[0]
    runs = run_interleaved(stacks, prompt, 1, warmup=args.warmup, runs=args.runs, telemetry=telemetry, console=console)
    return {name: [run.ttft_s * 1e3 for run in finished] for name, finished in runs.items()}


def measure_batches(
    stack: EngineStack, args: argparse.Namespace, levels: Sequence[int] | None, device: str, environment: dict[str, Any]
) -> list[dict[str, Any]]:
    """In-process levels: that many requests handed over at once, ``--batch-runs`` times.

    Throughput is tokens received / wall time from the first t0 to the last tN. Raises :class:`InputError` for a level
    above the engine's ``max_batch_size``; without ``levels``, :data:`BATCH_LEVELS` up to it.
    """
    limit = stack.engine.config.max_batch_size
    if levels is None:
        levels = [level for level in BATCH_LEVELS if level <= limit]
    if bad := [level for level in levels if not 1 <= level <= limit]:
        raise InputError(f"--batch {bad[0]}: this engine was built for 1 to {limit} (max_batch_size)")
    new_tokens, results = args.batch_output_tokens, []
    with Telemetry(device) as telemetry, progress_bar(console) as bar:
        task = bar.add_task("batches", total=len(levels) * (args.batch_runs + 1))
        for level in levels:
            bar.update(task, description=f"{level} at once")
            prompts = make_prompts(args.model_dir, args.prompt, args.input_tokens, level)
            stack.generate_batch(prompts, new_tokens)
            bar.advance(task)
            batches = []
            for _ in range(args.batch_runs):
                with telemetry.section(str(level)):
                    batches.append(stack.generate_batch(prompts, new_tokens))
                bar.advance(task)
            results.append(_level(stack, level, batches, args, telemetry.summary(str(level)), environment))
    return results


def _level(
    stack: EngineStack,
    level: int,
    batches: list[list[GenerationRun]],
    args: argparse.Namespace,
    section: dict[str, Any],
    environment: dict[str, Any],
) -> dict[str, Any]:
    runs = [run for batch in batches for run in batch]
    walls = [max(run.token_times[-1] for run in batch) - batch[0].t0 for batch in batches]
    rates = [sum(len(run.token_ids) for run in batch) / wall for batch, wall in zip(batches, walls)]
    samples = samples_of(runs)
    summed: dict[str, Any] = {key: summary(samples[key]) for key in ("ttft_ms", "tpot_ms", "latency_s")}
    summed["output_tokens_per_s"] = summary(rates)
    nbytes = stack.cost.decode_nbytes(args.input_tokens, args.batch_output_tokens, level)
    summed["mbu"] = mbu(nbytes, summed["tpot_ms"]["p50"] / 1e3, environment)
    summed["gpu_utilization_pct"], summed["gpu_power_w"] = section["gpu_utilization_pct"], section["gpu_power_w"]
    tokens = sum(samples["output_tokens"])
    summed["energy_j_per_token"] = section["gpu_energy_j"] / tokens if section["gpu_energy_j"] else None
    del samples["itl_ms"]
    return {
        "concurrency": level,
        "mode": "in_process",
        "workload": {"input_tokens": args.input_tokens, "output_tokens": args.batch_output_tokens},
        "samples": samples | {"wall_s": walls},
        "summary": summed,
        "telemetry": section,
        "checks": {
            "failed_requests": 0,
            "clock_backwards": sum(run.clock_backwards for run in runs),
            "requests_per_s": len(runs) / sum(walls),
            "mean_latency_s": summed["latency_s"]["mean"],
        },
    }


RATIOS = {  # metric: (key of the samples, statement of what is divided)
    "latency": ("latency_s", "baseline / engine"),
    "ttft": ("ttft_ms", "baseline / engine"),
    "tpot": ("tpot_ms", "baseline / engine"),
    "prefill": ("prefill_ttft_ms", "baseline / engine, the long prompt"),
}


def comparison(baseline: Result, engine: Result) -> Result:
    """Paired bootstrap ratios of an interleaved pair; none when either run is INVALID."""
    reasons = [f"{r['benchmark']}: {reason}" for r in (baseline, engine) for reason in r["validity"]["reasons"]]
    speedup = {}
    if not reasons:
        for name, (key, _) in RATIOS.items():
            if key in baseline["samples"] and key in engine["samples"]:
                speedup[name] = bootstrap_ratio(baseline["samples"][key], engine["samples"][key])
        rates = [
            [n / s for n, s in zip(r["samples"]["output_tokens"], r["samples"]["latency_s"])]
            for r in (engine, baseline)
        ]
        speedup["output_tokens_per_s"] = bootstrap_ratio(*rates)
    result = new_result(
        "comparison",
        engine["backend"],
        model=baseline["model"],
        workload=baseline["workload"],
        environment=baseline["environment"],
        speedup=speedup,
        engine=engine.get("engine"),
        method="interleaved A B A B; median ratio of pairs; percentile bootstrap, 10,000 resamples, seed 0",
    )
    result["validity"] = {"status": "INVALID" if reasons else "VALID", "reasons": reasons}
    return result


def print_result(result: Result, out: Console | None = None) -> None:
    """The speed, its MBU and how far the wall is: one table."""
    summed, wall = result["summary"], result["environment"]["read_bandwidth"]["bytes_per_s"]
    table = Table(title=f"{result['benchmark']} ({result['backend']}), {result['model']['name']}", title_justify="left")
    for column in ("at once", "tok/s", "TTFT p50", "TPOT p50", "MBU", "wall"):
        table.add_column(column, justify="right")

    def row(level: int, s: dict[str, Any], nbytes: float) -> None:
        limit = level * wall / nbytes
        rate = s["output_tokens_per_s"]["p50"]
        used = "-" if s["mbu"] is None else f"{s['mbu']:.2f}"
        distance = f"{limit:,.0f} tok/s, {limit / rate:.2f}x away"
        table.add_row(
            str(level), f"{rate:,.1f}", f"{s['ttft_ms']['p50']:.1f} ms", f"{s['tpot_ms']['p50']:.2f} ms", used, distance
        )

    row(1, summed, summed["step_nbytes"])
    for level in result.get("levels", []):
        s = level["summary"]
        row(level["concurrency"], s, s["mbu"] * wall * s["tpot_ms"]["p50"] / 1e3 if s["mbu"] else summed["step_nbytes"])
    out = out or Console()
    out.print(table)
    if "prefill_ttft_ms" in summed:
        prefill = summed["prefill_ttft_ms"]
        out.print(f"TTFT of {prefill['input_tokens']} tokens: {prefill['p50']:.1f} ms, MFU {summed['prefill_mfu']:.2f}")
    if result["model"]["source"] == "synthetic":
        out.print("[bold]synthetic weights[/]: speed only, no accuracy")
    for reason in result["validity"]["reasons"]:
        out.print(f"[bold red]INVALID[/] {reason}")
