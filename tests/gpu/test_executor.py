"""The CUDA executor against the PyTorch reference: on a GPU, and in Triton's interpreter where there is none."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.engine.step import Chunk, Step
from llama_engine.model.sampler import sample
from llama_engine.model.weights import random_weights
from llama_engine.sampling import SamplingParams, count_tokens, recent_tokens
from tests.gpu.pairs import DEVICE, ENGINE, TINY, blocks_of, make_executor, make_pair
from tests.repeats import quick

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("int8_head", "kv_cache"),
    quick([(False, "fp16"), (True, "fp16"), (False, "fp8"), (True, "fp8")], (True, "fp8")),
)
def test_ragged_steps_match_the_reference(int8_head, kv_cache):
    fused, host = make_pair(int8_head=int8_head, engine=dataclasses.replace(ENGINE, kv_cache=kv_cache))
    assert fused.kv_nbytes_per_token == host.kv_nbytes_per_token == fused.model.kv[0][0, 0, :, 0].nbytes * 2 * 2
    for executor in (fused, host):
        for slot in range(4):
            executor.bind(slot, SamplingParams())
            executor.set_block_table(slot, blocks_of(slot))
    prompts = [[5, 9, 33, 2, 70], [1], list(range(20, 40))]
    steps = [
        Step((Chunk(0, 0, prompts[0]), Chunk(2, 0, prompts[2][:7], samples=False)), "all"),
        Step((Chunk(0, 5), Chunk(2, 7, prompts[2][7:]), Chunk(1, 0, prompts[1])), "last"),
        Step((Chunk(2, 20), Chunk(0, 6), Chunk(1, 1)), "last"),
        Step((Chunk(1, 2), Chunk(2, 21)), "last"),
    ]
    for step in steps:
        got, want = fused.submit(step), host.submit(step)
        assert got.logits().shape == want.logits().shape
        assert (got.logits() - want.logits()).abs().max() < 0.02 * want.logits().abs().max()
        assert got.tokens() == want.tokens()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU captures graphs of its own")
def test_steps_run_in_the_graph_of_their_bucket():
    fused, host = make_pair()
    replayed = []

    def capture(run):
        return SimpleNamespace(replay=lambda: (replayed.append(1), run()))

    fused._capture = capture
    fused._capture_all()
    for executor in (fused, host):
        for slot in range(2):
            executor.bind(slot, SamplingParams(temperature=1.5, seed=slot) if slot else SamplingParams())
            executor.set_block_table(slot, blocks_of(slot))
    steps = [  # a prefill's two graphs; a pass of both; a decode's, each with the sampler's but the first
        (Step((Chunk(0, 0, [5, 9, 33]),), "last"), 2),
        (Step((Chunk(0, 3), Chunk(1, 0, [70, 3])), "last"), 2),
        (Step((Chunk(1, 2), Chunk(0, 4)), "last"), 2),
    ]
    for step, graphs in steps:
        replayed.clear()
        got, want = fused.submit(step), host.submit(step)
        assert (got.logits() - want.logits()).abs().max() < 0.02 * want.logits().abs().max()
        assert got.tokens() == want.tokens()
        assert len(replayed) == graphs


def test_a_request_alone_equals_the_same_request_in_a_batch():
    fused, _ = make_pair(kernels="tiled")
    results = []
    for others in (0, 3):
        for slot in range(4):
            fused.bind(slot, SamplingParams())
            fused.set_block_table(slot, blocks_of(slot))
        slots = [1, 0, 3, 2][: 1 + others]
        chunks = tuple(Chunk(s, 0, [7 * s + 1 + i for i in range(5 + 9 * (s != 1))]) for s in slots)
        outputs, logits = [fused.submit(Step(chunks)).tokens()[0]], []
        for i in range(4):
            chunks = tuple(Chunk(s, 5 + 9 * (s != 1) + i) for s in slots)
            handle = fused.submit(Step(chunks, "last"))
            outputs.append(handle.tokens()[0])
            logits.append(handle.logits()[0].clone())
        results.append((outputs, torch.stack(logits)))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.slow
@pytest.mark.parametrize("graphs_end_at", [1024, 2], ids=["graph", "eager"])
def test_decodes_and_new_prompts_in_one_pass_equal_two_passes(monkeypatch, graphs_end_at):
    """Bit for bit on a GPU, where the kernels are the same; the interpreter's products round by their shapes."""
    config = ModelConfig(96, 64, 96, 2, 4, 2, 32, 128)
    weights = random_weights(config, DEVICE)
    results = []
    for mixed in (True, False):
        fused = make_executor(config, weights)
        if not mixed:
            monkeypatch.setattr(fused, "_mixed_shape", lambda *_: None)
        elif graphs_end_at == 2:
            fused._mixed_buckets = []
            monkeypatch.setattr("llama_engine.gpu.buckets.PREFILL_BUCKETS", (2,))
        for slot in range(4):
            fused.bind(slot, SamplingParams(temperature=float(slot == 3), seed=7))
            fused.set_block_table(slot, blocks_of(slot))
        tokens = [fused.submit(Step((Chunk(0, 0, [5, 9, 33]), Chunk(3, 0, [8])))).tokens()]
        steps = [
            Step((Chunk(3, 1), Chunk(0, 3), Chunk(1, 0, [1, 2]), Chunk(2, 0, list(range(20)), samples=False)), "last"),
            Step((Chunk(3, 2), Chunk(0, 4), Chunk(1, 2), Chunk(2, 20, list(range(20, 40)))), "last"),
            Step(tuple(Chunk(slot, at) for slot, at in ((2, 40), (0, 5), (1, 3), (3, 3))), "last"),
        ]
        logits = []
        for step in steps:
            handle = fused.submit(step)
            tokens.append(handle.tokens())
            logits.append(handle.logits().clone())
        passes = [len(fused.submit(Step((Chunk(0, 6), Chunk(1, 4, [3, 4, 5]))))._passes)]
        assert passes == [1 if mixed else 2]
        results.append((tokens, torch.cat(logits)))
    assert results[0][0] == results[1][0]
    bound = 0.0 if DEVICE.type == "cuda" else 0.01 * results[1][1].abs().max()
    assert (results[0][1] - results[1][1]).abs().max() <= bound


