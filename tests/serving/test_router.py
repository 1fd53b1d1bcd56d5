"""The router over replicas that fail on command: nothing is lost, doubled or wrong, and nobody gets more than is fair.

A fake's next token depends on all ids before it, so an answer that goes on from the wrong place is seen.
"""

import asyncio
import contextlib
import random
import zlib

import pytest

from llama_engine.errors import ErrorCode, RunError, with_code
from llama_engine.serving import replica as replica_module
from llama_engine.serving import router as router_module
from llama_engine.serving.client import NewTokens, RequestFailed
from llama_engine.serving.router import MAX_TRIES, Router

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


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    monkeypatch.setattr(router_module, "GrpcClient", Fake)
    monkeypatch.setattr(router_module, "POLL_S", 0.002)
    monkeypatch.setattr(router_module, "PAUSE_S", (0.001, 0.01))


@contextlib.asynccontextmanager
async def routed(count, **options):
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


def test_requests_spread_evenly():
    async def go():
        async with routed(3) as (router, fakes):
            prompts = [[i] for i in range(10)]
            assert await asyncio.gather(*(ask(router, p) for p in prompts)) == [right(p, 8) for p in prompts]
            assert sorted(fake.most for fake in fakes) == [3, 3, 4]

    run(go())


def test_a_long_prompt_weighs_as_much_as_several_requests():
    async def go():
        async with routed(2) as (router, fakes):
            long = [*range(4 * replica_module.PREFILL_TOKENS)]
            await asyncio.gather(ask(router, long), *(ask(router, [1, i]) for i in range(4)))
            assert sorted(len(fake.served) for fake in fakes) == [1, 4]

    run(go())


def test_what_starts_alike_goes_where_it_is_cached_unless_that_is_busy():
    async def go():
        async with routed(3) as (router, fakes):
            prompt = [*range(200)]
            answer = await ask(router, prompt)
            (home,) = [fake for fake in fakes if fake.served]
            for _ in range(4):
                await ask(router, [9])  # would move the turn on
            before = len(home.served)
            turns = [prompt + answer + [i] for i in range(3)]
            for turn in turns:
                await ask(router, turn)
            assert len(home.served) == before + 3
            for fake in fakes:
                fake.go.clear()
            held = [asyncio.create_task(ask(router, [8] * 300 + [i])) for i in range(6)]
            await until(lambda: sum(fake.now for fake in fakes) == 6)
            held += [asyncio.create_task(ask(router, [*prompt, i])) for i in range(6)]
            await until(lambda: sum(len(fake.served) for fake in fakes) >= before + 3 + 12)
            assert 0 < len([ids for ids, _, _ in home.served if ids[:200] == prompt]) - 4 < 6
            for fake in fakes:
                fake.go.set()
            await asyncio.gather(*held)

    run(go())


def test_no_replica_gets_more_than_its_limit_and_the_queue_is_bounded():
    async def go():
        async with routed(2, limit=2, max_queue=3) as (router, fakes):
            for fake in fakes:
                fake.go.clear()
            order = []

            async def one(i):
                order.append((i, await ask(router, [i])))

            tasks = [asyncio.create_task(one(i)) for i in range(7)]
            await until(lambda: router.waiting == 3)
            with pytest.raises(RunError, match="queue is full: 3 requests wait") as caught:
                await ask(router, [8])
            assert caught.value.code is ErrorCode.QUEUE_FULL
            tasks[5].cancel()  # one that waits leaves
            await asyncio.sleep(0.005)
            for fake in fakes:
                fake.go.set()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert [fake.most for fake in fakes] == [2, 2]
            assert sorted(i for i, _ in order) == [0, 1, 2, 3, 4, 6]
            assert order[-1][0] == 6
            assert all(answer == right([i], 8) for i, answer in order)

    run(go())


@pytest.mark.parametrize(
    "code", [ErrorCode.UNAVAILABLE, ErrorCode.SHUTTING_DOWN, ErrorCode.CANCELLED, ErrorCode.INTERNAL]
)
@pytest.mark.parametrize("after", [0, 1, 5, 7])
def test_an_answer_goes_on_elsewhere(code, after):
    async def go():
        async with routed(2) as (router, fakes):
            for fake in fakes:
                fake.fails.append((after, code))
            fakes[1].fails.clear()
            fakes[1].served.clear()
            answers = await asyncio.gather(*(ask(router, [i]) for i in range(2)))
            assert answers == [right([i], 8) for i in range(2)]
            if after:
                assert [made for _, _, made in fakes[1].served] == [0, after]
            assert router.counts["requests_moved_total"] == 1
            assert router.counts["answers_resumed_total"] == bool(after)

    run(go())


