"""In-flight batching over an executor whose KV cache can be read: every chunk must find what its sequence put there."""

import random

import pytest

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.engine.engine import Engine
from llama_engine.engine.executor import ReadyHandle

MODEL = ModelConfig(50, 4, 4, 1, 1, 1, 4, 64)
SIZE = 4


class Failure(RuntimeError):
    """What a device does when it breaks off a step."""


def after(context, token):
    """The KV of a token, which depends on all tokens before it."""
    return hash((context, token))


def answer(prompt, new_tokens):
    """What the model says to a prompt, without any cache."""
    context = 0
    for token in prompt:
        context = after(context, token)
    tokens = []
    while len(tokens) < new_tokens:
        tokens.append(context % MODEL.vocab_size)
        context = after(context, tokens[-1])
    return tokens


class LedgerExecutor:
    """Writes into each block slot the KV of its token, and computes with nothing but what it finds there.

    ``failures``: in which share of the steps some chunks never run and the device says so, at once or when the tokens
    are read. Until the host knows of it, the next step may run on what is not there. Otherwise each chunk checks the
    positions before it against ``truth(slot)``, the ids that the host knows.
    """

    kernels, step_nbytes, kv_nbytes_per_token = "ledger", 0, 0

    def __init__(self, num_blocks, slots, asynchronous, failures=0.0):
        self.num_kv_blocks, self.asynchronous, self.failures = num_blocks, asynchronous, failures
        self.rng = random.Random(1)
        self.cells = {}
        self.tables = [[] for _ in range(slots)]
        self.last = [0] * slots
        self.computed = 0
        self.truth = None
        self.broken = False  # a step failed, and the host does not know yet

    def bind(self, slot, params, prompt, output):
        self.tables[slot] = []

    def set_block_table(self, slot, blocks):
        self.tables[slot] = list(blocks)

    def submit(self, step):
        failing = self.rng.random() < self.failures
        sampled = []
        for chunk in step.chunks:
            if failing and self.rng.random() < 0.5:
                sampled += [0] if chunk.samples else []
                continue
            context = self._context(chunk, checked=not (failing or self.broken))
            for position, token in enumerate(chunk.tokens or [self.last[chunk.slot]], chunk.start):
                context = after(context, token)
                self.cells[self._where(chunk.slot, position)] = context
                self.computed += 1
            if chunk.samples:
                self.last[chunk.slot] = context % MODEL.vocab_size
                sampled.append(self.last[chunk.slot])
        if failing and self.rng.random() < 0.5:
            raise Failure
        self.broken |= failing
        return FailingHandle(self) if failing else ReadyHandle(sampled)

    def _where(self, slot, position):
        block = self.tables[slot][position // SIZE]
        assert block > 0
        return block, position % SIZE

    def _context(self, chunk, checked):
        context, tokens = 0, self.truth(chunk.slot)
        for position in range(chunk.start):
            found = self.cells.get(self._where(chunk.slot, position))
            if checked and position < len(tokens):
                assert found == after(context, tokens[position]), f"position {position} of slot {chunk.slot}"
            context = found
        return context


class FailingHandle:
    def __init__(self, executor):
        self.executor = executor

    def tokens(self):
        self.executor.broken = False
        raise Failure

    def scored(self):
        return {}


def make_engine(*, num_blocks=24, asynchronous=False, failures=0.0, **changes):
    options = {"max_batch_size": 4, "max_seq_len": 64, "max_num_tokens": 16, "enable_prefix_cache": True} | changes
    config = EngineConfig(tokens_per_block=SIZE, num_kv_blocks=num_blocks, **options)
    executor = LedgerExecutor(num_blocks, config.max_batch_size, asynchronous, failures)
    engine = Engine(MODEL, config, executor)
    running = engine.scheduler.running
    executor.truth = lambda slot: next(s.prompt + s.output for s in running if s.slot == slot)
    return engine


def ask(engine, prompt, new_tokens):
    """The tokens of one request, run to its end, the prompt tokens it found cached, and the positions it computed."""
    before = engine.executor.computed
    request, tokens, cached = engine.add_request(prompt, new_tokens), [], None
    while engine.has_unfinished:
        for output in engine.step():
            assert output.request_id == request
            tokens += output.token_ids
            cached = output.cached_tokens
    return tokens, cached, engine.executor.computed - before


def check_invariants(engine):
    scheduler = engine.scheduler
    scheduler.blocks.check(sequence.table for sequence in scheduler.sequences)
    for sequence in scheduler.running:
        assert scheduler.blocks.blocks_for(sequence.computed) <= len(sequence.table)
    assert not any(sequence.table for sequence in scheduler.waiting)


def random_prompt(rng, past):
    """New, or like an earlier one up to somewhere, or a chat's next turn, or like those but for the first token."""
    new = [rng.randrange(MODEL.vocab_size) for _ in range(rng.randint(1, 20))]
    if past and rng.random() < 0.7:
        old = rng.choice(past)
        new = old[: rng.choice((len(old), rng.randint(1, len(old))))] + new
        if rng.random() < 0.2:
            new[0] = (new[0] + 1) % MODEL.vocab_size  # all later blocks hold the same tokens after another
    return new[:44]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("enable_prefix_cache", [False, True])
@pytest.mark.parametrize("failures", [pytest.param(0.0, marks=pytest.mark.slow), 0.01])  # 99 % of those steps work too
def test_random_load_never_reads_what_another_sequence_wrote(asynchronous, enable_prefix_cache, failures):
    engine = make_engine(asynchronous=asynchronous, failures=failures, enable_prefix_cache=enable_prefix_cache)
    rng, jobs, past, finished, failed = random.Random(7), {}, [], 0, 0
    for _ in range(10_000):
        if rng.random() < 0.25 and len(jobs) < 10:
            prompt, new = random_prompt(rng, past), rng.randint(1, 20)
            stops = rng.sample(range(MODEL.vocab_size), 3) if rng.random() < 0.5 else ()
            jobs[engine.add_request(prompt, new, stop_token_ids=stops)] = (answer(prompt, new), [], prompt)
        if jobs and rng.random() < 0.03:
            request = rng.choice(sorted(jobs))
            assert engine.cancel(request)
            del jobs[request]
        try:
            outputs = engine.step()
        except Failure:  # as EngineLoop does
            failed += 1
            for request in jobs:
                engine.cancel(request)
            jobs.clear()
            outputs = []
        for output in outputs:
            expected, tokens, prompt = jobs[output.request_id]
            tokens += output.token_ids
            assert tokens == expected[: len(tokens)]
            if output.finished:
                finished += 1
                past = [*past[-5:], prompt + tokens]
                del jobs[output.request_id]
        check_invariants(engine)
    for request in jobs:
        engine.cancel(request)
    engine.executor.failures = 0
    while engine.has_unfinished:
        engine.step()
    check_invariants(engine)
    scheduler = engine.scheduler
    assert scheduler.blocks.used == 0
    assert scheduler.preemptions > 100
    assert finished > 500
    assert (failed > 20) == (failures > 0)
    hits, queries = scheduler.prefix_cache_hit_tokens, scheduler.prefix_cache_query_tokens
    assert 0.1 * queries < hits < queries if enable_prefix_cache else hits == queries == 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_only_full_blocks_are_found_and_one_token_is_always_computed(asynchronous):
    engine = make_engine(asynchronous=asynchronous)
    prompt = list(range(10, 23))
    assert ask(engine, prompt, 1) == (answer(prompt, 1), 0, 13)
    assert ask(engine, prompt, 1) == (answer(prompt, 1), 12, 1)
    assert ask(engine, prompt[:12], 1) == (answer(prompt[:12], 1), 8, 4)  # all of its three blocks are there
    assert ask(engine, prompt[:7], 1)[1:] == (4, 3)
    assert ask(engine, [9, *prompt[1:]], 1)[1:] == (0, 13)  # blocks 1 and 2 are alike, what is before them is not
    assert ask(engine, prompt[4:], 1)[1:] == (0, 9)
    scheduler = engine.scheduler
    assert (scheduler.prefix_cache_hit_tokens, scheduler.prefix_cache_query_tokens) == (24, 13 + 13 + 12 + 7 + 13 + 9)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_second_turn_finds_the_answer_of_the_first(asynchronous):
    engine = make_engine(asynchronous=asynchronous)
    first = list(range(5, 12))
    said, _, _ = ask(engine, first, 10)
    second = [*first, *said, 3]  # positions 0 to 15 were computed; the last token said was not
    assert ask(engine, second, 2)[:2] == (answer(second, 2), 16)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_answer_is_found_while_it_grows(asynchronous):
    engine = make_engine(asynchronous=asynchronous)
    prompt = list(range(6))
    engine.add_request(prompt, 40)
    said = []
    while len(said) < 12:
        said += [token for output in engine.step() for token in output.token_ids]
    tokens, cached = [], set()
    other = engine.add_request([*prompt, *said], 3)
    while engine.has_unfinished:
        for output in engine.step():
            if output.request_id == other:
                tokens += output.token_ids
                cached.add(output.cached_tokens)
    assert (tokens, cached) == (answer([*prompt, *said], 3), {16})


def test_a_long_prompt_is_found_chunk_by_chunk_while_it_runs():
    engine = make_engine()
    prompt = [i % 50 for i in range(40)]
    engine.add_request(prompt, 4)
    engine.step()  # 16 of its tokens
    other = engine.add_request([*prompt[:16], 49], 4)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert {output.cached_tokens for output in outputs if output.request_id == other} == {16}


def test_prompts_of_one_step_do_not_find_each_other():
    engine = make_engine()
    prompt = list(range(8))
    ids = [engine.add_request(prompt, 2) for _ in range(2)]
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert [[t for o in outputs if o.request_id == i for t in o.token_ids] for i in ids] == [answer(prompt, 2)] * 2
    assert engine.scheduler.prefix_cache_hit_tokens == 0


def test_blocks_in_use_stay_and_the_least_recently_used_go():
    engine = make_engine(num_blocks=9)  # 8 to use
    first, second = [1] * 8, [2] * 8  # two blocks to keep each
    for prompt in (first, second, first):
        ask(engine, [*prompt, 0], 1)
    ask(engine, [3] * 21, 1)  # six blocks: two are free at most, so four of the older ones go
    assert ask(engine, [*first, 0], 1)[1] == 8
    assert ask(engine, [*second, 0], 1)[1] < 8


def test_a_preempted_sequence_finds_its_own_blocks_and_counts_no_hit():
    engine = make_engine(num_blocks=12, max_batch_size=2)
    prompts = [[i] * 9 for i in (1, 2)]
    ids = [engine.add_request(prompt, 24) for prompt in prompts]
    tokens = {i: [] for i in ids}
    while engine.has_unfinished:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            assert output.cached_tokens == 0
    assert engine.scheduler.preemptions == 1
    assert [tokens[i] for i in ids] == [answer(prompt, 24) for prompt in prompts]
    assert engine.executor.computed < 2 * (9 + 23) + 9  # the preempted one did not start from nothing
    assert engine.scheduler.prefix_cache_hit_tokens == 0


def test_after_a_failed_step_nothing_is_found():
    engine = make_engine()
    prompt = list(range(9))
    ask(engine, prompt, 1)
    engine.executor.failures = 1.0
    request = engine.add_request([*prompt, 7, 7, 7, 7], 4)
    with pytest.raises(Failure):
        engine.step()
    engine.cancel(request)
    engine.executor.failures = 0.0
    assert ask(engine, [*prompt, 7, 7, 7, 7], 4)[:2] == (answer([*prompt, 7, 7, 7, 7], 4), 0)


def test_no_later_request_overtakes_a_preempted_one():
    engine = make_engine(num_blocks=9, max_batch_size=2, enable_prefix_cache=False)
    engine.executor.truth = lambda slot: []
    sizes = (24, 24, 4)  # seven blocks, of eight, for each of the first two, and room for the third beside either
    first, second, third = (engine.add_request([number] * SIZE, new) for number, new in enumerate(sizes))
    finished = []
    while engine.has_unfinished:
        finished += [output.request_id for output in engine.step() if output.finished]
    assert engine.scheduler.preemptions > 0
    assert finished == [first, third, second]  # the third came in when the second was back
