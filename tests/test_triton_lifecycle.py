"""The real Triton Inference Server from start to end: faults, kill -9, draining, the scripts around it."""

import asyncio
import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client

from llama_engine import triton_server
from llama_engine.errors import InputError, RunError
from llama_engine.measure.load import Generator, Length
from llama_engine.triton_client import connect
from llama_engine.triton_server import ServeConfig, TritonServer, render
from tests.conftest import ROOT
from tests.serving import alone, ask, assert_idle, post, some_prompts, tensors

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
PARIS = "The capital of France is Paris."
TEXT = int(np.__version__.split(".")[0]) < 2  # this wheel's backend loses strings under NumPy 2
FAULT = """
_parse = parse
def parse(arrays, **options):
    request = _parse(arrays, **options)
    if request.prompt[0] == 13:
        raise ZeroDivisionError("injected")
    return request
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the wheel is for Linux")


@pytest.fixture(scope="module")
def faulty(tiny_engine):
    """A server that fails inside every request whose first token is 13, and keeps no prefix cache."""

    def render_with_fault(engine_dir, models_dir, config):
        render(engine_dir, models_dir, config)
        with (models_dir / "tensorrt_llm/1/model.py").open("a") as file:
            file.write(FAULT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_server, "render", render_with_fault)
        config = ServeConfig(drain_s=20, enable_prefix_cache=False)
        with TritonServer(tiny_engine, config, env=ONE_THREAD) as server:
            yield server


def test_without_a_prefix_cache_no_prompt_is_looked_up(faulty):
    for _ in range(2):
        ask(faulty, [list(range(40))], 2)
    deadline = time.monotonic() + 10
    while (metrics := faulty.metrics())["tokens_generated"] < 4:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert metrics["prefix_cache_query_tokens"] == metrics["prefix_cache_hit_tokens"] == 0


def test_error_inside_one_request_leaves_the_others(faulty, tiny_engine):
    prompts = [[13 if i % 3 == 0 else 14, i] for i in range(12)]
    answers = ask(faulty, prompts, 16)
    assert_idle(faulty)
    wanted = alone(tiny_engine, prompts, 16)
    for prompt, answer, right in zip(prompts, answers, wanted):
        assert ("injected" in str(answer)) if prompt[0] == 13 else (answer == right)


def test_kill_9_under_load_is_reported_and_a_restart_serves(faulty, tiny_engine):
    async def load():
        client = connect("grpc", faulty.grpc_url)
        kill = lambda load: faulty.alive and len(load.runs) > 8 and faulty.kill()  # noqa: E731
        lengths = Length(8, 8), Length(100, 100)
        generator = Generator(client, lambda n: [7] * n, *lengths, timeout_s=10, on_progress=kill)
        made = await generator.closed(8, requests=40)
        await client.close()
        return made

    made = asyncio.run(load())
    assert made.runs
    assert made.failures
    assert len(made.runs) + sum(made.failures.values()) == 40
    assert not faulty.alive
    assert not list(Path("/dev/shm").glob(f"{faulty._prefix}*"))
    faulty.start()
    # over HTTP: gRPC makes this process wait before it tries an address again that has just refused
    assert ask(faulty, [[1, 2, 3]], 8, "http") == alone(tiny_engine, [[1, 2, 3]], 8)


def test_shutdown_drains_what_runs(faulty, tiny_engine):
    """The last that uses this server."""
    threading.Timer(0.3, faulty.stop).start()
    prompts = [[i] for i in range(20, 44)]
    answers = ask(faulty, prompts, 250, "http", streaming=False)
    assert answers == alone(tiny_engine, prompts, 250)


def test_plain_infer_calls_without_decoupling(smollm2_engine):
    prompts = some_prompts(6, seed=2)
    with TritonServer(smollm2_engine, ServeConfig(decoupled=False, text=TEXT, drain_s=2), env=ONE_THREAD) as server:
        right = alone(smollm2_engine, prompts, 8)
        for module, address in ((http_client, server.http_url), (grpc_client, server.grpc_url)):
            client = module.InferenceServerClient(address)
            for prompt, answer in zip(prompts, right):
                result = client.infer("tensorrt_llm", tensors(module, prompt, 8))
                ids = result.as_numpy("output_ids")[0, 0].tolist()
                assert ids == (answer if TEXT else prompt + answer)  # the ensemble's text is the answer alone
        if TEXT:
            text = http_client.InferInput("text_input", [1, 1], "BYTES")
            text.set_data_from_numpy(np.array([["What is the capital of France? Answer briefly."]], dtype=object))
            new = http_client.InferInput("max_tokens", [1, 1], "INT32")
            new.set_data_from_numpy(np.array([[32]], dtype=np.int32))
            client = http_client.InferenceServerClient(server.http_url)
            answer = client.infer("ensemble", [text, new]).as_numpy("text_output")
            assert answer[0, 0].decode() == PARIS
        assert "--no-decoupled" in str(ask(server, [[1]], 3, streaming=True)[0])
        assert_idle(server)


def test_starting_errors_are_one_line(tiny_engine, tmp_path, monkeypatch):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(InputError, match=r"HTTP port \d+ .*choose another"):
            TritonServer(tiny_engine, http_port=busy.getsockname()[1])
    with pytest.raises(InputError, match="engine"):
        TritonServer(tmp_path / "none", run_dir=tmp_path / "run").start()
    with pytest.raises(InputError, match="negative"):
        ServeConfig(max_queue_size=-1)
    monkeypatch.setattr(triton_server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="not available on linux"):
        TritonServer(tiny_engine)


def test_a_server_that_cannot_load_says_why(tiny_engine, tmp_path, monkeypatch):
    def broken(engine_dir, models_dir, config):
        render(engine_dir, models_dir, config)
        (models_dir / "tensorrt_llm/1/model.py").write_text("raise RuntimeError('no such thing')\n")

    monkeypatch.setattr(triton_server, "render", broken)
    server = TritonServer(tiny_engine, run_dir=tmp_path / "run")
    with pytest.raises(RunError, match="no such thing"):
        server.start()
    assert not server.alive


@pytest.mark.skipif(not TEXT, reason="needs NumPy 1")
def test_text_in_text_out(smollm2_engine):
    question = {"text_input": "What is the capital of France? Answer briefly.", "max_tokens": 32}
    with TritonServer(smollm2_engine, ServeConfig(text=True, drain_s=2), env=ONE_THREAD) as server:
        _, whole = post(server, "/v2/models/ensemble/generate", question)
        assert json.loads(whole)["text_output"] == PARIS
        _, stream = post(server, "/v2/models/ensemble/generate_stream", question | {"stream": True})
        pieces = [json.loads(line[5:])["text_output"] for line in stream.splitlines() if line.startswith(b"data:")]
        assert len(pieces) > 1
        assert "".join(pieces) == PARIS
        assert_idle(server)


class FakeServer:
    """Stands in for one that lives until it is asked whether it does for the ``lives``-th time."""

    host, http_url, grpc_url, metrics_port, log = "h", "h:1", "h:2", 3, "triton.log"

    def __init__(self, lives=0):
        self.lives, self.starts, self.stopped = lives, 0, False

    def start(self):
        self.starts += 1

    @property
    def alive(self):
        self.lives -= 1
        return self.lives >= 0

    def kill(self):
        pass

    def stop(self):
        self.stopped = True


@pytest.fixture
def serve_native(kept_handlers):
    return runpy.run_path(str(ROOT / "scripts/serve_triton.py"))["serve_native"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serving_ends_in_order_at_ctrl_c_and_term(serve_native, number):
    server = FakeServer(lives=100)
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
    serve_native(server)
    assert (server.starts, server.stopped) == (1, True)


def test_a_server_that_dies_is_started_again_five_times(serve_native):
    server = FakeServer()
    with pytest.raises(RunError, match="ended 5 times by itself"):
        serve_native(server)
    assert (server.starts, server.stopped) == (6, True)
