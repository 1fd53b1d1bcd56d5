import gc
import threading
import time

import pytest

from llama_engine.cpu.executor import HostExecutor
from llama_engine.engine.loop import EngineLoop
from llama_engine.errors import ErrorCode, InputError, RunError
from llama_engine.native import load_engine
from llama_engine.sampling import SamplingParams


class Client:
    """Collects what a request's callback brings."""

    def __init__(self):
        self.tokens, self.logprobs, self.reason, self.done = [], [], None, threading.Event()

    def __call__(self, output):
        self.tokens += output.token_ids
        self.logprobs += output.logprobs or []
        if output.finished:
            self.reason = output.reason
            self.done.set()

    def wait(self):
        assert self.done.wait(60)
        return self.tokens


@pytest.fixture
def loop(tiny_engine):
    loop = EngineLoop(load_engine(tiny_engine, device="cpu"), max_queue=4)
    yield loop
    loop.shutdown(drain_s=0)


def test_many_threads_get_the_answers_they_would_get_alone(tiny_engine, loop):
    engine = load_engine(tiny_engine, device="cpu")
    clients = [Client() for _ in range(8)]
    for i, client in enumerate(clients):
        loop.submit([i + 1, 2 * i], 30, on_tokens=client)
    for i, client in enumerate(clients):
        request = engine.add_request([i + 1, 2 * i], 30)
        expected = []
        while engine.has_unfinished:
            expected += [t for o in engine.step() if o.request_id == request for t in o.token_ids]
        assert client.wait() == expected
        assert client.reason == "length"
    assert loop.stats()["requests"] == 0


def test_log_probabilities_come_to_those_who_ask(loop):
    params = SamplingParams(1.0, seed=3, logprobs=2), SamplingParams(1.0, seed=3)
    asking, other = clients = Client(), Client()
    for client, p in zip(clients, params):
        loop.submit([1, 2], 20, params=p, on_tokens=client)
    assert asking.wait() == other.wait()
    assert len(asking.logprobs) == 20
    assert all(entry.top[0][1] >= entry.token for entry in asking.logprobs)
    assert other.logprobs == []


def test_garbage_is_not_searched_for_in_what_was_there_before(tiny_engine):
    loop = EngineLoop(load_engine(tiny_engine, device="cpu"))
    assert gc.get_freeze_count() > 10_000  # at 512 sequences those searches took two thirds of the host's time
    loop.shutdown(drain_s=0)
    assert gc.get_freeze_count() == 0


def test_the_rate_of_an_idle_loop_falls_to_zero(loop):
    client = Client()
    loop.submit([1], 200, on_tokens=client)
    client.wait()
    deadline = time.monotonic() + 30
    while loop.stats()["tokens_per_s"] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loop.stats()["tokens_per_s"] > 0
    while loop.stats()["tokens_per_s"] > 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loop.stats()["tokens_per_s"] == 0


def test_full_queue_refuses_and_recovers(loop):
    clients = [Client() for _ in range(8)]
    for client in clients:
        loop.submit([1], 200, on_tokens=client)
    with pytest.raises(RunError, match="the queue is full: 8 requests") as full:
        loop.submit([1], 1, on_tokens=Client())
    assert full.value.code is ErrorCode.QUEUE_FULL
    for client in clients:
        client.wait()
    late = Client()
    loop.submit([1], 1, on_tokens=late)
    assert len(late.wait()) == 1


def test_cancel_frees_blocks_and_tells_the_client(loop):
    client = Client()
    request = loop.submit([1, 2], 250, on_tokens=client)
    loop.cancel(request)
    client.wait()
    assert client.reason.code is ErrorCode.CANCELLED
    assert len(client.tokens) < 250
    assert loop.stats()["kv_blocks_used"] == 0
    loop.cancel(request)
    loop.cancel(12345)


def test_timeout_ends_a_request(loop):
    client = Client()
    loop.submit([1], 250, on_tokens=client, timeout_s=1e-4)
    client.wait()
    assert client.reason.code is ErrorCode.TIMEOUT
    assert str(client.reason) == f"the request timed out after {len(client.tokens)} tokens"
    with pytest.raises(InputError, match="timeout_s"):
        loop.submit([1], 250, on_tokens=client, timeout_s=float("nan"))


def test_a_raising_callback_leaves_the_others_alone(loop):
    def broken(output):
        raise ValueError("client bug")

    good = Client()
    loop.submit([1], 30, on_tokens=broken)
    loop.submit([2], 30, on_tokens=good)
    assert len(good.wait()) == 30


def test_a_failing_step_is_reported_to_everyone_in_it_and_the_loop_lives(loop, monkeypatch):
    engine = loop._engine
    real, calls = engine.executor.submit, []

    def failing(step):
        calls.append(step)
        if len(calls) == 1:
            raise RuntimeError("device lost")
        return real(step)

    monkeypatch.setattr(engine.executor, "submit", failing)
    first, second = Client(), Client()
    loop.submit([1], 20, on_tokens=first)
    first.wait()
    assert "device lost" in str(first.reason)
    assert first.reason.code is ErrorCode.INTERNAL
    loop.submit([2], 20, on_tokens=second)
    assert len(second.wait()) == 20
    assert loop.stats()["kv_blocks_used"] == 0


def test_shutdown_drains_then_refuses(tiny_engine):
    loop = EngineLoop(load_engine(tiny_engine, device="cpu"))
    client = Client()
    loop.submit([1], 100, on_tokens=client)
    loop.shutdown(drain_s=30)
    assert client.reason == "length"
    with pytest.raises(RunError, match="shutting down") as refused:
        loop.submit([1], 1, on_tokens=Client())
    assert refused.value.code is ErrorCode.SHUTTING_DOWN


def test_shutdown_without_drain_cancels(tiny_engine):
    loop = EngineLoop(load_engine(tiny_engine, device="cpu"))
    client = Client()
    loop.submit([1], 250, on_tokens=client)
    started = time.monotonic()
    loop.shutdown(drain_s=0)
    client.wait()
    assert client.reason.code is ErrorCode.SHUTTING_DOWN
    assert time.monotonic() - started < 30


def test_impossible_requests_are_refused_at_submission(loop):
    with pytest.raises(InputError, match="max_seq_len") as refused:
        loop.submit([1], 10_000, on_tokens=Client())
    assert refused.value.code is ErrorCode.CONTEXT_LENGTH


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_row_that_cannot_be_sampled_ends_its_own_request_alone(tiny_engine, monkeypatch, kernels):
    loop = EngineLoop(load_engine(tiny_engine, device="cpu", kernels=kernels), max_queue=4)
    draw = HostExecutor._draw

    def broken(self, logits, chunks):
        if any(self._params[chunk.slot].seed == 13 for chunk in chunks):
            raise IndexError("no such row")
        return draw(self, logits, chunks)

    monkeypatch.setattr(HostExecutor, "_draw", broken)
    unlucky, lucky = Client(), Client()
    loop.submit([1], 30, params=SamplingParams(1.0, seed=13), on_tokens=unlucky)
    loop.submit([2], 30, params=SamplingParams(1.0, seed=12), on_tokens=lucky)
    assert unlucky.wait() == []
    assert str(unlucky.reason) == "no token could be sampled: IndexError: no such row"
    assert unlucky.reason.code is ErrorCode.INTERNAL
    tokens = lucky.wait()
    assert lucky.reason == "length"
    alone = Client()
    loop.submit([2], 30, params=SamplingParams(1.0, seed=12), on_tokens=alone)
    assert alone.wait() == tokens
    assert loop.stats()["kv_blocks_used"] == 0
    loop.shutdown(0)
