"""Replicas that Ray places and restarts; needs requirements-cluster.txt. Two nodes, both on this machine's loopback."""

import asyncio
import importlib.util
import os
import signal
import sys
import time

import pytest

from llama_engine.engine_dir import load_engine_json
from llama_engine.native import load_engine
from llama_engine.serving import cluster as cluster_module
from llama_engine.serving.cluster import Cluster
from llama_engine.serving.repository import ServeConfig
from llama_engine.serving.router import Router
from tests.engine.tools import generate
from tests.serving.tools import some_prompts

pytestmark = [  # Ray itself is imported later: it reads its settings then
    pytest.mark.skipif(sys.platform != "linux", reason="the wheel is for Linux"),
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed: requirements-cluster.txt"
    ),
]
NEW, CONFIG, EACH = 200, ServeConfig(device="cpu", drain_s=1), {"CPU": 1}
PROMPTS = some_prompts(24, seed=5)


@pytest.fixture(scope="module")
def nodes():
    """The second node, once it is there; the last test ends it."""
    return []


@pytest.fixture(scope="module")
def cluster(tiny_engine, nodes):
    """One replica on a node of its own, one on the head: a node has one core for one."""
    with Cluster(cpus=1) as cluster:
        import ray
        from ray._private.node import Node  # what ray.cluster_utils is made of
        from ray._private.parameter import RayParams

        cluster.deploy(tiny_engine, CONFIG, 1, resources=EACH)
        address = ray.get_runtime_context().gcs_address
        params = RayParams(gcs_address=address, num_cpus=1, object_store_memory=80 << 20, include_log_monitor=False)
        params.node_ip_address = "127.0.0.1"
        nodes.append(Node(params, head=False, shutdown_at_exit=True, spawn_reaper=False))
        cluster.deploy(tiny_engine, CONFIG, 2, resources=EACH)
        cluster.wait(2, 240)
        yield cluster
        cluster.stop()
        end(nodes)


def end(nodes):
    """Everything of the second node at once, as when a machine loses its power."""
    while nodes:
        nodes.pop().kill_all_processes(check_alive=False, allow_graceful=False)


@pytest.fixture(scope="module")
def right(tiny_engine):
    engine = load_engine(tiny_engine, device="cpu", threads=1)
    return [generate(engine, prompt, NEW) for prompt in PROMPTS]


def answers(cluster, engine_dir, disturb):
    """Of all prompts at once, while ``disturb`` runs in a thread; how many requests were moved."""

    async def go():
        router = Router.of(load_engine_json(engine_dir), cluster.members(), cluster.members)

        async def ask(prompt):
            ids = []
            async for new in router.generate(prompt, NEW, streaming=True):
                ids += new
            return ids

        disturbed = asyncio.get_running_loop().run_in_executor(None, disturb)
        rounds = []
        while not disturbed.done() or not rounds:
            rounds.append(await asyncio.gather(*map(ask, PROMPTS)))
        await disturbed
        rounds.append(await asyncio.gather(*map(ask, PROMPTS)))
        await router.close()
        return rounds, router.counts["requests_moved_total"]

    return asyncio.run(asyncio.wait_for(go(), 400))


def test_a_replica_that_is_killed_comes_back_and_no_answer_is_lost(cluster, tiny_engine, right):
    before = cluster.about()["replica-0"]

    def kill():
        for pid in before["pids"]:  # the actor, and the server, whose supervisor it was
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 240
        while (now := cluster.about()["replica-0"]) is None or now["pids"][0] == before["pids"][0]:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    rounds, _ = answers(cluster, tiny_engine, kill)
    assert all(made == right for made in rounds)


def test_a_rolling_replacement_loses_no_answer(cluster, tiny_engine, right, monkeypatch):
    monkeypatch.setattr(cluster_module, "NOTICED_S", 1.0)
    before, said = cluster.about(), []

    def replace():
        cluster.replace(tiny_engine, CONFIG, resources=EACH, drain_s=30, say=said.append)

    rounds, _ = answers(cluster, tiny_engine, replace)
    assert all(made == right for made in rounds)
    after = cluster.about()
    assert {about["pids"][0] for about in before.values()}.isdisjoint(about["pids"][0] for about in after.values())
    assert sum("0 requests left" in line for line in said) == 2


def test_nothing_of_it_listens_beyond_the_loopback(cluster):
    import psutil

    family = psutil.Process().children(recursive=True)
    connections = [c for process in family for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert connections
    assert {c.laddr.ip.removeprefix("::ffff:") for c in connections} == {"127.0.0.1"}
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_a_node_that_dies_takes_no_answer_with_it(cluster, nodes, tiny_engine, right):
    """The last: its replica finds no other core."""
    rounds, _ = answers(cluster, tiny_engine, lambda: end(nodes))
    assert all(made == right for made in rounds)
