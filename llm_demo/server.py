r"""An OpenAI-compatible gateway in front of Triton Inference Server, and a page to chat and to race on.

Purpose: feel the engine from a browser, or from any OpenAI client with base_url http://127.0.0.1:8080/v1.
Method:  the engine's tokenizer and chat template make token ids, Triton's tensorrt_llm model answers over gRPC. The
         race's other lane is the Hugging Face model, loaded at first use in a process of its own. A Triton that dies
         is started again.
Output:  the page at /, the API under /v1, /health, /metrics (Prometheus). Starts Triton itself unless --replica.

    python llm_demo/server.py --engine-dir engines/smollm2-135m-instruct --model-dir models/smollm2-135m-instruct
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from rich.console import Console
from starlette.types import ASGIApp

from llama_engine.errors import InputError, RunError, run_cli
from llama_engine.flags import Parser
from llama_engine.serving.repository import ServeConfig
from llama_engine.serving.server import TritonServer, supervise
from llm_demo.app import create_app
from llm_demo.gateway import Gateway

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--engine-dir", type=Path, required=True)
    parser.add_argument("--model-dir", type=Path, help="the Hugging Face model; without it there is no race")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--api-key", default=os.environ.get("LLM_DEMO_API_KEY"), help="or $LLM_DEMO_API_KEY")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=URL", help="OpenAI server to race")
    parser.add_argument(
        "--replica",
        "--triton-url",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="gRPC address of a running server of this engine, repeated for each (default: start one)",
    )
    parser.add_argument("--instances", type=int, default=1, help="engines in each server (default: 1)")
    args = parser.parse_args()
    if args.model_dir and not (args.model_dir / "config.json").is_file():
        raise InputError(f"--model-dir {args.model_dir} holds no model: run scripts/prepare_model.py")
    for stop in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs start with SIGINT ignored
        signal.signal(stop, signal.default_int_handler)
    console = Console(highlight=False, soft_wrap=True)
    with contextlib.suppress(KeyboardInterrupt), listen(args.host, args.port) as door, contextlib.ExitStack() as stack:
        server, urls = None, args.replica
        if not urls:
            config = ServeConfig(device=args.device, drain_s=2, instances=args.instances)
            with console.status("starting Triton Inference Server"):
                server = stack.enter_context(TritonServer(args.engine_dir, config, http=False))
            urls = [server.grpc_url]
        options = {"model_dir": args.model_dir, "device": args.device, "others": args.other}
        gateway = Gateway(args.engine_dir, *urls, instances=args.instances, **options)
        ended = stack.enter_context(answering(gateway, door, args.host, args.api_key, console))
        if server:
            supervise(server, console.print, ended)
        ended.wait()
        raise RunError("the gateway ended by itself")
    console.print("stopped")


@contextlib.contextmanager
def answering(
    gateway: Gateway, door: socket.socket, host: str, api_key: str | None, console: Console
) -> Iterator[threading.Event]:
    """The gateway behind an open ``door``; the event is set when it ends by itself."""
    app = create_app(gateway, api_key=api_key, local_only=host in LOOPBACK)
    if host not in LOOPBACK and not api_key:
        console.print(f"note: {host} is open to others and no --api-key is set")
    console.print(f"ready: http://{host}:{door.getsockname()[1]} (OpenAI clients: /v1; Ctrl-C stops)")
    with serving(app, door) as ended:
        yield ended


@contextlib.contextmanager
def serving(app: ASGIApp, door: socket.socket) -> Iterator[threading.Event]:
    """The gateway in a thread of its own, while the main one minds Triton. The event is set when it ends."""
    options = {"loop": "asyncio", "log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 2}
    # longer than clients keep an idle connection: one that sends into a connection that closes gets an error
    web = uvicorn.Server(uvicorn.Config(app, timeout_keep_alive=75, **options))
    ended = threading.Event()

    def run() -> None:
        try:
            web.run(sockets=[door])
        finally:
            ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield ended
    finally:
        web.should_exit = True
        thread.join()


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """The bound socket, claimed before anything slow starts. Raises :class:`InputError` when it is taken."""
    try:
        door = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen on {host}:{port} ({why}): choose another --host or --port") from None
    with door:
        yield door


if __name__ == "__main__":
    run_cli(main)
