r"""Serve a built engine with the real Triton Inference Server.

Purpose: one server for benchmarks/triton_client.py, benchmarks/benchmark_triton.py and any Triton client.
Method:  renders triton_model_repo/ for the engine into a run directory, starts tritonserver from the wheel
         nvidia-pytriton, waits until it is ready, and drains and stops it on Ctrl-C or TERM.
Output:  the addresses; the server's log in the run directory.

The HTTP port answers whoever reaches it, so a web page open in a browser on this machine can have text made. Set
LLAMA_ENGINE_TRITON_KEY to a secret, here and for the clients: inference then needs it, over HTTP and gRPC.

    python scripts/serve_triton.py --engine-dir engines/smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

from rich.console import Console

from llama_engine.engine_dir import WEIGHTS, load_engine_json
from llama_engine.errors import InputError, run_cli
from llama_engine.files import atomic_dir
from llama_engine.flags import Parser
from llama_engine.serving.client import KEY_NAME, KEY_VARIABLE, inference_key
from llama_engine.serving.repository import ServeConfig, add_kernels, own_names, render, serve_command
from llama_engine.serving.server import TritonServer, listening, supervise


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--engine-dir", type=Path, required=True)
    parser.add_argument("--backend", choices=["auto", *WEIGHTS], default="auto", help="auto: the engine's")
    parser.add_argument("--print", action="store_true", help="tensorrt_llm: render, print the command, start nothing")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_kernels(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument(
        "--no-decoupled",
        dest="decoupled",
        action="store_false",
        help="serve the plain infer calls over HTTP and gRPC; no streaming",
    )
    parser.add_argument("--text", action="store_true", help="also serve the model ensemble: text in, text out")
    parser.add_argument(
        "--instances", type=int, default=1, help="engines in this server, on GPUs one a card (default: 1)"
    )
    parser.add_argument("--max-queue-size", type=int, default=256, help="requests that may wait (default: 256)")
    parser.add_argument("--request-timeout-s", type=float, default=0, help="0: none, unless the client sets one")
    parser.add_argument(
        "--stream-interval", type=int, default=1, help="tokens a response, after the first (default: 1)"
    )
    parser.add_argument("--drain-s", type=float, default=10, help="seconds running requests get at shutdown")
    parser.add_argument("--exclude-input-in-output", action="store_true", help="answer with new tokens only")
    parser.add_argument(
        "--no-prefix-cache",
        dest="enable_prefix_cache",
        action="store_false",
        help="compute every prompt whole, though one that starts alike was answered before (native engines)",
    )
    parser.add_argument("--null-model", action="store_true", help="also serve null_model, the load generator's ceiling")
    parser.add_argument("--run-dir", type=Path, help="model repository and log (default: a temporary one)")
    args = parser.parse_args()
    config = ServeConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(ServeConfig)})
    ports = {"http_port": args.http_port, "grpc_port": args.grpc_port, "metrics_port": args.metrics_port}
    if len(set(ports.values())) < len(ports):
        raise InputError(f"the HTTP, gRPC and metrics ports must differ, got {', '.join(map(str, ports.values()))}")
    if load_engine_json(args.engine_dir, backend=args.backend).backend == "tensorrt_llm":
        serve_tensorrtllm(args, config, listening(args.host, **ports))
    elif args.print:
        raise InputError("--print shows what --backend tensorrt_llm would run; the native backend just starts")
    else:
        serve_native(TritonServer(args.engine_dir, config, host=args.host, run_dir=args.run_dir, **ports))


def serve_native(server: TritonServer) -> None:
    """Until Ctrl-C or TERM."""
    for stop in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs start with SIGINT ignored
        signal.signal(stop, signal.default_int_handler)
    console = Console()
    try:
        with console.status("starting Triton Inference Server"):
            server.start()
        console.print(
            f"ready: HTTP {server.http_url}, gRPC {server.grpc_url}, "
            f"metrics http://{server.host}:{server.metrics_port}/metrics, log {server.log} (Ctrl-C stops)",
            soft_wrap=True,
            highlight=False,
        )
        supervise(server, lambda message: console.print(message, soft_wrap=True, highlight=False))
    except KeyboardInterrupt:
        console.print("stopping")
    finally:
        server.stop()


def serve_tensorrtllm(args: argparse.Namespace, config: ServeConfig, listen: list[str]) -> None:
    """Render for NVIDIA's C++ backend and become the server, or the container that holds it."""
    models = (args.run_dir or Path("build/triton")) / "models"
    with atomic_dir(models, own_names, inputs=[args.engine_dir], force=True) as scratch:
        render(args.engine_dir, scratch, config, "tensorrt_llm")
    command = serve_command(args.engine_dir, models, ["--disable-auto-complete-config", *listen])
    # the secret stays where it is: the shell that runs this line puts it in again
    print(shlex.join(command).replace(f"{KEY_NAME}={inference_key()}", f'{KEY_NAME}="${KEY_VARIABLE}"'))
    if args.print:
        return
    if shutil.which(command[0]) is None:
        raise InputError(f"{command[0]} is not installed: run the command above where it is, or use a native engine")
    sys.stdout.flush()
    os.execvp(command[0], command)


if __name__ == "__main__":
    run_cli(main)
