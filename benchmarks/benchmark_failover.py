r"""Kill a replica under load, and measure what its users see of it.

Purpose: that no answer is lost, doubled or wrong when a server dies; how long users wait; how throughput comes back.
Method:  replicas of one engine, each a Triton Inference Server of its own, on GPUs one a card, behind the HTTP gateway:
         what is measured is the stream of server-sent events that its client reads. --concurrency users a replica ask
         greedy and sampled requests for --duration, of one replica and of all; then of all while, at a moment drawn
         from --seed, one is killed (kill -9) and started again. Every answer must be the one that the same request had
         before. --instances N puts N engines into one server, as Triton's instance group, instead.
Output:  results/local/failover.json: throughput of one and of all, answers lost, duplicated and wrong, the longest gap,
         the dip, and the time until throughput, and all replicas, are back.

    python benchmarks/benchmark_failover.py --engine-dir engines/smollm2-135m-instruct
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from llama_engine.config import check_length
from llama_engine.device import pick_device
from llama_engine.engine_dir import EngineInfo, load_engine_json
from llama_engine.errors import InputError, run_cli
from llama_engine.flags import Parser
from llama_engine.measure import failover
from llama_engine.measure.environment import fingerprint
from llama_engine.measure.failover import Phase, some_requests
from llama_engine.measure.fleet import Fleet, Gateways, gateways, replicas
from llama_engine.measure.protocol import describe
from llama_engine.measure.result import Result, check_output, new_result, write_result
from llama_engine.report.show import show
from llama_engine.serving.openai_target import OpenAITarget
from llama_engine.serving.repository import ServeConfig, add_kernels

SETTLING_S = 1.0  # of a run's begin that its throughput leaves out
POLL_S = 0.05  # of what the gateways say of the victim
# beside OpenAI's: ids to compare, and the usage, which says where an answer went on, at its end alone
EXTRA = {"return_token_ids": True, "stream_options": {"include_usage": True}}
console = Console(stderr=True)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/smollm2-135m-instruct"))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_kernels(parser)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--instances", type=int, default=1, help="engines in one server, which is all of them then")
    parser.add_argument("--gateways", type=int, default=1, help="processes that the users are spread over (default: 1)")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[4], help="users a replica; killed at the last (default: 4)"
    )
    parser.add_argument("--input-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--duration", type=float, default=30, help="seconds of each run (default: 30)")
    parser.add_argument("--stream-interval", type=int, default=1, help="of the servers: tokens a response (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests, the moment and the victim")
    parser.add_argument("--output", type=Path, default=Path("results/local/failover.json"))
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    servers = 1 if args.instances > 1 else args.replicas
    if servers * args.instances < 2 or min(args.concurrency) < 1 or not 1 <= args.duration < 3600:
        raise InputError("--replicas must be at least 2, --concurrency at least 1, --duration 1 to 3600 s")
    if args.gateways < 1:
        raise InputError(f"--gateways must be at least 1, got {args.gateways}")
    info = load_engine_json(args.engine_dir, backend="native")
    if not (args.engine_dir / "tokenizer.json").is_file():
        raise InputError(f"{args.engine_dir} has no tokenizer, which the gateway needs: prepare_model.py --words")
    check_length(info.engine, args.input_tokens, args.output_tokens, "--output-tokens")
    output = check_output(args.output, args.force, args.engine_dir)
    sizes = (args.concurrency, args.input_tokens, args.output_tokens)
    asked = Asked(servers, args.instances, args.gateways, *sizes, args.duration, args.seed)
    config = ServeConfig(
        device=pick_device(args.device).type,
        kernels=args.kernels,
        drain_s=1,
        stream_interval=args.stream_interval,
        instances=args.instances,
    )
    with contextlib.ExitStack() as stack, console.status("starting servers and gateways"):
        fleet = stack.enter_context(replicas(args.engine_dir, servers, config))
        groups = [*([fleet.urls[:1]] if servers > 1 else []), fleet.urls]
        found = stack.enter_context(gateways(args.engine_dir, groups, args.gateways, args.instances))
        doors = Doors(found[0] if servers > 1 else None, found[-1])
        result = asyncio.run(measure(asked, fleet, doors, info, config, fingerprint(config.device)))
    write_result(output, result, force=args.force)
    show([result])
    print(f"wrote {output}")
    return 0 if result["validity"]["status"] == "VALID" else 1


@dataclass(frozen=True)
class Asked:
    """What the users do, and when they are disturbed."""

    servers: int
    instances: int  # in each server
    gateways: int
    concurrency: list[int]
    input_tokens: int
    output_tokens: int
    duration: float
    seed: int

    @property
    def replicas(self) -> int:
        return self.servers * self.instances

    @property
    def kill_s(self) -> float:
        """After the begin of the disturbed run."""
        return self.duration * random.Random(self.seed).uniform(0.25, 0.4)

    @property
    def victim(self) -> int:
        return random.Random(self.seed + 1).randrange(self.servers)


@dataclass(frozen=True)
class Doors:
    """The gateways before one replica, where one can be had alone, and before all."""

    one: Gateways | None
    all: Gateways


async def measure(
    asked: Asked, fleet: Fleet, doors: Doors, info: EngineInfo, config: ServeConfig, environment: dict[str, Any]
) -> Result:
    """One replica and all of them at each load, then all of them disturbed."""
    users = asked.concurrency[-1] * asked.replicas
    requests = some_requests(4 * users, asked.input_tokens, asked.output_tokens, info.model.vocab_size, asked.seed)
    scaling, phases, times = [], [], []

    async def run(door: Gateways, users: int, kill: bool = False) -> tuple[Phase, float, float]:
        """What came, and the cores that a gateway, and this process, kept busy with it."""
        targets = [
            OpenAITarget(url, chat=False, decode=str, model=info.model.name, extra=EXTRA, key_variable="")
            for url in door.urls
        ]
        await failover.warm(targets, requests[:users])
        disturbing = asyncio.create_task(disturb()) if kill else None
        spent, own = door.cpu_s(), time.process_time()
        phase = await failover.closed_loop(targets, requests, users, asked.duration)
        wall = phase.end - phase.start
        spent, own = (door.cpu_s() - spent) / len(door.ports) / wall, (time.process_time() - own) / wall
        if disturbing:
            await disturbing
        for target in targets:
            await target.close()
        phases.append(phase)
        return phase, spent, own

    async def disturb() -> None:
        await asyncio.sleep(asked.kill_s)
        victim = fleet.servers[asked.victim]
        times.append(time.perf_counter())
        victim.process.kill()  # its supervisor ends what is left, and starts it again
        while await asyncio.to_thread(doors.all.up, victim.grpc_url):
            await asyncio.sleep(POLL_S)
        deadline = time.perf_counter() + max(60.0, asked.duration)
        while not (up := await asyncio.to_thread(doors.all.up, victim.grpc_url)) and time.perf_counter() < deadline:
            await asyncio.sleep(POLL_S)
        times.extend([time.perf_counter()] * up)

    for each in asked.concurrency:
        found: dict[str, Any] = {"concurrency": each}
        parts = [("one", doors.one, each)] if doors.one else []
        for name, door, count in [*parts, ("all", doors.all, each * asked.replicas)]:
            calm, gateway, client = await run(door, count)
            found[f"{name}_tokens_per_s"] = calm.rate(calm.start + SETTLING_S, calm.start + asked.duration)
            found |= {f"{name}_gateway_cores": gateway, f"{name}_client_cores": client}
        if doors.one:
            found["ratio"] = found["all_tokens_per_s"] / found["one_tokens_per_s"]
        scaling.append(found)
    before = doors.all.metrics()
    phase, _, _ = await run(doors.all, users, kill=True)
    moves = moved(doors.all.metrics(), before)
    right, unstable = failover.right_answers(calm)
    counts = failover.compare(phase, right, asked.output_tokens)
    after = failover.disturbance(phase, times[0], times[1] if len(times) > 1 else None, asked.duration)
    return new_result(
        "failover",
        info.backend,
        model=info.identity,
        engine=describe(info, config.kernels),
        workload={
            "input_tokens": asked.input_tokens,
            "output_tokens": asked.output_tokens,
            "concurrency": users,
            "replicas": asked.replicas,
            "instances": asked.instances,
            "gateways": asked.gateways,
            "duration_s": asked.duration,
            "seed": asked.seed,
            "stream_interval": config.stream_interval,
            "prefix_cache": True,
        },
        environment=environment,
        summary=failover.summarize_phase(phase),
        failover={
            "killed": "tritonserver, kill -9",
            "killed_after_s": asked.kill_s,
            "victim": asked.victim,
            **counts,
            **moves,
            "requests_without_one_right_answer": unstable,
            **after,
        },
        scaling=scaling,
        failures=failover.failures(phases),
        checks={
            "failed_requests": sum(failover.failures(phases[:-1]).values()),  # of the runs that were left alone
            "lost_answers": counts["lost"],
            "duplicated_answers": counts["duplicated"],
            "wrong_answers": counts["wrong"] + (counts["diverged"] if config.device == "cpu" else 0),
            "moved_requests": moves["moved"],
            "client_lag_p99_ms": failover.lag_p99_ms(phases),
        },
    )


def moved(now: Counter[str], before: Counter[str]) -> dict[str, int]:
    """How many requests the gateways moved, and how many of them had begun to answer."""
    names = {"moved": "requests_moved_total", "resumed": "answers_resumed_total"}
    return {name: int(now[metric] - before[metric]) for name, metric in names.items()}


if __name__ == "__main__":
    run_cli(main)