@pytest.mark.parametrize(
    "options", [{}, {"end_id": right([1], 8)[5]}, {"stop_words_list": [[3, right([1], 8)[5]], [1, 2]]}]
)
def test_a_whole_answer_whose_end_was_not_said_is_whole(options):
    async def go():
        async with routed(2) as (router, fakes):
            whole = 6 if options else 8
            for fake in fakes:
                fake.fails.append((whole, ErrorCode.UNAVAILABLE))
            assert await ask(router, [1], **options) == right([1], whole)
            assert sum(len(fake.served) for fake in fakes) == 1

    run(go())


def test_a_request_that_fails_everywhere_does_not_go_on_for_ever():
    async def go():
        async with routed(6) as (router, fakes):
            for fake in fakes:
                fake.fails = [(0, ErrorCode.INTERNAL)]
            with pytest.raises(RequestFailed, match="failed"):
                await ask(router, [1])
            tried = [fake for fake in fakes if fake.served]
            assert len(tried) == MAX_TRIES
            assert all(len(fake.served) == 1 for fake in tried)

    run(go())


@pytest.mark.parametrize("code", [ErrorCode.INVALID, ErrorCode.TIMEOUT, ErrorCode.NOT_FINITE, ErrorCode.CONTEXT_LENGTH])
def test_an_error_of_the_request_itself_is_told_at_once(code):
    async def go():
        async with routed(2) as (router, fakes):
            for fake in fakes:
                fake.fails.append((1, code))
            with pytest.raises(RequestFailed) as caught:
                await ask(router, [1])
            assert caught.value.code is code
            assert sum(len(fake.served) for fake in fakes) == 1
            assert all(replica.up for replica in router.replicas.values())

    run(go())


def test_a_request_that_no_server_can_read_leaves_the_replicas_to_the_others():
    """Triton refuses such a one without a code, as it refuses everything while it starts and ends."""

    async def go():
        async with routed(2) as (router, fakes):
            for fake in fakes:
                fake.fails = [(0, None)] * MAX_TRIES
            bad = asyncio.create_task(ask(router, [1]))
            await until(lambda: fakes[0].served)
            good = await asyncio.gather(*(ask(router, [i]) for i in range(2, 8)), return_exceptions=True)
            assert isinstance((await asyncio.gather(bad, return_exceptions=True))[0], RequestFailed)
            assert sum(answer == right([i], 8) for i, answer in enumerate(good, 2)) >= 3
            await until(lambda: all(replica.up for replica in router.replicas.values()))

    run(go())


def test_an_answer_ends_on_the_engine_on_which_it_began(monkeypatch):
    async def go():
        async with routed(0) as (router, _):
            router.members({"r0": "old", "r1": "new", "r2": "old"})
            fakes = {url: replica.client for url, replica in router.replicas.items()}
            await until(lambda: all(replica.up for replica in router.replicas.values()))
            for url in ("r0", "r2"):
                fakes[url].fails = [(2, ErrorCode.UNAVAILABLE)]
            answers = await asyncio.gather(*(ask(router, [i]) for i in range(3)))
            assert answers == [right([i], 8) for i in range(3)]
            assert [made for _, _, made in fakes["r1"].served] == [0]
            monkeypatch.setattr(router_module, "PATIENCE_S", 0.02)
            router.members({"r1": "new"})
            fakes["r1"].go.clear()
            fakes["r1"].fails = [(3, ErrorCode.INTERNAL)]
            asked = asyncio.create_task(ask(router, [3]))
            await until(lambda: fakes["r1"].now == 1)
            router.members({"r1": "new", "r9": "old"})
            await until(lambda: router.replicas["r9"].up)
            monkeypatch.setattr(router_module, "PAUSE_S", (60, 60))  # the only one of its version stays away
            fakes["r1"].go.set()
            with pytest.raises(RequestFailed):
                await asked
            assert not router.replicas["r9"].client.served

    run(go())


def test_full_replicas_are_told_when_all_of_them_are():
    async def go():
        async with routed(2) as (router, fakes):
            fakes[0].fails_always = ErrorCode.QUEUE_FULL
            assert await asyncio.gather(*(ask(router, [i]) for i in range(4))) == [right([i], 8) for i in range(4)]
            fakes[1].fails_always = ErrorCode.QUEUE_FULL
            with pytest.raises(RequestFailed) as caught:
                await ask(router, [1])
            assert caught.value.code is ErrorCode.QUEUE_FULL
            assert all(replica.up for replica in router.replicas.values())

    run(go())


def test_without_replicas_nobody_waits():
    async def go():
        async with routed(0) as (router, _):
            with pytest.raises(RunError, match="none of 0 replicas") as caught:
                await ask(router, [1])
            assert caught.value.code is ErrorCode.UNAVAILABLE

    run(go())


