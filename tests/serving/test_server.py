"""Requests to the real Triton Inference Server, in order and under fire. Each test leaves no KV block behind."""

import asyncio
import contextlib
import http.server
import json
import random
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from tritonclient.utils import InferenceServerException

from llama_engine.errors import ErrorCode
from llama_engine.measure.lengths import Length
from llama_engine.measure.load import Generator
from llama_engine.measure.text import RandomIds, Text
from llama_engine.measure.traffic import Traffic
from llama_engine.native import load_engine
from llama_engine.sampling import SamplingParams
from llama_engine.serving.client import RequestFailed, connect
from llama_engine.serving.repository import ServeConfig
from llama_engine.serving.server import TritonServer
from llama_engine.serving.target import TritonTarget
from llama_engine.tokenizer import stop_inputs
from tests.serving.tools import alone, ask, assert_idle, post, some_prompts, tensors, url

TRANSPORTS = [(p, s) for p in ("grpc", "http") for s in (True, False)]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the wheel is for Linux")


@pytest.fixture(scope="module")
def server(tiny_engine):
    config = ServeConfig(max_queue_size=64, drain_s=1, null_model=True)
    with TritonServer(tiny_engine, config, env={"OMP_NUM_THREADS": "1"}) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_leaks(server):
    yield
    assert_idle(server)


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


def test_a_prompt_asked_again_is_found_in_the_prefix_cache(server, tiny_engine):
    prompt = list(range(300, 340))
    time.sleep(0.5)  # metrics are published four times a second
    before = server.metrics()
    answers = [ask(server, [prompt], 8)[0] for _ in range(2)]
    assert answers == alone(tiny_engine, [prompt], 8) * 2
    counts = {"prefix_cache_hit_tokens": 32, "prefix_cache_query_tokens": 80}
    deadline = time.monotonic() + 10
    while {key: server.metrics()[key] - before[key] for key in counts} != counts:
        assert time.monotonic() < deadline, server.metrics()
        time.sleep(0.1)


def test_sampling_and_end_id_reach_the_engine(server, tiny_engine):
    options = {"temperature": 1.5, "runtime_top_k": 50, "random_seed": 3}
    first, again, other = (ask(server, [[1, 2, 3]], 20, **options | {"random_seed": s})[0] for s in (3, 3, 4))
    assert first == again != other
    greedy = alone(tiny_engine, [[1, 2, 3]], 20)[0]
    assert ask(server, [[1, 2, 3]], 20, end_id=greedy[5])[0] == greedy[: greedy.index(greedy[5]) + 1]
    unsaid = next(token for token in range(512) if token not in greedy)
    for protocol in ("grpc", "http"):
        words = [[unsaid, *greedy[4:6]], [1, 3, -1]]  # one of a token, one of two
        ids = ask(server, [[1, 2, 3]], 20, protocol, bad_words_list=words)[0]
        assert ids[:5] == greedy[:5]
        assert ids[5] != greedy[5]


@pytest.mark.parametrize(("protocol", "streaming"), TRANSPORTS)
def test_log_probabilities_reach_the_client(server, tiny_engine, protocol, streaming):
    prompt, options = [1, 2, 3], {"temperature": 1.0, "random_seed": 5}

    async def ask_both():
        client = connect(protocol, url(server, protocol))
        asked = {}, {"return_log_probs": True}, {"return_log_probs": True, "top_logprobs": 3}
        answers = []
        for more in asked:
            responses = client.generate(prompt, 9, streaming=streaming, **options, **more)
            answers.append([response async for response in responses])
        await client.close()
        return answers

    plain, chosen, top = asyncio.run(ask_both())
    assert all(response.logprobs is None for response in plain)
    engine = load_engine(tiny_engine, device="cpu", threads=1)
    engine.add_request(prompt, 9, params=SamplingParams(1.0, seed=5, logprobs=3))
    outputs = [output for _ in range(9) for output in engine.step()]
    for answer, n in ((chosen, 0), (top, 3)):
        assert [token for response in answer for token in response] == [o.token_ids[0] for o in outputs]
        given = [entry for response in answer for entry in response.logprobs]
        assert [entry.token for entry in given] == pytest.approx([o.logprobs[0].token for o in outputs], abs=1e-3)
        assert [len(entry.top) for entry in given] == [n] * 9
        expected = [dict(o.logprobs[0].top[:n]) for o in outputs]
        assert [dict(entry.top) for entry in given] == [pytest.approx(top, abs=1e-3) for top in expected]


