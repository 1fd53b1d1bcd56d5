"""Tensor parallelism from the checkpoint to tokens, on PyTorch operations with both ranks on one CPU."""

import dataclasses
import json

import pytest
import torch

from llama_engine.checkpoint.build import build_native
from llama_engine.checkpoint.convert import ConvertOptions, convert
from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.engine.step import Chunk, Step
from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import InputError
from llama_engine.model.weights import LINEARS, Linear, load_weights, random_weights
from llama_engine.native import load_engine, make_executor
from tests.split import rank_of

LIMITS = EngineConfig(max_batch_size=4, max_seq_len=128)


def logits_of(engine):
    for slot in (0, 1):
        engine.executor.set_block_table(slot, [1 + slot])
    ids = [(31 * i + 3) % 512 for i in range(40)]
    chunks = (Chunk(0, 0, ids), Chunk(1, 0, ids[::-1]))
    first = engine.executor.submit(Step(chunks, "all")).logits()
    again = engine.executor.submit(Step((Chunk(1, 40), Chunk(0, 40)), "last"))
    return torch.cat((first, again.logits())), again.tokens()


def build(model, tmp_path, ranks, **options):
    convert(model, tmp_path / f"c{ranks}", ConvertOptions(tp_size=ranks, **options))
    build_native(tmp_path / f"c{ranks}", tmp_path / f"e{ranks}", LIMITS)
    return load_engine(tmp_path / f"e{ranks}", device="cpu", kernels="torch")


def test_two_ranks_compute_what_the_whole_model_does(tiny_model, tmp_path):
    whole, split = (build(tiny_model, tmp_path, ranks) for ranks in (1, 2))
    (want, tokens), (got, found) = logits_of(whole), logits_of(split)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert found == tokens
    assert split.config.tp_size == json.loads((tmp_path / "e2/engine.json").read_text())["engine"]["tp_size"] == 2
    assert split.executor.kv_nbytes_per_token * 2 == whole.executor.kv_nbytes_per_token
    assert split.executor.step_nbytes < whole.executor.step_nbytes * 0.55


@pytest.mark.parametrize("lm_head", ["checkpoint", "int8"])
def test_int8_ranks_have_scales_of_their_own_and_sum_to_the_dequantized_whole(tiny_model, tmp_path, lm_head):
    convert(tiny_model, tmp_path / "c", ConvertOptions(int8=True, tp_size=2))
    build_native(tmp_path / "c", tmp_path / "e", dataclasses.replace(LIMITS, lm_head=lm_head))
    info = load_engine_json(tmp_path / "e")
    assert 0 < max(info.activation_losses) < 0.01
    assert len(info.activation_losses) == info.model.num_layers + (lm_head == "int8")
    split = load_engine(tmp_path / "e", device="cpu", kernels="torch")
    whole = build(tiny_model, tmp_path, 1)
    ranks = [load_weights(tmp_path / "e", info.model, "cpu", rank, 2) for rank in (0, 1)]
    assert not torch.equal(ranks[0].layers[0].down.scale, ranks[1].layers[0].down.scale)
    c, weights = info.model, whole.executor._model.weights

    def joined(name, parts):
        parts = [part.dequantize().half() for part in parts]
        if name in ("o", "down"):
            return Linear(torch.cat(parts, dim=1))
        kinds = {"qkv": (c.q_size, c.kv_size, c.kv_size), "gate_up": (c.intermediate_size,) * 2}
        sizes = [size // 2 for size in kinds.get(name, (c.vocab_size,))]
        return Linear(torch.cat([torch.cat(pair) for pair in zip(*(part.split(sizes) for part in parts))]))

    for i, layer in enumerate(weights.layers):
        for name in LINEARS:
            setattr(layer, name, joined(name, [getattr(rank.layers[i], name) for rank in ranks]))
    weights.lm_head = joined("lm_head", [rank.lm_head for rank in ranks])
    (want, _), (got, _) = logits_of(whole), logits_of(split)
    assert (got - want).abs().max() < 4e-3 * want.abs().max()


def test_a_rank_of_whole_weights_is_what_the_checkpoint_holds(tiny_model, tmp_path):
    whole = build(tiny_model, tmp_path, 1)
    build(tiny_model, tmp_path, 2)
    config = whole.model_config
    for rank in (0, 1):
        stored = load_weights(tmp_path / "e2", config, "cpu", rank, 2)
        cut = rank_of(whole.executor._model.weights, config, rank, 2)
        assert torch.equal(stored.lm_head.weight, cut.lm_head.weight)
        for a, b in zip(stored.layers, cut.layers):
            assert all(torch.equal(getattr(a, name).weight, getattr(b, name).weight) for name in LINEARS)


def test_what_cannot_be_split_is_refused_by_name(tiny_model, tmp_path):
    config = ModelConfig(96, 64, 96, 2, 4, 2, 32, 128)
    for ranks, message in ((3, "does not divide the model's num_heads 4"), (4, "num_kv_heads 2")):
        with pytest.raises(InputError, match=message):
            config.share(ranks)
    with pytest.raises(InputError, match="vocab_size 95"):
        dataclasses.replace(config, vocab_size=95).share(2)
    convert(tiny_model, tmp_path / "c", ConvertOptions(tp_size=4))
    with pytest.raises(InputError, match="tp_size 4 does not divide the model's num_kv_heads 2"):
        build_native(tmp_path / "c", tmp_path / "e", LIMITS)
    assert not (tmp_path / "e").exists()


def test_more_ranks_than_gpus_are_refused(tiny_model, tmp_path, monkeypatch):
    engine = build(tiny_model, tmp_path, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"split over 2 GPUs .* PyTorch sees 1"):
        make_executor(tmp_path / "e2", engine.model_config, engine.config, torch.device("cuda"), "auto", None)


def test_random_weights_split_evenly():
    config = ModelConfig(96, 64, 96, 1, 4, 2, 32, 128)
    weights = random_weights(config, "cpu")
    parts = [rank_of(weights, config, rank, 2) for rank in (0, 1)]
    whole = weights.layers[0].down.dequantize()
    assert torch.equal(torch.cat([p.layers[0].down.dequantize() for p in parts], dim=1), whole)
    assert parts[0].layers[0].qkv.shape == (128, 64)