def test_the_only_replica_is_waited_for_by_those_it_had(monkeypatch):
    async def go():
        async with routed(1, limit=2) as (router, (fake,)):
            fake.go.clear()
            tasks = [asyncio.create_task(ask(router, [i])) for i in range(3)]
            await until(lambda: fake.now == 2)
            fake.down = True
            fake.go.set()
            with pytest.raises(RunError, match="all replicas went down"):
                await tasks[2]
            with pytest.raises(RunError, match="none of 1 replicas is up"):
                await ask(router, [4])
            assert not await router.ready()
            fake.down = False
            assert await asyncio.gather(*tasks[:2]) == [right([i], 8) for i in range(2)]
            fake.down = True
            monkeypatch.setattr(router_module, "PATIENCE_S", 0.02)
            with pytest.raises(RequestFailed):
                await ask(router, [5])

    run(go())


def test_a_replica_that_fails_everything_gets_little():
    """It is the least busy one always."""

    async def go():
        async with routed(2) as (router, fakes):
            fakes[0].fails_always = ErrorCode.INTERNAL
            for i in range(200):
                assert await ask(router, [i], 2) == right([i], 2)
            assert len(fakes[0].served) < 60
            fakes[0].fails_always = None
            await until(lambda: router.replicas["r0"].up)
            await asyncio.gather(*(ask(router, [i], 2) for i in range(4)))
            assert router.replicas["r0"].pause_s == 0

    run(go())


def test_one_that_leaves_ends_what_it_has_and_gets_no_more():
    async def go():
        async with routed(2) as (router, fakes):
            for fake in fakes:
                fake.go.clear()
            tasks = [asyncio.create_task(ask(router, [i])) for i in range(4)]
            await until(lambda: [fake.now for fake in fakes] == [2, 2])
            router.members(["r1", "r2"])
            new = router.replicas["r2"].client
            new.go.clear()
            await until(lambda: router.replicas["r2"].up)
            tasks += [asyncio.create_task(ask(router, [i])) for i in range(4, 8)]
            await until(lambda: new.now + fakes[1].now == 6)
            for fake in (*fakes, new):
                fake.go.set()
            assert await asyncio.gather(*tasks) == [right([i], 8) for i in range(8)]
            assert len(fakes[0].served) == 2
            assert sorted(router.replicas) == ["r1", "r2"]
            await until(lambda: fakes[0].closed)
            assert not fakes[1].closed

    run(go())


def test_a_client_that_leaves_frees_its_place():
    async def go():
        async with routed(1, limit=1) as (router, (fake,)):
            async with contextlib.aclosing(router.generate([1], 8, streaming=True)) as source:
                await anext(source)
                waits = asyncio.create_task(ask(router, [2]))
                await until(lambda: router.waiting == 1)
            assert fake.now == 0 or fake.served[-1][0] == [2]
            assert await waits == right([2], 8)

    run(go())


def test_nvidias_backend_moves_only_what_has_not_begun():
    async def go():
        async with routed(2, resumes=False) as (router, fakes):
            for fake in fakes:
                fake.fails = [(0, ErrorCode.UNAVAILABLE)]
            fakes[1].fails = []
            assert await asyncio.gather(*(ask(router, [i]) for i in range(2))) == [right([i], 8) for i in range(2)]
            for fake in fakes:
                fake.fails = [(3, ErrorCode.UNAVAILABLE)]
            await until(lambda: all(replica.up for replica in router.replicas.values()))
            with pytest.raises(RequestFailed):
                await ask(router, [1])

    run(go())


@pytest.mark.parametrize("seed", range(3))
def test_whatever_dies_under_load_every_answer_is_right(seed):
    async def go():
        rng = random.Random(seed)
        async with routed(3, limit=4, max_queue=1000) as (router, fakes):
            prompts = [[rng.randrange(100) for _ in range(rng.randint(1, 12))] for _ in range(120)]
            asked = [asyncio.create_task(ask(router, prompt, 20)) for prompt in prompts]
            while not all(task.done() for task in asked):
                victim = rng.choice(fakes[:2])  # one that never dies: where all do, errors are right
                victim.down = rng.random() < 0.5
                await asyncio.sleep(0.003 * rng.random())
                victim.down = False
            assert await asyncio.gather(*asked) == [right(prompt, 20) for prompt in prompts]
            assert router.counts["answers_resumed_total"] > 0

    run(go())


def test_where_an_answer_goes_on_is_told_once():
    async def go():
        async with routed(2) as (router, fakes):
            for fake in fakes:
                fake.fails.append((3, ErrorCode.UNAVAILABLE))
            parts = [part async for part in router.generate([1], 8, streaming=True)]
            assert [token for part in parts for token in part] == right([1], 8)
            assert [part.resumed_after for part in parts] == [None] * 3 + [3, None, None, 6, None]
            assert [part.resumed_after async for part in router.generate([2], 4, streaming=True)] == [None] * 4

    run(go())


def test_metrics_name_every_replica():
    async def go():
        async with routed(2) as (router, _):
            await ask(router, [1])
            values = router.metrics()
            assert values['replica_up{replica="r0"}'] == 1
            assert values['replica_requests{replica="r1"}'] == values["requests_waiting"] == 0

    run(go())
