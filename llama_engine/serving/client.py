"""Clients of a Triton ``tensorrt_llm`` model: one asynchronous call over gRPC or HTTP, streaming or not.

Both speak to decoupled and plain models alike: a gRPC stream, or HTTP ``generate`` and ``generate_stream``.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import aiohttp
import grpc
import numpy as np
import tritonclient.grpc.aio as grpc_aio
from tritonclient.grpc import InferInput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, triton_to_np_dtype

from llama_engine.errors import ErrorCode, InputError, RunError, split_code
from llama_engine.sampling import Logprobs

# inputs that are neither BOOL nor INT32
FLOATS = ("temperature", "runtime_top_p", "min_p", "embedding_bias")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
DTYPES = dict.fromkeys([*FLOATS, *PENALTIES], np.float32) | {"random_seed": np.uint64, "grammar": np.uint8}
# unlimited messages, as the client's own default; a restarted server is found again within a second
CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
# A peer that is silent for 7 s is taken for dead: a stopped process, a machine without power, a broken network.
# Only for servers that allow it (server.listening): others end a connection that pings so often.
KEEPALIVE = [
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.ping_timeout_ms", 5000),  # what ends the connection in newer gRPC; a minute by default
    ("grpc.http2.max_pings_without_data", 0),
]


KEY_VARIABLE = "LLAMA_ENGINE_TRITON_KEY"
KEY_NAME = "inference-key"  # the HTTP header; over gRPC it has a prefix


def inference_key() -> str | None:
    """The secret that inference needs, from ``LLAMA_ENGINE_TRITON_KEY``. Raises :class:`InputError`."""
    key = os.environ.get(KEY_VARIABLE) or None
    if key and not re.fullmatch(r"[\w.~-]+", key, re.ASCII):
        raise InputError(f"{KEY_VARIABLE} may hold letters, digits and -._~ only: it becomes a header")
    return key


class RequestFailed(RunError):
    """The server refused or dropped one request. ``code`` is the engine's own, or else that it is unavailable.

    ``lost``: the connection failed, so that nothing is known of the server's other requests.
    """

    def __init__(self, text: str, *, lost: bool = False) -> None:
        message, code = split_code(text)
        super().__init__(message, code or ErrorCode.UNAVAILABLE)
        self.lost = lost


class NewTokens(list[int]):
    """The ids of one response. ``logprobs`` are theirs, where ``generate`` was given ``return_log_probs=True``; with
    ``top_logprobs=n``, of the n most likely tokens too. The first response has those of the prompt from its second
    token on, with ``return_prompt_log_probs=True``, and how many of its tokens the prefix cache had."""

    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs] | None = None
    cached_tokens: int | None = None
    resumed_after: int | None = None  # tokens, where another replica goes on with an answer

    @classmethod
    def of(cls, outputs: Callable[[str], Any], options: Mapping[str, Any]) -> NewTokens:
        """From the response's tensors by name, flat or not, None for one that is absent."""
        new = cls(_flat(outputs("output_ids")))
        if options.get("return_log_probs"):
            new.logprobs = _scores("output", outputs, options)
            new.prompt_logprobs = _scores("prompt", outputs, options) or None
        if cached := _flat(outputs("cached_tokens")):
            new.cached_tokens = cached[0]
        return new


class GrpcClient:
    """One HTTP/2 connection, one stream a request; leaving ``generate`` early cancels it on the server.

    ``generate`` yields :class:`NewTokens` as they arrive: once when not streaming. ``options`` are inputs of the model
    by name. Raises :class:`RequestFailed`. Both clients send :func:`inference_key`.
    """

    def __init__(self, url: str, *, keepalive: bool = False) -> None:
        key = inference_key()
        self._headers = {f"triton-grpc-protocol-{KEY_NAME}": key} if key else None
        self._client = grpc_aio.InferenceServerClient(url, channel_args=CHANNEL + KEEPALIVE * keepalive)

    async def ready(self, model: str = "tensorrt_llm") -> bool:
        """True when the server can be reached and has the model loaded."""
        try:
            return await self._client.is_model_ready(model, client_timeout=5)
        except (InferenceServerException, grpc.aio.AioRpcError):
            return False

    async def generate(
        self, prompt: list[int], new_tokens: int, *, streaming: bool, model: str = "tensorrt_llm", **options: Any
    ) -> AsyncIterator[NewTokens]:
        values = {"input_lengths": len(prompt), "request_output_len": new_tokens, "streaming": streaming}
        values |= {"exclude_input_in_output": True} | options
        inputs = [_tensor("input_ids", np.array([prompt], np.int32))]
        for name, value in values.items():
            value = list(value.encode()) if isinstance(value, str) else value
            dtype = np.bool_ if isinstance(value, bool) else DTYPES.get(name, np.int32)
            inputs.append(_tensor(name, np.array([value] if isinstance(value, list) else [[value]], dtype)))

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": model, "inputs": inputs, "enable_empty_final_response": True}

        responses, ended = self._client.stream_infer(requests(), headers=self._headers), False
        try:
            async for result, error in responses:
                response = None if error else result.get_response()
                # set before anything is yielded or raised: whoever leaves then must not cancel
                ended = response is None or response.parameters["triton_final_response"].bool_param
                if error is not None:
                    raise RequestFailed(str(error))
                if response.outputs:
                    yield NewTokens.of(_arrays(response).get, options)
            if not ended:
                raise RequestFailed("the stream ended without a final response", lost=True)
        except InferenceServerException as error:
            raise RequestFailed(str(error)) from None
        except grpc.aio.AioRpcError as error:
            raise RequestFailed(f"{error.code().name}: {error.details()}", lost=True) from None
        finally:
            if ended:
                await _read_to_end(responses)
            else:
                responses.cancel()

    async def close(self) -> None:
        await self._client.close()


