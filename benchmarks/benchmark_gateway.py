r"""What one gateway process can carry: its own cost of a response, with no engine behind it.

Purpose: how many streams a gateway serves before it, not the GPUs, is the limit; what --stream-interval buys.
Method:  replicas that answer at once with random ids, the real gateway before them, users over HTTP. Either the
         gateway's core is busy, and the rate is its ceiling, or something else was the limit; the CPU time of a
         response holds in both cases.
Output:  one line a number of tokens a response: responses and tokens a second, CPU time of gateway and client.

    python benchmarks/benchmark_gateway.py --engine-dir engines/smollm2-135m-instruct
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import RunError, run_cli
from llama_engine.flags import Parser
from llama_engine.measure import failover
from llama_engine.measure.fleet import Gateways, gateways
from llama_engine.serving.openai_target import OpenAITarget


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/smollm2-135m-instruct"), help="its tokenizer")
    parser.add_argument("--replicas", type=int, default=2, help="that answer at once (default: 2)")
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--users", type=int, default=128)
    parser.add_argument("--interval", type=int, nargs="+", default=[1, 4, 16], help="tokens a response")
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--duration", type=float, default=10)
    args = parser.parse_args()
    info = load_engine_json(args.engine_dir, backend="native")
    for tokens in args.interval:
        with null_replicas(args.replicas, info.model.vocab_size, tokens) as urls:
            # the router gives a replica as many requests as its engine's batch holds
            instances = -(-args.users // (args.replicas * info.engine.max_batch_size))
            with gateways(args.engine_dir, [urls], args.gateways, instances) as (door,):
                requests = failover.some_requests(64, 128, args.output_tokens, info.model.vocab_size, 0)
                print(asyncio.run(measure(door, info.model.name, requests, args.users, args.duration, tokens)))


async def measure(door: Gateways, model: str, requests: list, users: int, duration: float, tokens: int) -> str:
    extra = {"return_token_ids": True, "stream_options": {"include_usage": True}}
    options = {"chat": False, "decode": str, "model": model, "extra": extra, "key_variable": ""}
    targets = [OpenAITarget(url, **options) for url in door.urls]
    await failover.warm(targets, requests)
    spent, own = door.cpu_s(), time.process_time()
    phase = await failover.closed_loop(targets, requests, users, duration)
    spent, own, wall = door.cpu_s() - spent, time.process_time() - own, phase.end - phase.start
    for target in targets:
        await target.close()
    if failed := failover.failures([phase]):
        raise RunError(f"requests failed: {failed}")
    responses = sum(-(-len(answer.run.token_ids) // tokens) for answer in phase.answers)
    rates = f"{responses / wall:,.0f} responses/s, {len(phase.token_times) / wall:,.0f} tokens/s"
    cores = f"{spent / wall / len(door.ports):.2f} of a core each, {spent / responses * 1e6:.0f} us a response"
    return (
        f"{tokens} tokens a response, {users} users: {rates}; {len(door.ports)} gateways: {cores}; "
        f"client {own / wall:.2f} of a core, {own / responses * 1e6:.0f} us"
    )


@contextlib.contextmanager
def null_replicas(count: int, vocab: int, tokens: int) -> Iterator[list[str]]:
    """The addresses of so many, each in a process of its own."""
    command = [sys.executable, "-m", "llama_engine.serving.null_replica", str(vocab), str(tokens)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen(command, **pipes) for _ in range(count)]
    try:
        yield [f"127.0.0.1:{int(process.stdout.readline())}" for process in processes]
    finally:
        for process in processes:
            process.communicate()


if __name__ == "__main__":
    run_cli(main)
