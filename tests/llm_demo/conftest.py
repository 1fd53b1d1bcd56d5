"""A gateway over the default model on the real Triton Inference Server, one for all tests of the demo."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from llama_engine.serving.repository import ServeConfig
from llama_engine.serving.server import TritonServer, free_port
from tests.conftest import ROOT

THREADS = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.1)


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="session")
def triton(smollm2_engine) -> Iterator[TritonServer]:
    with TritonServer(smollm2_engine, ServeConfig(drain_s=1), env=THREADS) as server:
        yield server


@pytest.fixture(scope="session")
def gateway(triton, smollm2_engine, smollm2_model) -> Iterator[str]:
    """The URL of a gateway process that ends with code 0 on Ctrl-C."""
    port = free_port()
    command = [sys.executable, "llm_demo/server.py", "--engine-dir", smollm2_engine, "--model-dir", smollm2_model]
    process = subprocess.Popen(
        [*map(str, command), "--port", str(port), "--replica", triton.grpc_url, "--device", "cpu"],
        cwd=ROOT,
        env=os.environ | THREADS | {"PYTHONPATH": str(ROOT)},
    )
    try:
        wait_for(lambda: process.poll() is not None or healthy(f"http://127.0.0.1:{port}"), "the gateway")
        assert process.poll() is None
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
