"""Replicas over GPUs and machines: Ray places, watches and restarts them, and says where they are. It carries no token:
those travel over gRPC, from each replica's own Triton server to the router.

A replica is a Ray actor that holds a :class:`TritonServer`. Dead servers are started again by :func:`supervise` inside
it, dead actors and those of dead machines by Ray, wherever there is room. Should Ray be away, what serves goes on.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import InputError, RunError
from llama_engine.serving.client import KEY_VARIABLE, inference_key
from llama_engine.serving.repository import ServeConfig
from llama_engine.serving.server import TritonServer, supervise

NAMESPACE = "llama-engine"
ANSWER_S = 2.0  # an actor's time to say where its server is
NOTICED_S = 3.0  # until every gateway has seen that a replica is leaving
LOOPBACK = {  # before Ray is imported: a cluster of this machine alone, that nobody else can reach
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's name for "listen on the loopback only"
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Worker:
    """The actor: one server of ``engine_dir`` on the GPU that Ray gave it, listening where gateways can reach it."""

    def __init__(self, engine_dir: str, config: ServeConfig, key: str | None) -> None:
        import ray

        if key:
            os.environ[KEY_VARIABLE] = key
        info = load_engine_json(engine_dir)
        self._about = {"version": info.weights_sha256, "model": info.identity, "node": ray.util.get_node_ip_address()}
        self._server = TritonServer(engine_dir, config, host=self._about["node"], http=False)
        self._server.start()
        self._leaving, self._ended = False, threading.Event()
        threading.Thread(target=self._supervise, daemon=True).start()

    def about(self) -> dict[str, Any]:
        """``url``, ``version`` (the weights' hash), ``model``, ``node``, ``leaving``, and ``pids`` of what serves."""
        process = self._server.process
        pids = [os.getpid(), *([process.pid] if process else [])]
        return self._about | {"url": self._server.grpc_url, "leaving": self._leaving, "pids": pids}

    def leave(self) -> None:
        """Tell gateways to send nothing more."""
        self._leaving = True

    def requests(self) -> int:
        """How many are running or waiting here."""
        return int(self._server.metrics()["requests"])

    def stop(self) -> None:
        self._ended.set()
        self._server.stop()

    def _supervise(self) -> None:
        try:
            supervise(self._server, print, self._ended)
        except BaseException:
            os._exit(1)  # for Ray to start another, perhaps elsewhere


class Cluster:
    """``with Cluster(address) as cluster``: the one at ``address``, or without one a cluster of this machine that ends
    with this process. Raises :class:`InputError` without Ray."""

    def __init__(self, address: str | None = None, *, cpus: int | None = None) -> None:
        if importlib.util.find_spec("ray") is None:
            raise InputError("Ray is not installed: pip install -r requirements-cluster.txt (Python 3.10 to 3.14)")
        self.address, self.cpus = address, cpus
        self._urls: dict[str, tuple[str, str]] = {}  # name: (url, version), as last heard
        self._actors: dict[str, Any] = {}  # an actor that nobody holds and that is not detached ends

    def __enter__(self) -> Cluster:
        if not self.address:
            os.environ.update({name: value for name, value in LOOPBACK.items() if name not in os.environ})
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        else:
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        import ray

        own = {"num_cpus": self.cpus, "include_dashboard": False, "object_store_memory": 80 << 20}
        options = {} if self.address else own
        try:
            ray.init(
                self.address or "local", namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR", **options
            )
        except Exception as error:  # Ray has no class of its own for these
            raise RunError(f"no Ray cluster at {self.address or 'this machine'}: {_line(error)}") from None
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()

    def resources(self) -> dict[str, float]:
        """Of the whole cluster by name, such as CPU and GPU."""
        import ray

        return ray.cluster_resources()

    def deploy(self, engine_dir: Path, config: ServeConfig, count: int, *, resources: Mapping[str, float]) -> None:
        """See to it that replicas 0 to ``count`` - 1 are there; returns at once. ``resources`` is what each takes, by
        Ray's names. On a joined cluster they outlive this process."""
        if self.address and not inference_key():
            raise InputError(f"replicas of a cluster are open to its network: set {KEY_VARIABLE} to a secret first")
        for number in range(count):
            if f"replica-{number}" not in self._actors:
                self._start(f"replica-{number}", engine_dir, config, resources)

    def _start(self, name: str, engine_dir: Path, config: ServeConfig, resources: Mapping[str, float]) -> None:
        import ray

        others = {key: value for key, value in resources.items() if key not in ("CPU", "GPU")}
        actor = ray.remote(Worker).options(
            name=name,
            get_if_exists=True,
            lifetime="detached" if self.address else None,
            max_restarts=-1,
            max_concurrency=4,
            num_cpus=resources.get("CPU", 1),
            num_gpus=resources.get("GPU", 0),
            resources=others,
        )
        self._actors[name] = actor.remote(str(Path(engine_dir).resolve()), config, inference_key())

    def names(self) -> list[str]:
        import ray

        found = ray.util.list_named_actors(all_namespaces=True)
        return sorted(x["name"] for x in found if x["namespace"] == NAMESPACE and x["name"].startswith("replica-"))

    def about(self) -> dict[str, dict[str, Any] | None]:
        """What each replica says of itself; None while it says nothing."""
        import ray

        calls = {name: ray.get_actor(name).about.remote() for name in self.names()}
        ready = ray.wait(list(calls.values()), num_returns=len(calls), timeout=ANSWER_S)[0] if calls else []
        return {name: _result(call) if call in ready else None for name, call in calls.items()}

    def members(self) -> dict[str, str]:
        """{url: version} of the replicas that take requests. Of one that says nothing, what it said last: it may be
        busy, and whether it serves is for the router to find out."""
        heard = self.about()
        self._urls = {name: self._urls[name] for name in heard if name in self._urls}
        for name, about in heard.items():
            if about and about["leaving"]:
                self._urls.pop(name, None)
            elif about:
                self._urls[name] = (about["url"], about["version"])
        return dict(self._urls.values())

    def wait(self, count: int, timeout_s: float = 600) -> None:
        """Until so many replicas serve. Raises :class:`RunError`."""
        deadline = time.monotonic() + timeout_s
        while len(self.members()) < count:
            if time.monotonic() > deadline:
                raise RunError(f"{len(self.members())} of {count} replicas serve after {timeout_s:g} s")
            time.sleep(0.2)

    def replace(
        self,
        engine_dir: Path,
        config: ServeConfig,
        *,
        resources: Mapping[str, float],
        drain_s: float,
        say: Callable[[str], None],
    ) -> None:
        """Give every replica a new engine, one after the other, while the others answer. A replica ends what it has,
        for ``drain_s`` at most; what it has still then goes on elsewhere, on the old engine.

        Raises :class:`InputError` for another model: gateways hold its tokenizer and template.
        """
        import ray

        names, model = self.names(), load_engine_json(engine_dir).identity["name"]
        if len(names) < 2:
            raise InputError(f"{len(names)} replicas: a rolling replacement needs two, of which one answers")
        for name in names:
            about = self.about()[name]
            if about and about["model"]["name"] != model:
                raise InputError(f"{name} serves {about['model']['name']}, {engine_dir} holds {model}: start it anew")
            actor = ray.get_actor(name)
            if about:
                ray.get(actor.leave.remote())
                time.sleep(NOTICED_S)
                deadline = time.monotonic() + drain_s
                while (left := _result(actor.requests.remote())) and time.monotonic() < deadline:
                    time.sleep(0.2)
                say(f"{name}: {left or 0} requests left, stopping")
                _result(actor.stop.remote())
            ray.kill(actor, no_restart=True)
            while name in self.names():
                time.sleep(0.1)
            self._start(name, engine_dir, config, resources)
            self.wait(len(names))
            say(f"{name}: serves the new engine")

    def stop(self) -> None:
        """End every replica, whoever started it."""
        import ray

        actors = [ray.get_actor(name) for name in self.names()]
        for call in [actor.stop.remote() for actor in actors]:
            _result(call)
        for actor in actors:
            ray.kill(actor, no_restart=True)


def _result(call: Any) -> Any:
    """What an actor answered; None when it is dead, or away."""
    import ray

    try:
        return ray.get(call, timeout=60)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
        return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
