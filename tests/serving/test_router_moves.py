"""An answer whose replica fails goes on elsewhere, from its next token and once."""

import asyncio
import random

import pytest

from llama_engine.errors import ErrorCode
from llama_engine.serving import router as router_module
from llama_engine.serving.client import RequestFailed
from llama_engine.serving.router import MAX_TRIES
from tests.serving.fakes import ask, right, routed, run, until


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
