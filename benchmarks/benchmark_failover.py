r"""Kill a replica under load, and measure what its users see of it.

Purpose: that no answer is lost, doubled or wrong when a server dies; how long users wait; how throughput comes back.
Method:  replicas of one engine, each a Triton Inference Server of its own, on GPUs one a card, behind the gateway's
         router. --concurrency users a replica ask greedy and sampled requests for --duration, of one replica and of
         all; then of all while, at a moment drawn from --seed, one is killed (kill -9) and started again.
         Every answer must be the one that the same request had before.
Output:  results/local/failover.json: throughput of one and of all, answers lost, duplicated and wrong, the longest gap,
         the dip, and the time until throughput, and all replicas, are back.

    python benchmarks/benchmark_failover.py --engine-dir engines/smollm2-135m-instruct
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llama_engine.config import check_length
from llama_engine.device import pick_device
from llama_engine.engine_dir import EngineInfo, load_engine_json
from llama_engine.errors import InputError, RunError, run_cli
from llama_engine.flags import Parser
from llama_engine.measure import failover
from llama_engine.measure.environment import fingerprint
from llama_engine.measure.failover import Move, Phase, Request
from llama_engine.measure.protocol import describe
from llama_engine.measure.result import Result, check_output, new_result, write_result
from llama_engine.report.show import show
from llama_engine.serving.repository import ServeConfig, add_kernels
from llama_engine.serving.router import Router
from llama_engine.serving.server import TritonServer, supervise

SETTLING_S = 1.0  # of a run's begin that its throughput leaves out
console = Console(stderr=True)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/smollm2-135m-instruct"))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_kernels(parser)
    parser.add_argument("--replicas", type=int, default=2)
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
    if args.replicas < 2 or min(args.concurrency) < 1 or not 1 <= args.duration < 3600:
        raise InputError("--replicas must be at least 2, --concurrency at least 1, --duration 1 to 3600 s")
    info = load_engine_json(args.engine_dir, backend="native")
    check_length(info.engine, args.input_tokens, args.output_tokens, "--output-tokens")
    output = check_output(args.output, args.force, args.engine_dir)
    asked = Asked(args.replicas, args.concurrency, args.input_tokens, args.output_tokens, args.duration, args.seed)
    device = pick_device(args.device).type
    config = ServeConfig(device=device, kernels=args.kernels, drain_s=1, stream_interval=args.stream_interval)
    with replicas(args.engine_dir, asked.replicas, config) as fleet:
        result = asyncio.run(measure(asked, fleet, info, config, fingerprint(device)))
    write_result(output, result, force=args.force)
    show([result])
    print(f"wrote {output}")
    return 0 if result["validity"]["status"] == "VALID" else 1


@dataclass(frozen=True)
class Asked:
    """What the users do, and when they are disturbed."""

    replicas: int
    concurrency: list[int]
    input_tokens: int
    output_tokens: int
    duration: float
    seed: int

    @property
    def kill_s(self) -> float:
        """After the begin of the disturbed run."""
        return self.duration * random.Random(self.seed).uniform(0.25, 0.4)

    @property
    def victim(self) -> int:
        return random.Random(self.seed + 1).randrange(self.replicas)


@dataclass
class Fleet:
    servers: list[TritonServer]
    said: list[str] = field(default_factory=list)  # by their supervisors

    @property
    def urls(self) -> list[str]:
        return [server.grpc_url for server in self.servers]


@contextlib.contextmanager
def replicas(engine_dir: Path, count: int, config: ServeConfig) -> Iterator[Fleet]:
    """Servers, each kept running by a thread of its own; on GPUs one a card, in turn."""
    cards = torch.cuda.device_count() if config.device == "cuda" else 0
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    ended = threading.Event()
    with contextlib.ExitStack() as stack, console.status(f"starting {count} servers"):
        servers = [
            TritonServer(
                engine_dir,
                config,
                http=False,
                env=threads | ({"CUDA_VISIBLE_DEVICES": str(i % cards)} if cards else {}),
            )
            for i in range(count)
        ]
        starting = [threading.Thread(target=server.start) for server in servers]
        for server in servers:
            stack.callback(server.stop)
        for thread in starting:
            thread.start()
        for thread in starting:
            thread.join()
        if dead := [server for server in servers if not server.alive]:
            raise RunError(f"a replica did not start: see {dead[0].log}")
        fleet = Fleet(servers)
        watching = [threading.Thread(target=supervise, args=(server, fleet.said.append, ended)) for server in servers]
        for thread in watching:
            thread.start()
        try:
            yield fleet
        finally:
            ended.set()
            for thread in watching:
                thread.join()


async def measure(
    asked: Asked, fleet: Fleet, info: EngineInfo, config: ServeConfig, environment: dict[str, Any]
) -> Result:
    """One replica and all of them at each load, then all of them disturbed."""
    users = asked.concurrency[-1] * asked.replicas
    requests = Request.some(4 * users, asked.input_tokens, info.model.vocab_size, asked.seed)
    number_of = {tuple(request.prompt): number for number, request in enumerate(requests)}
    scaling, phases, moves = [], [], []

    async def run(urls: list[str], users: int, what: str, kill: bool = False) -> tuple[Phase, Router, list[float]]:
        router, times = Router.of(info, urls), []
        router.on_move = lambda prompt, made: moves.append(Move(number_of[tuple(prompt)], time.perf_counter(), made))
        with console.status(what):
            while not all(replica.up for replica in router.replicas.values()):
                await asyncio.sleep(0.01)
            await failover.closed_loop(router, requests[:users], 8, users, 0)  # warm
            disturbing = asyncio.create_task(disturb(router, times)) if kill else None
            phase = await failover.closed_loop(router, requests, asked.output_tokens, users, asked.duration)
            if disturbing:
                await disturbing
        await router.close()
        phases.append(phase)
        return phase, router, times

    async def disturb(router: Router, times: list[float]) -> None:
        await asyncio.sleep(asked.kill_s)
        victim = fleet.servers[asked.victim]
        times.append(time.perf_counter())
        victim.process.kill()  # its supervisor ends what is left, and starts it again
        while router.replicas[victim.grpc_url].up:
            await asyncio.sleep(0.005)
        deadline = time.perf_counter() + max(60.0, asked.duration)
        while not router.replicas[victim.grpc_url].up and time.perf_counter() < deadline:
            await asyncio.sleep(0.005)
        if router.replicas[victim.grpc_url].up:
            times.append(time.perf_counter())

    for each in asked.concurrency:
        one, _, _ = await run(fleet.urls[:1], each, f"one replica, {each} users")
        calm, _, _ = await run(fleet.urls, each * asked.replicas, f"{asked.replicas} replicas, {each} users each")
        rates = [part.rate(part.start + SETTLING_S, part.start + asked.duration) for part in (one, calm)]
        named = dict(zip(("one_tokens_per_s", "all_tokens_per_s"), rates))
        scaling.append({"concurrency": each} | named | {"ratio": rates[1] / rates[0]})
    phase, router, times = await run(fleet.urls, users, f"{asked.replicas} replicas, one of which is killed", kill=True)
    right, unstable = failover.right_answers(calm)
    counts = failover.compare(phase, right, asked.output_tokens, moves)
    found = failover.disturbance(phase, times[0], times[1] if len(times) > 1 else None, asked.duration)
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
            "moved": router.counts["requests_moved_total"],
            "resumed": router.counts["answers_resumed_total"],
            "requests_without_one_right_answer": unstable,
            **found,
        },
        scaling=scaling,
        checks={
            "failed_requests": counts["lost"] + sum(bool(x.error) for part in phases[:-1] for x in part.answers),
            "duplicated_answers": counts["duplicated"],
            "wrong_answers": counts["wrong"] + (counts["diverged"] if config.device == "cpu" else 0),
            "moved_requests": router.counts["requests_moved_total"],
            "client_lag_p99_ms": failover.lag_p99_ms(phases),
        },
    )


if __name__ == "__main__":
    run_cli(main)
