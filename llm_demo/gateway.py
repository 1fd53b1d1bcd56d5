"""The gateway's application: requests to token ids, Triton's or the baseline's ids back to OpenAI's answers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from llama_engine.config import check_request
from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import ErrorCode, InputError, RunError
from llama_engine.serving.router import Discover, Router
from llama_engine.tokenizer import ChatTokenizer, stop_inputs
from llm_demo.api import DOWN, ApiError, ChatRequest, CompletionRequest, Sampling, Shape, usage_of
from llm_demo.baseline import Baseline
from llm_demo.guard import Guard
from llm_demo.text import TextStream

STATIC = Path(__file__).parent / "static"
T = TypeVar("T")
Piece = tuple[str, "str | None", dict[str, int]]  # text, finish reason at the end, usage so far


class Gateway:
    """One engine behind Triton and, with ``model_dir``, its baseline. Raises :class:`InputError`.

    ``triton_urls`` are its replicas; ``discover`` tells, again and again, which there are now.
    """

    def __init__(
        self,
        engine_dir: Path,
        *triton_urls: str,
        model_dir: Path | None,
        device: str,
        discover: Discover | None = None,
    ) -> None:
        self.info = load_engine_json(engine_dir, backend="auto")
        self.tokenizer = ChatTokenizer(engine_dir)
        self.triton_urls, self.discover = triton_urls, discover
        self.baseline = Baseline(model_dir, device) if model_dir else None
        self.name = self.info.model.name
        self.models = [self.name, *([f"{self.name}:baseline"] if model_dir else [])]
        self.counts: Counter[str] = Counter()
        self.running = 0

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self.client = Router.of(self.info, self.triton_urls, self.discover)
        yield
        await self.client.close()
        if self.baseline:
            await self.baseline.close()

    def check_model(self, name: str) -> None:
        if name not in self.models:
            message = f"The model {name!r} does not exist; there is {' and '.join(self.models)}."
            raise ApiError(404, message, code="model_not_found", param="model")

    async def encode(self, request: Sampling) -> list[int]:
        """Ids of a request's prompt, off the event loop: a long text takes a while."""
        if isinstance(request, ChatRequest):
            messages = [{"role": message.role, "content": message.text} for message in request.messages]
            return await asyncio.to_thread(self.tokenizer.encode_chat, messages)
        if isinstance(request, CompletionRequest) and isinstance(request.prompt, str):
            return await asyncio.to_thread(self.tokenizer.encode, request.prompt)
        return request.prompt

    def room(self, prompt: list[int], request: Sampling) -> int:
        """How many tokens may be made. Raises :class:`ApiError` where prompt and answer do not fit."""
        where = "messages" if isinstance(request, ChatRequest) else "prompt"
        limit = self.info.engine.max_seq_len
        try:
            check_request(self.info.model, self.info.engine, prompt, request.max_tokens or 1)
        except InputError as error:
            message = str(error)
            if error.code is ErrorCode.CONTEXT_LENGTH:
                asked = f" and {request.max_tokens} are asked for" if request.max_tokens else ""
                message = (
                    f"This model's context is {limit} tokens; the prompt has {len(prompt)}{asked}. Shorten one of them."
                )
            raise ApiError(400, message, code=error.code.value, param=where) from None
        return request.max_tokens or limit - len(prompt)

    async def ids(self, prompt: list[int], max_tokens: int, request: Sampling) -> AsyncIterator[list[int]]:
        """New ids from the model the request names, cut before an end-of-sequence id. Leaving early cancels."""
        eos = self.tokenizer.eos_token_ids
        seed = request.seed % (1 << 64)
        if request.model == self.name:
            options = stop_inputs(eos)
            if request.temperature > 0:
                options |= {"temperature": request.temperature, "runtime_top_p": request.top_p, "random_seed": seed}
            source = self.client.generate(prompt, max_tokens, streaming=True, **options)
        else:
            sampling = {"temperature": request.temperature, "top_p": request.top_p, "seed": seed}
            source = self.baseline.generate(prompt, max_tokens, eos=list(eos), **sampling)
        async with contextlib.aclosing(source):
            async for new in source:
                yield list(itertools.takewhile(lambda token: token not in eos, new))
                if any(token in eos for token in new):
                    return

    async def answer(self, request: Sampling) -> AsyncIterator[Piece]:
        """The last piece alone has a finish reason. Raises :class:`ApiError`."""
        self.check_model(request.model)
        start, first = time.perf_counter(), 0.0
        text = TextStream(self.tokenizer, request.stop)
        self.running += 1
        try:
            prompt = await self.encode(request)
            room = self.room(prompt, request)
            self.counts["prompt_tokens_total"] += len(prompt)
            source = self.ids(prompt, room, request)
            async with contextlib.aclosing(source):
                async for new in source:
                    first = first or time.perf_counter() - start
                    self.counts["completion_tokens_total"] += len(new)
                    piece = text.push(new)
                    if text.stopped:
                        break
                    yield piece, None, usage_of(len(prompt), text.tokens)
            if not text.stopped:
                piece = text.push([], last=True)
            reason = "length" if text.tokens >= room and not text.stopped else "stop"
            self.counts["ttft_seconds_sum"] += first
            self.counts["ttft_seconds_count"] += 1
            yield piece, reason, usage_of(len(prompt), text.tokens)
        except (InputError, RunError) as error:
            raise ApiError.of(error) from None
        finally:
            self.running -= 1

    def state(self, ready: bool) -> dict[str, Any]:
        return {
            "status": "ok" if ready else "unavailable",
            "message": "" if ready else DOWN,
            "models": self.models,
            "source": self.info.model.source,
            "max_seq_len": self.info.engine.max_seq_len,
            "baseline_loaded": self.baseline is not None and self.baseline.loaded,
        }

    def metrics(self) -> str:
        rows = [f"llm_demo_{name} {value:g}" for name, value in sorted(self.counts.items())]
        rows += [f"llm_demo_{name} {value:g}" for name, value in self.client.metrics().items()]
        return "\n".join([*rows, f"llm_demo_requests_running {self.running}", ""])


