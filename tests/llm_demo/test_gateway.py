"""The gateway through the real ``openai`` client, and its behaviour when somebody leaves or the server is away."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys

import httpx
import openai
import psutil
import pytest

from llama_engine.errors import ErrorCode, RunError, with_code
from llama_engine.serving.client import RequestFailed
from llama_engine.serving.server import free_port
from llama_engine.tokenizer import ChatTokenizer
from llm_demo.app import create_app
from llm_demo.errors import ApiError
from llm_demo.gateway import Gateway
from tests.conftest import ROOT
from tests.llm_demo.conftest import THREADS, healthy, wait_for

PARIS = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
STORY = [{"role": "user", "content": "Write a long story about a fox."}]
NAME = "SmolLM2-135M-Instruct"
VLLM_NEUTRAL = {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "min_tokens": 0, "stop_token_ids": []}
VLLM_NEUTRAL |= {"ignore_eos": False, "add_generation_prompt": True, "skip_special_tokens": True, "length_penalty": 1.0}


@pytest.fixture(scope="module")
def client(gateway):
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="unused", max_retries=0) as client:
        yield client


def text_of(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME, f"{NAME}:baseline"]
    assert client.models.retrieve(NAME).id == NAME


@pytest.mark.parametrize("model", [NAME, f"{NAME}:baseline"])
def test_streaming_gives_what_one_answer_gives(client, model):
    asked = {"model": model, "messages": PARIS, "temperature": 0, "max_tokens": 32}
    whole = client.chat.completions.create(**asked)
    assert "Paris" in whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 5


def test_length_seed_and_history(client):
    def ask(seed):
        answer = client.chat.completions.create(
            model=NAME, messages=STORY, temperature=1, top_p=0.9, seed=seed, max_completion_tokens=12
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 12
        return answer.choices[0].message.content

    assert ask(7) == ask(7)
    assert len({ask(seed) for seed in (7, 8, -9)}) == 3
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "yes."}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert client.chat.completions.create(model=NAME, messages=messages, max_tokens=4).usage.prompt_tokens > 10


def test_stop_and_bare_completions(client, smollm2_model):
    asked = {"model": NAME, "prompt": "1, 2, 3, 4, 5, 6,", "temperature": 0, "max_tokens": 24}
    free = client.completions.create(**asked).choices[0].text
    assert " 9," in free
    stopped = client.completions.create(**asked, stop=[" 9,", "never"])
    assert stopped.choices[0].text == free[: free.index(" 9,")]
    assert stopped.choices[0].finish_reason == "stop"
    streamed = client.completions.create(**asked, stop=" 9,", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == stopped.choices[0].text
    ids = ChatTokenizer(smollm2_model).encode(asked["prompt"])
    assert client.completions.create(**asked | {"prompt": ids}).choices[0].text == free


@pytest.mark.parametrize(
    ("change", "status", "param", "said"),
    [
        ({"model": "gpt-4"}, 404, "model", "does not exist"),
        ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"n": True}, 400, "n", "valid integer"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"presence_penalty": 2.5}, 400, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": False}, 400, "frequency_penalty", "valid number"),
        ({"logit_bias": {"49152": 1}}, 400, "logit_bias", "vocabulary has 0 to 49151"),
        ({"extra_body": {"logit_bias": {"x": 1}}}, 400, "logit_bias.x", "match pattern"),
        ({"extra_body": {"echo": 0}}, 400, "echo", "not supported"),
        ({"max_tokens": 4, "max_completion_tokens": 4}, 400, "max_tokens", "give one of them"),
        ({"extra_body": {"min_tokens": 5}, "max_tokens": 4}, 400, "min_tokens", "more than 4 at most"),
        ({"extra_body": {"min_tokens": 99999}}, 400, "min_tokens", r"more than the \d+ that fit"),
        (
            {"extra_body": {"min_tokens": 5}, "response_format": {"type": "json_object"}},
            400,
            "min_tokens",
            "says where the answer ends",
        ),
        ({"extra_body": {"stream": "yes"}}, 400, "stream", "valid boolean"),
        ({"reasoning_effort": "high"}, 400, "reasoning_effort", "not supported"),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": "x"}}}, 400, None, "may not set chat_template"),
        ({"logprobs": 0}, 400, "logprobs", "valid boolean"),
        ({"top_logprobs": 0}, 400, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "less than or equal to 20"),
        ({"max_tokens": True}, 400, "max_tokens", "valid integer"),
        ({"max_tokens": "8"}, 400, "max_tokens", "valid integer"),
        ({"temperature": True}, 400, "temperature", "valid number"),
        ({"seed": 1.0}, 400, "seed", "valid integer"),
        (
            {"extra_body": {"stream_options": {"include_usage": 1}}},
            400,
            "stream_options.include_usage",
            "valid boolean",
        ),
        ({"extra_body": {"best_guess": 1}}, 400, "best_guess", "not permitted"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user", "content": 7}]}, 400, "messages.0.content", "valid string"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0", "content is missing"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0", "needs tool_call_id"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages.0.content.0.type",
            "'text'",
        ),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "messages", "context is 2048 tokens"),
        ({"max_tokens": 2040}, 400, "messages", "context is 2048 tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_openai_errors(client, change, status, param, said, stream):
    with pytest.raises(openai.APIStatusError, match=said) as caught:
        client.chat.completions.create(**{"model": NAME, "messages": PARIS, "stream": stream} | change)
    assert caught.value.status_code == status
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    if "context" in said:
        assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("name", "value"), [("n", True), ("best_of", True), ("prompt", [True, False]), ("prompt", []), ("max_tokens", "2")]
)
def test_bare_completions_tell_numbers_from_booleans(client, name, value):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": NAME, "prompt": "1, 2,", "max_tokens": 1} | {name: value})
    assert caught.value.param.startswith(name)


def test_neutral_values_of_either_kind_of_number_pass(client):
    neutral = {"frequency_penalty": 0.0, "presence_penalty": 0, "n": 1, "logprobs": False, "temperature": 0}
    neutral |= {
        "logit_bias": {},
        "modalities": ["text"],
        "response_format": {"type": "text"},
        "tools": [],
        "stop": None,
    }
    neutral |= {"verbosity": "medium", "parallel_tool_calls": True, "user": "me", "extra_body": VLLM_NEUTRAL}
    assert client.chat.completions.create(model=NAME, messages=PARIS, max_tokens=1, **neutral).choices


def test_other_paths_and_bodies_are_openai_errors_too(gateway):
    assert httpx.get(f"{gateway}/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{gateway}/v1/chat/completions").status_code == 405
    bad = httpx.post(f"{gateway}/v1/completions", content="{", headers={"Content-Type": "application/json"})
    assert bad.status_code == 400
    assert bad.json()["error"]["param"] is None
    assert "not valid JSON" in bad.json()["error"]["message"]
    foreign = httpx.post(f"{gateway}/v1/completions", json={}, headers={"Host": "evil.example"})
    assert "evil.example" in foreign.json()["error"]["message"]
    assert httpx.post(f"{gateway}/baseline", headers={"Origin": "https://evil.example"}).status_code == 403


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_frees_the_request_in_triton(gateway, triton, stream):
    body = {"model": NAME, "messages": STORY, "max_tokens": 1900, "stream": stream, "temperature": 1, "seed": 1}
    before = triton.metrics()["tokens_generated"]
    if stream:
        with httpx.stream("POST", f"{gateway}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            for _ in range(10):
                next(lines)
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{gateway}/v1/chat/completions", json=body, timeout=httpx.Timeout(60, read=0.7))
    # Metrics are read four times a second: first see the request, then see it gone.
    wait_for(lambda: triton.metrics()["tokens_generated"] > before, "tokens in the metrics", 20)
    wait_for(lambda: triton.metrics()["requests"] == 0, "an empty engine", 20)
    assert triton.metrics()["tokens_generated"] - before < 1900
    wait_for(lambda: "llm_demo_requests_running 0" in httpx.get(f"{gateway}/metrics").text, "an idle gateway", 5)


def test_metrics_count_tokens(gateway, client):
    def count(name):
        rows = [row.rsplit(" ", 1) for row in httpx.get(f"{gateway}/metrics").text.splitlines()]
        return float(dict(rows).get(f"llm_demo_{name}", 0))

    names = ("completion_tokens_total", "prompt_tokens_total", 'requests_total{code="200"}', "ttft_seconds_count")
    before = [count(name) for name in names]
    usage = client.chat.completions.create(model=NAME, messages=STORY, max_tokens=5).usage
    after = [count(name) for name in names]
    assert [b - a for a, b in zip(before, after)] == [5, usage.prompt_tokens, 1, 1]


def test_key_and_missing_server(smollm2_engine):
    """In this process, with no Triton behind it."""

    async def go():
        gateway = Gateway(smollm2_engine, f"127.0.0.1:{free_port()}", model_dir=None, device="cpu")
        app = create_app(gateway, api_key="sesame", local_only=False)
        key = {"Authorization": "Bearer sesame"}
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://any.example")
        async with gateway.lifespan(app), http:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer schön".encode()}):
                refused = await http.get("/v1/models", headers=headers)
                assert refused.status_code == 401
                assert refused.json()["error"]["code"] == "invalid_api_key"
            models = (await http.get("/v1/models", headers=key)).json()["data"]
            assert [model["id"] for model in models] == [NAME]
            assert (await http.post("/baseline", json={}, headers=key)).status_code == 404
            health = await http.get("/health")
            assert health.status_code == 503
            assert "does not answer" in health.json()["message"]
            for stream in (False, True):
                body = {"model": NAME, "messages": PARIS, "stream": stream}
                down = await http.post("/v1/chat/completions", json=body, headers=key)
                assert down.status_code == 503
                assert down.json()["error"]["code"] == "engine_unavailable"

    asyncio.run(go())


def test_terminal_chat_and_race(gateway, run_script):
    done = run_script("llm_demo/chat.py", "--url", gateway, PARIS[0]["content"])
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "first token" in done.stdout
    done = run_script("llm_demo/chat.py", "--url", gateway, "--race", "--max-tokens", 8, "Write a story.")
    assert done.returncode == 0, done.stderr
    assert "x faster" in done.stdout
    lost = run_script("llm_demo/chat.py", "--url", f"http://127.0.0.1:{free_port()}", "hello")
    assert lost.returncode == 1
    assert lost.stderr.startswith("error: no gateway")
    assert len(lost.stderr.splitlines()) == 1


def test_smallest_example(smollm2_engine, run_script):
    done = run_script("llm_demo/run_inference.py", smollm2_engine, PARIS[0]["content"])
    assert done.stdout == "The capital of France is Paris.\n", done.stderr


def test_a_taken_port_is_one_line(smollm2_engine, run_script):
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        done = run_script("llm_demo/server.py", "--engine-dir", smollm2_engine, "--port", port)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot listen on 127.0.0.1:{port}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_demo_script_starts_answers_and_stops_everything(smollm2_model):
    port = free_port()
    env = os.environ | {"LLAMA_ENGINE_PYTHON": sys.executable} | THREADS
    demo = subprocess.Popen(
        ["./scripts/demo.sh", "--port", str(port), "--device", "cpu"],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: demo.poll() is not None or healthy(url), "the demo", 200)
        body = {"model": NAME, "messages": PARIS, "temperature": 0}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert "Paris" in json.dumps(answer)
        family = psutil.Process(demo.pid).children(recursive=True)
        assert any("tritonserver" in child.name() for child in family)
    finally:
        demo.send_signal(signal.SIGINT)
        said, _ = demo.communicate(timeout=60)
    assert demo.returncode == 0
    assert f"ready: {url}" in said
    assert said.rstrip().endswith("stopped")
    assert psutil.wait_procs(family, timeout=5)[1] == []


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (ErrorCode.INVALID, 400),
        (ErrorCode.CONTEXT_LENGTH, 400),
        (ErrorCode.QUEUE_FULL, 429),
        (ErrorCode.CANCELLED, 499),
        (ErrorCode.NOT_FINITE, 500),
        (ErrorCode.INTERNAL, 500),
        (ErrorCode.SHUTTING_DOWN, 503),
        (ErrorCode.UNAVAILABLE, 503),
        (ErrorCode.TIMEOUT, 504),
    ],
)
def test_the_status_is_the_error_codes_whatever_the_message_says(code, status):
    for said in ("the request", "queue is full", "max_seq_len"):
        over_triton = RequestFailed(with_code(RunError(said, code)))
        wrapped = RequestFailed(f"[StatusCode.INTERNAL] in ensemble 'x': [{code.value}] {said}")
        for error in (RunError(said, code), over_triton, wrapped):
            answer = ApiError.of(error)
            assert (answer.status, answer.code) == (status, code.value)
        assert str(over_triton) == said
    assert ApiError.of(RequestFailed("failed to connect: queue is full")).status == 503
