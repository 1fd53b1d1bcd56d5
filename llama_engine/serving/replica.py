"""What the router knows of one replica, and of one request on its way."""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llama_engine.serving.client import GrpcClient

PREFILL_TOKENS = 256  # prompt tokens that hold up the others about as much as one more request that runs
KNOWN_BLOCKS = 1 << 16  # of a replica's prefix cache that are remembered, the latest


@dataclass(eq=False)
class Replica:
    """One server. ``up`` is None while it is asked; ``leaving`` ones end what they have and are forgotten."""

    url: str
    client: GrpcClient
    up: bool | None = None
    version: str = ""
    leaving: bool = False
    requests: int = 0
    prefill_tokens: int = 0  # of requests without a first token
    pause_s: float = 0.0
    doubt: asyncio.Event = field(default_factory=asyncio.Event)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    blocks: OrderedDict[bytes, None] = field(default_factory=OrderedDict)  # keys, most recently used last
    watcher: asyncio.Task[None] | None = None

    def cost(self, keys: Sequence[bytes], tokens: int, block_tokens: int) -> float:
        """Of answering a prompt of ``tokens`` ids whose full blocks have ``keys``."""
        cached = sum(1 for _ in itertools.takewhile(self.blocks.__contains__, keys)) * block_tokens
        return self.requests + (self.prefill_tokens + tokens - cached) / PREFILL_TOKENS

    def remember(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self.blocks[key] = None
            self.blocks.move_to_end(key)
        while len(self.blocks) > KNOWN_BLOCKS:
            self.blocks.popitem(last=False)


@dataclass(eq=False)
class Job:
    """One request on its way: the prompt and what has been made of its answer."""

    prompt: list[int]
    made: list[int] = field(default_factory=list)
    version: str = ""  # of what made them
    keys: list[bytes] = field(default_factory=list)
    tried: set[Replica] = field(default_factory=set)  # since the last new token
    tries: int = 0
