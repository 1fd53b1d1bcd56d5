"""Many replicas of one engine behind the interface of one client: who answers what, and who goes on when one dies.

A request goes where it costs least: the requests that run there already, and the prompt tokens that are still to be
computed there, its own among them unless the replica's prefix cache holds them. A replica takes no more than ``limit``
at once; the rest wait here, first come, first served, for whichever is free first.

A replica that fails is left out until it is ready again. What it had begun is moved: another replica gets the prompt,
the ids that the client has already, and how many of them are the answer's (``output_prefix_length``). Draws depend on
seed and position alone and penalties on that split, so the client cannot tell, but for a gap. Only NVIDIA's backend,
which knows no such split, cannot go on: there an answer that has begun ends with the error.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

from llama_engine.engine.kv_cache import block_key
from llama_engine.engine_dir import EngineInfo
from llama_engine.errors import ErrorCode, RunError
from llama_engine.serving.client import GrpcClient, RequestFailed
from llama_engine.serving.replica import Job, Replica

# What another replica may do better. A timeout is the user's limit; bad input, infinite logits are the same anywhere.
MOVES = {ErrorCode.UNAVAILABLE, ErrorCode.SHUTTING_DOWN, ErrorCode.CANCELLED, ErrorCode.QUEUE_FULL, ErrorCode.INTERNAL}
MAX_TRIES = 3  # without a new token: a request that kills its replica must not kill them all
PATIENCE_S = 60.0  # for a replica to come back, of a request that had one
POLL_S = 0.5
PAUSE_S = (0.1, 5.0)  # before a replica whose engine fails is asked whether it is ready: doubled until it answers


Discover = Callable[[], Iterable[str] | Mapping[str, str]]
_Waiting = tuple[Job, "asyncio.Future[Replica]"]


class Router:
    """The replicas of :meth:`members` as one :class:`GrpcClient`. Create it inside a running event loop.

    ``limit`` bounds what one replica has at once, ``max_queue`` what waits beyond that. ``resumes`` is false for
    NVIDIA's backend. ``counts`` are for metrics.
    """

    def __init__(
        self, urls: Iterable[str], *, block_tokens: int, limit: int, max_queue: int = 256, resumes: bool = True
    ) -> None:
        self.block_tokens, self.limit, self.max_queue, self.resumes = block_tokens, limit, max_queue, resumes
        self.counts: Counter[str] = Counter(requests_moved_total=0, answers_resumed_total=0)
        self.replicas: dict[str, Replica] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._waiting: deque[_Waiting] = deque()
        self._follower: asyncio.Task[None] | None = None
        self.members(urls)

    @classmethod
    def of(
        cls,
        info: EngineInfo,
        urls: Iterable[str],
        discover: Discover | None = None,
        instances: int = 1,
        **options: Any,
    ) -> Router:
        """For replicas of one engine, or of ``instances``: as many requests each as fit its batch, and some to follow
        at once. ``discover`` is asked for the members twice a second, in a thread; while it fails, they stay who they
        are."""
        batch = info.engine.max_batch_size * instances
        options = {"limit": batch + batch // 8 + 1, "resumes": info.backend == "native"} | options
        router = cls(urls, block_tokens=info.engine.tokens_per_block, **options)
        if discover:
            router._follower = asyncio.create_task(router._follow(discover))
        return router

    async def _follow(self, discover: Discover) -> None:
        while True:
            with contextlib.suppress(Exception):  # whoever knows the members is away
                self.members(await asyncio.to_thread(discover))
            await asyncio.sleep(POLL_S)

    def members(self, urls: Iterable[str] | Mapping[str, str]) -> None:
        """From now on these, perhaps with the version of what each serves: an answer begins and ends on one version.
        One that is gone from the list ends what it has, and gets nothing new."""
        versions = urls if isinstance(urls, Mapping) else dict.fromkeys(urls, "")
        for url in sorted(versions.keys() - self.replicas.keys()):
            replica = self.replicas[url] = Replica(url, GrpcClient(url, keepalive=True))
            replica.watcher = asyncio.create_task(self._watch(replica))
        for replica in list(self.replicas.values()):
            replica.leaving = replica.url not in versions
            replica.version = versions.get(replica.url, replica.version)
            self._forget_if_done(replica)
        self._serve_waiting()

    async def ready(self, model: str = "tensorrt_llm") -> bool:
        """Whether a replica is up, or may be. At the start this waits until all were asked, or one is up."""
        if not self._up():
            await asyncio.gather(*(replica.asked.wait() for replica in self.replicas.values()))
        return self._hope

    @property
    def _hope(self) -> bool:
        return any(replica.up is not False for replica in self.replicas.values())

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def generate(
        self, prompt: list[int], new_tokens: int, *, streaming: bool, model: str = "tensorrt_llm", **options: Any
    ) -> AsyncIterator[list[int]]:
        """As :meth:`GrpcClient.generate`. Raises :class:`RequestFailed` of the last replica that was tried, or
        :class:`RunError` when there is none, or too many requests wait."""
        job = Job(prompt, keys=self._keys(prompt))
        stops = {options.get("end_id", -1), *options.get("stop_words_list", [[]])[0]}
        await self.ready()
        replica = (None if self._waiting else self._take(job)) or await self._wait(job)
        while True:
            if job.made:  # and so what belongs to the prompt has been answered
                options |= {"output_prefix_length": len(job.made)}
                options.pop("return_prompt_log_probs", None)
            source = replica.client.generate(
                prompt + job.made, new_tokens - len(job.made), streaming=streaming, model=model, **options
            )
            error, begun, owed = None, False, len(prompt) + len(job.made)
            replica.prefill_tokens += owed
            try:
                async with contextlib.aclosing(source):
                    async for ids in source:
                        if ids and not begun:
                            begun = True
                            replica.prefill_tokens -= owed
                        if ids:
                            if job.tries and job.made:
                                ids.resumed_after = len(job.made)
                            job.made += ids
                            job.tries = 0
                            job.tried.clear()
                        yield ids
                replica.pause_s = 0.0
                replica.remember(self._keys(prompt + job.made))
                return
            except RequestFailed as failure:
                error = failure
            finally:
                replica.prefill_tokens -= 0 if begun else owed
                self._leave(replica, error)
            if job.made and (len(job.made) >= new_tokens or job.made[-1] in stops):
                return  # whole, but for the message that says so
            replica = await self._move(job, replica, error)

    async def close(self) -> None:
        if self._follower:
            self._follower.cancel()
        replicas, self.replicas = self.replicas, {}
        for replica in replicas.values():
            replica.watcher.cancel()
            await replica.client.close()

    def _up(self) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.up and not replica.leaving]

    def _keys(self, ids: list[int]) -> list[bytes]:
        """Of the full blocks of ``ids``, as the engine's prefix cache names them."""
        size, keys = self.block_tokens, [b""]
        for end in range(size, len(ids) + 1, size):
            keys.append(block_key(keys[-1], ids[end - size : end]))
        return keys[1:]

    def _take(self, job: Job) -> Replica | None:
        """A place at the cheapest replica that has one, rather where the job has not failed."""
        able = [replica for replica in self._up() if not job.made or replica.version == job.version]
        rather = [replica for replica in able if replica not in job.tried] or able
        free = [replica for replica in rather if replica.requests < self.limit]
        if not free:
            return None
        tokens = len(job.prompt) + len(job.made)
        best = min(free, key=lambda replica: replica.cost(job.keys, tokens, self.block_tokens))
        best.requests += 1
        job.version = best.version
        best.remember(job.keys)
        self.replicas[best.url] = self.replicas.pop(best.url)  # last in turn among equals
        return best

    async def _wait(self, job: Job, error: RequestFailed | None = None) -> Replica:
        """In the queue for a place. A job that had one and failed with ``error`` goes first, and gives up with that.

        Raises :class:`RunError` where there is nothing to wait for.
        """
        if not (error or self._hope):
            raise RunError(f"none of {len(self.replicas)} replicas is up", ErrorCode.UNAVAILABLE)
        if not error and len(self._waiting) >= self.max_queue:
            raise RunError(f"the queue is full: {len(self._waiting)} requests wait", ErrorCode.QUEUE_FULL)
        loop = asyncio.get_running_loop()
        entry = (job, loop.create_future())
        if error:
            self._waiting.appendleft(entry)
            loop.call_later(PATIENCE_S, self._dismiss, entry, error)
        else:
            self._waiting.append(entry)
        self._serve_waiting()
        try:
            return await entry[1]
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
            elif not (entry[1].cancelled() or entry[1].exception()):  # the place came too late
                self._leave(entry[1].result(), None)
            raise

    async def _move(self, job: Job, replica: Replica, error: RequestFailed) -> Replica:
        """Another replica for a job that failed on ``replica``. Raises ``error`` where none can help."""
        job.tries += 1
        job.tried.add(replica)
        full = error.code is ErrorCode.QUEUE_FULL and job.tried.issuperset(self._up())
        if error.code not in MOVES or job.tries >= MAX_TRIES or full or (job.made and not self.resumes):
            raise error
        self.counts["requests_moved_total"] += 1
        self.counts["answers_resumed_total"] += bool(job.made)
        return await self._wait(job, error)

    def _leave(self, replica: Replica, error: RequestFailed | None) -> None:
        """Give a place back; after an error that is not the request's own, ask whether the replica is ready."""
        replica.requests -= 1
        if error and error.code in MOVES - {ErrorCode.QUEUE_FULL}:
            if error.code is ErrorCode.INTERNAL:  # it says it is ready, and is the least busy one
                replica.pause_s = min(max(PAUSE_S[0], 2 * replica.pause_s), PAUSE_S[1])
            replica.up = None
            replica.doubt.set()
        self._forget_if_done(replica)
        self._serve_waiting()

    def _serve_waiting(self) -> None:
        while self._waiting:
            job, place = self._waiting[0]
            if not place.cancelled():
                replica = self._take(job)
                if replica is None:
                    return
                place.set_result(replica)
            self._waiting.popleft()

    def _forget_if_done(self, replica: Replica) -> None:
        if replica.leaving and replica.requests == 0 and self.replicas.pop(replica.url, None):
            replica.watcher.cancel()
            replica.asked.set()
            closing = asyncio.create_task(replica.client.close())
            self._closing.add(closing)  # a task that nobody holds may vanish
            closing.add_done_callback(self._closing.discard)

    async def _watch(self, replica: Replica) -> None:
        """Ask the replica whether it is ready, at once when it is doubted."""
        while self.replicas.get(replica.url) is replica:
            if replica.doubt.is_set():
                replica.doubt.clear()
                await asyncio.sleep(replica.pause_s)
            up = await replica.client.ready()
            if not replica.doubt.is_set():
                if not up:
                    replica.blocks.clear()  # another process will come back
                replica.up = up
                replica.asked.set()
                self._serve_waiting()
                if not self._hope:  # tell those that wait and never had a replica
                    for entry in [entry for entry in self._waiting if not entry[0].tries]:
                        self._dismiss(entry, RunError("all replicas went down", ErrorCode.UNAVAILABLE))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(replica.doubt.wait(), POLL_S)

    def _dismiss(self, entry: _Waiting, error: RunError) -> None:
        if entry in self._waiting and not entry[1].done():
            self._waiting.remove(entry)
            entry[1].set_exception(error)

    def metrics(self) -> dict[str, float]:
        """By name, with labels."""
        values: dict[str, float] = dict(self.counts) | {"requests_waiting": self.waiting}
        for replica in self.replicas.values():
            label = f'{{replica="{replica.url}"}}'
            values[f"replica_up{label}"] = bool(replica.up)
            values[f"replica_requests{label}"] = replica.requests
        return values
