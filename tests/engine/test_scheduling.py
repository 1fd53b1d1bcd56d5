"""What the scheduler puts into a step, over an executor that computes nothing."""

import random

import pytest

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.engine.engine import Engine
from llama_engine.engine.executor import ReadyHandle

MODEL = ModelConfig(64, 32, 64, 1, 2, 1, 16, 65536)


class Recorder:
    """Samples token 1 for everything and keeps the steps."""

    kernels, step_nbytes, kv_nbytes_per_token = "none", 0, 0

    def __init__(self, num_kv_blocks, asynchronous):
        self.num_kv_blocks, self.asynchronous, self.steps = num_kv_blocks, asynchronous, []
        self.tables = {}

    def bind(self, *request):
        pass

    def set_block_table(self, slot, blocks):
        self.tables[slot] = list(blocks)

    def submit(self, step):
        self.steps.append(step)
        held = [block for chunk in step.chunks for block in self.tables[chunk.slot]]
        assert len(set(held)) == len(held)  # no two sequences of a step share a block
        for chunk in step.chunks:
            assert chunk.start + chunk.length <= 64 * len(self.tables[chunk.slot])
        return ReadyHandle([1] * sum(chunk.samples for chunk in step.chunks))

    def counts(self):
        """Decodes and prefill tokens of each step."""
        return [
            (sum(c.tokens is None for c in s.chunks), sum(c.length for c in s.chunks if c.tokens is not None))
            for s in self.steps
        ]


def make(blocks=4096, asynchronous=True, **settings):
    config = EngineConfig(**{"max_batch_size": 64, "max_seq_len": 16384, "max_prefill_tokens": 128} | settings)
    return Engine(MODEL, config, Recorder(blocks, asynchronous))


def run(engine, steps=None):
    while engine.has_unfinished and steps != 0:
        engine.step()
        steps = None if steps is None else steps - 1


def test_one_decode_alone_is_not_held_up_either():
    engine = make()
    engine.add_request([1] * 8, 100)
    run(engine, 5)
    engine.executor.steps.clear()
    engine.add_request([1] * 1000, 4)
    run(engine, 8)
    assert engine.executor.counts() == [(1, 128)] * 7 + [(1, 104)]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_long_prompt_beside_decodes_takes_a_bounded_part_of_every_step(asynchronous):
    engine = make(asynchronous=asynchronous)
    for _ in range(32):
        engine.add_request([1] * 8, 400)
    run(engine, 10)
    engine.executor.steps.clear()
    late = engine.add_request([1] * 8192, 4)
    run(engine, 64 + 5)
    counts = engine.executor.counts()
    assert counts[:64] == [(32, 128)] * 64
    assert counts[64:] == [(33, 0)] * 3 + [(32, 0)] * 2
    assert late not in engine._requests


def test_a_prompt_alone_takes_whole_steps():
    engine = make()
    engine.add_request([1] * 8192, 4)
    run(engine)
    assert engine.executor.counts() == [(0, 2048)] * 4 + [(1, 0)] * 3


def test_more_waiting_than_decoding_go_first():
    engine = make()
    for _ in range(4):
        engine.add_request([1] * 8, 400)
    run(engine, 3)
    engine.executor.steps.clear()
    for _ in range(20):
        engine.add_request([1] * 1000, 400)
    run(engine, 40)
    counts = engine.executor.counts()
    assert [decodes + tokens for decodes, tokens in counts[:6]] == [2048] * 6
    assert counts[6][0] == 16  # of 24: from here on at most half as many wait
    shares = [tokens for _, tokens in counts[6:]]
    assert max(shares) == 8 * 128
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("scarce", ["slots", "blocks"])
def test_those_that_cannot_be_admitted_do_not_hurry_the_prefill(scarce):
    limits = {"max_batch_size": 8} if scarce == "slots" else {"blocks": 8 * 20 + 1}
    engine = make(**limits)
    rng = random.Random(1)
    for _ in range(60):
        engine.add_request([1] * 1000, rng.randint(100, 300))
    run(engine)
    beside = [(decodes, tokens) for decodes, tokens in engine.executor.counts()[20:] if tokens and decodes > 5]
    assert len(beside) > 100
    room = 8 if scarce == "slots" else 10  # sequences
    assert all(tokens <= 128 * (room - decodes) for decodes, tokens in beside)


def test_each_waiting_prompt_brings_its_share_of_a_step():
    engine = make(max_prefill_tokens=64)
    for _ in range(32):
        engine.add_request([1] * 8, 400)
    run(engine, 10)
    engine.executor.steps.clear()
    for _ in range(3):
        engine.add_request([1] * 640, 4)
    run(engine, 2)
    assert engine.executor.counts() == [(32, 192)] * 2


def test_prompts_are_answered_in_the_order_they_came():
    engine = make(max_prefill_tokens=16)
    rng = random.Random(3)
    ids = [engine.add_request([1] * rng.randint(1, 200), 50) for _ in range(100)]
    first = []
    while engine.has_unfinished:
        first += [o.request_id for o in engine.step() if o.request_id not in first]
    assert first == ids


@pytest.mark.parametrize(
    ("prompt", "new", "blocks"), [(1000, 250, 4000), (1000, 250, 1200), (32, 1000, 1200), (500, 1000, 2500)]
)
def test_scarce_blocks_cost_each_sequence_about_one_recomputation_at_most(prompt, new, blocks):
    engine = make(blocks, max_batch_size=256, max_seq_len=2048)
    for _ in range(256):
        engine.add_request([1] * prompt, new)
    run(engine)
    assert engine.scheduler.preemptions < 256
    recomputed = sum(tokens for _, tokens in engine.executor.counts()) - 256 * prompt
    assert recomputed < 0.4 * 256 * (prompt + new)
    assert engine.scheduler.blocks.used == 0
