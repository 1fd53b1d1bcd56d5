"""The real Triton Inference Server around a built engine, without a container.

``tritonserver``, its Python backend and one stub a Python version come from the wheel ``nvidia-pytriton``. A run
directory holds the rendered model repository, a backend directory with the stub of this Python, and the log.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil
import tritonclient.grpc as grpc_client
from tritonclient.utils import InferenceServerException

from llama_engine.device import pick_device
from llama_engine.errors import InputError, RunError
from llama_engine.files import check_apart, check_replaceable
from llama_engine.serving import lifeline
from llama_engine.serving.client import KEY_NAME, inference_key
from llama_engine.serving.repository import ServeConfig, own_names, render
from llama_engine.serving.wheel import environment, interpreter, link_backend, own_backends, wheel

CLOSED_APIS = "model-repository,shared-memory,trace,logging"
READY_TIMEOUT_S = 600
RESTART_AFTER_S = (0, 1, 4, 15, 60)  # a server's deaths in a row; one that has run for STEADY_S starts a new row
STEADY_S = 120
SIZES = ("step_nbytes", "kv_nbytes_per_token")  # of the engine, whatever the number of instances
_instances = itertools.count()


def free_port(host: str = "127.0.0.1", port: int | None = None, what: str = "free") -> int:
    """``port``, or one chosen by the system. Raises :class:`InputError` when it cannot be had."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port or 0))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise InputError(f"cannot use {what} port {port} on {host} ({why}): choose another") from None
        return probe.getsockname()[1]


def listening(host: str, http_port: int | None, grpc_port: int, metrics_port: int) -> list[str]:
    """tritonserver's arguments for where it listens, and for what: inference, metadata, health and statistics.

    The other interfaces need a header that nobody knows, and inference the secret of :func:`inference_key` if there is
    one. ``http_port`` None: no HTTP at all.
    """
    ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
    wanted = {name: port for name, port in ports.items() if port is not None}
    flags = [part for name, port in wanted.items() for part in (f"--{name}-address={host}", f"--{name}-port={port}")]
    rules = [f"{CLOSED_APIS}:admin={secrets.token_hex(16)}"]
    if key := inference_key():
        rules.append(f"inference:{KEY_NAME}={key}")
    if http_port is None:
        flags.append("--allow-http=false")
    else:
        flags += [f"--http-restricted-api={rule}" for rule in rules]
    flags += ["--grpc-http2-min-recv-ping-interval-without-data=500", "--grpc-http2-max-ping-strikes=0"]  # KEEPALIVE
    return [*flags, *(f"--grpc-restricted-protocol={rule}" for rule in rules)]


def read_metrics(url: str) -> tuple[dict[str, float], str]:
    """The engine's values on a server's metrics page, without the prefix ``llama_engine_``, and its kernels' name.
    Those of several instances are summed."""
    with urllib.request.urlopen(f"http://{url}/metrics", timeout=10) as answer:
        rows = [row for row in answer.read().decode().splitlines() if row.startswith("llama_engine_")]
    kernels = re.search(r'kernels="([^"]*)"', rows[0]) if rows else None
    values: dict[str, float] = {}
    for row in rows:
        name, value = row.split("{")[0].removeprefix("llama_engine_"), float(row.rsplit(" ", 1)[1])
        values[name] = value if name in SIZES else values.get(name, 0) + value
    return values, kernels[1] if kernels else "unknown"


