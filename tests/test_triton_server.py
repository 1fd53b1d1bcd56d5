"""The real Triton Inference Server, in order and under fire. Each test leaves no KV block behind."""

import asyncio
import json
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client

from llama_engine import triton_server
from llama_engine.engine import Engine
from llama_engine.errors import InputError, RunError
from llama_engine.measure.load import Generator, Length
from llama_engine.triton_client import RequestFailed, connect
from llama_engine.triton_server import ServeConfig, TritonServer, free_port, render
from tests.test_engine import generate

ROOT = Path(__file__).parent.parent
TRANSPORTS = [(p, s) for p in ("grpc", "http") for s in (True, False)]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the wheel is for Linux")


@pytest.fixture(scope="module")
def server(tiny_engine):
    with TritonServer(tiny_engine, ServeConfig(max_queue_size=64, drain_s=5), env={"OMP_NUM_THREADS": "1"}) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_leaks(request):
    yield
    if "server" in request.fixturenames:
        assert_idle(request.getfixturevalue("server"))


def assert_idle(server, seconds=10):
    deadline = time.monotonic() + seconds
    while True:
        metrics = server.metrics()
        if metrics["kv_blocks_used"] == metrics["requests"] == 0:
            return
        assert time.monotonic() < deadline, f"not idle: {metrics}"
        time.sleep(0.1)


def url(server, protocol):
    return server.grpc_url if protocol == "grpc" else server.http_url


def ask(server, prompts, new_tokens, protocol="grpc", streaming=True, **options):
    """The new ids of each prompt, all sent at once; a refused one gives its exception."""

    async def main():
        client = connect(protocol, url(server, protocol))

        async def one(prompt):
            ids = []
            try:
                async for new in client.generate(prompt, new_tokens, streaming=streaming, **options):
                    ids += new
            except RequestFailed as error:
                return error
            return ids

        try:
            return await asyncio.gather(*(one(prompt) for prompt in prompts))
        finally:
            await client.close()

    return asyncio.run(main())


def alone(engine_dir, prompts, new_tokens):
    engine = Engine.from_dir(engine_dir, device="cpu", threads=1)
    return [generate(engine, prompt, new_tokens) for prompt in prompts]


