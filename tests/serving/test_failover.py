"""Two real replicas behind the router, of which one is killed, stopped or replaced while both answer."""

import asyncio
import os
import signal
import sys

import pytest

from llama_engine.native import load_engine
from llama_engine.sampling import SamplingParams
from llama_engine.serving import client as client_module
from llama_engine.serving.client import GrpcClient
from llama_engine.serving.repository import ServeConfig
from llama_engine.serving.router import Router
from llama_engine.serving.server import TritonServer
from tests.engine.tools import generate
from tests.serving.tools import some_prompts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the wheel is for Linux")
NEW = 200
SAMPLINGS = [  # as inputs of the server, and as the engine has them
    ({}, SamplingParams()),
    ({"temperature": 1.5, "random_seed": 7}, SamplingParams(temperature=1.5, seed=7)),
    (
        {"temperature": 0.5, "runtime_top_k": 50, "random_seed": 2**63, "presence_penalty": 1.5},
        SamplingParams(temperature=0.5, top_k=50, seed=2**63, presence_penalty=1.5),
    ),
    (
        {"repetition_penalty": 1.5, "frequency_penalty": 0.5},
        SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5),
    ),
]
ASKED = list(zip(some_prompts(12, seed=3), SAMPLINGS * 3))


@pytest.fixture(scope="module")
def replicas(tiny_engine):
    config = ServeConfig(drain_s=0, stream_interval=3)
    options = {"env": {"OMP_NUM_THREADS": "1"}, "http": False}
    with TritonServer(tiny_engine, config, **options) as first, TritonServer(tiny_engine, config, **options) as second:
        yield first, second


@pytest.fixture(scope="module")
def right(tiny_engine):
    """Each answer as an engine gives it that is never disturbed."""
    engine = load_engine(tiny_engine, device="cpu", threads=1)
    return [generate(engine, prompt, NEW, params=params) for prompt, (_, params) in ASKED]


def test_responses_hold_as_many_tokens_as_asked_for_after_the_first(replicas, right):
    async def go():
        client = GrpcClient(replicas[0].grpc_url)
        prompt, (options, _) = ASKED[0]
        parts = [part async for part in client.generate(prompt, NEW, streaming=True, **options)]
        await client.close()
        return parts

    parts = asyncio.run(go())
    assert [token for part in parts for token in part] == right[0]
    assert len(parts) <= 2 + (NEW - 1) // 3  # fewer where a busy machine let tokens pile up


DISTURBANCES = {
    "kill -9": TritonServer.kill,
    "a machine that is silent": lambda server: os.killpg(server.process.pid, signal.SIGSTOP),
    "a replacement": TritonServer.stop,  # what runs may end, what comes is refused
}
LAST = [*DISTURBANCES][-1]


KILLED_AT = 400  # tokens


@pytest.mark.slow
@pytest.mark.parametrize("how", DISTURBANCES)
def test_every_answer_is_whole_and_right(replicas, right, how, monkeypatch):
    """Users, more than both replicas take at once, ask on until an answer was moved: whatever the speed of the engine,
    and however far behind it this process is, that comes, for a disturbance that met no answer is made again."""
    monkeypatch.setattr(client_module, "KEEPALIVE", [(name, min(ms, 1000)) for name, ms in client_module.KEEPALIVE])
    victim, urls = replicas[0], [replica.grpc_url for replica in replicas]
    # a replacement lets what runs end, so that only answers which had not begun need move
    counted = "requests_moved_total" if how == LAST else "answers_resumed_total"

    async def go():
        loop = asyncio.get_running_loop()
        router, answers, made = Router(urls, block_tokens=16, limit=4), [], 0
        begun, over = asyncio.Event(), asyncio.Event()
        await router.ready()
        there = router.replicas[victim.grpc_url]

        async def user(number):
            nonlocal made
            prompt, (options, _) = ASKED[number]
            while not over.is_set():
                ids = []
                async for new in router.generate(prompt, NEW, streaming=True, **options):
                    ids += new
                    made += len(new)
                    if made >= KILLED_AT and there.requests:
                        begun.set()
                answers.append((number, ids))

        async def again():
            victim.kill()
            await loop.run_in_executor(None, victim.start)
            while not there.up:
                await asyncio.sleep(0.05)

        async def disturb():
            await begun.wait()
            await loop.run_in_executor(None, DISTURBANCES[how], victim)
            while not router.counts[counted]:
                await asyncio.sleep(0.01)
                if there.up is False and not there.requests:
                    await again()
                    await loop.run_in_executor(None, DISTURBANCES[how], victim)
            over.set()

        await asyncio.gather(disturb(), *map(user, range(len(ASKED))))
        if how != LAST:
            await again()
        await router.close()
        return answers

    answers = asyncio.run(asyncio.wait_for(go(), 240))
    assert all(ids == right[number] for number, ids in answers)
    assert {number for number, _ in answers} == set(range(len(ASKED)))
