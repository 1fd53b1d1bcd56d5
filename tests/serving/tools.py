"""What tests ask of a running Triton Inference Server, and what they compare the answers to."""

import asyncio
import json
import random
import time
import urllib.error
import urllib.request

import numpy as np

from llama_engine.native import load_engine
from llama_engine.serving.client import RequestFailed, connect
from tests.engine.tools import generate


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
    engine = load_engine(engine_dir, device="cpu", threads=1)
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


def tensors(module, prompt, new_tokens):
    """The least inputs of a request, for either of tritonclient's modules."""
    inputs = []
    for name, array in (("input_ids", np.array([prompt])), ("request_output_len", np.array([[new_tokens]]))):
        inputs.append(module.InferInput(name, list(array.shape), "INT32"))
        inputs[-1].set_data_from_numpy(array.astype(np.int32))
    return inputs
