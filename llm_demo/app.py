"""The gateway's routes: OpenAI's API, the page, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from llama_engine.errors import RunError
from llm_demo.answers import Piece, Shape, Usage
from llm_demo.api import ChatRequest, CompletionRequest, Sampling
from llm_demo.errors import ApiError
from llm_demo.gateway import Gateway
from llm_demo.guard import Guard

STATIC = Path(__file__).parent / "static"
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
T = TypeVar("T")
Pieces = AsyncIterator[tuple[Piece, Usage]]
_ERROR = {"type": "object", "required": ["message", "type", "param", "code"]}
_ERRORS = {"type": "object", "properties": {"error": _ERROR}, "required": ["error"]}
REFUSED = {"description": "OpenAI's error shape", "content": {"application/json": {"schema": _ERRORS}}}
STREAMED = {"description": "whole, or with stream in events", "content": {"text/event-stream": {}}}
COMPLETED: dict[int | str, dict[str, Any]] = {
    200: STREAMED,
    422: {"description": "never: 400 it is"},
    "default": REFUSED,
}


def create_app(gateway: Gateway, *, api_key: str | None, local_only: bool) -> ASGIApp:
    """The routes behind a :class:`Guard`."""
    app = FastAPI(lifespan=gateway.lifespan, docs_url=None, redoc_url=None)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return await refused(_, ApiError.of_validation(error.errors(), error.body))

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

    @app.post("/v1/chat/completions", responses=COMPLETED)
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await _complete(gateway, request, body)

    @app.post("/v1/completions", responses=COMPLETED)
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
    if other := gateway.others.get(body.model):
        return await other.forward(request.url.path.removeprefix("/v1/"), await request.json())
    options = body.stream_options
    shape = Shape(body.model, isinstance(body, ChatRequest), obfuscate=options.include_obfuscation)
    pieces = gateway.answer(body)
    if body.stream:
        first = await _unless_gone(request, anext(pieces))
        return StreamingResponse(_events(shape, body, first, pieces), media_type="text/event-stream")
    parts = await _unless_gone(request, _all(pieces))
    return JSONResponse(shape.whole((piece for piece, _ in parts), parts[-1][1]))


async def _all(pieces: Pieces) -> list[tuple[Piece, Usage]]:
    return [piece async for piece in pieces]


async def _again(first: tuple[Piece, Usage], rest: Pieces) -> Pieces:
    yield first
    async for each in rest:
        yield each


async def _events(shape: Shape, body: Sampling, first: tuple[Piece, Usage], pieces: Pieces) -> AsyncIterator[bytes]:
    every, opened = body.stream_options.continuous_usage_stats, set()
    async with contextlib.aclosing(pieces):
        try:
            async for piece, usage in _again(first, pieces):
                if shape.chat and piece.index not in opened:
                    opened.add(piece.index)
                    yield _event(shape.opening(piece.index))
                if piece.text or piece.reason or piece.ids or every:
                    yield _event(shape.chunk(piece, usage if every else None))
            if body.stream_options.include_usage:
                yield _event(shape.closing(first[1]))
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body())


def _event(data: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % _ENCODE(data).encode()


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
