"""In-flight batching: which chunks of which sequences run in the next step.

Decodes go first, then prefills that are under way, then new admissions, each first come, first served, all within
``max_num_tokens``. A prompt must not hold up those who are being answered: while one sequence waits for its first token
(is prefilled, or could be admitted), or at most half as many as decode, prefill takes at most ``max_prefill_tokens`` of
a step for each that waits. When more wait, as after a burst, whole steps are theirs: that serves most of them sooner.
When blocks run out the youngest sequence is preempted: its blocks are freed and it is prefilled again later from what
it has said.

With ``enable_prefix_cache`` a sequence starts behind the longest prefix whose full blocks are registered. A block is
registered when a step that fills it has been planned and the host knows its tokens. Steps run in the order of their
planning, so what a later step finds is there when it reads.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from llama_engine.config import EngineConfig
from llama_engine.engine.kv_cache import BlockManager, block_key
from llama_engine.engine.step import Chunk
from llama_engine.sampling import Logprobs, SamplingParams

SCORED_TOKENS = 256  # prefill of a step that scores a prompt, at most: such a step keeps the logits of every row


class DrainFirst(Exception):
    """Preemption needs tokens that are still on the device: collect the step in flight, then schedule again."""


class Grammar(Protocol):
    """What an answer may look like, token by token. A step needs the token of the step before, so that on an
    asynchronous executor such a sequence runs in every other step alone."""

    def forbidden(self) -> np.ndarray:
        """bool ``[vocab]``: the tokens that may not come next."""
        ...

    def advance(self, token: int) -> bool:
        """Take the next token; whether nothing may follow it but the end."""
        ...


@dataclass(eq=False)
class Sequence:
    """One request. ``sampled`` counts tokens the device has been asked for; ``output`` those the host has seen.

    ``on_tokens`` and ``deadline`` (``time.monotonic()``) are the loop's, which calls the one with each
    :class:`~llama_engine.engine.engine.Output` and looks at the other; nothing here does.

    ``params`` are in force for the next token. Once ``min_tokens`` of the answer are asked for, ``released`` replaces
    them, if there is one: until then ``params`` ban what would end the answer.
    """

    request_id: int
    prompt: list[int]
    max_new_tokens: int
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: frozenset[int] = frozenset()
    grammar: Grammar | None = None
    min_tokens: int = 0
    released: SamplingParams | None = None
    output: list[int] = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    slot: int = -1
    computed: int = 0  # positions whose KV is in the cache or on its way
    sampled: int = 0
    last_on_device: bool = False  # the slot holds this sequence's newest token
    finished: bool = False
    keys: list[bytes] = field(default_factory=list)  # of its first full blocks, each computed once
    registered: int = 0  # blocks of the table that are registered, or have an equal that is
    doubtful: bool = False  # a step failed: what the table holds must not be registered
    cached_tokens: int | None = None  # prompt tokens found in the prefix cache; None until admitted
    prompt_logprobs: list[Logprobs] = field(default_factory=list)  # of the prompt's tokens from the second on, so far
    on_tokens: Callable[[Any], None] = lambda output: None
    deadline: float = float("inf")

    def tokens(self, start: int, end: int) -> list[int]:
        """The ids at positions ``start .. end - 1``, as far as the host knows them."""
        n = len(self.prompt)
        return self.prompt[start:end] + self.output[max(0, start - n) : max(0, end - n)]

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of the prompt are still wanted."""
        return self.params.prompt_logprobs and len(self.prompt_logprobs) < len(self.prompt) - 1

    @property
    def known(self) -> int:
        """Positions that have a token, on the host or on the device."""
        return len(self.prompt) + self.sampled

    @property
    def decoding(self) -> bool:
        return self.last_on_device and self.computed == self.known - 1


@dataclass(frozen=True)
class Plan:
    """A step's chunks with the sequences they belong to, and what changed since the last step."""

    work: list[tuple[Sequence, Chunk]]
    grown: list[Sequence]  # their block tables are longer, or new
    admitted: list[Sequence]  # their slots are new
    released: list[Sequence]  # their parameters are: from this step on, what ends their answers may come


