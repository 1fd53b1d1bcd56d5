"""OpenAI's API as a target of load: chat or completions, streamed as server-sent events, whoever serves it.

Benchmarks need what OpenAI's API does not have: answers of an exact length (``ignore_eos``), prompts as token ids, the
count of tokens in each chunk (``stream_options.continuous_usage_stats``). vLLM, SGLang, TensorRT-LLM and others take
these; :meth:`OpenAITarget.prepare` finds out which of them this server refuses, and does without.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from llama_engine.errors import InputError, RunError
from llama_engine.serving.client import RequestFailed
from llama_engine.serving.target import Ask, Decode, Event

KEY_VARIABLE = "OPENAI_API_KEY"
PROBE_TOKENS = 2
WISHES = ("continuous_usage_stats", "ignore_eos", "prompt ids", "include_usage", "seed")  # the least needed first
STREAM_OPTIONS = ("continuous_usage_stats", "include_usage")
TEXTS = ("content", "reasoning_content", "reasoning")  # where servers put what a model writes


class OpenAITarget:
    """``url`` with or without its ``/v1``; ``model`` None takes the first that the server lists; ``extra`` goes into
    every request's body. The key is read from the environment variable ``key_variable``. Raises :class:`InputError`.
    """

    def __init__(
        self,
        url: str,
        *,
        chat: bool,
        decode: Decode,
        ids: bool = True,
        model: str | None = None,
        extra: dict[str, Any] | None = None,
        key_variable: str = KEY_VARIABLE,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise InputError(f"--url: an OpenAI API is at http://HOST:PORT or https://..., got {url!r}")
        self.api = "openai-chat" if chat else "openai-completions"
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model or ""
        self.refused: list[str] = []
        self._chat, self._decode, self._extra = chat, decode, extra or {}
        self._wishes = [wish for wish in WISHES if wish != "prompt ids" or (ids and not chat)]
        key = os.environ.get(key_variable) if key_variable else None
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {key}"} if key else None,
            # uvicorn, under most servers, closes a connection after 5 s of nothing: do not send into one that closes
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
            read_bufsize=1 << 20,
        )

    @property
    def prompt_as(self) -> str:
        return "messages" if self._chat else "ids" if "prompt ids" in self._wishes else "text"

    async def ready(self) -> bool:
        """True when the server lists models."""
        try:
            return bool(await self._models())
        except RunError:
            return False

    async def prepare(self) -> None:
        if not self.model:
            models = await self._models()
            if not models:
                raise RunError(f"{self.url}/v1/models lists no model: give --model")
            self.model = models[0]
        # ids 0.. are pieces of any vocabulary; what they say does not matter
        probe = Ask((("user", tuple(range(1, 9))),), PROBE_TOKENS)
        while True:
            try:
                async for _ in self.stream(probe):
                    pass
                return
            except RequestFailed as error:
                named = [wish for wish in self._wishes if wish.split()[-1] in str(error)]
                if "stream_options" in str(error):
                    named += [wish for wish in STREAM_OPTIONS if wish in self._wishes]
                if "prompt" in str(error) and "prompt ids" in self._wishes:
                    named.insert(0, "prompt ids")
                if not self._wishes or not str(error).startswith(("HTTP 4", "HTTP 500")):
                    raise RunError(f"{self.url} refuses a request of {PROBE_TOKENS} tokens: {error}") from None
                wish = (named or self._wishes)[0]
                self._wishes.remove(wish)
                self.refused.append(wish)

    async def stream(self, ask: Ask, *, streaming: bool = True) -> AsyncIterator[Event]:
        path = f"{self.url}/v1/{'chat/' if self._chat else ''}completions"
        try:
            async with self._session.post(path, json=self._body(ask, streaming)) as response:
                if response.status != 200:
                    raise RequestFailed(f"HTTP {response.status}: {_message(await response.read())}")
                if not streaming:
                    yield _event(_json(await response.read()), 0)
                    return
                counted = finished = 0
                async for line in response.content:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    event = _event(_json(data), counted)
                    counted += event.tokens or 0
                    finished = finished or event.finish is not None
                    if event.text or event.tokens or event.finish or event.usage:
                        yield event
                if not finished:
                    raise RequestFailed("the stream ended without [DONE]")
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from None

    async def close(self) -> None:
        await self._session.close()

    def _body(self, ask: Ask, streaming: bool) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "max_tokens": ask.new_tokens, "stream": streaming}
        if self._chat:
            body["messages"] = [{"role": role, "content": self._decode(ids)} for role, ids in ask.messages]
        else:
            body["prompt"] = ask.ids if "prompt ids" in self._wishes else self._decode(ask.ids)
        drawn = ask.sampling
        body["temperature"] = drawn.temperature if drawn else 0
        if drawn and drawn.temperature > 0:
            body |= {"top_p": drawn.top_p} | ({"top_k": drawn.top_k} if drawn.top_k else {})
            body |= {"seed": drawn.seed} if "seed" in self._wishes else {}
        if "ignore_eos" in self._wishes:
            body["ignore_eos"] = True
        options = {name: True for name in STREAM_OPTIONS if name in self._wishes}
        if streaming and options:
            body["stream_options"] = options
        return body | self._extra

    async def _models(self) -> list[str]:
        try:
            timeout = aiohttp.ClientTimeout(10)
            async with self._session.get(f"{self.url}/v1/models", timeout=timeout) as response:
                body = await response.read()
                if response.status != 200:
                    raise RunError(f"{self.url}/v1/models: HTTP {response.status}: {_message(body)}")
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise RunError(f"no server answers at {self.url}: {error or type(error).__name__}") from None
        try:
            return [model["id"] for model in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError):
            raise RunError(f"{self.url}/v1/models is no list of models: is this an OpenAI API?") from None


def _event(answer: dict[str, Any], counted: int) -> Event:
    """One chunk, or a whole answer. ``counted`` is how many tokens the chunks before it brought."""
    at = time.perf_counter()
    if "error" in answer or answer.get("object") == "error":
        raise RequestFailed(_message(json.dumps(answer).encode()))
    choice = next(iter(answer.get("choices") or []), {})
    part = choice.get("delta") or choice.get("message") or choice
    text = "".join(part.get(name) or "" for name in TEXTS) or part.get("text") or ""
    found = answer.get("usage")
    usage, tokens = None, None
    if found and found.get("completion_tokens") is not None:
        cached = (found.get("prompt_tokens_details") or {}).get("cached_tokens")
        usage = {name: found.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")}
        usage |= {} if cached is None else {"cached_tokens": cached}
        if resumed := found.get("resumed_after"):  # this gateway's own, after a replica died
            usage["resumed_after"] = resumed[0]
        if choice:  # beside text it counts up to here; alone at the end it is the total
            tokens = usage["completion_tokens"] - counted
    ids = choice.get("token_ids") or ()
    return Event(at, len(ids) if ids and tokens is None else tokens, ids, text, choice.get("finish_reason"), usage)


def _json(data: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(data)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise RequestFailed(f"not a JSON object: {data[:200]!r}")
    return answer


def _message(body: bytes) -> str:
    """What an error's body says, in whichever of the usual shapes."""
    try:
        found = json.loads(body)
        found = found.get("error", found)
        return (
            str(found.get("message") or found.get("detail") or found)[:500] if isinstance(found, dict) else str(found)
        )
    except (ValueError, AttributeError):
        return body[:500].decode(errors="replace").strip()
