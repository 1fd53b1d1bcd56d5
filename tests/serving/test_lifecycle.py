"""The real Triton Inference Server from start to end: faults, kill -9, draining, the scripts around it."""

import asyncio
import contextlib
import json
import os
import queue
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client

from llama_engine.errors import InputError, RunError
from llama_engine.measure.lengths import Length
from llama_engine.measure.load import Generator
from llama_engine.measure.text import RandomIds, Text
from llama_engine.measure.traffic import Traffic
from llama_engine.serving import server as server_module
from llama_engine.serving import wheel
from llama_engine.serving.client import KEY_VARIABLE
from llama_engine.serving.repository import ServeConfig, render
from llama_engine.serving.server import TritonServer, free_port
from llama_engine.serving.target import TritonTarget
from llama_engine.tokenizer import ChatTokenizer
from tests.conftest import ROOT
from tests.serving.tools import alone, ask, assert_idle, post, some_prompts, tensors

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
        patch.setattr(server_module, "render", render_with_fault)
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
        target = TritonTarget("grpc", faulty.grpc_url)
        kill = lambda load: faulty.alive and len(load.runs) > 8 and faulty.kill()  # noqa: E731
        traffic = Traffic(input_tokens=Length(8, 8), output_tokens=Length(100, 100))
        generator = Generator(target, traffic, Text(RandomIds(512)), timeout_s=10, on_progress=kill)
        made = await generator.closed(8, requests=40)
        await target.close()
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


@pytest.mark.slow
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
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="not available on linux"):
        TritonServer(tiny_engine)


@pytest.mark.parametrize("folder", ["models", "backends"])
def test_a_run_directory_keeps_what_the_user_has_there(tiny_engine, tmp_path, folder):
    kept = tmp_path / folder / "smollm2/model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_text("weights")
    with pytest.raises(InputError, match=f"{folder} was not written by this command, so it is never replaced"):
        TritonServer(tiny_engine, run_dir=tmp_path).start()
    assert kept.read_text() == "weights"


def test_a_run_directory_is_never_in_the_engine(tiny_engine, tmp_path):
    engine = shutil.copytree(tiny_engine, tmp_path / "models")
    with pytest.raises(InputError, match="overlaps the input"):
        TritonServer(engine, run_dir=tmp_path).start()
    assert (engine / "engine.json").is_file()


def test_a_server_that_cannot_load_says_why(tiny_engine, tmp_path, monkeypatch):
    def broken(engine_dir, models_dir, config):
        render(engine_dir, models_dir, config)
        (models_dir / "tensorrt_llm/1/model.py").write_text("raise RuntimeError('no such thing')\n")

    monkeypatch.setattr(server_module, "render", broken)
    server = TritonServer(tiny_engine, run_dir=tmp_path / "run")
    with pytest.raises(RunError, match="no such thing"):
        server.start()
    assert not server.alive
    with pytest.raises(RunError, match="no such thing"):
        server.start()  # over what it wrote before