class TritonServer:
    """A running server: ``with TritonServer(engine_dir) as server: ... server.grpc_url``.

    Ports left None are chosen free; ``http`` false leaves gRPC as the only way in. Raises :class:`InputError` before
    anything starts, :class:`RunError` when the server dies or does not get ready; the message names the log.
    """

    def __init__(
        self,
        engine_dir: Path | str,
        config: ServeConfig | None = None,
        *,
        host: str = "127.0.0.1",
        http: bool = True,
        http_port: int | None = None,
        grpc_port: int | None = None,
        metrics_port: int | None = None,
        run_dir: Path | str | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.config = config or ServeConfig()
        self.engine_dir, self.host = Path(engine_dir), host
        pick_device(self.config.device)  # a device that is not there is no failure of the server
        self._root = wheel()
        self._python = interpreter(self._root, text=self.config.text)
        self._env = environment(self._root, self._python) | (env or {})
        if self.config.instances > 1:  # on a CPU they share its cores
            self._env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.config.instances)))
        self.http_port = free_port(host, http_port, "HTTP") if http else None
        self.grpc_port = free_port(host, grpc_port, "gRPC")
        self.metrics_port = free_port(host, metrics_port, "metrics")
        self.run_dir = Path(run_dir or tempfile.mkdtemp(prefix="triton-"))
        self._owns_run_dir = run_dir is None
        self._prefix = f"llama_engine_{os.getpid()}_{next(_instances)}_"
        self.log = self.run_dir / "triton.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._backends: list[psutil.Process] = []
        self._lifeline: subprocess.Popen[bytes] | None = None

    @property
    def http_url(self) -> str:
        return f"{self.host}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        return f"{self.host}:{self.grpc_port}"

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        if self._owns_run_dir and kind is None:
            shutil.rmtree(self.run_dir, ignore_errors=True)

    def start(self) -> None:
        """Render, start, wait until ready."""
        models, backends = self.run_dir / "models", self.run_dir / "backends"
        for folder, own in ((models, own_names), (backends, own_backends)):
            check_apart(folder, [self.engine_dir])
            check_replaceable(folder, own)
            shutil.rmtree(folder, ignore_errors=True)
        render(self.engine_dir, models, self.config)
        stub = link_backend(self._root, backends, self._python.version)
        said = subprocess.run(["ldd", stub], env=self._env, capture_output=True, text=True, check=False).stdout
        if lacking := [line.split()[0] for line in said.splitlines() if "not found" in line]:
            raise InputError(
                f"Triton's Python backend needs {', '.join(lacking)}, which is not installed: "
                "install it (Debian, Ubuntu: apt install libpython3-dev) or use a Python built with --enable-shared"
            )
        command = [
            str(self._root / "tritonserver/bin/tritonserver"),
            f"--model-repository={models}",
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={self._prefix}",
            *listening(self.host, self.http_port, self.grpc_port, self.metrics_port),
            "--allow-gpu-metrics=false",
            "--model-control-mode=none",
            f"--exit-timeout-secs={math.ceil(self.config.drain_s) + 3}",  # 3: what unloading takes
        ]
        with self.log.open("ab") as log:
            # a session of its own: Ctrl-C reaches the caller only, who then stops the server in order
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._env, start_new_session=True
            )
        try:
            watch = [sys.executable, "-IS", lifeline.__file__, str(self.process.pid), self._prefix]
            self._lifeline = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)
            self._wait_ready()
            self._backends = psutil.Process(self.process.pid).children()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Drain for ``drain_s``, then end; killed if it does not. Safe to call twice."""
        if self.alive:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(self.config.drain_s + 10)
        self.kill()  # or what is left of it: a backend may wait for its server for ever

    def kill(self) -> None:
        """kill -9 the server and its backend processes. Safe to call twice."""
        if self.process is not None:
            lifeline.end(self.process.pid, self._prefix)
            self.process.wait()
            self.process, self._backends = None, []
        if self._lifeline is not None:
            with self._lifeline:  # which waits for it
                self._lifeline.kill()
            self._lifeline = None

    @property
    def alive(self) -> bool:
        """False too once a backend process is dead: this Triton calls itself ready then, and starts none again."""
        return self.process is not None and self.process.poll() is None and all(map(_runs, self._backends))

    def metrics(self) -> dict[str, float]:
        """This engine's metrics by name, without the prefix ``llama_engine_``."""
        return read_metrics(f"{self.host}:{self.metrics_port}")[0]

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if not self.alive:
                raise RunError(f"tritonserver ended while starting: {self._last_error()} (log: {self.log})")
            # connections of its own: a shared one waits longer after each refusal
            options = [("grpc.use_local_subchannel_pool", 1)]
            client = grpc_client.InferenceServerClient(self.grpc_url, channel_args=options)
            with client, contextlib.suppress(InferenceServerException, OSError):
                if client.is_server_ready(client_timeout=2):
                    for port in filter(None, (self.http_port, self.metrics_port)):  # they open after gRPC's
                        socket.create_connection((self.host, port), timeout=2).close()
                    return
            time.sleep(0.1)
        raise RunError(f"tritonserver was not ready within {READY_TIMEOUT_S} s (log: {self.log})")

    def _last_error(self) -> str:
        self._owns_run_dir = False  # the log is worth keeping
        lines = self.log.read_text(errors="replace").splitlines()
        failed = [line.split("] ", 1)[-1] for line in lines if line.startswith("E") and "CudaDriver" not in line]
        failed = [line for line in failed if "failed to load" in line or "Failed" in line] or failed or lines[-1:]
        return failed[0].split("\\n")[0].strip('"') if failed else "no output"


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def supervise(server: TritonServer, say: Callable[[str], None], ended: threading.Event | None = None) -> None:
    """Keep a started server running until ``ended`` is set; one that dies is started again on the same ports.

    Raises :class:`RunError` when it died more often in a row than ``RESTART_AFTER_S`` has pauses.
    """
    ended = ended or threading.Event()
    deaths, started = 0, time.monotonic()
    while True:
        while server.alive:
            if ended.wait(0.5):
                return
        server.kill()  # what is left of it may still hold the GPU
        deaths = 1 if time.monotonic() - started > STEADY_S else deaths + 1
        if deaths > len(RESTART_AFTER_S):
            raise RunError(f"tritonserver ended {deaths} times in a row: see {server.log}")
        pause = RESTART_AFTER_S[deaths - 1]
        say(
            f"tritonserver or its backend ended by itself (see {server.log}); starting it again"
            + f" in {pause} s" * bool(pause)
        )
        if ended.wait(pause):
            return
        started = time.monotonic()
        try:
            server.start()
        except RunError as error:
            say(str(error))
        else:
            say("tritonserver serves again")
