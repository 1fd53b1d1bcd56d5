"""A thread that owns an engine, for servers: submit and cancel from anywhere, tokens come back by callback."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from llama_engine.engine import Engine
from llama_engine.errors import RunError
from llama_engine.sampling import SamplingParams

OnTokens = Callable[[list[int], bool, "str | None"], None]


class QueueFull(RunError):
    """The bounded queue has no room; the client should back off and retry."""


class ShuttingDown(RunError):
    """The loop no longer takes requests."""


@dataclass
class _Request:
    prompt: list[int]
    max_new_tokens: int
    params: SamplingParams
    stop_token_ids: tuple[int, ...]
    on_tokens: OnTokens
    deadline: float | None
    engine_id: int = -1


class EngineLoop:
    """In-flight batching for many threads.

    ``on_tokens(new_ids, finished, reason)`` is called on the loop's thread; ``reason`` is stop, length, cancelled,
    timeout or error. At most ``max_queue`` requests wait beyond those that run.
    """

    def __init__(self, engine: Engine, *, max_queue: int = 256) -> None:
        self._engine = engine
        self._max_queue = max_queue
        self._inbox: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._requests: dict[int, _Request] = {}
        self._by_engine_id: dict[int, int] = {}
        self._next_id = 0
        self._closed = False
        self._stop = threading.Event()
        self._window: tuple[float, int] = (time.monotonic(), 0)
        self._tokens_per_s = 0.0
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: list[int],
        max_new_tokens: int,
        *,
        params: SamplingParams | None = None,
        stop_token_ids: Iterable[int] = (),
        on_tokens: OnTokens,
        timeout_s: float | None = None,
    ) -> int:
        """Queue a request; returns its id.

        Raises ``InputError`` for one that can never fit, :class:`QueueFull`, :class:`ShuttingDown`.
        """
        self._engine.validate(prompt, max_new_tokens)
        with self._lock:
            if self._closed:
                raise ShuttingDown("the engine is shutting down")
            capacity = self._engine.config.max_batch_size + self._max_queue
            if len(self._requests) >= capacity:
                raise QueueFull(f"the queue is full: {len(self._requests)} requests running or waiting of {capacity}")
            request_id = self._next_id
            self._next_id += 1
            self._requests[request_id] = _Request(
                list(prompt),
                max_new_tokens,
                params or SamplingParams(),
                tuple(stop_token_ids),
                on_tokens,
                None if timeout_s is None else time.monotonic() + timeout_s,
            )
        self._inbox.put(("add", request_id))
        return request_id

    def cancel(self, request_id: int) -> None:
        """Stop a request; its blocks are free before the next step. Unknown ids are ignored."""
        self._inbox.put(("cancel", request_id))

    def stats(self) -> dict[str, Any]:
        """Counters for metrics: queue depth, running, KV blocks, preemptions, tokens."""
        scheduler = self._engine.scheduler
        return {
            "requests": len(self._requests),
            "running": len(scheduler.running),
            "waiting": len(self._requests) - len(scheduler.running),
            "kv_blocks_used": scheduler.blocks.used,
            "kv_blocks_total": scheduler.blocks.usable,
            "preemptions": scheduler.preemptions,
            "tokens_generated": self._engine.tokens_generated,
            "tokens_per_s": self._tokens_per_s,
            "steps": self._engine.steps,
        }

    def shutdown(self, drain_s: float = 10.0) -> None:
        """Refuse new requests, let running ones finish for ``drain_s`` seconds, cancel the rest, stop the thread."""
        with self._lock:
            self._closed = True
        deadline = time.monotonic() + drain_s
        while self._requests and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        self._stop.set()
        self._inbox.put(("wake", -1))
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._take_messages(block=not self._engine.has_unfinished)
            if not self._engine.has_unfinished:
                continue
            self._expire()
            try:
                outputs = self._engine.step()
            except Exception as error:  # the device failed: nobody in the batch can be answered
                self._fail_all(f"error: {error}")
                continue
            for output in outputs:
                self._deliver(self._by_engine_id.get(output.request_id), output.token_ids, output.reason)
            self._measure_rate()
        for request_id in list(self._requests):
            self._drop(request_id, "cancelled")

    def _take_messages(self, *, block: bool) -> None:
        while True:
            try:
                kind, request_id = self._inbox.get(block=block, timeout=0.2 if block else None)
            except queue.Empty:
                return
            block = False
            request = self._requests.get(request_id)
            if request is None:
                continue
            if kind == "cancel":
                self._drop(request_id, "cancelled")
            elif kind == "add":
                request.engine_id = self._engine.add_request(
                    request.prompt, request.max_new_tokens, params=request.params, stop_token_ids=request.stop_token_ids
                )
                self._by_engine_id[request.engine_id] = request_id

    def _expire(self) -> None:
        now = time.monotonic()
        expired = [i for i, request in list(self._requests.items()) if request.deadline and request.deadline < now]
        for request_id in expired:
            self._drop(request_id, "timeout")

    def _deliver(self, request_id: int | None, tokens: list[int], reason: str | None) -> None:
        request = None if request_id is None else self._requests.get(request_id)
        if request_id is None or request is None:
            return
        if reason:
            self._forget(request_id)
        try:
            request.on_tokens(tokens, reason is not None, reason)
        except Exception:  # one client's callback must not take the others down
            if not reason:
                self._drop(request_id, None)

    def _drop(self, request_id: int, reason: str | None) -> None:
        request = self._forget(request_id)
        if request is None:
            return
        self._engine.cancel(request.engine_id)
        if reason:
            try:
                request.on_tokens([], True, reason)
            except Exception:  # the client is gone, and so is its request
                return

    def _forget(self, request_id: int) -> _Request | None:
        with self._lock:
            request = self._requests.pop(request_id, None)
        if request is not None:
            self._by_engine_id.pop(request.engine_id, None)
        return request

    def _fail_all(self, reason: str) -> None:
        for request_id in list(self._requests):
            self._drop(request_id, reason)

    def _measure_rate(self) -> None:
        since, tokens = self._window
        now = time.monotonic()
        if now - since >= 1.0:
            self._tokens_per_s = (self._engine.tokens_generated - tokens) / (now - since)
            self._window = (now, self._engine.tokens_generated)
