"""What a load generator can ask: one protocol for any served engine, and Triton's ``tensorrt_llm`` models behind it.

OpenAI's API is in :mod:`llama_engine.serving.openai_target`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from llama_engine.sampling import SamplingParams
from llama_engine.serving.client import Client, connect

TRITON_MODEL = "tensorrt_llm"
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Ask:
    """One request: the conversation so far as (role, token ids) with an answer to come, of ``new_tokens``."""

    messages: tuple[tuple[str, tuple[int, ...]], ...]
    new_tokens: int
    sampling: SamplingParams | None = None

    @property
    def ids(self) -> list[int]:
        """The whole prompt, without a chat template."""
        return list(itertools.chain.from_iterable(ids for _, ids in self.messages))


class Event(NamedTuple):
    """Something of an answer that the caller can use since ``at`` (``perf_counter`` seconds).

    ``tokens`` is how many tokens it brought, None where the server does not say. ``ids`` are theirs where the API sends
    ids. The last event of an answer may bring nothing but ``finish`` (why it ended) and ``usage`` (what the server
    counted: ``prompt_tokens``, ``completion_tokens`` and, of the prompt, ``cached_tokens``).
    """

    at: float
    tokens: int | None
    ids: Sequence[int] = ()
    text: str = ""
    finish: str | None = None
    usage: dict[str, int] | None = None


class Target(Protocol):
    """A served engine. Create it inside a running event loop; requests may run at the same time.

    ``prompt_as`` is what it sends, ids, text or messages; ``refused`` names what the server was asked to do and would
    not, such as ``ignore_eos``.
    """

    api: str
    url: str
    model: str
    prompt_as: str
    refused: list[str]

    async def ready(self) -> bool:
        """True when the server can be reached and has the model."""
        ...

    async def prepare(self) -> None:
        """Learn the model's name and what the server takes. Raises :class:`RunError`."""
        ...

    def stream(self, ask: Ask, *, streaming: bool = True) -> AsyncIterator[Event]:
        """The answer as it arrives; leaving early cancels it. Raises :class:`RequestFailed`."""
        ...

    async def close(self) -> None: ...


def describe_target(target: Target) -> dict[str, Any]:
    """What a result says of it."""
    return {name: getattr(target, name) for name in ("api", "url", "model", "prompt_as", "refused")}


class TritonTarget:
    """Triton over gRPC or HTTP. Ids in, ids out, exactly so many: nothing ends an answer early."""

    prompt_as = "ids"

    def __init__(self, protocol: str, url: str, model: str = TRITON_MODEL) -> None:
        self.api, self.url, self.model = f"triton-{protocol}", url, model
        self.refused: list[str] = []
        self._client: Client = connect(protocol, url)

    async def ready(self) -> bool:
        return await self._client.ready(self.model)

    async def prepare(self) -> None:
        """Nothing to learn: what the server lacks, its first answer says."""

    async def stream(self, ask: Ask, *, streaming: bool = True) -> AsyncIterator[Event]:
        options: dict[str, Any] = {}
        if (drawn := ask.sampling) and drawn.temperature > 0:
            options = {"temperature": drawn.temperature, "runtime_top_p": drawn.top_p, "random_seed": drawn.seed}
            options |= {"runtime_top_k": drawn.top_k} if drawn.top_k else {}
        async for ids in self._client.generate(
            ask.ids, ask.new_tokens, streaming=streaming, model=self.model, **options
        ):
            yield Event(time.perf_counter(), len(ids), ids)

    async def close(self) -> None:
        await self._client.close()
