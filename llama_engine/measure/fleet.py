"""What a failover is measured on: servers that are kept running, and gateways before them, each in its own process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from llama_engine.errors import RunError
from llama_engine.serving.repository import REPOSITORY, ServeConfig
from llama_engine.serving.server import TritonServer, free_port, supervise

GATEWAY = REPOSITORY.parent / "llm_demo/server.py"
START_S = 180
NICE = 10
METRIC = re.compile(r"^llm_demo_(\S+) (\S+)$", re.MULTILINE)


@dataclass
class Fleet:
    servers: list[TritonServer]
    said: list[str] = field(default_factory=list)  # by their supervisors

    @property
    def urls(self) -> list[str]:
        return [server.grpc_url for server in self.servers]


@contextlib.contextmanager
def replicas(engine_dir: Path, count: int, config: ServeConfig) -> Iterator[Fleet]:
    """Servers, each kept running by a thread of its own; on GPUs one a card, in turn. On a CPU they make way for the
    gateways and the load generator, as another machine's would: else the generator measures its own waiting."""
    cards = torch.cuda.device_count() if config.device == "cuda" and config.instances == 1 else 0
    engines = count * config.instances
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // engines))}
    ended = threading.Event()

    def thread(work: Callable[..., None], *arguments: object) -> threading.Thread:
        def run() -> None:
            if config.device == "cpu":
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)  # this thread's, and what it starts
            work(*arguments)

        found = threading.Thread(target=run)
        found.start()
        return found

    with contextlib.ExitStack() as stack:
        servers = [
            TritonServer(
                engine_dir,
                config,
                http=False,
                env=threads | ({"CUDA_VISIBLE_DEVICES": str(i % cards)} if cards else {}),
            )
            for i in range(count)
        ]
        for server in servers:
            stack.callback(server.stop)
        for starting in [thread(server.start) for server in servers]:
            starting.join()
        if dead := [server for server in servers if not server.alive]:
            raise RunError(f"a replica did not start: see {dead[0].log}")
        fleet = Fleet(servers)
        watching = [thread(supervise, server, fleet.said.append, ended) for server in servers]
        try:
            yield fleet
        finally:
            ended.set()
            for watcher in watching:
                watcher.join()


@dataclass
class Gateways:
    """Processes of ``llm_demo/server.py`` over the same replicas."""

    ports: list[int]
    processes: list[subprocess.Popen[bytes]]

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    def metrics(self) -> Counter[str]:
        """Their sums, by name with labels and without the prefix."""
        total: Counter[str] = Counter()
        for url in self.urls:
            with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
                total.update({name: float(value) for name, value in METRIC.findall(answer.read().decode())})
        return total

    def cpu_s(self) -> float:
        """Of all of them, since they were started."""
        times = [psutil.Process(process.pid).cpu_times() for process in self.processes]
        return sum(each.user + each.system for each in times)

    def up(self, replica: str) -> bool:
        """Whether every gateway takes ``replica`` to be up."""
        return self.metrics()[f'replica_up{{replica="{replica}"}}'] == len(self.ports)


@contextlib.contextmanager
def gateways(
    engine_dir: Path, groups: Sequence[Sequence[str]], count: int, instances: int = 1
) -> Iterator[list[Gateways]]:
    """``count`` of them before the replicas of each group of URLs, once all see all of theirs."""
    command = [sys.executable, str(GATEWAY), "--engine-dir", str(engine_dir), "--instances", str(instances)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY.parent), *sys.path]), "OMP_NUM_THREADS": "1"}
    found = [Gateways([free_port() for _ in range(count)], []) for _ in groups]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for urls, group in zip(groups, found):
            flags = [part for url in urls for part in ("--replica", url)]
            group.processes += [
                subprocess.Popen(
                    [*command, *flags, "--port", str(port)], env=env, stdout=subprocess.DEVNULL, start_new_session=True
                )
                for port in group.ports
            ]
            processes += group.processes
        deadline = time.monotonic() + START_S
        for urls, group in zip(groups, found):
            while not _all_up(group, urls):
                if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
                    raise RunError("a gateway did not start")
                time.sleep(0.1)
        yield found
    finally:
        for process in processes:
            process.send_signal(signal.SIGINT)
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _all_up(found: Gateways, urls: Sequence[str]) -> bool:
    try:
        return all(map(found.up, urls))
    except OSError:
        return False
