r"""Load a Triton Inference Server and measure what its users get.

Purpose: throughput and latency of a served engine at several loads, with proof that the client is not the limit.
Method:  closed loop at each --concurrency, then open loop with seeded Poisson arrivals at each --rate; every request
         gets exactly its number of tokens, EOS ignored. A null model in the same server gives the client's own
         ceiling, and its lag is sampled; both decide validity.
Output:  results/<name>/triton-<backend>.json with one entry in "levels" a load.

    python benchmarks/benchmark_triton.py --engine-dir engines/smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from llama_engine.build import EngineInfo, engine_backend, load_engine_json
from llama_engine.engine import pick_device
from llama_engine.errors import InputError, RunError, run_cli
from llama_engine.measure.environment import fingerprint
from llama_engine.measure.generation import Cost, ceilings, mbu, progress_bar
from llama_engine.measure.load import Generator, Length, Load, level, parse_slo
from llama_engine.measure.result import check_output, new_result, write_result
from llama_engine.measure.telemetry import Telemetry
from llama_engine.triton_client import connect
from llama_engine.triton_server import ServeConfig, TritonServer, read_metrics

NULL_S = 2.0
console = Console(stderr=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/smollm2-135m-instruct"))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--url", help="HOST:PORT of a running server (default: start one and stop it)")
    parser.add_argument("--metrics-url", default="127.0.0.1:8002", help="its metrics page, with --url")
    parser.add_argument("--protocol", choices=["grpc", "http"], default="grpc")
    parser.add_argument("--streaming", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 2, 4, 8], help="closed loop: users at once")
    parser.add_argument("--rate", type=float, nargs="*", default=[], help="open loop: requests a second")
    parser.add_argument("--input-tokens", type=Length.parse, default=Length(32, 32), help="N or LOW:HIGH (default: 32)")
    parser.add_argument("--output-tokens", type=Length.parse, default=Length(128, 128), help="likewise (default: 128)")
    parser.add_argument("--requests", type=int, default=0, help="a level (default: 4 a user, or 32 in the open loop)")
    parser.add_argument("--duration", type=float, default=0, help="seconds a level, instead of --requests")
    parser.add_argument("--slo", nargs="*", default=[], help="goodput limits: ttft_ms:200 tpot_ms:30 latency_ms:5000")
    parser.add_argument("--timeout", type=float, default=600, help="seconds the client waits for one answer")
    parser.add_argument("--seed", type=int, default=0, help="of lengths, prompts and arrivals")
    parser.add_argument("--output", type=Path, help="default: results/local/triton-<backend>.json")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    backend = engine_backend(args.engine_dir)
    info = load_engine_json(args.engine_dir, backend=backend)
    loads = [*args.concurrency, *args.rate]
    if any(value <= 0 for value in [*loads, args.timeout]) or min(args.requests, args.duration) < 0:
        raise InputError("--concurrency, --rate and --timeout must be positive, --requests and --duration not negative")
    if not loads:
        raise InputError("nothing to measure: give --concurrency or --rate")
    if args.input_tokens.high + args.output_tokens.high > info.engine.max_seq_len:
        raise InputError(
            f"{args.input_tokens.high} input + {args.output_tokens.high} output tokens exceed this engine's "
            f"max_seq_len {info.engine.max_seq_len}"
        )
    args.slo = parse_slo(args.slo)
    output = check_output(args.output or Path(f"results/local/triton-{backend}.json"), args.force)
    device = pick_device(args.device).type
    with console.status("measuring this machine's ceilings"):
        environment = fingerprint(device) | ceilings(device)
        if device == "cuda":
            torch.cuda.empty_cache()
    with server(args) as (url, metrics_url):
        result = asyncio.run(measure(args, info, backend, device, environment, url, metrics_url))
    write_result(output, result, force=args.force)
    show(result, output)
    return 0 if result["validity"]["status"] == "VALID" else 1


@contextlib.contextmanager
def server(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The address to load and that of the metrics: the given server's, or those of one started for the run."""
    if args.url:
        yield args.url, args.metrics_url
        return
    triton = TritonServer(args.engine_dir, ServeConfig(device=args.device, null_model=True))
    with contextlib.ExitStack() as stack:
        with console.status("starting Triton Inference Server"):
            stack.enter_context(triton)
        yield triton.grpc_url if args.protocol == "grpc" else triton.http_url, f"{triton.host}:{triton.metrics_port}"


