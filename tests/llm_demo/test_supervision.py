"""The demo over a real Triton of its own: what it opens, and what is left when something in it is killed."""

import contextlib
import os
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from llama_engine.serving.server import free_port
from tests.conftest import ROOT
from tests.llm_demo.conftest import THREADS, healthy, wait_for

pytestmark = pytest.mark.slow

ASKED = {"model": "SmolLM2-135M-Instruct", "prompt": "1, 2, 3,", "temperature": 0, "max_tokens": 6}
SERVER, BACKEND = "tritonserver", "triton_python_backend_stub"


@pytest.fixture(scope="module")
def demo(smollm2_engine):
    """The process and its URL. The last test kills it."""
    port = free_port()
    command = [sys.executable, "llm_demo/server.py", "--engine-dir", str(smollm2_engine), "--port", str(port)]
    env = os.environ | THREADS | {"PYTHONPATH": str(ROOT)}
    demo, seen = psutil.Popen([*command, "--device", "cpu"], cwd=ROOT, env=env), []
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: demo.poll() is not None or healthy(url), "the demo", 200)
        seen = demo.children(recursive=True)
        yield demo, url
        seen += demo.children(recursive=True) if demo.poll() is None else []
    finally:
        for process in [demo, *seen]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        demo.wait()


def part(demo, name):
    return next(child for child in demo.children(recursive=True) if child.name() == name)


def test_no_port_of_the_demo_s_triton_answers_a_page(demo):
    connections = part(demo[0], SERVER).net_connections("inet")
    listening = {c.laddr for c in connections if c.status == psutil.CONN_LISTEN}
    assert listening
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    page = {"Content-Type": "text/plain", "Origin": "https://evil.example", "Host": "evil.example"}
    for address in listening:
        with contextlib.suppress(httpx.HTTPError):  # gRPC's closes the connection
            content = '{"input_ids": [1], "request_output_len": 1}'
            url = f"http://127.0.0.1:{address.port}/v2/models/tensorrt_llm/generate"
            assert httpx.post(url, content=content, headers=page, timeout=10).status_code in (404, 405)


@pytest.mark.parametrize("victim", [SERVER, BACKEND])
def test_the_demo_goes_on_after_a_kill_of(demo, victim):
    demo, url = demo
    right = httpx.post(f"{url}/v1/completions", json=ASKED, timeout=60).json()["choices"][0]["text"]
    family = [part(demo, name) for name in (SERVER, BACKEND)]
    family[victim == BACKEND].kill()
    assert psutil.wait_procs(family, timeout=10)[1] == []
    wait_for(lambda: healthy(url), "Triton's return")
    assert httpx.post(f"{url}/v1/completions", json=ASKED, timeout=60).json()["choices"][0]["text"] == right


def test_nothing_survives_a_kill_of_the_demo(demo):
    demo, _ = demo
    family = demo.children(recursive=True)
    assert {SERVER, BACKEND} <= {process.name() for process in family}
    demo.kill()
    assert psutil.wait_procs(family, timeout=10)[1] == []
    assert not list(Path("/dev/shm").glob(f"llama_engine_{demo.pid}_*"))
