"""The real Triton Inference Server around a built engine, without a container.

``tritonserver``, its Python backend and one stub a Python version come from the wheel ``nvidia-pytriton``. A run
directory holds the rendered model repository, a backend directory with the stub of this Python, and the log.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from llama_engine.build import load_engine_json
from llama_engine.errors import InputError, RunError
from llama_engine.triton_repo import REPOSITORY, fill, render_text

INSTALL = "pip install --no-deps nvidia-pytriton==0.7.0 (Linux on x86-64 or arm64)"
CLOSED_APIS = "model-repository,shared-memory,trace,logging"
_instances = itertools.count()


@dataclass(frozen=True)
class ServeConfig:
    """What ``serve_triton`` can set. Times in seconds; ``request_timeout_s`` 0 means none.

    ``decoupled`` chooses Triton's transaction policy: true serves gRPC streams and HTTP ``generate`` and
    ``generate_stream``; false serves the plain HTTP and gRPC ``infer`` calls, which Triton refuses for decoupled
    models. ``text`` adds the ensemble, text in and text out.
    """

    device: str = "auto"
    decoupled: bool = True
    max_queue_size: int = 256
    request_timeout_s: float = 0.0
    drain_s: float = 10.0
    exclude_input_in_output: bool = False
    null_model: bool = False
    text: bool = False

    def __post_init__(self) -> None:
        if self.max_queue_size < 0 or self.request_timeout_s < 0 or self.drain_s < 0:
            raise InputError("max_queue_size, request_timeout_s and drain_s must not be negative")


def wheel() -> Path:
    """The folder of ``nvidia-pytriton`` that holds bin/tritonserver. Raises :class:`InputError` in one line."""
    spec = importlib.util.find_spec("pytriton")
    root = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if root is None or not (root / "tritonserver/bin/tritonserver").is_file():
        raise InputError(
            f"Triton Inference Server is not available on {sys.platform} {platform.machine()} here: {INSTALL}"
        )
    return root


def stub(root: Path) -> Path:
    """The Python backend's stub for the running Python. Raises :class:`InputError` when there is none."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    path = root / "tritonserver/python_backend_stubs" / version / "triton_python_backend_stub"
    if not path.is_file():
        raise InputError(f"this Triton has no Python backend for Python {version}: use Python 3.10 to 3.12")
    return path


