"""Replicas that fail on command, and a router over them."""

import asyncio
import contextlib
import zlib

import pytest

from llama_engine.errors import ErrorCode, RunError, with_code
from llama_engine.serving import router as router_module
from llama_engine.serving.client import NewTokens, RequestFailed
from llama_engine.serving.router import Router

BLOCK = 4


class Fake:
    """A replica: ``down`` refuses everything, ``fails`` is what the next answers end with, after so many tokens."""

    def __init__(self, url, **_):
        self.url, self.down, self.closed = url, False, False
        self.fails: list[tuple[int, ErrorCode]] = []
        self.fails_always: ErrorCode | None = None
        self.now, self.most, self.served = 0, 0, []
        self.go = asyncio.Event()  # cleared: no token comes
        self.go.set()

    async def ready(self, model="tensorrt_llm"):
        return not self.down

    async def close(self):
        self.closed = True

    async def generate(self, ids, new_tokens, *, streaming, model, output_prefix_length=0, **options):
        self.served.append((ids, new_tokens, output_prefix_length))
        self.now += 1
        self.most = max(self.most, self.now)
        after, code = self.fails.pop(0) if self.fails else (None, self.fails_always)
        try:
            for made in range(new_tokens + 1):
                await asyncio.sleep(0)
                await self.go.wait()
                if self.down or made == after or (after is None and code):
                    raise RequestFailed(
                        "failed" if self.down or not code else with_code(RunError("failed", code)), lost=self.down
                    )
                if made < new_tokens:
                    ids = [*ids, token_after(ids)]
                    yield NewTokens(ids[-1:])
        finally:
            self.now -= 1


def token_after(ids):
    return zlib.crc32(repr(ids).encode()) % 1000


def right(prompt, new):
    ids = list(prompt)
    for _ in range(new):
        ids.append(token_after(ids))
    return ids[len(prompt) :]


@contextlib.asynccontextmanager
async def routed(count, **options):
    """A router over so many fakes, and the fakes; what began has ended when it closes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router_module, "GrpcClient", Fake)
        patch.setattr(router_module, "POLL_S", 0.002)
        patch.setattr(router_module, "PAUSE_S", (0.001, 0.01))
        router = Router([f"r{i}" for i in range(count)], **{"block_tokens": BLOCK, "limit": 100} | options)
        try:
            assert await router.ready() == (count > 0)
            yield router, [router.replicas[f"r{i}"].client for i in range(count)]
            assert not router.waiting
            assert all(replica.requests == replica.prefill_tokens == 0 for replica in router.replicas.values())
        finally:
            await router.close()


async def ask(router, prompt, new=8, **options):
    ids = []
    async for part in router.generate(prompt, new, streaming=True, **options):
        ids += part
    return ids


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)