def test_block_tables_of_many_lengths_arrive_together():
    fused, _ = make_pair()
    tables = {0: [3, 1, 2], 2: [9], 1: [4, 5, 6, 7]}
    for slot, blocks in tables.items():
        fused.set_block_table(slot, [8, 8, 8])
        fused.set_block_table(slot, blocks)
    fused.submit(Step((Chunk(0, 0, [1]),))).tokens()
    for slot, blocks in tables.items():
        assert fused.model.block_tables[slot, : len(blocks)].tolist() == blocks
    assert not fused.model.block_tables[3:].any()


def test_what_one_pass_cannot_hold_takes_two():
    fused, _ = make_pair(engine=EngineConfig(16, 64, 1024, 16, num_kv_blocks=65, max_prefill_tokens=30))
    decode, prompt = Chunk(0, 4), Chunk(1, 0, [1] * 30)

    def shape(*chunks, logits="none"):
        step = Step(chunks, logits)
        where = range(len(chunks))
        decodes = [i for i in where if chunks[i].tokens is None]
        return fused._mixed_shape(step, decodes, [i for i in where if i not in decodes])

    assert shape(decode, prompt) == (8, 30, 8)
    assert shape(*(Chunk(i, 4) for i in range(9)), Chunk(9, 0, [1] * 30)) == (16, 30, 8)
    assert shape(decode, Chunk(1, 0, [1] * 31)) == (8, 60, 8)
    assert shape(decode, Chunk(1, 0, [1] * 61)) is None
    assert shape(decode, *(Chunk(i, 0, [1]) for i in range(1, 10))) is None
    assert shape(decode, Chunk(1, 0, [1] * 1025)) == (1, 1025, None)
    assert shape(decode, *(Chunk(i, 0, [1] * 200) for i in range(1, 10))) == (1, 1800, None)
    assert shape(decode, prompt, logits="all") is None
    assert shape(decode) is None
    assert shape(prompt) is None


@pytest.mark.slow
def test_more_rows_than_one_tile_of_lm_head():
    rows = 70
    engine = EngineConfig(rows, max_seq_len=16, max_num_tokens=rows, tokens_per_block=16, num_kv_blocks=rows + 1)
    fused, host = make_pair(engine=engine)
    for executor in (fused, host):
        for slot in range(rows):
            executor.bind(slot, SamplingParams())
            executor.set_block_table(slot, [1 + slot])
        executor.submit(Step(tuple(Chunk(slot, 0, [slot]) for slot in range(rows)))).tokens()
    step = Step(tuple(Chunk(slot, 1) for slot in reversed(range(rows))), "last")
    got, want = fused.submit(step), host.submit(step)
    assert (got.logits() - want.logits()).abs().max() < 0.02 * want.logits().abs().max()
    assert got.tokens() == got.logits().argmax(-1).tolist()


@pytest.mark.slow
def test_sampled_requests_repeat_for_a_seed_and_do_not_touch_greedy_ones():
    fused, _ = make_pair()

    def run(params):
        for slot, p in enumerate(params):
            fused.bind(slot, p)
            fused.set_block_table(slot, blocks_of(slot))
        tokens = [fused.submit(Step((Chunk(0, 0, [3, 4]), Chunk(1, 0, [3, 4])))).tokens()]
        tokens += [fused.submit(Step((Chunk(0, i), Chunk(1, i)))).tokens() for i in (2, 3)]
        return [list(column) for column in zip(*tokens)]

    hot = SamplingParams(temperature=5.0, seed=11)
    first, again = run([SamplingParams(), hot]), run([SamplingParams(), hot])
    assert first == again
    assert first[0] == run([SamplingParams(), SamplingParams()])[0]
    assert any(run([SamplingParams(), SamplingParams(temperature=5.0, seed=s)])[1] != first[1] for s in (1, 2, 3))