def environment(root: Path) -> dict[str, str]:
    """The server's environment: this Python first on PATH, where the stub looks for it, and its libpython."""
    env = dict(os.environ)
    libraries = [str(root.parent / "nvidia_pytriton.libs")]
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):
        libraries.insert(0, str(sysconfig.get_config_var("LIBDIR")))
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    env["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *filter(None, [env.get("LD_LIBRARY_PATH")])])
    env["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY.parent), *(path for path in sys.path if path)])
    missing = subprocess.run(["ldd", str(stub(root))], env=env, capture_output=True, text=True, check=False).stdout
    lacking = [line.split()[0] for line in missing.splitlines() if "not found" in line]
    if lacking:
        raise InputError(
            f"Triton's Python backend needs {', '.join(lacking)}, which is not installed: "
            "install it (Debian, Ubuntu: apt install libpython3-dev) or use a Python built with --enable-shared"
        )
    return env


def render(engine_dir: Path | str, models_dir: Path, config: ServeConfig) -> None:
    """Write the model repository for an engine. Raises :class:`InputError` for an engine that cannot be read."""
    engine = load_engine_json(Path(engine_dir))
    values = {
        "max_batch_size": engine.engine.max_batch_size,
        "decoupled": config.decoupled,
        "engine_dir": Path(engine_dir).resolve(),
        "device": config.device,
        "max_queue_size": config.max_queue_size,
        "request_timeout_s": config.request_timeout_s,
        "drain_s": config.drain_s,
        "exclude_input_in_output": config.exclude_input_in_output or config.text,
    }
    for name in ["tensorrt_llm", *(["null_model"] if config.null_model else [])]:
        fill(REPOSITORY / "tensorrt_llm/config.pbtxt", models_dir / name / "config.pbtxt", {"name": name, **values})
        (models_dir / name / "1").mkdir()
        shutil.copy(REPOSITORY / name / "1/model.py", models_dir / name / "1/model.py")
    if config.text:
        if int(np.__version__.split(".")[0]) >= 2:
            raise InputError(
                f"serving text needs NumPy 1.26, found {np.__version__} (pip install numpy==1.26.4): this Triton's "
                "Python backend was built for NumPy 1 and loses strings under NumPy 2; token ids work with both"
            )
        render_text(engine_dir, models_dir, max_batch_size=engine.engine.max_batch_size)


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _claim(host: str, port: int | None, what: str) -> int:
    if port is None:
        return free_port(host)
    if not 0 < port < 65536:
        raise InputError(f"the {what} port must be in 1..65535, got {port}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"cannot use {what} port {port} on {host} ({error.strerror}): choose another") from None
    return port


def read_metrics(url: str) -> tuple[dict[str, float], str]:
    """The engine's values on a server's metrics page, without the prefix ``llama_engine_``, and its kernels' name."""
    with urllib.request.urlopen(f"http://{url}/metrics", timeout=10) as answer:
        rows = [row for row in answer.read().decode().splitlines() if row.startswith("llama_engine_")]
    kernels = re.search(r'kernels="([^"]*)"', rows[0]) if rows else None
    values = {row.split("{")[0].removeprefix("llama_engine_"): float(row.rsplit(" ", 1)[1]) for row in rows}
    return values, kernels[1] if kernels else "unknown"


class TritonServer:
    """A running server: ``with TritonServer(engine_dir) as server: ... server.grpc_url``.

    Ports left None are chosen free. Raises :class:`InputError` before anything starts, :class:`RunError` when the
    server dies or does not get ready; the message names the log.
    """

    def __init__(
        self,
        engine_dir: Path | str,
        config: ServeConfig | None = None,
        *,
        host: str = "127.0.0.1",
        http_port: int | None = None,
        grpc_port: int | None = None,
        metrics_port: int | None = None,
        run_dir: Path | str | None = None,
        ready_timeout_s: float = 600.0,
        env: dict[str, str] | None = None,
    ) -> None:
        self.config = config or ServeConfig()
        self.engine_dir, self.host, self._ready_timeout_s = Path(engine_dir), host, ready_timeout_s
        self._root = wheel()
        self._env = environment(self._root) | (env or {})
        self.http_port = _claim(host, http_port, "HTTP")
        self.grpc_port = _claim(host, grpc_port, "gRPC")
        self.metrics_port = _claim(host, metrics_port, "metrics")
        self.run_dir = Path(run_dir or tempfile.mkdtemp(prefix="triton-"))
        self._owns_run_dir = run_dir is None
        self._prefix = f"llama_engine_{os.getpid()}_{next(_instances)}_"
        self.log = self.run_dir / "triton.log"
        self.process: subprocess.Popen[bytes] | None = None

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
        if self.alive:
            raise RunError("this server is running already")
        models, backends = self.run_dir / "models", self.run_dir / "backends"
        for folder in (models, backends):
            shutil.rmtree(folder, ignore_errors=True)
        render(self.engine_dir, models, self.config)
        backend = backends / "python"
        backend.mkdir(parents=True)
        parts = self._root / "tritonserver/backends/python"
        for part in (parts / "libtriton_python.so", parts / "triton_python_backend_utils.py", stub(self._root)):
            (backend / part.name).symlink_to(part)
        command = [
            str(self._root / "tritonserver/bin/tritonserver"),
            f"--model-repository={models}",
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={self._prefix}",
            f"--http-address={self.host}",
            f"--http-port={self.http_port}",
            f"--grpc-address={self.host}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-address={self.host}",
            f"--metrics-port={self.metrics_port}",
            "--allow-gpu-metrics=false",
            "--model-control-mode=none",
            # these need a header that nobody knows: clients infer, read metadata, health and statistics, no more
            f"--http-restricted-api={CLOSED_APIS}:admin={secrets.token_hex(16)}",
            f"--grpc-restricted-protocol={CLOSED_APIS}:admin={secrets.token_hex(16)}",
            f"--exit-timeout-secs={math.ceil(self.config.drain_s) + 3}",  # 3: what unloading takes
        ]
        with self.log.open("ab") as log:
            # a session of its own: Ctrl-C reaches the caller only, who then stops the server in order
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._env, start_new_session=True
            )
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Drain for ``drain_s``, then end; killed if it does not. Safe to call twice."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(self.config.drain_s + 10)
            except subprocess.TimeoutExpired:
                self.kill()
        self._clean()

    def kill(self) -> None:
        """kill -9 the server and its backend processes."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._clean()

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def metrics(self) -> dict[str, float]:
        """This engine's metrics by name, without the prefix ``llama_engine_``."""
        return read_metrics(f"{self.host}:{self.metrics_port}")[0]

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + self._ready_timeout_s
        while time.monotonic() < deadline:
            if not self.alive:
                raise RunError(f"tritonserver ended while starting: {self._last_error()} (log: {self.log})")
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"http://{self.http_url}/v2/health/ready", timeout=2)
                return
            time.sleep(0.1)
        raise RunError(f"tritonserver was not ready within {self._ready_timeout_s:.0f} s (log: {self.log})")

    def _last_error(self) -> str:
        self._owns_run_dir = False  # the log is worth keeping
        lines = self.log.read_text(errors="replace").splitlines()
        failed = [line.split("] ", 1)[-1] for line in lines if line.startswith("E") and "CudaDriver" not in line]
        failed = [line for line in failed if "failed to load" in line or "Failed" in line] or failed or lines[-1:]
        return failed[0].split("\\n")[0].strip('"') if failed else "no output"

    def _clean(self) -> None:
        for region in Path("/dev/shm").glob(f"{self._prefix}*"):
            region.unlink(missing_ok=True)