class HttpClient:
    """The same over HTTP/1.1 connections, one a concurrent request; streams are server-sent events."""

    def __init__(self, url: str) -> None:
        key = inference_key()
        self._session = aiohttp.ClientSession(
            f"http://{url}",
            headers={KEY_NAME: key} if key else None,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
        )

    async def ready(self, model: str = "tensorrt_llm") -> bool:
        """True when the server can be reached and has the model loaded."""
        try:
            async with self._session.get(f"/v2/models/{model}/ready", timeout=aiohttp.ClientTimeout(5)) as response:
                return response.status == 200
        except (aiohttp.ClientError, asyncio.TimeoutError):
            return False

    async def generate(
        self, prompt: list[int], new_tokens: int, *, streaming: bool, model: str = "tensorrt_llm", **options: Any
    ) -> AsyncIterator[NewTokens]:
        body = {"input_ids": prompt, "request_output_len": new_tokens, "streaming": streaming}
        body |= {"exclude_input_in_output": True}
        # Triton takes lists flat and shapes them itself
        body |= {
            name: np.ravel(value).tolist() if isinstance(value, list) else value for name, value in options.items()
        }
        body |= {name: list(value.encode()) for name, value in options.items() if isinstance(value, str)}
        path = f"/v2/models/{model}/{'generate_stream' if streaming else 'generate'}"
        try:
            async with self._session.post(path, json=body) as response:
                if not streaming:
                    yield NewTokens.of(_answer(await response.read()).get, options)
                    return
                async for line in response.content:
                    if line.startswith(b"data:"):
                        yield NewTokens.of(_answer(line[5:]).get, options)
                    elif line.strip():
                        raise RequestFailed(f"HTTP {response.status}: {line.decode(errors='replace').strip()}")
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise RequestFailed(f"{type(error).__name__}: {error}", lost=True) from None

    async def close(self) -> None:
        await self._session.close()


async def _read_to_end(responses: Any) -> None:
    """Let the server close a stream that has its last response. Cancelled between the two, Triton 2.51 keeps the call
    and the request for ever, about 6 kB, and dropping the stream unread cancels it."""
    with contextlib.suppress(InferenceServerException, grpc.aio.AioRpcError):
        async for _ in responses:
            pass


def _tensor(name: str, array: np.ndarray) -> InferInput:
    tensor = InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
    return tensor.set_data_from_numpy(array)


def _arrays(response: Any) -> dict[str, np.ndarray]:
    """The values of a response's tensors, flat: tritonclient looks for each by name anew, at every token."""
    tensors = zip(response.outputs, response.raw_output_contents)
    return {tensor.name: np.frombuffer(raw, triton_to_np_dtype(tensor.datatype)) for tensor, raw in tensors}


def _scores(what: str, outputs: Callable[[str], Any], options: Mapping[str, Any]) -> list[Logprobs]:
    own = _flat(outputs(f"{what}_log_probs"))
    top = zip(_flat(outputs(f"{what}_top_ids")), _flat(outputs(f"{what}_top_log_probs")))
    return [Logprobs(value, list(itertools.islice(top, options.get("top_logprobs", 0)))) for value in own]


def _flat(values: Any) -> list[Any]:
    return [] if values is None else np.ravel(values).tolist()


def _answer(text: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(text)
    except ValueError:
        raise RequestFailed(f"not JSON: {text[:200]!r}") from None
    if "error" in answer:
        raise RequestFailed(answer["error"])
    return answer


Client = GrpcClient | HttpClient


def connect(protocol: str, url: str) -> Client:
    """A client for ``grpc`` or ``http``. Create it inside a running event loop."""
    return GrpcClient(url) if protocol == "grpc" else HttpClient(url)