class Scheduler:
    """Owns the waiting queue, the running set, the slots and the blocks."""

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        self._config = config
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self._slots = list(range(config.max_batch_size - 1, -1, -1))
        self._grown: list[Sequence] = []  # kept over a DrainFirst, which ends a schedule half-way
        self.preemptions = 0
        self.prefix_cache_query_tokens = 0  # prompt tokens looked up, once a request
        self.prefix_cache_hit_tokens = 0

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.running, *self.waiting]

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Free everything the sequence holds. Safe with a step in flight: device work is ordered."""
        sequence.finished = True
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def reset_prefix_cache(self) -> None:
        """Forget all that is cached, and what the running sequences hold: after a step that failed, it may be wrong."""
        self.blocks.forget_all()
        for sequence in self.running:
            sequence.doubtful = True

    def schedule(self) -> Plan | None:
        """The next step, or None when there is nothing to run. Raises :class:`DrainFirst`."""
        budget = self._config.max_num_tokens
        work: list[tuple[Sequence, Chunk]] = []
        admitted: list[Sequence] = []
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running:
            waits = sequence.grammar is not None and sequence.sampled != len(sequence.output)
            if sequence.sampled < sequence.max_new_tokens and not waits:
                (decoding if sequence.decoding else prefilling).append(sequence)
        for sequence in decoding:
            if sequence.slot < 0:
                continue  # preempted by an older one, in this very loop
            if sequence.computed >= len(sequence.table) * self.blocks.tokens_per_block:
                if not self._make_room(sequence):
                    continue
                self._grown.append(sequence)
                self._register(sequence)
            work.append((sequence, Chunk(sequence.slot, sequence.computed)))
        prefilling = [sequence for sequence in prefilling if sequence.slot >= 0]
        budget -= len(work)
        prompts = len(prefilling) + self._admissible()
        if work and prompts <= max(1, len(work) // 2):
            budget = min(budget, self._config.max_prefill_tokens * prompts)
        if any(s.scoring for s in (*prefilling, *itertools.islice(self.waiting, 1))):
            budget = min(budget, SCORED_TOKENS)
        for sequence in prefilling:
            budget -= self._prefill(work, sequence, budget)
        while budget > 0 and self._slots and self.waiting:
            if self.waiting[0].scoring and budget > SCORED_TOKENS:
                break  # the next step is limited from its start
            if not self._admits(self.waiting[0]):
                break
            sequence = self.waiting.popleft()
            sequence.slot = self._slots.pop()
            self.running.append(sequence)
            admitted.append(sequence)
            self._grown.append(sequence)
            budget -= self._prefill(work, sequence, budget)
        # what was preempted after it was planned does not run
        work = [(sequence, chunk) for sequence, chunk in work if sequence.slot >= 0]
        released = []
        for sequence, chunk in work:
            sequence.computed += chunk.length
            if chunk.samples:
                sequence.sampled += 1
                sequence.last_on_device = True
                if sequence.released and sequence.sampled > sequence.min_tokens:
                    sequence.params, sequence.released = sequence.released, None
                    released.append(sequence)
            if chunk.tokens is not None:  # decodes are seen to when their tables grow
                self._register(sequence)
        if not work:
            return None
        grown, self._grown = [sequence for sequence in self._grown if sequence.slot >= 0], []
        return Plan(work, grown, admitted, released)

    def _admissible(self) -> int:
        """About how many waiting sequences have room to run."""
        if not self.waiting:
            return 0
        room = self.blocks.free // self.blocks.blocks_for(self.waiting[0].known)
        return min(len(self.waiting), len(self._slots), room)

    def _admits(self, sequence: Sequence) -> bool:
        """Take the blocks of a waiting sequence, if one more is left for each that runs: or it would be preempted."""
        size, table = self.blocks.tokens_per_block, sequence.table
        if self._config.enable_prefix_cache and not sequence.scoring:
            # The last token is computed always: its logits are wanted.
            self.blocks.match(table, self._keys(sequence, (sequence.known - 1) // size))
        cached = len(table)
        if self.blocks.free - (self.blocks.blocks_for(sequence.known) - cached) < len(self.running):
            self.blocks.release(table)
            return False
        self.blocks.grow(table, sequence.known)
        sequence.registered, sequence.computed, sequence.doubtful = cached, cached * size, False
        if sequence.cached_tokens is None:  # what a preempted sequence finds again is its own
            sequence.cached_tokens = min(sequence.computed, len(sequence.prompt))
            self.prefix_cache_hit_tokens += sequence.computed
            self.prefix_cache_query_tokens += sequence.known if self._config.enable_prefix_cache else 0
        return True

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """The keys of the first ``count`` full blocks."""
        keys, size = sequence.keys, self.blocks.tokens_per_block
        while len(keys) < count:
            tokens = sequence.tokens(len(keys) * size, (len(keys) + 1) * size)
            keys.append(block_key(keys[-1] if keys else b"", tokens))
        return keys[:count]

    def _register(self, sequence: Sequence) -> None:
        """Put the full blocks whose tokens the host knows into the prefix cache."""
        known = min(sequence.computed, len(sequence.prompt) + len(sequence.output))
        full = known // self.blocks.tokens_per_block
        if self._config.enable_prefix_cache and full > sequence.registered and not sequence.doubtful:
            keys = self._keys(sequence, full)
            for index in range(sequence.registered, full):
                self.blocks.register(sequence.table[index], keys[index])
            sequence.registered = full

    def _prefill(self, work: list[tuple[Sequence, Chunk]], sequence: Sequence, budget: int) -> int:
        """Plan the next tokens of a prompt, at most ``budget``; how many."""
        end = min(sequence.known, sequence.computed + budget)
        if end > sequence.computed:
            part = sequence.tokens(sequence.computed, end)
            work.append((sequence, Chunk(sequence.slot, sequence.computed, part, samples=end == sequence.known)))
        return max(0, end - sequence.computed)

    def _make_room(self, sequence: Sequence) -> bool:
        """Grow the sequence by one position, preempting from the youngest on; False if it was itself preempted."""
        while not self.blocks.grow(sequence.table, sequence.computed + 1):
            victim = self.running[-1]
            if any(s.sampled != len(s.output) for s in self.running):
                raise DrainFirst
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        sequence.computed = 0
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._register(sequence)
        self.blocks.release(sequence.table)
        self._slots.append(sequence.slot)
        sequence.slot = -1
        sequence.last_on_device = False
