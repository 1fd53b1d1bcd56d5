"""The router over replicas that fail on command: nothing is lost, doubled or wrong, and nobody gets more than is fair.

A fake's next token depends on all ids before it, so an answer that goes on from the wrong place is seen.
"""

import asyncio
import contextlib

import pytest

from llama_engine.errors import ErrorCode, RunError
from llama_engine.serving import replica as replica_module
from llama_engine.serving import router as router_module
from llama_engine.serving.client import RequestFailed
from tests.serving.fakes import ask, right, routed, run, until


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


def test_metrics_name_every_replica():
    async def go():
        async with routed(2) as (router, _):
            await ask(router, [1])
            values = router.metrics()
            assert values['replica_up{replica="r0"}'] == 1
            assert values['replica_requests{replica="r1"}'] == values["requests_waiting"] == 0

    run(go())
