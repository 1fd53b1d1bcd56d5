"""One answer to one prompt, piece by piece, and several at once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llama_engine.sampling import Logprobs
from llama_engine.serving.client import NewTokens
from llama_engine.tokenizer import ChatTokenizer
from llm_demo.answers import Piece, Score, Usage
from llm_demo.api import Sampling
from llm_demo.text import TextStream
from llm_demo.tools import ToolFormat

AT_ONCE = 64  # choices of one request: it shall not be refused for filling the queue by itself


class Source(Protocol):
    """What a choice needs of the gateway."""

    tokenizer: ChatTokenizer
    counts: Counter[str]

    def ids(
        self, prompt: list[int], room: int, request: Sampling, seed: int, grammar: str | None
    ) -> AsyncIterator[NewTokens]: ...


@dataclass
class Choice:
    """The ``number``-th answer to ``prompt``, of ``room`` tokens at most; ``logprobs`` are of its tokens so far."""

    source: Source
    request: Sampling
    tools: ToolFormat | None
    grammar: str | None
    usage: Usage
    prompt: list[int]
    room: int
    number: int
    logprobs: list[float] = field(default_factory=list)
    told: bool = False  # how much of the prompt was cached

    @property
    def likelihood(self) -> float:
        """Mean log-probability of a token."""
        return sum(self.logprobs) / max(1, len(self.logprobs))

    async def pieces(self, index: int) -> AsyncGenerator[Piece, None]:
        """The last one alone has a reason."""
        request, tools, counts = self.request, self.tools, self.source.counts
        start, first = time.perf_counter(), 0.0
        text = TextStream(self.source.tokenizer, request.stop, request.min_tokens)
        held, scores, length = "", [], 0
        ids: list[int] | None = [] if request.gives_ids else None
        prompt = self.prompt if request.gives_ids else None
        seed = request.seed + self.number
        if request.echoes:
            held = self.source.tokenizer.backend.decode(self.prompt, skip_special_tokens=False)
        answer = self.source.ids(self.prompt, max(1, self.room), request, seed, self.grammar)
        async with contextlib.aclosing(answer) as source:
            async for new in source:
                first = first or time.perf_counter() - start
                self._count(new)
                if request.echoes and not text.tokens and request.scores is not None:
                    scores += self._scores(self.prompt, [None, *(new.prompt_logprobs or [])])
                if not self.room:
                    break
                self.usage.completion_tokens += len(new)
                counts["completion_tokens_total"] += len(new)
                held += text.push(new)
                if ids is not None:
                    ids += new
                if new.logprobs is not None:
                    scores += self._scores(new, new.logprobs)
                if text.stopped:
                    break
                if not (tools and tools.may_call(held)):
                    yield Piece(index, held, None, [], self._given(scores), length, ids, prompt)
                    length += sum(len(score.token.decode(errors="replace")) for score in scores)
                    held, scores, ids, prompt = "", [], ids and [], None
        if not text.stopped:
            held += text.push([], last=True)
        reason = "length" if text.tokens >= self.room and not text.stopped else "stop"
        counts["ttft_seconds_sum"] += first
        counts["ttft_seconds_count"] += 1
        calls = tools.calls(held) if tools and tools.may_call(held) else []
        if calls:
            held, reason = "", "tool_calls"
        yield Piece(index, held, reason, calls, self._given(scores), length, ids, prompt)

    def _count(self, new: NewTokens) -> None:
        first = self.number == 0 and not self.told  # an answer that moves to another replica tells it again
        if new.cached_tokens is not None and first:
            self.told = True
            self.usage.cached_tokens = (self.usage.cached_tokens or 0) + new.cached_tokens
        if new.resumed_after:
            self.usage.resumed_after.append(new.resumed_after)
        self.logprobs += [entry.token for entry in new.logprobs or []]

    def _scores(self, ids: Sequence[int], logprobs: Sequence[Logprobs | None]) -> list[Score]:
        name = self.source.tokenizer.token_bytes
        return [
            Score(name(token), entry and entry.token, [(name(i), value) for i, value in entry.top] if entry else [])
            for token, entry in zip(ids, logprobs)
        ]

    def _given(self, scores: list[Score]) -> list[Score] | None:
        wanted = self.request.logprobs
        return scores if wanted is not None and wanted is not False else None  # 0 is wanted


async def merged(sources: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """The pieces of several choices as they come, at most :data:`AT_ONCE` choices at a time. Leaving early, and a
    choice that fails, ends them all."""
    if len(sources) == 1:  # nothing to wait for in turn: no task and no queue between
        async with contextlib.aclosing(sources[0]) as source:
            async for piece in source:
                yield piece
        return
    pieces: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
    places = asyncio.Semaphore(AT_ONCE)

    async def drain(source: AsyncGenerator[Piece, None]) -> None:
        try:
            async with places, contextlib.aclosing(source):
                async for piece in source:
                    pieces.put_nowait(piece)
            pieces.put_nowait(None)
        except Exception as error:
            pieces.put_nowait(error)

    tasks = [asyncio.create_task(drain(source)) for source in sources]
    try:
        left = len(tasks)
        while left:
            piece = await pieces.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                left -= 1
            else:
                yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def best(
    source: AsyncGenerator[Piece, None], choices: Sequence[Choice], of: int, n: int
) -> AsyncGenerator[Piece, None]:
    """When all are complete: of each prompt's ``of`` choices the ``n`` whose tokens are most likely, best first."""
    async with contextlib.aclosing(source):
        pieces = [piece async for piece in source]
    for first in range(0, len(choices), of):
        ranked = sorted(range(first, first + of), key=lambda index: -choices[index].likelihood)
        for place, index in enumerate(ranked[:n]):
            for piece in (piece for piece in pieces if piece.index == index):
                piece.index = -1 - (first // of * n + place)  # negative: not to be taken for one of the others
    for piece in pieces:
        if piece.index < 0:
            piece.index = -1 - piece.index
            yield piece