@pytest.mark.parametrize(("protocol", "streaming"), TRANSPORTS)
def test_the_first_response_tells_of_the_prompt(server, tiny_engine, protocol, streaming):
    prompt = list(range(200, 240))
    params = SamplingParams(logprobs=2, prompt_logprobs=True)
    engine = load_engine(tiny_engine, device="cpu", threads=1)
    engine.add_request(prompt, 3, params=params)
    expected = engine.step()[0].prompt_logprobs

    async def ask_twice():
        client = connect(protocol, url(server, protocol))
        scored = {"return_log_probs": True, "top_logprobs": 2, "return_prompt_log_probs": True}
        answers = []
        for more in (scored, {}):
            responses = client.generate(prompt, 3, streaming=streaming, **more)
            answers.append([response async for response in responses])
        await client.close()
        return answers

    (first, *others), again = asyncio.run(ask_twice())
    assert first.cached_tokens == 0  # nothing may be skipped
    assert again[0].cached_tokens == 32
    assert [entry.token for entry in first.prompt_logprobs] == pytest.approx([e.token for e in expected], abs=1e-3)
    assert [dict(e.top) for e in first.prompt_logprobs] == [pytest.approx(dict(e.top), abs=1e-3) for e in expected]
    for response in (*others, *again[1:]):
        assert (response.prompt_logprobs, response.cached_tokens) == (None, None)


def test_log_probabilities_have_the_names_and_shapes_of_tensorrt_llm(server):
    client = grpc_client.InferenceServerClient(server.grpc_url)
    inputs = tensors(grpc_client, [1, 2, 3], 5)
    for name, value, kind in (("return_log_probs", True, "BOOL"), ("top_logprobs", 2, "INT32")):
        inputs.append(grpc_client.InferInput(name, [1, 1], kind))
        inputs[-1].set_data_from_numpy(np.array([[value]], np.bool_ if kind == "BOOL" else np.int32))
    found, done = [], threading.Event()
    client.start_stream(lambda result, error: (found.append(error or result), done.set()))
    client.async_stream_infer("tensorrt_llm", inputs)
    assert done.wait(20)
    client.stop_stream()
    shapes = {output.name: tuple(output.shape) for output in found[0].get_response().outputs}
    assert shapes == {
        **{"output_ids": (1, 1, 8), "sequence_length": (1, 1)},  # the prompt too, of which nothing is said
        **{"output_log_probs": (1, 1, 5), "cum_log_probs": (1, 1)},
        **{"output_top_ids": (1, 1, 5, 2), "output_top_log_probs": (1, 1, 5, 2), "cached_tokens": (1, 1)},
    }
    total = found[0].as_numpy("output_log_probs").sum()
    assert found[0].as_numpy("cum_log_probs").item() == pytest.approx(total, abs=1e-5)


