"""Tensor-parallel ranks on two GPUs against the unsplit model; tests/kernels/test_exchange.py shows what one GPU can.

Whole chains of two ranks do not fit one: kernels that wait their turn hold the shared memory that their peers need.
"""

import dataclasses

import pytest
import torch

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.cpu.executor import HostExecutor
from llama_engine.engine.step import Chunk, Step
from llama_engine.model.llama import TorchModel
from llama_engine.model.weights import random_weights
from llama_engine.sampling import SamplingParams
from tests.split import rank_of

pytest.importorskip("triton")

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")]
SMALL = ModelConfig(6000, 2048, 8192, 4, 32, 8, 64, 4096, rope_theta=500000.0)
WIDE = ModelConfig(128256, 4096, 14336, 3, 32, 8, 128, 4096, rope_theta=500000.0)
ENGINE = EngineConfig(max_batch_size=8, max_seq_len=2048, max_num_tokens=2048, num_kv_blocks=8 * 32 + 1, tp_size=2)


@pytest.fixture(autouse=True)
def _few_graphs(monkeypatch):
    """Of each kind one or two: all take a minute to compile and capture."""
    from llama_engine.gpu import buckets

    monkeypatch.setattr(buckets, "PREFILL_BUCKETS", (32, 512))
    monkeypatch.setattr(buckets, "PREFILL_CHUNKS", (1, 8))
    monkeypatch.setattr(buckets, "DECODE_BUCKETS", (1, 2, 4))


def _blocks(slot):
    return [1 + slot * 32 + i for i in range(32)]


def _pair(config, kernels):
    from llama_engine.gpu.tensor_parallel import TensorParallelExecutor

    weights = random_weights(config, "cuda:0")
    parts = [rank_of(weights, config, rank, 2, torch.device("cuda", rank)) for rank in (0, 1)]
    split = TensorParallelExecutor(config.share(2), ENGINE, parts, kernels=kernels)
    whole = dataclasses.replace(ENGINE, tp_size=1)
    host = HostExecutor(TorchModel(config, whole, weights), config, whole, weights)
    return split, host


def _same_state(split, rows):
    """The ranks' slots, and the logits of the ``rows`` that the last step sampled from."""
    for rank in split.ranks:
        torch.cuda.synchronize(rank.device)
    first, *others = (rank.model for rank in split.ranks)
    for other in others:
        for name in ("last_token", "position"):
            assert torch.equal(getattr(first, name).cpu(), getattr(other, name).cpu()), name
        assert torch.equal(first.logits[:rows].cpu(), other.logits[:rows].cpu())


CASES = [
    *(pytest.param(SMALL, kernels, id=kernels) for kernels in ("auto", "streaming", "tiled")),
    pytest.param(WIDE, "auto", id="8b"),
]


@pytest.mark.parametrize(("config", "kernels"), CASES)
def test_ranks_agree_with_the_reference_and_to_the_bit_with_each_other(config, kernels):
    split, host = _pair(config, kernels)
    assert ("persistent" in split.kernels) == (kernels == "auto")
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in (20, 5, 1500, 300, 1100)
    ]
    for executor in (split, host):
        for slot in range(5):
            executor.bind(slot, SamplingParams())
            executor.set_block_table(slot, _blocks(slot))
    steps = [
        Step((Chunk(0, 0, prompts[0]),), "last"),
        *(Step((Chunk(0, 20 + i),), "last") for i in range(3)),  # the persistent kernel, where there is one
        Step((Chunk(0, 23), Chunk(1, 0, prompts[1])), "last"),
        *(Step((Chunk(1, 5 + i), Chunk(0, 24 + i)), "last") for i in range(2)),
        Step((Chunk(2, 0, prompts[2]),), "last"),  # eagerly
        Step((Chunk(3, 0, prompts[3]),), "all"),
        Step((Chunk(0, 26), Chunk(1, 7), Chunk(2, 1500), Chunk(3, 300)), "last"),
        Step((Chunk(0, 27), Chunk(1, 8)), "last"),
        Step((Chunk(0, 28), Chunk(1, 9), Chunk(4, 0, prompts[4])), "last"),  # eagerly, beside decodes
        Step((Chunk(1, 10), Chunk(0, 29), Chunk(4, 1100)), "last"),
    ]
    for step in steps:
        got, want = split.submit(step), host.submit(step)
        error = (got.logits() - want.logits()).abs().max()
        assert error <= want.logits().abs().max() / 128 * 1.5
        _same_state(split, sum(chunk.samples for chunk in step.chunks))
        for rank in split.ranks:  # near ties may fall otherwise: go on from the same tokens
            rank.model.last_token[:8] = torch.tensor(host._last, dtype=torch.int32)


@pytest.mark.parametrize(("config", "kernels"), CASES)
def test_long_answers_repeat_to_the_bit_and_leave_the_ranks_alike(config, kernels):
    from llama_engine.engine.engine import Engine

    split, _ = _pair(config, kernels)
    engine = Engine(config, ENGINE, split)
    params = [SamplingParams(), SamplingParams(temperature=1.0, seed=3, top_p=0.9), SamplingParams(logprobs=2)]

    def run(counts):
        for i, new in enumerate(counts):
            engine.add_request([7 + i, 9, 11], new, params=params[i % 3])
        found = {}
        while engine.has_unfinished:
            for output in engine.step():
                assert not isinstance(output.reason, Exception), output.reason
                found.setdefault(output.request_id, []).extend(output.token_ids)
        _same_state(split, 1)
        return list(found.values())

    for counts in ([200], [100, 90], [60, 50, 70, 40, 65, 80, 75]):
        first = run(counts)
        assert sorted(map(len, first)) == sorted(counts)
        assert run(counts) == first
