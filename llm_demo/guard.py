"""What stands in front of the gateway's application: who may ask, from where, and how large a body.

Nothing of a request's body is read before its headers are found good, so that a refusal costs no memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_demo.errors import ApiError

MAX_BODY_BYTES = 4 << 20
MAX_BODIES_BYTES = 64 << 20  # of all requests together
BODY_S = 30  # a body's time to arrive
LINGER_S = 2  # what a refused client still sends is read and dropped so long, for a reset would eat the answer
LOCAL = {"127.0.0.1", "localhost", "::1"}
SAFE = {"GET", "HEAD", "OPTIONS"}
PUBLIC = {"/", "/health", "/metrics"}  # and /static/: without the key
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Guard:
    """Refuses in OpenAI's error shape, adds security headers to every answer and counts the API's by status.

    ``local_only`` refuses other host names, so that no foreign page can reach a loopback server by renaming it.
    """

    def __init__(self, app: ASGIApp, counts: Counter[str], *, api_key: str | None, local_only: bool) -> None:
        self.app, self.counts, self.local_only = app, counts, local_only
        self.key = api_key.encode() if api_key else None
        self.held = 0  # bytes of the bodies of the requests that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
                if scope["path"].startswith("/v1/"):
                    self.counts[f'requests_total{{code="{message["status"]}"}}'] += 1
            await send(message)

        body = bytearray()
        try:
            try:
                self.admit(scope)
                await self.read(receive, body)
            except ApiError as error:
                self.held -= len(body)
                body.clear()
                await _refuse(error, scope, receive, guarded)
                return
            await self.app(scope, _replay(bytes(body), receive), guarded)
        finally:
            self.held -= len(body)

    def admit(self, scope: Scope) -> None:
        """Judge method, path and headers. Raises :class:`ApiError`."""
        headers, path, changes = Headers(scope=scope), scope["path"], scope["method"] not in SAFE
        host = headers.get("host", "")
        if self.local_only and _hostname(host) not in LOCAL:
            raise ApiError(400, f"This server answers on this machine only, not as {host!r}.")
        if changes and "origin" in headers and _netloc(headers["origin"]) != host.lower():
            raise ApiError(403, f"Pages of {headers['origin']} may not use this server.", code="foreign_origin")
        public = not changes and (path in PUBLIC or path.startswith("/static/"))
        given = headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self.key and not public and not secrets.compare_digest(given, self.key):
            raise ApiError(401, "Incorrect or missing API key.", code="invalid_api_key")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if changes and kind != "application/json":
            raise ApiError(415, f"The content type must be application/json, not {kind or 'absent'}.")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
            raise _too_large()

    async def read(self, receive: Receive, body: bytearray) -> None:
        """Append the whole body. Raises :class:`ApiError`."""
        deadline, more = time.monotonic() + BODY_S, True
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise ApiError(408, f"The request's body did not arrive within {BODY_S} s.") from None
            if message["type"] == "http.disconnect":
                raise ApiError(499, "The client left.")
            part, more = message.get("body", b""), message.get("more_body", False)
            if len(body) + len(part) > MAX_BODY_BYTES:
                raise _too_large()
            if self.held + len(part) > MAX_BODIES_BYTES:
                raise ApiError(429, "Too many large requests at once, try again.", code="bodies_full")
            body += part
            self.held += len(part)


def _too_large() -> ApiError:
    return ApiError(413, f"The request's body is larger than {MAX_BODY_BYTES >> 20} MiB.", code="request_too_large")


def _hostname(host: str) -> str | None:
    with contextlib.suppress(ValueError):
        return urlsplit(f"//{host}").hostname
    return None


def _netloc(origin: str) -> str | None:
    """``host:port`` of an origin, as the Host header of a request to it has it. None: origin "null" and such."""
    with contextlib.suppress(ValueError):
        return urlsplit(origin.lower()).netloc or None
    return None


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then what the connection says."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer, then drop what is still being sent, then close."""

    async def lingering(message: Message) -> None:
        await send(message | {"more_body": True} if message["type"] == "http.response.body" else message)

    await JSONResponse(error.body(), error.status, {"Connection": "close"})(scope, receive, lingering)

    async def drop() -> None:
        while (await receive()).get("more_body"):
            pass

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(drop(), LINGER_S)
    await send({"type": "http.response.body", "body": b""})