def create_app(gateway: Gateway, *, api_key: str | None, local_only: bool) -> ASGIApp:
    """The routes behind a :class:`Guard`."""
    app = FastAPI(lifespan=gateway.lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return await refused(_, ApiError(400, f"{where or 'body'}: {first['msg']}", param=where or None))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError(500, f"The gateway failed: {type(error).__name__}").body(), 500)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in gateway.models]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        gateway.check_model(name)
        return _model(name)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await _complete(gateway, request, body)

    @app.post("/v1/completions")
    async def completion(request: Request, body: CompletionRequest) -> Response:
        return await _complete(gateway, request, body)

    @app.post("/baseline")
    async def baseline() -> dict[str, bool]:
        """Load the race's baseline now, so that loading is not part of the race."""
        if gateway.baseline is None:
            raise ApiError(404, "There is no baseline: start the gateway with --model-dir.")
        try:
            await gateway.baseline.load()
        except RunError as error:
            raise ApiError.of(error) from None
        return {"loaded": True}

    @app.get("/health")
    async def health() -> JSONResponse:
        ready = await gateway.client.ready()
        return JSONResponse(gateway.state(ready), 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(gateway.metrics(), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=STATIC))
    return Guard(app, gateway.counts, api_key=api_key, local_only=local_only)


async def _complete(gateway: Gateway, request: Request, body: Sampling) -> Response:
    """An error before the first token is a status code; after it, an ``error`` event that ends the stream."""
    shape = Shape(body.model, isinstance(body, ChatRequest))
    pieces = gateway.answer(body)
    if body.stream:
        opening = await _unless_gone(request, anext(pieces))
        return StreamingResponse(_events(shape, body, opening, pieces), media_type="text/event-stream")
    parts = await _unless_gone(request, _all(pieces))
    return JSONResponse(shape.whole("".join(text for text, _, _ in parts), *parts[-1][1:]))


async def _all(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


async def _events(shape: Shape, body: Sampling, piece: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
    every = body.stream_options.continuous_usage_stats
    async with contextlib.aclosing(pieces):
        try:
            if shape.chat:
                yield _event(shape.opening())
            reason = None
            while reason is None:
                text, reason, usage = piece
                if text or reason or every:
                    yield _event(shape.chunk(text, reason, usage if every else None))
                piece = piece if reason else await anext(pieces)
            if body.stream_options.include_usage:
                yield _event(shape.chunk(None, usage=usage))
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body())


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """``work``'s result; when the client leaves first, ``work`` is cancelled, which frees its place in the engine."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=0.1))[0]:
            if await request.is_disconnected():
                raise ApiError(499, "The client left.")
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait({task})


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "llama-engine"}
