"""Another OpenAI-compatible server beside this engine, so that the page can race it: requests go there as they are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
from fastapi.responses import JSONResponse, Response, StreamingResponse

from llama_engine.errors import InputError
from llm_demo.errors import ApiError


class OtherServer:
    """The first model of the server at ``url``, under the name of ours. Raises :class:`InputError` for another URL."""

    def __init__(self, flag: str) -> None:
        self.name, _, url = flag.partition("=")
        if not self.name or not url.startswith(("http://", "https://")):
            raise InputError(f"--other {flag!r} must be NAME=URL, as in vllm=http://127.0.0.1:8000/v1")
        self.url = url.rstrip("/")
        self.http = httpx.AsyncClient(timeout=httpx.Timeout(600, connect=5), trust_env=False)

    async def forward(self, kind: str, body: dict[str, Any]) -> Response:
        """The server's own answer to ``kind``, "completions" or "chat/completions". Raises :class:`ApiError`."""
        try:
            models = (await self.http.get(f"{self.url}/models")).raise_for_status().json()["data"]
            request = self.http.build_request("POST", f"{self.url}/{kind}", json=body | {"model": models[0]["id"]})
            answer = await self.http.send(request, stream=True)
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise ApiError(502, f"{self.name} at {self.url} does not answer: {type(error).__name__}") from None
        if not body.get("stream") or answer.is_error:
            try:
                content = (await answer.aread()) and answer.json()
            except (httpx.HTTPError, ValueError):
                raise ApiError(502, f"{self.name} at {self.url} answered with status {answer.status_code}") from None
            return JSONResponse(content, answer.status_code)

        async def lines() -> AsyncIterator[bytes]:
            try:
                async for part in answer.aiter_bytes():
                    yield part
            except httpx.HTTPError:
                return  # the page sees that [DONE] is missing
            finally:
                await answer.aclose()

        return StreamingResponse(lines(), media_type="text/event-stream")