@pytest.mark.slow
@pytest.mark.skipif(not TEXT, reason="needs NumPy 1")
def test_text_in_text_out(smollm2_engine, tmp_path):
    """Of a model whose answers end at a full stop, too."""
    engine = tmp_path / "engine"
    shutil.copytree(smollm2_engine, engine, symlinks=True)
    info = json.loads((engine / "engine.json").read_text())
    info["model"]["eos_token_ids"] = [2, 3, *ChatTokenizer(engine).encode(".")]
    (engine / "engine.json").write_text(json.dumps(info))
    question = {"text_input": "What is the capital of France? Answer briefly.", "max_tokens": 32}
    with TritonServer(engine, ServeConfig(text=True, drain_s=2), env=ONE_THREAD) as server:
        _, whole = post(server, "/v2/models/ensemble/generate", question)
        assert json.loads(whole)["text_output"] == PARIS[:-1]
        _, whole = post(server, "/v2/models/ensemble/generate", question | {"exclude_input_in_output": True})
        assert json.loads(whole)["text_output"] == PARIS[:-1]
        _, whole = post(server, "/v2/models/ensemble/generate", question | {"min_length": 12})
        assert json.loads(whole)["sequence_length"] > 12
        _, whole = post(server, "/v2/models/ensemble/generate", question | {"end_id": 2})
        assert json.loads(whole)["sequence_length"] > len(PARIS.split())
        _, stream = post(server, "/v2/models/ensemble/generate_stream", question | {"stream": True})
        pieces = [json.loads(line[5:])["text_output"] for line in stream.splitlines() if line.startswith(b"data:")]
        assert len(pieces) > 1
        assert "".join(pieces) == PARIS[:-1]
        assert_idle(server)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_inference_needs_the_secret_when_one_is_set(keyed, tiny_engine, monkeypatch, protocol):
    asked = [[1, 2, 3]], 8, protocol
    assert ask(keyed, *asked) == alone(tiny_engine, [[1, 2, 3]], 8)
    assert ask(keyed, *asked, streaming=False) == alone(tiny_engine, [[1, 2, 3]], 8)
    for wrong in ("", "hush-hus", "hush-hush-"):
        monkeypatch.setenv(KEY_VARIABLE, wrong)
        for streaming in (True, False):
            # a gRPC stream may end before it has told why
            refusal = "restricted|Internal error from Core" if protocol == "grpc" else "restricted"
            assert re.search(refusal, str(ask(keyed, *asked, streaming=streaming)[0]))
    for path in ("infer", "generate", "generate_stream"):
        status, _ = post(keyed, f"/v2/models/tensorrt_llm/{path}", {"input_ids": [1], "request_output_len": 2})
        assert status == 403
    assert post(keyed, "/v2/repository/index", {})[0] == 403


@pytest.fixture(scope="module")
def keyed(tiny_engine):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, "hush-hush")
        with TritonServer(tiny_engine, ServeConfig(drain_s=1), env=ONE_THREAD) as server:
            yield server


@pytest.fixture(autouse=True)
def secret(request, monkeypatch):
    if "keyed" in request.fixturenames:
        monkeypatch.setenv(KEY_VARIABLE, "hush-hush")


def test_a_secret_that_no_header_can_hold_is_refused(tiny_engine, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "two,words:=")
    with pytest.raises(InputError, match=f"{KEY_VARIABLE} may hold letters, digits"):
        TritonServer(tiny_engine).start()


def test_without_http_grpc_is_the_only_way_in(tiny_engine):
    with TritonServer(tiny_engine, ServeConfig(drain_s=1), env=ONE_THREAD, http=False) as server:
        assert ask(server, [[1, 2, 3]], 8) == alone(tiny_engine, [[1, 2, 3]], 8)
        listening = psutil.Process(server.process.pid).net_connections("inet")
        ports = {connection.laddr.port for connection in listening if connection.status == psutil.CONN_LISTEN}
        assert ports == {server.grpc_port, server.metrics_port}


@pytest.mark.slow
def test_a_dead_backend_is_a_dead_server(tiny_engine):
    with TritonServer(tiny_engine, ServeConfig(drain_s=1), env=ONE_THREAD) as server:
        assert server.alive
        (backend,) = psutil.Process(server.process.pid).children()
        backend.kill()
        psutil.wait_procs([backend], timeout=5)
        assert not server.alive
        server.kill()
        server.start()
        assert ask(server, [[1, 2, 3]], 8) == alone(tiny_engine, [[1, 2, 3]], 8)


@pytest.fixture(scope="module")
def pair(tiny_engine, tmp_path_factory):
    """Two servers at once; the second has a KV cache of 8 blocks of 16 tokens, less than the context of 256."""
    tight = tmp_path_factory.mktemp("tight") / "engine"
    shutil.copytree(tiny_engine, tight)
    info = json.loads((tight / "engine.json").read_text())
    info["engine"]["num_kv_blocks"] = 9  # one is scratch
    (tight / "engine.json").write_text(json.dumps(info))
    config = ServeConfig(drain_s=1, max_queue_size=16)
    with (
        TritonServer(tiny_engine, config, env=ONE_THREAD) as first,
        TritonServer(tight, config, env=ONE_THREAD) as second,
    ):
        yield first, second


@pytest.mark.slow
def test_a_full_kv_cache_makes_requests_wait_and_one_too_large_for_it_is_refused(pair, tiny_engine):
    _, tight = pair
    for protocol in ("grpc", "http"):
        (error,) = ask(tight, [[1] * 40], 89, protocol)
        assert str(error) == "129 tokens need 9 KV blocks of 16 tokens; the cache has 8"
        assert isinstance(ask(tight, [[1] * 40], 88, protocol)[0], list)
    prompts = [[i, i] for i in range(12)]  # 7 blocks each, four at once
    assert ask(tight, prompts, 100) == alone(tiny_engine, prompts, 100)
    assert_idle(tight)
    assert tight.metrics()["preemptions"] > 0


