"""The measuring contract as code: interleaved runs of the stacks, and the results they become."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llama_engine.device import pick_device
from llama_engine.engine_dir import EngineInfo, load_engine_json
from llama_engine.errors import InputError
from llama_engine.flags import Parser
from llama_engine.measure.compare import paired
from llama_engine.measure.cost import Cost
from llama_engine.measure.demand import sampled
from llama_engine.measure.environment import ceilings, fingerprint
from llama_engine.measure.generation import (
    WAKE_TOKENS,
    GenerationRun,
    Stack,
    add_device,
    mfu,
    progress_bar,
    run_interleaved,
    samples_of,
    summarize,
)
from llama_engine.measure.result import Result, check_output, new_result, write_result
from llama_engine.measure.stacks import EngineStack, TensorRTStack, TransformersStack
from llama_engine.measure.stats import RESAMPLES, SEED, summary
from llama_engine.measure.telemetry import Telemetry
from llama_engine.measure.workload import Workload, add_arguments, add_engine_arguments, workload_of
from llama_engine.native import load_engine
from llama_engine.report.show import show
from llama_engine.sampling import SamplingParams
from llama_engine.trtllm import TensorRTBackend


def parser_for(doc: str | None, output: str | None) -> argparse.ArgumentParser:
    """A script's parser, with the flags of every benchmark that loads a model itself; ``output`` is the default."""
    parser = Parser(doc)
    parser.add_argument("--model-dir", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--output", type=Path, default=output, help="where the result goes")
    parser.add_argument("--force", action="store_true", help="replace an existing result")
    return parser


def use_device(device: str, threads: int | None) -> str:
    """Set the CPU threads and return the device: "cpu" or "cuda". Raises :class:`InputError`."""
    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    return pick_device(device).type


def main(doc: str | None, *, engine: bool) -> None:
    """The two scripts that measure one stack: the baseline, or an engine."""
    parser = parser_for(doc, None if engine else "results/local/baseline.json")
    add_arguments(parser)
    if engine:
        add_engine_arguments(parser)
        parser.add_argument("--kernels", default="auto", help="native only: auto, torch, on a GPU streaming or tiled")
    else:
        parser.add_argument("--compile", action="store_true", help="with a static cache and torch.compile")
    args = parser.parse_args()
    info = load_engine_json(args.engine_dir, backend=args.backend) if engine else None
    output = args.output or Path(f"results/local/optimized-{info.backend}.json")
    check_output(output, args.force, args.model_dir, *([args.engine_dir] if engine else []))
    device = use_device(args.device, args.threads)
    workload = workload_of(args, info)
    stack: Stack
    if info:
        stack = open_engine(args.engine_dir, info, device=device, threads=args.threads, kernels=args.kernels)
    else:
        stack = TransformersStack(args.model_dir, device, compiled=args.compile)
    measured = measure([stack], workload, device)
    write_result(output, measured[stack.name], force=args.force)
    show(measured.values())


def describe(info: EngineInfo, kernels: str) -> dict[str, Any]:
    """What a result says of its engine."""
    return {
        "backend": info.backend,
        "checkpoint_sha256": info.checkpoint_sha256,
        "weights_sha256": info.weights_sha256,
        "config": info.engine.to_dict(),
        "model": info.identity,
        "quantization": info.quant_algo or "16-bit",
        "kernels": kernels,
    }


def open_engine(
    engine_dir: Path, info: EngineInfo, *, device: str, threads: int | None = None, kernels: str = "auto"
) -> Stack:
    """The engine of ``engine_dir``, of which ``info`` was read, as a stack. Raises :class:`InputError`."""
    if info.backend == "native":
        engine = load_engine(engine_dir, device=device, kernels=kernels, threads=threads, enable_prefix_cache=False)
        return EngineStack(engine, describe(info, engine.executor.kernels))
    assert info.tensorrt_llm
    cost = Cost.of(info.model, info.tensorrt_llm.step_nbytes, info.model.kv_nbytes(info.engine.kv_element_nbytes))
    return TensorRTStack(TensorRTBackend(engine_dir, sequences=1), cost, describe(info, info.backend))


def measure(stacks: Sequence[Stack], workload: Workload, device: str) -> dict[str, Result]:
    """Run the stacks interleaved, then the native engine's batches; one complete result each, by stack name."""
    environment = fingerprint(device) | ceilings(device)
    prompt = workload.prompts(workload.input_tokens)[0]
    times: dict[str, Any] = {"warmup": workload.warmup, "runs": workload.runs}
    with Telemetry(device) as telemetry:
        timed = run_interleaved(stacks, prompt, workload.output_tokens, telemetry=telemetry, **times)
        sections = {stack.name: telemetry.summary(stack.name) for stack in stacks}
        prefill = {}
        if workload.prefill_tokens:
            long = workload.prompts(workload.prefill_tokens)[0]
            prefill = run_interleaved(stacks, long, 1, telemetry=telemetry, **times)
    described = {
        "input_tokens": workload.input_tokens,
        "output_tokens": workload.output_tokens,
        "concurrency": 1,
        "warmup_runs": workload.warmup,
        "timed_runs": workload.runs,
        "wake_tokens": WAKE_TOKENS,
        "prompt_ids": prompt,
        "interleaved_with": [stack.name for stack in stacks],
    }
    results = {}
    for stack in stacks:
        runs, cost = timed[stack.name], stack.cost
        samples = samples_of(runs)
        summed = summarize(samples, [len(run.token_ids) / run.latency_s for run in runs])  # N / (tN - t0)
        summed["step_nbytes"] = cost.decode_nbytes(workload.input_tokens, workload.output_tokens)
        summed["mfu"] = mfu(cost, workload.input_tokens, summed["ttft_ms"]["p50"] / 1e3, environment)
        if prefill:
            samples["prefill_ttft_ms"] = [run.ttft_s * 1e3 for run in prefill[stack.name]]
            long_ttft = summary(samples["prefill_ttft_ms"])
            summed["prefill_ttft_ms"] = long_ttft | {"input_tokens": workload.prefill_tokens}
            summed["prefill_mfu"] = mfu(cost, workload.prefill_tokens, long_ttft["p50"] / 1e3, environment)
        part = {"samples": samples, "summary": summed, "checks": run_checks(runs), "cost": dataclasses.asdict(cost)}
        part = add_device(part, sections[stack.name], summed["step_nbytes"], environment)
        if stack.about:
            part["engine"] = stack.about
        if isinstance(stack, EngineStack):
            part["checks"]["prefix_cache_hit_tokens"] = stack.engine.scheduler.prefix_cache_hit_tokens
            part["levels"] = measure_batches(stack, workload, device, environment)
        results[stack.name] = new_result(
            "optimized" if stack.about else "baseline",
            stack.name,
            model=workload.model,
            workload=described,
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


def measure_batches(
    stack: EngineStack, workload: Workload, device: str, environment: dict[str, Any]
) -> list[dict[str, Any]]:
    """In-process levels: that many requests handed over at once, ``batch_runs`` times after one to warm up.

    Throughput is tokens received / wall time from the first t0 to the last tN. With ``--temperature``, 1 and the
    levels once more, sampled.
    """
    new_tokens, results = workload.batch_output_tokens, []
    levels: list[tuple[int, SamplingParams | None]] = [(level, None) for level in workload.batch]
    if workload.sampling:
        levels += [(level, workload.sampling) for level in sorted({1, *workload.batch})]
    with Telemetry(device) as telemetry, progress_bar() as bar:
        task = bar.add_task("", total=len(levels) * (workload.batch_runs + 1))
        for level, sampling in levels:
            name = f"{level} at once{', sampled' * bool(sampling)}"
            bar.update(task, description=name)
            prompts = workload.prompts(workload.input_tokens, level)
            stack.generate_batch(prompts, new_tokens, sampling)
            bar.advance(task)
            runs, walls, rates, outputs = [], [], [], set()
            for _ in range(workload.batch_runs):
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
                "workload": {"input_tokens": workload.input_tokens, "output_tokens": new_tokens}
                | ({"sampling": sampled(sampling)} if sampling else {}),
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
            nbytes = stack.cost.decode_nbytes(workload.input_tokens, new_tokens, level)
            results.append(add_device(part, telemetry.summary(name), nbytes, environment))
    return results


def comparison(baseline: Result, engine: Result) -> Result:
    """What :func:`paired` says of an interleaved pair, as a result."""
    speedup, verdict = paired(baseline, engine)
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
    return result | {"validity": verdict}
