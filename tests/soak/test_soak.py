"""Mixed load for SOAK_S seconds (15 by default, 1200 for a release): nothing leaks, nothing answers differently.

SOAK_S=1200 python -m pytest tests/soak --slow
"""

import asyncio
import os
import random
import sys
import time

import psutil
import pytest

from llama_engine.serving.client import RequestFailed, connect
from llama_engine.serving.repository import ServeConfig
from llama_engine.serving.server import TritonServer
from tests.serving.tools import alone, assert_idle

SOAK_S = float(os.environ.get("SOAK_S", 15))
MAX_GROWTH = 100e6
HAMMERERS = 2  # users that ask again at once when the queue is full; the others back off, as real clients do
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the wheel is for Linux"),
    pytest.mark.timeout(SOAK_S + 300),
]


def resident(pid):
    """Resident bytes of the server and of each of its backends, by process."""
    process = psutil.Process(pid)
    return {(part.pid, part.name()): part.memory_info().rss for part in [process, *process.children(recursive=True)]}


@pytest.mark.slow
def test_soak(tiny_engine):
    rng = random.Random(0)
    prompts = [[rng.randrange(512) for _ in range(rng.randint(1, 120))] for _ in range(64)]
    right = alone(tiny_engine, prompts, 100)
    counts = {"answered": 0, "refused": 0, "vanished": 0, "impatient": 0, "bad": 0}

    async def user(clients, number, end):
        rng = random.Random(number)
        while time.monotonic() < end:
            client, which = rng.choice(clients), rng.randrange(len(prompts))
            new_tokens, streaming = rng.randint(1, 100), rng.random() < 0.5
            deed = rng.choices(["ask", "vanish", "hurry", "bad"], [6, 2, 2, 1])[0]
            prompt = [999] if deed == "bad" else prompts[which]
            answers = client.generate(prompt, new_tokens, streaming=streaming)

            async def take(answers=answers, deed=deed):
                ids = []
                async for new in answers:
                    ids += new
                    if deed == "vanish":
                        break
                await answers.aclose()
                return ids

            try:
                ids = await asyncio.wait_for(take(), 0.02 if deed == "hurry" else 60)
                if deed in ("ask", "hurry"):
                    assert ids == right[which][:new_tokens]
                    counts["answered"] += 1
                counts["vanished"] += deed == "vanish"
            except asyncio.TimeoutError:
                assert deed == "hurry", "an ordinary request took a minute"
                counts["impatient"] += 1
            except RequestFailed as error:
                if deed != "bad" and "queue is full" not in str(error):
                    raise
                counts["bad" if deed == "bad" else "refused"] += 1
                if deed != "bad" and number >= HAMMERERS:
                    await asyncio.sleep(rng.uniform(0.02, 0.2))

    async def load(server, seconds):
        clients = [connect("grpc", server.grpc_url), connect("http", server.http_url)]
        end = time.monotonic() + seconds
        await asyncio.gather(*(user(clients, number, end) for number in range(16)))
        for client in clients:
            await client.close()

    with TritonServer(tiny_engine, ServeConfig(max_queue_size=8), env={"OMP_NUM_THREADS": "1"}) as server:
        asyncio.run(load(server, min(15.0, SOAK_S / 3)))  # pools and caches fill
        before = resident(server.process.pid)
        asyncio.run(load(server, SOAK_S))
        growth = {name: after - before.get(name, 0) for name, after in resident(server.process.pid).items()}
        assert_idle(server)
        metrics = server.metrics()
    grown = ", ".join(f"{name} {nbytes / 1e6:+.1f} MB" for (_, name), nbytes in growth.items())
    print(f"soak {SOAK_S:.0f} s: {counts}, {grown}, preemptions {metrics['preemptions']:.0f}")
    assert sum(growth.values()) < MAX_GROWTH
    assert min(counts["answered"], counts["vanished"], counts["bad"]) > 0