BAD = [
    ({"input_ids": []}, "empty"),
    ({"input_ids": [1.5]}, "non-signed-integer"),
    ({"input_ids": "text"}, "non-signed-integer"),
    ({"input_ids": None}, "non-signed-integer"),
    ({"input_ids": [512]}, "outside the vocabulary of 512"),
    ({"input_ids": [-1]}, "outside the vocabulary"),
    ({"input_ids": [1] * 300}, "max_seq_len 256"),
    ({"request_output_len": 0}, "at least 1"),
    ({"request_output_len": -5}, "at least 1"),
    ({"request_output_len": 10**9}, "1000000000 new tokens exceed this engine's max_seq_len 256"),
    ({"request_output_len": [1, 2]}, "batch size does not match"),
    ({"input_lengths": 9}, "input_lengths is 9"),
    ({"input_lengths": -1}, "input_lengths is -1"),
    ({"beam_width": 2}, "beam_width=2"),
    ({"temperature": -1.0}, "temperature"),
    ({"runtime_top_p": 7.0}, "top_p"),
    ({"random_seed": -1}, "non-unsigned-integer"),
    ({"streaming": "yes"}, "non-boolean"),
    ({"stop_words_list": [1, 2, 3]}, "proper shape"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[json.dumps(c)[:40] for c, _ in BAD])
def test_malformed_json_values_are_refused_one_by_one(server, changes, message):
    body = {"input_ids": [1, 2, 3], "request_output_len": 4} | changes
    status, answer = post(server, "/v2/models/tensorrt_llm/generate", body)
    assert status >= 400
    assert message in json.loads(answer)["error"]


@pytest.mark.parametrize(("protocol", "streaming"), TRANSPORTS)
def test_the_engines_error_codes_reach_every_client(server, protocol, streaming):
    def refusal(prompt, **options):
        (error,) = ask(server, [prompt], 4, protocol, streaming, **options)
        return error.code, str(error)

    assert refusal([512]) == (ErrorCode.INVALID, "token id 512 is outside the vocabulary of 512")
    assert refusal([1], temperature=-1.0) == (
        ErrorCode.INVALID,
        "temperature must be a number in [0, 1.79769e+308], got -1.0",
    )
    assert refusal([1] * 300)[0] is ErrorCode.CONTEXT_LENGTH
    assert refusal([1], model="null" * 2)[0] is ErrorCode.UNAVAILABLE  # Triton's own refusal


def test_a_temperature_that_float32_cannot_divide_by_is_greedy(server, tiny_engine):
    expected = alone(tiny_engine, [[1, 2, 3]], 8)
    assert ask(server, [[1, 2, 3]], 8, temperature=1e-45) == expected


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


def test_a_grpc_call_is_cancelled_only_before_its_last_response(server):
    # one cancelled after it stays in tritonserver's memory for ever
    async def codes():
        client = connect("grpc", server.grpc_url)
        streams, stream_infer = [], client._client.stream_infer

        def recorded(requests, **options):
            streams.append(stream_infer(requests, **options))
            return streams[-1]

        client._client.stream_infer = recorded
        for prompt, new_tokens in (([999], 4), ([1, 2, 3], 1), ([1, 2, 3], 200)):
            answers = client.generate(prompt, new_tokens, streaming=True)
            with contextlib.suppress(RequestFailed):
                await anext(answers)
            await answers.aclose()
        codes = [(await stream._grpc_call.code()).name for stream in streams]
        await client.close()
        return codes

    assert asyncio.run(codes()) == ["OK", "OK", "CANCELLED"]


def test_stop_request_ends_the_request_of_its_id_and_no_other(server):
    client = grpc_client.InferenceServerClient(server.grpc_url)
    lengths, errors = {}, []

    def answered(result, error):
        if error:
            errors.append(str(error))
        else:
            lengths[result.get_response().id] = result.as_numpy("output_ids").size

    client.start_stream(answered)
    others = [str(i) for i in range(40)]  # ten batches, so that the stop finds its request in the queue behind them
    for name in [*others, "mine"]:
        client.async_stream_infer("tensorrt_llm", tensors(grpc_client, [3], 250), request_id=name)
    stop = grpc_client.InferInput("stop", [1, 1], "BOOL")
    stop.set_data_from_numpy(np.array([[True]]))
    client.async_stream_infer("tensorrt_llm", [*tensors(grpc_client, [3], 250), stop], request_id="mine")
    deadline = time.monotonic() + 60
    while len(lengths) + len(errors) < 42:
        assert time.monotonic() < deadline, (lengths, errors)
        time.sleep(0.05)
    client.stop_stream()
    assert errors == ["[cancelled] the request was cancelled"]
    assert lengths == {"mine": 0} | dict.fromkeys(others, 251)  # the stop's own answer; prompt and new tokens


def test_time_out_of_one_request_is_said_and_frees_it(server):
    client = grpc_client.InferenceServerClient(server.grpc_url)
    errors, done = [], threading.Event()
    client.start_stream(lambda result, error: (errors.append(error), done.set()))
    # the request's own limit, in microseconds, is passed to the engine
    client.async_stream_infer("tensorrt_llm", tensors(grpc_client, [1, 2], 250), timeout=1)
    assert done.wait(10)
    client.stop_stream()
    assert "timed out" in str(errors[0])
    assert RequestFailed(str(errors[0])).code is ErrorCode.TIMEOUT


def test_impatient_clients_do_not_disturb_patient_ones(server, tiny_engine):
    prompts = some_prompts(12, seed=5)

    async def both():
        target = TritonTarget("grpc", server.grpc_url)
        traffic = Traffic(input_tokens=Length(8, 8), output_tokens=Length(200, 200))
        hasty = Generator(target, traffic, Text(RandomIds(512)), timeout_s=0.02)
        load, answers = await asyncio.gather(hasty.closed(6, requests=40), asyncio.to_thread(ask, server, prompts, 40))
        await target.close()
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
    assert {answer.code for answer in answers if not isinstance(answer, list)} == {ErrorCode.QUEUE_FULL}
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


def test_administration_is_closed_over_grpc(server):
    client = grpc_client.InferenceServerClient(server.grpc_url)
    calls = {
        client.get_model_repository_index: (),
        client.load_model: ("tensorrt_llm",),
        client.unload_model: ("tensorrt_llm",),
        client.get_log_settings: (),
        client.update_log_settings: ({"log_verbose_level": 9},),
        client.get_trace_settings: (),
        client.update_trace_settings: (None, {"trace_level": ["TIMESTAMPS"]}),
        client.get_system_shared_memory_status: (),
        client.register_system_shared_memory: ("x", "/x", 64),
        client.unregister_system_shared_memory: (),
        client.get_cuda_shared_memory_status: (),
        client.register_cuda_shared_memory: ("x", b"", 0, 64),
        client.unregister_cuda_shared_memory: (),
    }
    for call, given in calls.items():
        with pytest.raises(InferenceServerException, match="This protocol is restricted"):
            call(*given)
    assert isinstance(ask(server, [[1]], 2)[0], list)


def test_listens_on_loopback_only(server):
    listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
    ours = {f"{port:04X}" for port in (server.http_port, server.grpc_port, server.metrics_port)}
    addresses = {row.split()[1].split(":")[0] for row in listening if row.split()[1].split(":")[1] in ours}
    assert addresses == {"0100007F"}


def has_mbu(summary):
    """So small an engine may make a whole answer before the first response is sent: then there is no time per token."""
    return summary["mbu"] > 0 if summary["tpot_ms"]["p50"] > 0 else summary["mbu"] is None


def test_benchmark_writes_a_complete_result(server, tiny_engine, run_script, tmp_path, small_ceilings):
    output = tmp_path / "triton-native.json"
    flags = ["--concurrency", 1, 3, "--rate", 50, "--requests", 12, "--output-tokens", 16, "--slo", "ttft_ms:1000"]
    where = ["--url", server.grpc_url, "--metrics-url", f"{server.host}:{server.metrics_port}"]
    command = ["benchmarks/benchmark_triton.py", "--engine-dir", tiny_engine, *where, *flags, "--output", output]
    done = run_script(*command)
    assert done.returncode in (0, 1), done.stderr  # a busy machine makes a run INVALID, which is said and written
    result = json.loads(output.read_text())
    assert [level.get("concurrency") for level in result["levels"]] == [1, 3, None]
    assert all(level["samples"]["output_tokens"] == [16] * 12 for level in result["levels"])
    assert result["null_model"]["responses_per_s"] > 0
    assert result["engine"]["kernels"] != "unknown"
    assert has_mbu(result["levels"][0]["summary"])
    assert (result["validity"]["status"] == "VALID") == (done.returncode == 0)
    assert all(level["checks"]["prefix_cache_hit_tokens"] == 0 for level in result["levels"])
    assert run_script(*command).returncode == 2
    assert run_script(*command, "--force", "--concurrency", 0).returncode == 2
    assert not result["workload"]["traffic"]["prefix_cache_can_help"]
    alike = tmp_path / "alike.json"
    alike.write_text('{"input_tokens": 8, "output_tokens": 8, "prefix_groups": 1, "prefix_tokens": 64}')
    for asked in ([], ["--prefix-cache"]):
        run_script(*command, "--force", "--concurrency", 1, "--rate", "--requests", 5, "--workload", alike, *asked)
        result = json.loads(output.read_text())
        assert result["workload"]["traffic"]["prefix_cache_can_help"]
        assert result["workload"]["traffic"]["shared_prompt_share"] == 4 * 64 / (5 * 72)
        assert result["levels"][0]["checks"]["prefix_cache_hit_tokens"] > 0
        assert result["workload"]["prefix_cache"] == bool(asked)
        assert any("prefix cache" in reason for reason in result["validity"]["reasons"]) == (not asked)


NVIDIA_METRICS = """# TYPE nv_inference_request_success counter
nv_inference_request_success{model="tensorrt_llm",version="1"} 12
# TYPE nv_trt_llm_kv_cache_block_metrics gauge
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"} 64
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 6239
"""


@pytest.fixture
def nvidia_page():
    """HOST:PORT of a metrics page as NVIDIA's backend has it, without any of the native engine's rows."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(NVIDIA_METRICS.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as page:
        threading.Thread(target=page.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{page.server_port}"
        page.shutdown()


def test_a_server_of_nvidias_backend_is_measured_with_its_engine_or_without(
    server, tiny_model, trt_engine, nvidia_page, run_script, tmp_path, small_ceilings
):
    """The requests go to the native engine; what is known of it is what is known of NVIDIA's."""
    metrics, script = f"{server.host}:{server.metrics_port}", "benchmarks/benchmark_triton.py"
    load = ["--url", server.grpc_url, "--concurrency", 2, "--requests", 6, "--output-tokens", 32, "--metrics-url"]
    results = []
    for name, known in (("with", ["--engine-dir", trt_engine]), ("without", ["--model-dir", tiny_model])):
        output = ["--output", tmp_path / f"{name}.json"]
        done = run_script(script, *known, *output, *load, nvidia_page)
        assert done.returncode in (0, 1), done.stderr
        results.append(json.loads(output[1].read_text()))
        assert results[-1]["backend"] == results[-1]["engine"]["backend"] == "tensorrt_llm"
        assert results[-1]["model"]["name"] == "synthetic-tiny"
        assert results[-1]["levels"][0]["samples"]["output_tokens"] == [32] * 6
        refused = run_script(script, *known, *output, "--force", *load, metrics)
        assert (refused.returncode, "runs the native engine: give --engine-dir" in refused.stderr) == (2, True)
    assert has_mbu(results[0]["levels"][0]["summary"])
    assert "mbu" not in results[1]["levels"][0]["summary"]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_no_answer_ends_before_its_fewest_tokens(server, tiny_engine, protocol):
    greedy = alone(tiny_engine, [[1, 2, 3]], 20)[0]
    ends = stop_inputs(greedy[3:6])
    assert len(ask(server, [[1, 2, 3]], 20, protocol, **ends)[0]) <= 4
    ids = ask(server, [[1, 2, 3]], 20, protocol, min_length=9, **ends)[0]
    assert len(ids) > 9
    assert not set(ids[:9]) & set(greedy[3:6])
    (error,) = ask(server, [[1, 2, 3]], 20, protocol, min_length=21, **ends)
    assert (error.code, "min_tokens must be an integer in [0, 20]" in str(error)) == (ErrorCode.INVALID, True)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("streaming", [True, False])
def test_an_answer_ends_at_any_of_several_ids(server, tiny_engine, protocol, streaming):
    greedy = alone(tiny_engine, [[1, 2, 3]], 20)[0]
    unseen = next(token for token in range(512) if token not in greedy)
    for ends in ([unseen, greedy[5]], [greedy[5], unseen], [unseen, unseen + 1, greedy[5]]):
        ids = ask(server, [[1, 2, 3]], 20, protocol, streaming, **stop_inputs(ends))[0]
        assert ids == greedy[: greedy.index(greedy[5]) + 1]