@pytest.mark.slow
def test_two_servers_share_a_machine_and_one_that_is_killed_leaves_the_other(pair, tiny_engine):
    first, second = pair
    assert ask(first, [[5, 6]], 4) == ask(second, [[5, 6]], 4) == alone(tiny_engine, [[5, 6]], 4)
    with pytest.raises(InputError, match=f"gRPC port {first.grpc_port} .*choose another"):
        TritonServer(tiny_engine, grpc_port=first.grpc_port)
    client, heard = grpc_client.InferenceServerClient(second.grpc_url), queue.SimpleQueue()
    client.start_stream(lambda result, error: heard.put(error))
    streaming = grpc_client.InferInput("streaming", [1, 1], "BOOL")
    streaming.set_data_from_numpy(np.array([[True]]))
    for i in range(16):
        client.async_stream_infer("tensorrt_llm", [*tensors(grpc_client, [i], 120), streaming])
    assert heard.get(timeout=30) is None
    second.kill()
    while (error := heard.get(timeout=30)) is None:
        pass
    assert error.status() == "StatusCode.UNAVAILABLE"
    client.stop_stream()
    assert not list(Path("/dev/shm").glob(f"{second._prefix}*"))
    assert list(Path("/dev/shm").glob(f"{first._prefix}*"))
    assert ask(first, [[5, 6]], 4) == alone(tiny_engine, [[5, 6]], 4)
    second.start()
    assert ask(second, [[5, 6]], 4, "http") == alone(tiny_engine, [[5, 6]], 4)


@pytest.mark.slow
def test_term_ends_streams_in_full_and_refuses_what_comes_after(pair, tiny_engine):
    """The last that uses the first of the pair. Its client keeps the stream open, for which Triton waits in vain."""
    server, _ = pair
    client, heard = grpc_client.InferenceServerClient(server.grpc_url), queue.SimpleQueue()
    client.start_stream(lambda result, error: heard.put((result, error)))
    streaming = grpc_client.InferInput("streaming", [1, 1], "BOOL")
    streaming.set_data_from_numpy(np.array([[True]]))
    names = [str(i) for i in range(12)]
    for name in names:
        inputs = [*tensors(grpc_client, [int(name)], 100), streaming]
        client.async_stream_infer("tensorrt_llm", inputs, request_id=name, enable_empty_final_response=True)
    answers, ended = {name: [] for name in names}, set()
    stopping = threading.Thread(target=server.stop)
    while len(ended) < len(names):
        result, error = heard.get(timeout=60)
        assert error is None
        if not stopping.ident:
            stopping.start()
        response = result.get_response()
        answers[response.id] += np.ravel(result.as_numpy("output_ids")).tolist() if response.outputs else []
        ended |= {response.id} if response.parameters["triton_final_response"].bool_param else set()
    assert [*answers.values()] == alone(tiny_engine, [[int(name)] for name in names], 100)
    client.async_stream_infer("tensorrt_llm", tensors(grpc_client, [3], 4))
    assert heard.get(timeout=30)[1] is not None
    stopping.join(60)
    assert not server.alive
    client.close()


@pytest.mark.slow
def test_nothing_survives_a_starter_that_is_killed(tiny_engine):
    ports = [part for name in ("http", "grpc", "metrics") for part in (f"--{name}-port", str(free_port()))]
    starter = subprocess.Popen(
        [sys.executable, "scripts/serve_triton.py", "--engine-dir", str(tiny_engine), *ports],
        cwd=ROOT,
        env=os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    family = []
    try:
        assert any(line.startswith("ready") for line in starter.stdout)
        family = psutil.Process(starter.pid).children(recursive=True)
        assert {"tritonserver", "triton_python_backend_stub"} <= {process.name() for process in family}
        starter.kill()
        assert psutil.wait_procs(family, timeout=10)[1] == []
        assert not list(Path("/dev/shm").glob(f"llama_engine_{starter.pid}_*"))
    finally:
        for process in [starter, *family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        starter.communicate()
