"""The CUDA executor under the engine, and at the sizes of real models."""

import dataclasses

import pytest
import torch

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.cpu.executor import HostExecutor
from llama_engine.engine.step import Chunk, Step
from llama_engine.model.llama import TorchModel
from llama_engine.model.weights import random_weights
from llama_engine.sampling import SamplingParams
from tests import overflow
from tests.gpu.pairs import DEVICE, ENGINE, TINY, blocks_of, make_pair

pytest.importorskip("triton")


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
            executor.set_block_table(slot, blocks_of(slot, engine))
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
    host.set_block_table(2, blocks_of(2, engine))
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

    fused, host = make_pair(engine=config)
    (got, preemptions), (want, _) = run(fused), run(host)
    assert got == want
    assert [len(tokens) for tokens in got] == [16, 16, 16]
    assert preemptions > 0


@pytest.mark.slow
def test_a_prompt_whose_start_is_cached_is_answered_as_without():
    from llama_engine.engine.engine import Engine
    from tests.engine.tools import generate

    def engine(executor, cached):
        return Engine(TINY, dataclasses.replace(ENGINE, enable_prefix_cache=cached), executor)

    (fused, host), (other, _), prompt = make_pair(kernels="tiled"), make_pair(kernels="tiled"), list(range(20, 58))
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
    from tests.engine.test_engine import random_load
    from tests.engine.tools import generate

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