def some_prompts(count, seed=0, longest=40):
    rng = random.Random(seed)
    return [[rng.randrange(512) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def post(server, path, body, timeout=20):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{server.http_url}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize(("protocol", "streaming"), TRANSPORTS)
def test_batched_answers_equal_those_given_alone(server, tiny_engine, protocol, streaming):
    prompts = some_prompts(9)
    assert ask(server, prompts, 24, protocol, streaming) == alone(tiny_engine, prompts, 24)


def test_output_holds_the_prompt_as_tensorrt_llm_has_it(server, tiny_engine):
    status, answer = post(
        server,
        "/v2/models/tensorrt_llm/generate",
        {"input_ids": [5, 6, 7, 9, 9], "input_lengths": 3, "request_output_len": 4},
    )
    assert status == 200
    assert json.loads(answer)["output_ids"] == [5, 6, 7, *alone(tiny_engine, [[5, 6, 7]], 4)[0]]
    assert json.loads(answer)["sequence_length"] == 7


def test_sampling_and_end_id_reach_the_engine(server, tiny_engine):
    options = {"temperature": 1.5, "runtime_top_k": 50, "random_seed": 3}
    first, again, other = (ask(server, [[1, 2, 3]], 20, **options | {"random_seed": s})[0] for s in (3, 3, 4))
    assert first == again != other
    greedy = alone(tiny_engine, [[1, 2, 3]], 20)[0]
    assert ask(server, [[1, 2, 3]], 20, end_id=greedy[5])[0] == greedy[: greedy.index(greedy[5]) + 1]


BAD = [
    ({"input_ids": []}, "empty"),
    ({"input_ids": [1.5]}, ""),
    ({"input_ids": "text"}, ""),
    ({"input_ids": None}, ""),
    ({"input_ids": [512]}, "outside the vocabulary of 512"),
    ({"input_ids": [-1]}, "outside the vocabulary"),
    ({"input_ids": [1] * 300}, "max_seq_len 256"),
    ({"request_output_len": 0}, "at least 1"),
    ({"request_output_len": -5}, "at least 1"),
    ({"request_output_len": 10**9}, "1000000000 new tokens exceed this engine's max_seq_len 256"),
    ({"request_output_len": [1, 2]}, ""),
    ({"input_lengths": 9}, "input_lengths is 9"),
    ({"input_lengths": -1}, "input_lengths is -1"),
    ({"beam_width": 2}, "beam_width=2"),
    ({"temperature": -1.0}, "temperature"),
    ({"runtime_top_p": 7.0}, "top_p"),
    ({"random_seed": -1}, ""),
    ({"streaming": "yes"}, ""),
    ({"stop_words_list": [1, 2, 3]}, ""),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[json.dumps(c)[:40] for c, _ in BAD])
def test_malformed_json_values_are_refused_one_by_one(server, changes, message):
    body = {"input_ids": [1, 2, 3], "request_output_len": 4} | changes
    status, answer = post(server, "/v2/models/tensorrt_llm/generate", body)
    assert status >= 400
    assert message in json.loads(answer)["error"]


def test_malformed_tensors_over_grpc_are_refused(server):
    client = grpc_client.InferenceServerClient(server.grpc_url)
    shapes = {
        "wrong dtype": ("input_ids", np.ones((1, 3), np.int64), "INT64"),
        "rank 1": ("input_ids", np.ones((3,), np.int32), "INT32"),
        "rank 3": ("input_ids", np.ones((1, 1, 3), np.int32), "INT32"),
        "batch of 2": ("input_ids", np.ones((2, 3), np.int32), "INT32"),
        "batch of 1000": ("input_ids", np.ones((1000, 3), np.int32), "INT32"),
        "empty": ("input_ids", np.ones((1, 0), np.int32), "INT32"),
        "unknown name": ("no_such_input", np.ones((1, 3), np.int32), "INT32"),
    }
    for what, (name, array, kind) in shapes.items():
        tensor = grpc_client.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        length = grpc_client.InferInput("request_output_len", [array.shape[0], 1], "INT32")
        length.set_data_from_numpy(np.full((array.shape[0], 1), 4, np.int32))
        errors, done = [], threading.Event()

        def answered(result, error, errors=errors, done=done):
            errors.append(error)
            done.set()

        client.start_stream(answered)
        client.async_stream_infer("tensorrt_llm", [tensor, length])
        assert done.wait(10), what
        client.stop_stream()
        assert errors[0] is not None, what
    assert isinstance(ask(server, [[1, 2]], 3)[0], list)


def test_random_bytes_over_http(server):
    rng = random.Random(0)
    for size in (0, 1, 17, 1000, 100_000):
        status, _ = post(server, "/v2/models/tensorrt_llm/generate", rng.randbytes(size))
        assert status >= 400
        with socket.create_connection((server.host, server.http_port)) as raw:
            raw.sendall(rng.randbytes(size))
    with socket.create_connection((server.host, server.grpc_port)) as raw:
        raw.sendall(rng.randbytes(10_000))
    assert isinstance(ask(server, [[1, 2]], 3)[0], list)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_clients_that_vanish_mid_stream_leave_nothing(server, tiny_engine, protocol):
    async def vanish():
        client = connect(protocol, url(server, protocol))
        for prompt in some_prompts(30, seed=1):
            answers = client.generate(prompt, 200, streaming=True)
            async for _ in answers:
                break
            await answers.aclose()
        await client.close()

    asyncio.run(vanish())
    assert_idle(server)
    assert ask(server, [[1, 2, 3]], 8) == alone(tiny_engine, [[1, 2, 3]], 8)


def test_stop_request_ends_the_request_of_its_id(server):
    client = grpc_client.InferenceServerClient(server.grpc_url)
    answers = []
    client.start_stream(lambda result, error: answers.append(error))

    def tensor(name, value, kind, dtype):
        made = grpc_client.InferInput(name, [1, 1], kind)
        made.set_data_from_numpy(np.array([[value]], dtype))
        return made

    ids = tensor("input_ids", 3, "INT32", np.int32)
    run = [ids, tensor("request_output_len", 250, "INT32", np.int32), tensor("streaming", True, "BOOL", np.bool_)]
    client.async_stream_infer("tensorrt_llm", run, request_id="mine")
    client.async_stream_infer("tensorrt_llm", [ids, tensor("stop", True, "BOOL", np.bool_)], request_id="mine")
    assert_idle(server)
    client.stop_stream()
    assert answers


def test_time_out_of_one_request_is_said_and_frees_it(server):
    # the request's own limit, in microseconds, is passed to the engine
    tensors = []
    for name, array in (("input_ids", np.array([[1, 2]])), ("request_output_len", np.array([[250]]))):
        tensors.append(grpc_client.InferInput(name, list(array.shape), "INT32"))
        tensors[-1].set_data_from_numpy(array.astype(np.int32))
    client = grpc_client.InferenceServerClient(server.grpc_url)
    errors, done = [], threading.Event()
    client.start_stream(lambda result, error: (errors.append(error), done.set()))
    client.async_stream_infer("tensorrt_llm", tensors, timeout=1)
    assert done.wait(10)
    client.stop_stream()
    assert "timed out" in str(errors[0])


def test_impatient_clients_do_not_disturb_patient_ones(server, tiny_engine):
    prompts = some_prompts(12, seed=5)

    async def both():
        client = connect("grpc", server.grpc_url)
        hasty = Generator(client, lambda n: [7] * n, Length(8, 8), Length(200, 200), timeout_s=0.02)
        load, answers = await asyncio.gather(hasty.closed(6, requests=40), asyncio.to_thread(ask, server, prompts, 40))
        await client.close()
        return load, answers

    load, answers = asyncio.run(both())
    assert len(load.runs) + sum(load.failures.values()) == 40
    assert answers == alone(tiny_engine, prompts, 40)


def test_two_hundred_more_than_the_queue_holds(server, tiny_engine):
    room = 4 + 64
    answers = ask(server, [[3, 4, 5]] * (room + 200), 64, streaming=False)
    served = [answer for answer in answers if isinstance(answer, list)]
    refused = [str(answer) for answer in answers if not isinstance(answer, list)]
    assert len(served) >= room
    assert refused
    assert all("queue is full" in message for message in refused)
    assert served == alone(tiny_engine, [[3, 4, 5]], 64) * len(served)


@pytest.mark.parametrize(
    "path",
    [
        "/v2/repository/index",
        "/v2/repository/models/tensorrt_llm/load",
        "/v2/repository/models/tensorrt_llm/unload",
        "/v2/systemsharedmemory/region/x/register",
        "/v2/logging",
        "/v2/trace/setting",
    ],
)
def test_administration_is_closed(server, path):
    status, _ = post(server, path, {"log_verbose_level": 9, "key": "/x", "offset": 0, "byte_size": 64})
    assert status == 403
    assert isinstance(ask(server, [[1]], 2)[0], list)


def test_listens_on_loopback_only(server):
    listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
    ours = {f"{port:04X}" for port in (server.http_port, server.grpc_port, server.metrics_port)}
    addresses = {row.split()[1].split(":")[0] for row in listening if row.split()[1].split(":")[1] in ours}
    assert addresses == {"0100007F"}


def test_kill_9_under_load_is_reported_and_a_restart_serves(tiny_engine):
    server = TritonServer(tiny_engine, ServeConfig(drain_s=2), env={"OMP_NUM_THREADS": "1"})
    with server:
        threading.Timer(1.0, server.kill).start()

        async def load():
            client = connect("grpc", server.grpc_url)
            generator = Generator(client, lambda n: [7] * n, Length(8, 8), Length(100, 100), timeout_s=10)
            made = await generator.closed(8, duration_s=3)
            await client.close()
            return made

        made = asyncio.run(load())
        assert made.runs
        assert made.failures
        assert not server.alive
        assert not list(Path("/dev/shm").glob(f"{server._prefix}*"))
        server.start()
        # over HTTP: gRPC makes this process wait before it tries an address again that has just refused
        assert ask(server, [[1, 2, 3]], 8, "http") == alone(tiny_engine, [[1, 2, 3]], 8)


def test_error_inside_one_request_leaves_the_others(tiny_engine, monkeypatch):
    fault = """
_parse = parse
def parse(arrays, **options):
    request = _parse(arrays, **options)
    if request.prompt[0] == 13:
        raise ZeroDivisionError("injected")
    return request
"""

    def render_with_fault(engine_dir, models_dir, config):
        render(engine_dir, models_dir, config)
        with (models_dir / "tensorrt_llm/1/model.py").open("a") as file:
            file.write(fault)

    monkeypatch.setattr(triton_server, "render", render_with_fault)
    prompts = [[13 if i % 3 == 0 else 14, i] for i in range(12)]
    with TritonServer(tiny_engine, ServeConfig(drain_s=2), env={"OMP_NUM_THREADS": "1"}) as server:
        answers = ask(server, prompts, 16)
        assert_idle(server)
    wanted = alone(tiny_engine, prompts, 16)
    for prompt, answer, right in zip(prompts, answers, wanted):
        assert ("injected" in str(answer)) if prompt[0] == 13 else (answer == right)


def test_shutdown_drains_what_runs(tiny_engine):
    server = TritonServer(tiny_engine, ServeConfig(drain_s=20), env={"OMP_NUM_THREADS": "1"})
    with server:
        threading.Timer(0.3, server.stop).start()
        prompts = [[i] for i in range(24)]
        answers = ask(server, prompts, 250, streaming=False)
    right = alone(tiny_engine, prompts, 250)
    assert answers == right


def test_plain_infer_calls_without_decoupling(tiny_engine):
    config = ServeConfig(decoupled=False, drain_s=2)
    prompts = some_prompts(6, seed=2)
    with TritonServer(tiny_engine, config, env={"OMP_NUM_THREADS": "1"}) as server:
        right = alone(tiny_engine, prompts, 8)
        for module, address in ((http_client, server.http_url), (grpc_client, server.grpc_url)):
            client = module.InferenceServerClient(address)
            for prompt, answer in zip(prompts, right):
                tensors = []
                for name, array in (("input_ids", np.array([prompt])), ("request_output_len", np.array([[8]]))):
                    tensors.append(module.InferInput(name, list(array.shape), "INT32"))
                    tensors[-1].set_data_from_numpy(array.astype(np.int32))
                result = client.infer("tensorrt_llm", tensors)
                assert result.as_numpy("output_ids")[0, 0].tolist() == prompt + answer
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


@pytest.mark.skipif(int(np.__version__.split(".")[0]) >= 2, reason="this wheel's backend loses strings under NumPy 2")
def test_text_in_text_out(smollm2_engine):
    question = {"text_input": "What is the capital of France? Answer briefly.", "max_tokens": 32}
    with TritonServer(smollm2_engine, ServeConfig(text=True, drain_s=2), env={"OMP_NUM_THREADS": "1"}) as server:
        _, whole = post(server, "/v2/models/ensemble/generate", question)
        assert json.loads(whole)["text_output"] == "The capital of France is Paris."
        _, stream = post(server, "/v2/models/ensemble/generate_stream", question | {"stream": True})
        pieces = [json.loads(line[5:])["text_output"] for line in stream.splitlines() if line.startswith(b"data:")]
        assert len(pieces) > 1
        assert "".join(pieces) == "The capital of France is Paris."
        assert_idle(server)


def test_serve_script_serves_paris_and_stops(smollm2_engine, run_script):
    ports = [free_port() for _ in range(3)]
    flags = [flag for pair in zip(("--http-port", "--grpc-port", "--metrics-port"), map(str, ports)) for flag in pair]
    command = ["scripts/serve_triton.sh", "--engine-dir", str(smollm2_engine), "--drain-s", "1", *flags]
    serving = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert any("ready" in line for line in serving.stdout)
        second = run_script(*command)
        assert second.returncode == 2
        assert len(second.stderr.strip().splitlines()) == 1
        for extra in (["--url", f"127.0.0.1:{ports[1]}"], ["--protocol", "http", "--url", f"127.0.0.1:{ports[0]}"]):
            asked = run_script("benchmarks/triton_client.py", "--engine-dir", smollm2_engine, *extra)
            assert asked.stdout.strip() == "The capital of France is Paris."
    finally:
        serving.terminate()
        assert serving.wait(40) == 0


def test_benchmark_writes_a_complete_result(tiny_engine, run_script, tmp_path):
    output = tmp_path / "triton-native.json"
    flags = ["--concurrency", 1, 3, "--rate", 50, "--requests", 12, "--output-tokens", 16, "--slo", "ttft_ms:1000"]
    command = ["benchmarks/benchmark_triton.py", "--engine-dir", tiny_engine, *flags, "--output", output]
    done = run_script(*command)
    assert done.returncode in (0, 1), done.stderr  # a busy machine makes a run INVALID, which is said and written
    result = json.loads(output.read_text())
    assert [level.get("concurrency") for level in result["levels"]] == [1, 3, None]
    assert all(level["samples"]["output_tokens"] == [16] * 12 for level in result["levels"])
    assert result["null_model"]["responses_per_s"] > 0
    assert (result["validity"]["status"] == "VALID") == (done.returncode == 0)
    assert run_script(*command).returncode == 2
    assert run_script(*command, "--force", "--concurrency", 0).returncode == 2
