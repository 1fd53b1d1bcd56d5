r"""Serve one engine from several GPUs or machines behind one OpenAI-compatible gateway.

Purpose: more requests than one GPU serves, and no answer lost when a GPU, a server or a machine fails.
Method:  Ray places one Triton Inference Server a GPU, watches and restarts them; the gateway's router sends each
         request to the least busy one, prefers one that has its prompt's beginning cached, and goes on elsewhere when
         one dies.
Output:  the gateway, as llm_demo/server.py's, until Ctrl-C. Without --address everything is on this machine, its
         loopback, and ends with the gateway; with --address replicas stay in that cluster: --stop ends them.

    python scripts/serve_cluster.py --engine-dir engines/smollm2-135m-instruct --replicas 2
    python scripts/serve_cluster.py --engine-dir engines/new --address 10.0.0.1:6379 --replace
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from rich.console import Console

from llama_engine.device import pick_device
from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import InputError, RunError, run_cli
from llama_engine.flags import Parser
from llama_engine.serving.cluster import Cluster
from llama_engine.serving.repository import ServeConfig, add_kernels
from llm_demo.gateway import Gateway
from llm_demo.server import answering, listen


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--engine-dir", type=Path, required=True, help="at the same path on every machine")
    parser.add_argument("--replicas", default="auto", help="how many; auto: one a GPU, else one; 0: a gateway alone")
    parser.add_argument(
        "--address", help="HOST:PORT of the Ray cluster that this machine has joined (default: one of its own)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_kernels(parser)
    parser.add_argument("--cpus", type=float, help="cores a replica (default: 1 beside a GPU, else an equal share)")
    parser.add_argument("--resource", action="append", default=[], metavar="NAME=AMOUNT", help="what else each needs")
    parser.add_argument("--host", default="127.0.0.1", help="the gateway's address (default: this machine only)")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--api-key", default=os.environ.get("LLM_DEMO_API_KEY"), help="or $LLM_DEMO_API_KEY")
    parser.add_argument(
        "--stream-interval", type=int, default=1, help="tokens a response, after the first (default: 1)"
    )
    parser.add_argument("--drain-s", type=float, default=600, help="seconds to end, when a replica is replaced")
    parser.add_argument("--replace", action="store_true", help="give the replicas at --address this engine, one by one")
    parser.add_argument("--stop", action="store_true", help="end the replicas at --address")
    args = parser.parse_args()
    if (args.replace or args.stop) and not args.address:
        raise InputError("--replace and --stop need the --address of the cluster whose replicas they mean")
    if (ranks := load_engine_json(args.engine_dir, backend="native").engine.tp_size) > 1:
        raise InputError(f"{args.engine_dir} is split over {ranks} GPUs, a replica has one: serve_triton.sh serves it")
    wanted, number = resources_of(args.resource), count_of(args.replicas)
    console, config = (
        Console(highlight=False, soft_wrap=True),
        ServeConfig(device=args.device, kernels=args.kernels, stream_interval=args.stream_interval),
    )
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        door = None if args.replace or args.stop else stack.enter_context(listen(args.host, args.port))
        with console.status("starting Ray"):
            cluster = stack.enter_context(Cluster(args.address))
        for stop in (signal.SIGINT, signal.SIGTERM):  # Ray took them for itself
            signal.signal(stop, signal.default_int_handler)
        if args.stop:
            return cluster.stop()
        have = cluster.resources()
        on_gpu = args.device == "cuda" or (args.device == "auto" and have.get("GPU", 0) > 0)
        if not args.address:
            pick_device(args.device)
        count = (int(have.get("GPU", 0)) if on_gpu else 1) if number is None else number
        share = args.cpus or (1 if on_gpu else max(1, have.get("CPU", 1) // max(count, 1)))
        each = {"CPU": share, "GPU": float(on_gpu)} | wanted
        lacking = {name: n * count for name, n in each.items() if n * count > have.get(name, 0)}
        for name, amount in lacking.items():
            text = f"{count} replicas need {amount:g} {name}, the cluster has {have.get(name, 0):g}"
            if not args.address:
                raise InputError(text)
            console.print(f"note: {text}: some will wait for more machines")
        if args.replace:
            return cluster.replace(args.engine_dir, config, resources=each, drain_s=args.drain_s, say=console.print)
        cluster.deploy(args.engine_dir, config, count, resources=each)
        with console.status("waiting for the first replica"):
            cluster.wait(1)
        gateway = Gateway(args.engine_dir, model_dir=None, device=args.device, discover=cluster.members)
        ended = stack.enter_context(answering(gateway, door, args.host, args.api_key, console))
        ended.wait()
        raise RunError("the gateway ended by itself")
    console.print("stopped")


def count_of(text: str) -> int | None:
    """None for auto. Raises :class:`InputError`."""
    if text == "auto":
        return None
    if not text.isdecimal():
        raise InputError(f"--replicas takes a number or auto, got {text!r}")
    return int(text)


def resources_of(items: list[str]) -> dict[str, float]:
    """``["H100=1"]``. Raises :class:`InputError`."""
    found = {}
    for item in items:
        name, _, amount = item.partition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            raise InputError(f"--resource takes NAME=AMOUNT, got {item!r}") from None
    return found


if __name__ == "__main__":
    run_cli(main)