async def measure(
    args: argparse.Namespace,
    info: EngineInfo,
    backend: str,
    device: str,
    environment: dict[str, Any],
    url: str,
    metrics_url: str,
) -> dict[str, Any]:
    """Null model first, then every level."""
    client = connect(args.protocol, url)
    rng = random.Random(args.seed)
    vocab = info.model.vocab_size

    def generator(**changes: Any) -> Generator:
        options = {"streaming": args.streaming, "seed": args.seed, "timeout_s": args.timeout} | changes
        prompts = lambda n: [rng.randrange(vocab) for _ in range(n)]  # noqa: E731  distinct, so no prefix is shared
        return Generator(client, prompts, args.input_tokens, args.output_tokens, **options)

    plan = [("concurrency", value) for value in args.concurrency] + [("rate", value) for value in args.rate]
    users = max([*args.concurrency, 8])
    null = await generator(model="null_model").closed(users, duration_s=NULL_S)
    null_rate = null.responses / null.wall_s if null.runs else None
    values, kernels = await asyncio.to_thread(_metrics, metrics_url)
    cost = Cost.of(info.model, int(values["step_nbytes"]), int(values["kv_nbytes_per_token"])) if values else None
    levels = []
    own = 3  # GPU processes: this one, tritonserver, the engine
    with Telemetry(device, own_processes=own) as telemetry, progress_bar(console) as bar:
        task = bar.add_task("levels", total=len(plan))
        for kind, value in plan:
            name = f"{value:g} {'at once' if kind == 'concurrency' else 'requests/s'}"
            bar.update(task, description=f"{name}: warm-up")
            await generator().closed(int(value) if kind == "concurrency" else 4, requests=int(max(value, 4)))
            started = asyncio.get_running_loop().time()

            def progress(load: Load, name: str = name, started: float = started) -> None:
                rate = load.tokens / (asyncio.get_running_loop().time() - started)
                failed = f", {sum(load.failures.values())} failed" if load.failures else ""
                bar.update(task, description=f"{name}: {rate:,.0f} tok/s{failed}")

            load_generator = generator(on_progress=progress)
            requests = args.requests or (0 if args.duration else 4 * int(value) if kind == "concurrency" else 32)
            with telemetry.section(name):
                if kind == "concurrency":
                    load = await load_generator.closed(value, requests=requests, duration_s=args.duration)
                else:
                    load = await load_generator.open(value, requests=requests, duration_s=args.duration)
            part = level(load, streaming=args.streaming, slo=args.slo)
            part["checks"]["null_responses_per_s"] = null_rate
            levels.append({kind: value, "mode": "closed" if kind == "concurrency" else "open"} | part)
            finish(levels[-1], args, telemetry.summary(name), cost, environment)
            bar.advance(task)
    await client.close()
    if not any(part["samples"] for part in levels):
        failure = next(iter(levels[0]["failures"]), "no answer")
        raise RunError(f"no request succeeded at {url}: {failure}")
    workload = {"streaming": args.streaming, "protocol": args.protocol, "seed": args.seed, "slo": args.slo}
    for name in ("input_tokens", "output_tokens"):
        length = getattr(args, name)
        workload[name if length.low == length.high else f"{name}_range"] = (
            length.low if length.low == length.high else [length.low, length.high]
        )
    about = {"backend": backend, "kernels": kernels, "config": info.engine.to_dict()}
    about |= {"checkpoint_sha256": info.checkpoint_sha256, "weights_sha256": info.weights_sha256}
    null_info = {"responses_per_s": null_rate, "concurrency": users, "failures": dict(null.failures)}
    return new_result(
        "triton",
        backend,
        model=info.identity,
        workload=workload,
        environment=environment,
        summary=scaling(levels),
        engine=about,
        null_model=null_info,
        levels=levels,
    )


def _metrics(url: str) -> tuple[dict[str, float], str]:
    try:
        return read_metrics(url)
    except OSError:
        console.print(f"no metrics at {url}: MBU is left out (give --metrics-url)")
        return {}, "unknown"


def finish(
    part: dict[str, Any],
    args: argparse.Namespace,
    section: dict[str, Any],
    cost: Cost | None,
    environment: dict[str, Any],
) -> None:
    """Add telemetry, MBU and energy a token to a level."""
    part["telemetry"], summed = section, part["summary"]
    summed["gpu_utilization_pct"], summed["gpu_power_w"] = section["gpu_utilization_pct"], section["gpu_power_w"]
    tokens = sum(part["samples"].get("output_tokens", []))
    energy = section["gpu_energy_j"]
    summed["energy_j_per_token"] = energy / tokens if energy and tokens else None
    if cost and "tpot_ms" in summed and "concurrency" in part:
        mean = [(length.low + length.high) // 2 for length in (args.input_tokens, args.output_tokens)]
        nbytes = cost.decode_nbytes(*mean, part["concurrency"])
        summed["mbu"] = mbu(nbytes, summed["tpot_ms"]["p50"] / 1e3, environment)


def scaling(levels: list[dict[str, Any]]) -> dict[str, Any]:
    """Throughput at the largest closed-loop level over N times that at one user."""
    rates = {part["concurrency"]: part["summary"] for part in levels if "concurrency" in part and part["samples"]}
    if 1 not in rates or len(rates) < 2:
        return {}
    top = max(rates)
    gain = rates[top]["output_tokens_per_s"]["p50"] / rates[1]["output_tokens_per_s"]["p50"]
    return {"scaling": {"from": 1, "to": top, "gain": gain, "efficiency": gain / top}}


def show(result: dict[str, Any], output: Path) -> None:
    """One row a level, and the verdict."""
    table = Table(title=f"Triton ({result['backend']}), {result['model']['name']}", title_justify="left")
    for column in ("load", "tok/s", "TTFT p50 / p99, ms", "TPOT p50 / p99, ms", "latency p50, s", "MBU", "failed"):
        table.add_column(column, justify="right")

    def pair(summed: dict[str, Any], key: str) -> str:
        return f"{summed[key]['p50']:.1f} / {summed[key]['p99']:.1f}" if key in summed else ""

    for part in result["levels"]:
        summed, failed = part["summary"], str(part["checks"]["failed_requests"])
        load = f"{part['concurrency']} at once" if "concurrency" in part else f"{part['rate']:g}/s"
        if not part["samples"]:
            table.add_row(load, "", "", "", "", "", failed)
            continue
        share = f"{summed['mbu']:.2f}" if summed.get("mbu") else ""
        rate, latency = summed["output_tokens_per_s"]["p50"], summed["latency_s"]["p50"]
        table.add_row(
            load, f"{rate:,.0f}", pair(summed, "ttft_ms"), pair(summed, "tpot_ms"), f"{latency:.2f}", share, failed
        )
    out = Console()
    out.print(table)
    for part in result["levels"]:
        for message, count in part["failures"].items():
            out.print(f"{count} x {message}", markup=False)
    verdict = result["validity"]
    out.print(f"{verdict['status']}: {'; '.join(verdict['reasons']) or 'all checks passed'}", markup=False)
    out.print(f"wrote {output}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    run_cli(main)
