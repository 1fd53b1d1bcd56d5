r"""Load a Triton Inference Server and measure what its users get.

Purpose: throughput and latency of a served engine at several loads, with proof that the client is not the limit.
Method:  closed loop at each --concurrency, then open loop with seeded Poisson arrivals at each --rate; every request
         gets exactly its number of tokens, EOS ignored. A null model in the same server gives the client's own
         ceiling, and its lag is sampled; both decide validity.
Output:  results/<name>/triton-<backend>.json (-whole.json with --no-streaming) with one entry in "levels" a load.

With --url, --model-dir may take the engine directory's place: the model that the server runs, Hugging Face format.

    python benchmarks/benchmark_triton.py --engine-dir engines/smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llama_engine.checkpoint.hf import HFModel, model_identity
from llama_engine.config import ModelConfig, check_length
from llama_engine.device import pick_device
from llama_engine.engine_dir import EngineInfo, load_engine_json
from llama_engine.errors import InputError, RunError, run_cli
from llama_engine.flags import Parser
from llama_engine.measure.cost import Cost
from llama_engine.measure.environment import ceilings, fingerprint
from llama_engine.measure.generation import add_device, progress_bar
from llama_engine.measure.load import Generator, Length, Load, level, parse_slo
from llama_engine.measure.protocol import describe
from llama_engine.measure.result import Result, check_output, new_result, write_result
from llama_engine.measure.telemetry import Telemetry
from llama_engine.report.show import show
from llama_engine.serving.client import connect
from llama_engine.serving.repository import ServeConfig
from llama_engine.serving.server import TritonServer, read_metrics

NULL_S = 2.0
PUBLISHED_S = 0.5  # twice as long as a server takes to publish what it counted
PREFIX_CACHE = ("prefix_cache_hit_tokens", "prefix_cache_query_tokens")
OWN_PROCESSES = 3  # on the GPU: this one, tritonserver, the engine
console = Console(stderr=True)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--engine-dir", type=Path, help="default: engines/smollm2-135m-instruct")
    parser.add_argument("--model-dir", type=Path, help="what NVIDIA's server at --url runs, if its engine is elsewhere")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--url", help="HOST:PORT of a running server (default: start one and stop it)")
    parser.add_argument("--metrics-url", default="127.0.0.1:8002", help="its metrics page, with --url")
    parser.add_argument("--protocol", choices=["grpc", "http"], default="grpc")
    parser.add_argument("--streaming", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 2, 4, 8], help="closed loop: users at once")
    parser.add_argument("--rate", type=float, nargs="*", default=[], help="open loop: requests a second")
    parser.add_argument("--input-tokens", default="32", help="N or LOW:HIGH (default: 32)")
    parser.add_argument("--output-tokens", default="128", help="likewise (default: 128)")
    parser.add_argument("--requests", type=int, default=0, help="a level (default: 4 a user, or 32 in the open loop)")
    parser.add_argument("--duration", type=float, default=0, help="seconds a level, instead of --requests")
    parser.add_argument("--slo", nargs="*", default=[], help="goodput limits: ttft_ms:200 tpot_ms:30 latency_ms:5000")
    parser.add_argument("--timeout", type=float, default=600, help="seconds the client waits for one answer")
    parser.add_argument("--prefix-cache", action="store_true", help="let the server answer from its prefix cache")
    parser.add_argument("--seed", type=int, default=0, help="of lengths, prompts and arrivals")
    parser.add_argument("--output", type=Path, help="default: results/local/triton-<backend>[-whole].json")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    served = served_by(args.engine_dir, args.model_dir, args.url)
    load = ServedLoad(
        concurrency=args.concurrency,
        rate=args.rate,
        input_tokens=Length.parse(args.input_tokens),
        output_tokens=Length.parse(args.output_tokens),
        requests=args.requests,
        duration=args.duration,
        timeout=args.timeout,
        slo=parse_slo(args.slo),
        streaming=args.streaming,
        protocol=args.protocol,
        prefix_cache=args.prefix_cache,
        seed=args.seed,
    )
    if served.info:
        check_length(served.info.engine, load.input_tokens.high, load.output_tokens.high, "--output-tokens")
        served.info.check_input(load.input_tokens.high, "--input-tokens")
    name = f"triton-{served.backend}{'' if args.streaming else '-whole'}.json"
    output = check_output(args.output or Path("results/local") / name, args.force, served.dir)
    device = pick_device(args.device).type
    with console.status("measuring this machine's ceilings"):
        environment = fingerprint(device) | ceilings(device)
        if device == "cuda":
            torch.cuda.empty_cache()
    url, metrics_url = args.url, args.metrics_url
    with ExitStack() as stack:
        if not url:
            with console.status("starting Triton Inference Server"):
                config = ServeConfig(device=args.device, null_model=True, enable_prefix_cache=args.prefix_cache)
                triton = stack.enter_context(TritonServer(served.dir, config))
            url = triton.grpc_url if args.protocol == "grpc" else triton.http_url
            metrics_url = f"{triton.host}:{triton.metrics_port}"
        result = asyncio.run(measure(load, url, metrics_url, served, environment))
    write_result(output, result, force=args.force)
    show([result])
    print(f"wrote {output}")
    return 0 if result["validity"]["status"] == "VALID" else 1


@dataclass(frozen=True)
class Served:
    """What the server runs, as known here. ``info`` is None where only the model is at hand, not the engine."""

    dir: Path
    backend: str
    model: ModelConfig
    identity: dict[str, str]
    info: EngineInfo | None = None


def served_by(engine_dir: Path | None, model_dir: Path | None, url: str | None) -> Served:
    """Of the engine's directory, or of the model's where NVIDIA's backend runs at ``url``. Raises
    :class:`InputError`."""
    if model_dir is None:
        engine_dir = engine_dir or Path("engines/smollm2-135m-instruct")
        info = load_engine_json(engine_dir, backend="auto")
        if info.backend != "native" and not url:
            raise InputError("NVIDIA's backend is not started here: run scripts/serve_triton.sh, and give --url")
        return Served(engine_dir, info.backend, info.model, info.identity, info)
    if engine_dir or not url:
        raise InputError("--model-dir takes the place of --engine-dir for a server that runs at --url")
    return Served(model_dir, "tensorrt_llm", HFModel(model_dir).config, model_identity(model_dir))


@dataclass(frozen=True)
class ServedLoad:
    """What the clients ask of the server. ``concurrency`` and ``rate`` list the levels, closed loop and open loop."""

    concurrency: list[int]
    rate: list[float]
    input_tokens: Length
    output_tokens: Length
    requests: int
    duration: float
    timeout: float
    slo: dict[str, float]
    streaming: bool
    protocol: str
    prefix_cache: bool
    seed: int

    def __post_init__(self) -> None:
        levels = [*self.concurrency, *self.rate]
        positive, not_negative = (*levels, self.timeout), (self.requests, self.duration)
        if not (all(0 < x < math.inf for x in positive) and all(0 <= x < math.inf for x in not_negative)):
            raise InputError(
                "--concurrency, --rate and --timeout must be positive, --requests and --duration not negative"
            )
        if not levels:
            raise InputError("nothing to measure: give --concurrency or --rate")


async def measure(asked: ServedLoad, url: str, metrics_url: str, served: Served, environment: dict[str, Any]) -> Result:
    """Null model first, then every level."""
    kernels, cost, values, own = "unknown", None, {}, served.info and served.info.tensorrt_llm
    try:
        values, kernels = await asyncio.to_thread(read_metrics, metrics_url)
        if "step_nbytes" in values:  # a page of NVIDIA's backend has rows of its own
            cost = Cost.of(served.model, int(values["step_nbytes"]), int(values["kv_nbytes_per_token"]))
    except OSError:
        console.print(f"no metrics at {metrics_url}: MBU is left out (give --metrics-url)")
    if cost and served.backend != "native":
        raise InputError(f"{url} runs the native engine: give --engine-dir, the one that it serves")
    if own:
        cost = Cost.of(served.model, own.step_nbytes, served.model.kv_nbytes())
    client = connect(asked.protocol, url)
    rng, vocab = random.Random(asked.seed), served.model.vocab_size

    def generator(**changes: Any) -> Generator:
        options = {"streaming": asked.streaming, "seed": asked.seed, "timeout_s": asked.timeout} | changes
        prompts = lambda n: [rng.randrange(vocab) for _ in range(n)]  # noqa: E731  distinct, so no prefix is shared
        return Generator(client, prompts, asked.input_tokens, asked.output_tokens, **options)

    users = max([*asked.concurrency, 8])
    null = await generator(model="null_model").closed(users, duration_s=NULL_S)
    null_rate = null.responses / null.wall_s if null.runs else None
    plan = [("concurrency", value) for value in asked.concurrency] + [("rate", value) for value in asked.rate]
    levels = []
    with Telemetry(environment["device"], own_processes=OWN_PROCESSES) as telemetry, progress_bar() as bar:
        task = bar.add_task("", total=len(plan))
        for kind, value in plan:
            closed = kind == "concurrency"
            name = f"{value:g} {'at once' if closed else 'requests/s'}"
            bar.update(task, description=f"{name}: warm-up")
            await generator().closed(value if closed else 4, requests=int(max(value, 4)))
            started = time.perf_counter()

            def progress(load: Load, name: str = name, started: float = started) -> None:
                rate, failed = load.tokens / (time.perf_counter() - started), sum(load.failures.values())
                bar.update(task, description=f"{name}: {rate:,.0f} tok/s" + (f", {failed} failed" if failed else ""))

            loader = generator(on_progress=progress)
            requests = asked.requests or (0 if asked.duration else 4 * value if closed else 32)
            with telemetry.section(name):
                load = await (loader.closed if closed else loader.open)(
                    value, requests=requests, duration_s=asked.duration
                )
            part = {kind: value, "mode": "closed" if closed else "open"}
            part |= level(load, streaming=asked.streaming, slo=asked.slo)
            part["checks"]["null_responses_per_s"] = null_rate
            if values:  # the server's metrics can be read, and are the native engine's
                await asyncio.sleep(PUBLISHED_S)
                before, (values, _) = values, await asyncio.to_thread(read_metrics, metrics_url)
                part["checks"] |= {key: int(values[key] - before[key]) for key in PREFIX_CACHE if key in values}
            nbytes = (
                cost.decode_nbytes(asked.input_tokens.mean, asked.output_tokens.mean, value)
                if cost and closed
                else None
            )
            levels.append(add_device(part, telemetry.summary(name), nbytes, environment))
            bar.advance(task)
    await client.close()
    if not any(part["samples"] for part in levels):
        raise RunError(f"no request succeeded at {url}: {next(iter(levels[0]['failures']), 'no answer')}")
    workload = {"streaming": asked.streaming, "protocol": asked.protocol, "seed": asked.seed, "slo": asked.slo}
    workload["prefix_cache"] = asked.prefix_cache
    for name in ("input_tokens", "output_tokens"):
        length = getattr(asked, name)
        workload |= {name: length.low} if length.low == length.high else {f"{name}_range": [length.low, length.high]}
    return new_result(
        "triton",
        served.backend,
        model=served.identity,
        workload=workload,
        environment=environment,
        engine=describe(served.info, kernels) if served.info else {"backend": served.backend},
        null_model={"responses_per_s": null_rate, "concurrency": users, "failures": dict(null.failures)},
        levels=levels,
    )


if __name__ == "__main__":
    run_cli(main)
