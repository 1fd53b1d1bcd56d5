"""Several engines in one server, as an instance group of Triton's: answers, cancelling and metrics are those of all."""

import asyncio
import os
import re
import signal
import sys
import time
import urllib.request

import psutil
import pynvml
import pytest

from llama_engine import device
from llama_engine.errors import InputError, RunError
from llama_engine.serving.client import GrpcClient, RequestFailed
from llama_engine.serving.repository import ServeConfig, render
from llama_engine.serving.server import TritonServer, read_metrics
from tests.serving.tools import alone, ask, assert_idle, some_prompts

NEW = 100


@pytest.fixture(scope="module")
def server(tiny_engine):
    if sys.platform != "linux":
        pytest.skip("the wheel is for Linux")
    config = ServeConfig(instances=2, drain_s=1)
    with TritonServer(tiny_engine, config, http=False, env={"OMP_NUM_THREADS": "1"}) as server:
        yield server


def stubs(server):
    return [child for child in psutil.Process(server.process.pid).children() if "stub" in child.name()]


@pytest.mark.slow
def test_both_instances_answer_alike_and_are_counted_together(server, tiny_engine):
    prompts = some_prompts(24, seed=9)
    assert ask(server, prompts, NEW) == alone(tiny_engine, prompts, NEW)
    assert_idle(server)
    metrics, kernels = read_metrics(f"127.0.0.1:{server.metrics_port}")
    assert metrics["tokens_generated"] == 24 * NEW
    assert kernels.startswith("cpu")
    page = urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10).read().decode()
    each = re.findall(r'^llama_engine_tokens_generated\{.*instance="(.*?)".*\} (\d+)$', page, re.MULTILINE)
    assert dict(each).keys() == {"tensorrt_llm_0_0", "tensorrt_llm_0_1"}
    assert all(int(tokens) for _, tokens in each)


@pytest.mark.slow
def test_a_stream_that_is_left_is_cancelled_wherever_it_runs(server):
    async def leave():
        client = GrpcClient(server.grpc_url)

        async def one(prompt):
            async for _ in client.generate(prompt, 200, streaming=True):
                return

        await asyncio.gather(*map(one, some_prompts(16, seed=4)))
        await client.close()

    before = server.metrics()["tokens_generated"]
    asyncio.run(leave())
    assert_idle(server)
    assert server.metrics()["tokens_generated"] - before < 16 * 200


@pytest.mark.slow
def test_stopping_by_name_is_refused_where_it_may_not_arrive(server):
    (answer,) = ask(server, [[1, 2]], 5, stop=True)
    assert isinstance(answer, RequestFailed)
    assert "stop reaches one of 2 instances" in str(answer)


@pytest.mark.slow
def test_a_server_with_a_dead_instance_is_dead(server):
    """Last: Triton calls itself ready still, and starts none again."""
    assert server.alive
    os.kill(stubs(server)[0].pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while server.alive:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_process_keeps_one_of_the_visible_gpus(monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 3)
    for visible, index, kept in ((None, 2, "2"), ("GPU-a,GPU-b", 1, "GPU-b"), ("5", 0, "5"), ("", 0, "")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        device.use_own_gpu(index)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == kept
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(RunError, match="instance 2 of the engine finds 2 GPUs"):
        device.use_own_gpu(2)


def test_a_machine_without_gpus_is_left_alone(monkeypatch):
    def absent():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    device.use_own_gpu(1)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_the_group_has_as_many_as_asked_for(tiny_engine, tmp_path):
    render(tiny_engine, tmp_path / "models", ServeConfig(instances=3))
    assert "instance_group [ { count: 3, kind" in (tmp_path / "models/tensorrt_llm/config.pbtxt").read_text()
    with pytest.raises(InputError, match="instances must be at least 1"):
        ServeConfig(instances=0)
