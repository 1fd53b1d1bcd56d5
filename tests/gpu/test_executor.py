"""The CUDA executor against the PyTorch reference: on a GPU, and in Triton's interpreter where there is none."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llama_engine.checkpoint.packing import quantize
from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.cpu.executor import HostExecutor
from llama_engine.engine.step import Chunk, Step
from llama_engine.model.llama import TorchModel
from llama_engine.model.sampler import sample
from llama_engine.model.weights import Linear, random_weights
from llama_engine.sampling import SamplingParams, count_tokens, recent_tokens
from tests import overflow
from tests.repeats import quick

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = ModelConfig(96, 64, 96, 2, 4, 2, 32, 128)
ENGINE = EngineConfig(max_batch_size=4, max_seq_len=64, max_num_tokens=64, tokens_per_block=16, num_kv_blocks=17)


def _pair(config=TINY, engine=ENGINE, int8_head=False, **options):
    from llama_engine.gpu.executor import CudaExecutor

    weights = random_weights(config, DEVICE)
    if int8_head:
        weights.lm_head = Linear(*quantize(weights.lm_head.weight))
    host = HostExecutor(TorchModel(config, engine, weights), config, engine, weights)
    return CudaExecutor(config, engine, weights, **options), host


def _blocks(slot, engine=ENGINE):
    n = engine.max_blocks_per_sequence
    return [1 + slot * n + i for i in range(n)]


@pytest.mark.parametrize(
    ("int8_head", "kv_cache"), quick([(False, "fp16"), (True, "fp16"), (False, "fp8")], (True, "fp16"), (False, "fp8"))
)
def test_ragged_steps_match_the_reference(int8_head, kv_cache):
    fused, host = _pair(int8_head=int8_head, engine=dataclasses.replace(ENGINE, kv_cache=kv_cache))
    assert fused.kv_nbytes_per_token == host.kv_nbytes_per_token == fused.model.kv[0][0, 0, :, 0].nbytes * 2 * 2
    for executor in (fused, host):
        for slot in range(4):
            executor.bind(slot, SamplingParams())
            executor.set_block_table(slot, _blocks(slot))
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
    fused, host = _pair()
    replayed = []

    def capture(run):
        return SimpleNamespace(replay=lambda: (replayed.append(1), run()))

    fused._capture = capture
    fused._capture_all()
    for executor in (fused, host):
        for slot in range(2):
            executor.bind(slot, SamplingParams(temperature=1.5, seed=slot) if slot else SamplingParams())
            executor.set_block_table(slot, _blocks(slot))
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
    fused, _ = _pair(kernels="tiled")
    results = []
    for others in (0, 3):
        for slot in range(4):
            fused.bind(slot, SamplingParams())
            fused.set_block_table(slot, _blocks(slot))
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
        fused = _executor(config, weights)
        if not mixed:
            monkeypatch.setattr(fused, "_mixed_shape", lambda *_: None)
        elif graphs_end_at == 2:
            fused._mixed_buckets = []
            monkeypatch.setattr("llama_engine.gpu.buckets.PREFILL_BUCKETS", (2,))
        for slot in range(4):
            fused.bind(slot, SamplingParams(temperature=float(slot == 3), seed=7))
            fused.set_block_table(slot, _blocks(slot))
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


def _executor(config, weights):
    from llama_engine.gpu.executor import CudaExecutor

    return CudaExecutor(config, ENGINE, weights, kernels="streaming")


def test_block_tables_of_many_lengths_arrive_together():
    fused, _ = _pair()
    tables = {0: [3, 1, 2], 2: [9], 1: [4, 5, 6, 7]}
    for slot, blocks in tables.items():
        fused.set_block_table(slot, [8, 8, 8])
        fused.set_block_table(slot, blocks)
    fused.submit(Step((Chunk(0, 0, [1]),))).tokens()
    for slot, blocks in tables.items():
        assert fused.model.block_tables[slot, : len(blocks)].tolist() == blocks
    assert not fused.model.block_tables[3:].any()


def test_what_one_pass_cannot_hold_takes_two():
    fused, _ = _pair(engine=EngineConfig(16, 64, 1024, 16, num_kv_blocks=65, max_prefill_tokens=30))
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
    fused, host = _pair(engine=engine)
    for executor in (fused, host):
        for slot in range(rows):
            executor.bind(slot, SamplingParams())
            executor.set_block_table(slot, [1 + slot])
        executor.submit(Step(tuple(Chunk(slot, 0, [slot]) for slot in range(rows)))).tokens()
    step = Step(tuple(Chunk(slot, 1) for slot in reversed(range(rows))), "last")
    got, want = fused.submit(step), host.submit(step)
    assert (got.logits() - want.logits()).abs().max() < 0.02 * want.logits().abs().max()
    assert got.tokens() == got.logits().argmax(-1).tolist()


def test_sampled_requests_repeat_for_a_seed_and_do_not_touch_greedy_ones():
    fused, _ = _pair()

    def run(params):
        for slot, p in enumerate(params):
            fused.bind(slot, p)
            fused.set_block_table(slot, _blocks(slot))
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
    fused, _ = _pair(graphs=graphs)
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
        fused.set_block_table(slot, _blocks(slot))
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


@pytest.mark.parametrize("graphs", [True, False])
def test_a_prompt_is_scored_beside_a_decode(graphs):
    fused, _ = _pair(graphs=graphs)
    for slot, params in enumerate((SamplingParams(), SamplingParams(logprobs=2, prompt_logprobs=True))):
        fused.bind(slot, params)
        fused.set_block_table(slot, _blocks(slot))
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
        _pair(engine=engine)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA GPU")
@pytest.mark.parametrize("kernels", ["streaming", "tiled"])
@pytest.mark.parametrize("geometry", ["smollm2", "8b"])
def test_graphs_equal_eager_and_batches_equal_single_requests(geometry, kernels):
    from llama_engine.gpu.executor import CudaExecutor

    config = {
        "smollm2": ModelConfig(49152, 576, 1536, 4, 9, 3, 64, 2048),
        "8b": ModelConfig(128256, 4096, 14336, 3, 32, 8, 128, 2048, rope_theta=500000.0),
    }[geometry]
    engine = EngineConfig(max_batch_size=16, max_seq_len=512, max_num_tokens=1024, num_kv_blocks=16 * 8 + 1)
    weights = random_weights(config, DEVICE)
    generator = torch.Generator().manual_seed(1)
    lengths = [32, 1, 300, 17, 64, 5, 90, 128, 33, 2]
    prompts = [torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in lengths]

    def run(executor, together):
        for slot in range(len(prompts)):
            executor.bind(slot, SamplingParams())
            executor.set_block_table(slot, _blocks(slot, engine))
        groups = [list(range(len(prompts)))] if together else [[i] for i in range(len(prompts))]
        outputs = {}
        for group in groups:
            steps = [Step(tuple(Chunk(i, 0, prompts[i]) for i in group))]
            steps += [Step(tuple(Chunk(i, lengths[i] + j) for i in group)) for j in range(24)]
            rows = [handle.tokens() for handle in [executor.submit(step) for step in steps]]
            for column, i in enumerate(group):
                outputs[i] = [row[column] for row in rows]
        return outputs

    graphs = CudaExecutor(config, engine, weights, kernels=kernels)
    eager = CudaExecutor(config, engine, weights, kernels=kernels, graphs=False)
    together = run(graphs, True)
    assert together == run(eager, True)
    assert together == run(graphs, False)
    host = HostExecutor(TorchModel(config, engine, weights), config, engine, weights)
    host.set_block_table(2, _blocks(2, engine))
    step = Step((Chunk(2, 0, prompts[2]),), "all")
    want, got = host.submit(step).logits(), graphs.submit(step).logits()
    assert (got - want).abs().max() <= want.abs().max() / 128 * 1.5


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA GPU")
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("kernels", ["auto", "streaming", "tiled"])
def test_a_deep_model_serves_the_reference_and_repeats_itself(kernels, graphs):
    from llama_engine.engine.engine import Engine
    from llama_engine.gpu.executor import CudaExecutor
    from llama_engine.measure.accuracy import engine_logits, served_error

    config = ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 2048, rope_theta=500000.0)
    settings = EngineConfig(max_batch_size=8, max_seq_len=512, max_num_tokens=512, num_kv_blocks=8 * 8 + 1)
    weights = random_weights(config, DEVICE)
    for layer in weights.layers:  # as trained models have it, lest what a layer adds outgrow all before
        layer.o.scale.mul_(0.125)
        layer.down.scale.mul_(0.125)
    engine = Engine(config, settings, CudaExecutor(config, settings, weights, kernels=kernels, graphs=graphs))
    model = TorchModel(config, settings, weights)
    model.dtype = torch.float32
    reference = Engine(config, settings, HostExecutor(model, config, settings, weights))
    prompt = torch.randint(config.vocab_size, (32,), generator=torch.Generator().manual_seed(1)).tolist()
    errors = {served_error(lambda ids: engine_logits(reference, ids), engine, prompt, 16) for _ in range(10)}
    assert len(errors) == 1
    assert max(errors) < 0.01


@pytest.mark.slow
def test_the_engine_runs_one_step_ahead_and_preempts_on_it():
    from llama_engine.engine.engine import Engine

    config = EngineConfig(max_batch_size=3, max_seq_len=64, max_num_tokens=16, tokens_per_block=16, num_kv_blocks=5)

    def run(executor):
        engine = Engine(TINY, config, executor)
        prompts = [[1, 2, 3], list(range(30, 50)), [9] * 7]
        ids = [engine.add_request(prompt, 16) for prompt in prompts]  # each crosses into a block that is not there
        found = {i: [] for i in ids}
        while engine.has_unfinished:
            for output in engine.step():
                found[output.request_id] += output.token_ids
        return [found[i] for i in ids], engine.scheduler.preemptions

    fused, host = _pair(engine=config)
    (got, preemptions), (want, _) = run(fused), run(host)
    assert got == want
    assert [len(tokens) for tokens in got] == [16, 16, 16]
    assert preemptions > 0


@pytest.mark.slow
def test_a_prompt_whose_start_is_cached_is_answered_as_without():
    from llama_engine.engine.engine import Engine
    from tests.engine.test_engine import generate

    def engine(executor, cached):
        return Engine(TINY, dataclasses.replace(ENGINE, enable_prefix_cache=cached), executor)

    (fused, host), (other, _), prompt = _pair(kernels="tiled"), _pair(kernels="tiled"), list(range(20, 58))
    warm, cold, reference = engine(fused, True), engine(other, False), engine(host, False)
    for length, new in ((33, 8), (38, 8), (38, 1), (32, 8)):
        tokens = generate(warm, prompt[:length], new)
        assert tokens == generate(cold, prompt[:length], new) == generate(reference, prompt[:length], new)
    assert warm.scheduler.prefix_cache_hit_tokens == 32 + 32 + 16


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA GPU")
@pytest.mark.parametrize("kernels", ["auto", "streaming"])
def test_random_load_of_many_steps_keeps_every_invariant_and_every_answer(kernels):
    from llama_engine.engine.engine import Engine
    from llama_engine.gpu.executor import CudaExecutor
    from tests.engine.test_engine import generate, random_load

    config = ModelConfig(512, 1024, 2048, 2, 8, 2, 128, 512)
    # A preempted answer is not compared: its recomputed keys come from prefill, which rounds differently.
    blocks = 24 if kernels == "auto" else 8 * 16 + 1
    options = {"tokens_per_block": 16, "num_kv_blocks": blocks, "enable_prefix_cache": True}
    settings = EngineConfig(8, max_seq_len=256, max_num_tokens=64, **options)
    engine = Engine(config, settings, CudaExecutor(config, settings, random_weights(config, DEVICE), kernels=kernels))
    finished = random_load(engine, 10_000 if kernels == "auto" else 1000, seed=9)
    assert (engine.scheduler.preemptions > 0) == (kernels == "auto")
    assert engine.scheduler.prefix_cache_hit_tokens > 1000
    assert engine.scheduler.blocks.used == 0
    assert len(finished) > 50
    if kernels == "streaming":  # the persistent kernel rounds differently, so its answers depend on the batch's size
        for (prompt, new, params, stops, fewest), tokens in list(finished.values())[::10]:
            engine.scheduler.reset_prefix_cache()
            options = {"params": params, "stop_token_ids": stops, "min_tokens": fewest}
            assert generate(engine, prompt, new, **options) == tokens


@pytest.mark.slow
@pytest.mark.parametrize("int8_head", [False, True])
def test_values_beyond_fp16_end_their_own_request_with_an_error(int8_head):
    from llama_engine.gpu.executor import CudaExecutor

    weights = overflow.overflowing(DEVICE, int8_head)
    overflow.check_overflow_ends_its_own_request(CudaExecutor(overflow.CONFIG, overflow.ENGINE, weights))
