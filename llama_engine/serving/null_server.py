"""A server of OpenAI's API that answers at once: what a load generator and this machine can do without an engine.

``python -m llama_engine.serving.null_server`` prints its port, and ends when its standard input is closed.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

CHUNK = b'data: {"choices":[{"index":0,"text":" a","delta":{"content":" a"},"finish_reason":null}]}\n\n'


async def answer(request: web.Request) -> web.StreamResponse:
    """One chunk a token when streaming, then usage and [DONE]."""
    asked = await request.json()
    count = asked["max_tokens"]
    usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}
    end = {"index": 0, "finish_reason": "length", "text": "", "delta": {}}
    if not asked.get("stream"):
        text = " a" * count
        choice = end | {"text": text, "message": {"role": "assistant", "content": text}}
        del choice["delta"]
        return web.json_response({"choices": [choice], "usage": usage})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(count):
        await response.write(CHUNK)
    last = json.dumps({"choices": [end], "usage": usage})
    await response.write(f"data: {last}\n\ndata: [DONE]\n\n".encode())
    return response


async def models(_: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "null", "object": "model"}]})


async def serve() -> None:
    app = web.Application(client_max_size=1 << 28)
    app.router.add_get("/v1/models", models)
    for path in ("/v1/completions", "/v1/chat/completions"):
        app.router.add_post(path, answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


@asynccontextmanager
async def null_server() -> AsyncIterator[str]:
    """The URL of one in a process of its own."""
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", __name__, **pipes)
    try:
        yield f"http://127.0.0.1:{int(await process.stdout.readline())}"
    finally:
        process.stdin.close()
        await process.wait()


if __name__ == "__main__":
    asyncio.run(serve())
