"""A thread that owns an engine, for servers: submit and cancel from anywhere, tokens come back by callback."""

from __future__ import annotations

import contextlib
import gc
import queue
import threading
import time
from collections import abc
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from llama_engine.engine.engine import Engine, Output
from llama_engine.engine.scheduler import Grammar, Sequence
from llama_engine.errors import ErrorCode, InputError, RunError
from llama_engine.sampling import SamplingParams

OnTokens = Callable[[Output], None]


class EngineLoop:
    """In-flight batching for many threads.

    ``on_tokens(output)`` is called on the loop's thread with each :class:`Output` of the request; the last one has the
    reason why it ended: a word, or the :class:`RunError` with its code. At most ``max_queue`` requests wait beyond
    those that run.
    """

    def __init__(self, engine: Engine, *, max_queue: int = 256) -> None:
        self._engine = engine
        self._capacity = engine.config.max_batch_size + max_queue
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # between threads that submit, and the one that shuts down
        self._requests: dict[int, Sequence] = {}
        self._closed = False
        self._stop = threading.Event()
        self._window: tuple[float, int] = (time.monotonic(), 0)
        self._tokens_per_s = 0.0
        # What lives as long as the process does need not be searched for garbage while others wait for tokens.
        gc.collect()
        gc.freeze()
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: list[int],
        max_new_tokens: int,
        *,
        params: SamplingParams | None = None,
        stop_token_ids: Iterable[int] = (),
        min_tokens: int = 0,
        output: abc.Sequence[int] = (),
        grammar: Grammar | None = None,
        on_tokens: OnTokens,
        timeout_s: float | None = None,
    ) -> int:
        """Queue a request; returns its id. What it asks for: see :meth:`Engine.make_request`.

        Raises :class:`InputError` for one that can never run, :class:`RunError` when the queue is full or the engine is
        shutting down.
        """
        if timeout_s is not None and not timeout_s >= 0:
            raise InputError(f"timeout_s must be a number >= 0, got {timeout_s!r}")
        sequence = self._engine.make_request(
            prompt,
            max_new_tokens,
            params=params,
            stop_token_ids=stop_token_ids,
            min_tokens=min_tokens,
            output=output,
            grammar=grammar,
        )
        sequence.on_tokens = on_tokens
        if timeout_s is not None:
            sequence.deadline = time.monotonic() + timeout_s
        with self._lock:
            if self._closed:
                raise _shutting_down()
            if (count := len(self._requests)) >= self._capacity:
                message = f"the queue is full: {count} requests running or waiting of {self._capacity}"
                raise RunError(message, ErrorCode.QUEUE_FULL)
            self._requests[sequence.request_id] = sequence
        self._inbox.put(partial(self._add, sequence))
        return sequence.request_id

    def cancel(self, request_id: int) -> None:
        """Stop a request; its blocks are free before the next step. Unknown ids are ignored."""
        self._inbox.put(partial(self._drop, request_id, _cancelled()))

    def stats(self) -> dict[str, Any]:
        """Counters for metrics: queue depth, running, KV blocks, prefix cache, preemptions, tokens."""
        scheduler = self._engine.scheduler
        return {
            "requests": len(self._requests),
            "running": len(scheduler.running),
            "waiting": len(self._requests) - len(scheduler.running),
            "kv_blocks_used": scheduler.blocks.used,
            "kv_blocks_total": scheduler.blocks.usable,
            "prefix_cache_query_tokens": scheduler.prefix_cache_query_tokens,
            "prefix_cache_hit_tokens": scheduler.prefix_cache_hit_tokens,
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
        self._thread.join(timeout=10)
        gc.unfreeze()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._measure_rate()
            self._take_messages()
            if not self._engine.has_unfinished:
                continue
            now = time.monotonic()
            for sequence in list(self._requests.values()):
                if sequence.deadline < now:
                    message = f"the request timed out after {len(sequence.output)} tokens"
                    self._drop(sequence.request_id, RunError(message, ErrorCode.TIMEOUT))
            try:
                outputs = self._engine.step()
            except Exception as error:  # the device failed: nobody in the batch can be answered
                self._drop_all(RunError(f"a step of the engine failed: {type(error).__name__}: {error}"))
                continue
            for output in outputs:
                self._deliver(output)
        self._drop_all(_shutting_down())

    def _take_messages(self) -> None:
        """Act on what has been asked; an idle engine waits for it."""
        with contextlib.suppress(queue.Empty):
            if not self._engine.has_unfinished:
                self._inbox.get(timeout=0.2)()
            while True:
                self._inbox.get_nowait()()

    def _add(self, sequence: Sequence) -> None:
        if sequence.request_id in self._requests:
            self._engine.add(sequence)

    def _deliver(self, output: Output) -> None:
        take = self._requests.pop if output.finished else self._requests.get
        sequence = take(output.request_id, None)
        if sequence is None:
            return
        try:
            sequence.on_tokens(output)
        except Exception:  # one client's callback must not take the others down
            self._drop(output.request_id, _cancelled())

    def _drop(self, request_id: int, reason: RunError) -> None:
        self._engine.cancel(request_id)
        self._deliver(Output(request_id, [], reason))

    def _drop_all(self, reason: RunError) -> None:
        for request_id in list(self._requests):
            self._drop(request_id, reason)

    def _measure_rate(self) -> None:
        since, tokens = self._window
        now = time.monotonic()
        if now - since >= 1.0:
            self._tokens_per_s = (self._engine.tokens_generated - tokens) / (now - since)
            self._window = (now, self._engine.tokens_generated)


def _cancelled() -> RunError:
    return RunError("the request was cancelled", ErrorCode.CANCELLED)


def _shutting_down() -> RunError:
    return RunError("the engine is shutting down", ErrorCode.SHUTTING_DOWN)