@pytest.mark.parametrize("graphs", quick([True, False], True))
def test_every_slot_draws_what_its_parameters_define(graphs):
    fused, _ = make_pair(graphs=graphs)
    words = ((1,), (2,), (6, 6, 7, 7), *((i, 7) for i in range(TINY.vocab_size) if i % 2))
    params = [
        SamplingParams(0.7, top_p=0.9, seed=5, repetition_penalty=1.5, frequency_penalty=1.0, logprobs=3),
        SamplingParams(),
        SamplingParams(presence_penalty=-2.0, logit_bias=((7, 1.5),), bad_words=words),
        SamplingParams(1.5, top_k=30, min_p=0.01, seed=2**64 - 1, logprobs=0),
    ]
    prompts = [[5, 9, 33], [1], [8, 8, 4, 2], [70, 3]]
    outputs = [[], [9], [6, 6, 7], []]  # as after a preemption
    for slot, p in enumerate(params):
        fused.bind(slot, SamplingParams(bad_words=((0,), (1, 2)), temperature=2.0))  # of a request that is gone
        fused.bind(slot, p, prompts[slot], outputs[slot])
        fused.set_block_table(slot, blocks_of(slot))
    lengths = [len(prompts[slot] + outputs[slot]) for slot in range(4)]
    steps = [Step(tuple(Chunk(s, 0, prompts[s] + outputs[s]) for s in (0, 1, 3)), "last")]
    steps += [Step((*(Chunk(s, lengths[s]) for s in (3, 0, 1)), Chunk(2, 0, prompts[2] + outputs[2])), "last")]
    steps += [Step(tuple(Chunk(s, lengths[s] + i - (s == 2)) for s in (2, 3, 0, 1)), "last") for i in (1, 2, 3)]
    banned = tuple((i,) for i in range(0, TINY.vocab_size, 2))
    changes = {2: (1, {"bad_words": banned}), 3: (0, {"bad_words": banned}), 4: (1, {"bad_words": ()})}
    for number, step in enumerate(steps):
        if number in changes:
            slot, change = changes[number]
            params[slot] = dataclasses.replace(params[slot], **change)
            fused.rebind(slot, params[slot])
        handle = fused.submit(step)
        logits, tokens, scores = handle.logits(), handle.tokens(), handle.logprobs()
        slots = [chunk.slot for chunk in step.chunks]
        counts = torch.stack(
            [torch.from_numpy(count_tokens(prompts[s], outputs[s], TINY.vocab_size)) for s in slots]
        ).to(DEVICE)
        for row, s in enumerate(slots):
            if not params[s].penalized:
                counts[row] = 0
        positions = [chunk.start + chunk.length for chunk in step.chunks]
        recent = np.stack([recent_tokens(prompts[s], outputs[s]) for s in slots])
        assert tokens == sample(logits, [params[s] for s in slots], positions, counts, recent).tolist()
        for row, (s, token) in enumerate(zip(slots, tokens)):
            outputs[s].append(token)
            expected = torch.log_softmax(logits[row], 0)
            if params[s].logprobs is None:
                assert scores[row] is None
                continue
            assert scores[row].token == pytest.approx(expected[token].item(), abs=1e-4)
            top = expected.topk(params[s].logprobs)
            assert [i for i, _ in scores[row].top] == top.indices.tolist()
            assert [value for _, value in scores[row].top] == pytest.approx(top.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("graphs", quick([True, False], True))
def test_a_prompt_is_scored_beside_a_decode(graphs):
    fused, _ = make_pair(graphs=graphs)
    for slot, params in enumerate((SamplingParams(), SamplingParams(logprobs=2, prompt_logprobs=True))):
        fused.bind(slot, params)
        fused.set_block_table(slot, blocks_of(slot))
    fused.submit(Step((Chunk(0, 0, [5, 9, 33]),))).tokens()
    prompt = [70, 3, 8, 8]
    chunks = (Chunk(0, 3), Chunk(1, 0, prompt))
    scored = fused.submit(Step(chunks, scored={1: prompt[1:]})).scored()
    logits = fused.submit(Step((Chunk(1, 0, prompt),), "all")).logits()
    expected = torch.log_softmax(logits, -1)
    assert [*scored] == [1]
    for row, (entry, token) in enumerate(zip(scored[1], prompt[1:], strict=True)):
        assert entry.token == pytest.approx(expected[row, token].item(), abs=1e-3)
        assert [i for i, _ in entry.top] == expected[row].topk(2).indices.tolist()


def test_no_memory_for_a_cache_is_one_clear_line():
    from llama_engine.errors import RunError

    engine = EngineConfig(4, 64, 64, 16, num_kv_blocks=1)
    with pytest.raises(RunError, match="no GPU memory is left for the KV cache"):
        make_pair(engine=engine)
