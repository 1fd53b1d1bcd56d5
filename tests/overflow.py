"""A model of which two tokens overflow the fp16 cache of values, and what any executor makes of them."""

from __future__ import annotations

import dataclasses

import torch

from llama_engine.checkpoint.packing import quantize
from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.engine.engine import Engine
from llama_engine.engine.executor import Executor
from llama_engine.errors import ErrorCode
from llama_engine.model.weights import EngineWeights, Linear, random_weights
from llama_engine.sampling import SamplingParams

CONFIG = ModelConfig(96, 64, 96, 2, 4, 2, 32, 128)
ENGINE = EngineConfig(max_batch_size=4, max_seq_len=64, max_num_tokens=64, tokens_per_block=16, num_kv_blocks=17)
UP, DOWN = 7, 8  # tokens whose values overflow to infinity and to -infinity; one after the other they give NaN
BAD = ([UP], [20, UP, DOWN, 21])
GOOD = ([1, 2, 3], list(range(20, 50)))


def overflowing(device: torch.device, int8_head: bool) -> EngineWeights:
    """Channel 3 is UP's and DOWN's own; the values of one of the two KV heads take it beyond 65,504."""
    weights = random_weights(CONFIG, device)
    weights.embedding[:, 3] = 0
    weights.embedding[UP, 3], weights.embedding[DOWN, 3] = 100, -100
    first = weights.layers[0]
    first.input_norm[3] = 60000
    first.qkv.weight[:, 3] = 0
    first.qkv.weight[-CONFIG.head_size :, 3] = 127
    first.qkv.scale[-CONFIG.head_size :] = 0.002
    weights.lm_head.weight[[UP, DOWN]] = 0  # so that nobody says them
    if int8_head:
        weights.lm_head = Linear(*quantize(weights.lm_head.weight))
    return weights


def run(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> list[tuple[list[int], object]]:
    """All requests at once: the tokens of each, and how it ended."""
    ids = [engine.add_request(prompt, 4, params=params) for prompt, params in requests]
    tokens: dict[int, list[int]] = {i: [] for i in ids}
    reasons = {}
    while engine.has_unfinished:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            if output.finished:
                reasons[output.request_id] = output.reason
    return [(tokens[i], reasons[i]) for i in ids]


def check_overflow_ends_its_own_request(executor: Executor) -> None:
    """Each bad prompt among good ones, greedy and sampled: an error for it, and what they get alone for the others."""
    engine = Engine(CONFIG, dataclasses.replace(ENGINE, num_kv_blocks=executor.num_kv_blocks), executor)
    for params in (SamplingParams(), SamplingParams(0.9, seed=4)):
        alone = [run(engine, [(prompt, params)])[0] for prompt in GOOD]
        assert all(len(tokens) == 4 and reason == "length" for tokens, reason in alone)
        for bad in BAD:
            (tokens, reason), *others = run(engine, [(prompt, params) for prompt in (bad, *GOOD)])
            assert tokens == []
            assert reason.code is ErrorCode.NOT_FINITE
            assert f"logits are not finite after {len(bad)} prompt and 0 new tokens" in str(reason)
            assert others == alone
    assert engine.scheduler.blocks.used == 0
