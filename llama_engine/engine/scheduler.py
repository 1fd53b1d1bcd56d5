"""In-flight batching: which chunks of which sequences run in the next step.

Decodes go first, then prefills that are under way, then new admissions, each first come, first served, all within
``max_num_tokens``. A prompt must not hold up those who are being answered: while one sequence waits for its first token
(is prefilled, or could be admitted), or at most half as many as decode, prefill takes at most ``max_prefill_tokens`` of
a step. When more wait, as after a burst, whole steps are theirs, for that serves most of them sooner.
When blocks run out the youngest sequence is preempted: its blocks are freed and it is prefilled again later from what
it has said.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from llama_engine.config import EngineConfig
from llama_engine.engine.executor import Chunk
from llama_engine.engine.kv_cache import BlockManager
from llama_engine.sampling import SamplingParams


class DrainFirst(Exception):
    """Preemption needs tokens that are still on the device: collect the step in flight, then schedule again."""


@dataclass(eq=False)
class Sequence:
    """One request. ``sampled`` counts tokens the device has been asked for; ``output`` those the host has seen."""

    request_id: int
    prompt: list[int]
    max_new_tokens: int
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: frozenset[int] = frozenset()
    output: list[int] = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    slot: int = -1
    computed: int = 0  # positions whose KV is in the cache or on its way
    sampled: int = 0
    last_on_device: bool = False  # the slot holds this sequence's newest token
    finished: bool = False

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


class Scheduler:
    """Owns the waiting queue, the running set, the slots and the blocks."""

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        self._config = config
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self._slots = list(range(config.max_batch_size - 1, -1, -1))
        self._grown: list[
            Sequence
        ] = []  # since the last plan, which is not the last call where DrainFirst came between
        self.preemptions = 0

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

    def schedule(self) -> Plan | None:
        """The next step, or None when there is nothing to run. Raises :class:`DrainFirst`."""
        budget = self._config.max_num_tokens
        work: list[tuple[Sequence, Chunk]] = []
        grown = self._grown
        admitted: list[Sequence] = []
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running:
            if sequence.sampled < sequence.max_new_tokens:
                (decoding if sequence.decoding else prefilling).append(sequence)
        for sequence in decoding:
            if sequence.slot < 0:
                continue  # preempted by an older one, in this very loop
            if sequence.computed >= len(sequence.table) * self.blocks.tokens_per_block:
                if not self._make_room(sequence):
                    continue
                grown.append(sequence)
            work.append((sequence, Chunk(sequence.slot, sequence.computed)))
        prefilling = [sequence for sequence in prefilling if sequence.slot >= 0]
        budget -= len(work)
        if work and len(prefilling) + self._admissible() <= max(1, len(work) // 2):
            budget = min(budget, self._config.max_prefill_tokens)
        for sequence in prefilling:
            budget -= self._prefill(work, sequence, budget)
        while budget > 0 and self._slots and self.waiting and self._admits(self.waiting[0]):
            sequence = self.waiting.popleft()
            sequence.slot = self._slots.pop()
            self.running.append(sequence)
            admitted.append(sequence)
            grown.append(sequence)
            budget -= self._prefill(work, sequence, budget)
        # what was preempted after it was planned does not run
        work = [(sequence, chunk) for sequence, chunk in work if sequence.slot >= 0]
        for sequence, chunk in work:
            sequence.computed += chunk.length
            if chunk.samples:
                sequence.sampled += 1
                sequence.last_on_device = True
        if not work:
            return None
        self._grown = []
        return Plan(work, [sequence for sequence in grown if sequence.slot >= 0], admitted)

    def _admissible(self) -> int:
        """About how many waiting sequences have room to run."""
        if not self.waiting:
            return 0
        room = self.blocks.free // self.blocks.blocks_for(self.waiting[0].known)
        return min(len(self.waiting), len(self._slots), room)

    def _admits(self, sequence: Sequence) -> bool:
        """Take the blocks of a waiting sequence, if one more is left for each that runs: or it would be preempted."""
        spare = self.blocks.free - self.blocks.blocks_for(sequence.known)
        return spare >= len(self.running) and self.blocks.grow(sequence.table, sequence.known)

    def _prefill(self, work: list[tuple[Sequence, Chunk]], sequence: Sequence, budget: int) -> int:
        """Plan the next tokens of a prompt, at most ``budget``; how many."""
        start, prompt, output = sequence.computed, sequence.prompt, sequence.output
        length = len(prompt) + len(output)
        end = min(length, start + budget)
        if end > start:
            part = prompt[start:end] + output[max(0, start - len(prompt)) : max(0, end - len(prompt))]
            work.append((sequence, Chunk(sequence.slot, start, part, samples=end == length)))
        return max(0, end - start)

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
        self.blocks.release(sequence.table)
        self._slots.append(sequence.slot)
        sequence.slot = -1
        sequence.last_on_device = False
