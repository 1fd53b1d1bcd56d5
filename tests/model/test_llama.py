"""The reference forward pass against transformers, and the fused CPU kernel against the reference."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.cpu import fused
from llama_engine.cpu.executor import HostExecutor
from llama_engine.engine_dir import load_engine_json
from llama_engine.model.llama import TorchModel
from llama_engine.model.rope import rope_frequencies
from llama_engine.model.schemes import FP16, INT4
from llama_engine.model.weights import load_weights, random_weights
from tests import overflow

BLOCK = 16


def dequantized_transformers(model_dir, engine_dir):
    """transformers' own model with the engine's dequantized weights, float32."""
    info = load_engine_json(engine_dir)
    weights = load_weights(engine_dir, info.model, "cpu")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir), dtype=torch.float32)
    c = info.model
    state = {
        "model.embed_tokens.weight": weights.embedding.float(),
        "model.norm.weight": weights.final_norm.float(),
        "lm_head.weight": weights.lm_head.dequantize(),
    }
    for i, layer in enumerate(weights.layers):
        prefix = f"model.layers.{i}."
        q, k, v = layer.qkv.dequantize().split((c.q_size, c.kv_size, c.kv_size))
        gate, up = layer.gate_up.dequantize().chunk(2)
        state |= {
            f"{prefix}self_attn.q_proj.weight": q,
            f"{prefix}self_attn.k_proj.weight": k,
            f"{prefix}self_attn.v_proj.weight": v,
            f"{prefix}self_attn.o_proj.weight": layer.o.dequantize(),
            f"{prefix}mlp.gate_proj.weight": gate,
            f"{prefix}mlp.up_proj.weight": up,
            f"{prefix}mlp.down_proj.weight": layer.down.dequantize(),
            f"{prefix}input_layernorm.weight": layer.input_norm.float(),
            f"{prefix}post_attention_layernorm.weight": layer.post_norm.float(),
        }
    model.load_state_dict(state)
    return model.eval()


def make_models(engine_dir, tmp_path, threads=(1, 2, 3)):
    config = load_engine_json(engine_dir).model
    return config, *models_of(config, load_weights(engine_dir, config, "cpu"), tmp_path, threads)


def models_of(config, weights, tmp_path, threads):
    engine = EngineConfig(2, max_seq_len=768, max_num_tokens=640, tokens_per_block=BLOCK, num_kv_blocks=64)
    reference = TorchModel(config, engine, weights)
    library = fused.compile_library(tmp_path)
    if library is None:
        pytest.skip("no C++ compiler on this machine")
    assert fused.supported(config, engine, weights)
    return reference, [fused.CpuModel(library, config, engine, weights, count) for count in threads]


def run(model, config, spans):
    """Forward ``spans`` of (slot, first position, count) with ids drawn from position and slot; logits of all rows."""
    positions = [p for _, start, count in spans for p in range(start, start + count)]
    slots = [slot for slot, _, count in spans for _ in range(count)]
    ids = [(31 * p + 7 * s * p + 11 * s + 3) % config.vocab_size for p, s in zip(positions, slots)]
    tables = torch.zeros((2, 40), dtype=torch.int32)
    tables[0, :38] = torch.arange(1, 39)
    tables[1, :20] = torch.arange(63, 43, -1)
    tensors = [torch.tensor(values, dtype=torch.int32) for values in (ids, positions, slots, range(len(ids)))]
    return model.forward(*tensors[:3], tables, tensors[3])


def test_llama3_frequencies_match_transformers(tiny_model, tiny_engine):
    reference = AutoModelForCausalLM.from_pretrained(tiny_model).model.rotary_emb.inv_freq
    torch.testing.assert_close(rope_frequencies(load_engine_json(tiny_engine).model), reference)


def test_reference_logits_match_transformers(tiny_model, tiny_engine, tmp_path):
    config, reference, _ = make_models(tiny_engine, tmp_path, threads=())
    ids = torch.tensor([[(31 * p + 3) % config.vocab_size for p in range(50)]])
    expected = dequantized_transformers(tiny_model, tiny_engine)(ids).logits[0]
    torch.testing.assert_close(run(reference, config, [(0, 0, 50)]), expected, atol=2e-3, rtol=1e-3)


def test_fused_kernel_matches_reference_and_itself_on_any_thread_count(tiny_engine, tmp_path):
    config, reference, models = make_models(tiny_engine, tmp_path)
    for spans in ([(0, 0, 300), (1, 0, 33)], [(0, 300, 1), (1, 33, 1)], [(0, 301, 20), (1, 34, 1)], [(0, 321, 5)]):
        expected = run(reference, config, spans)
        results = [run(model, config, spans) for model in models]
        assert (results[0] - expected).abs().max() <= expected.abs().max() / 128 * 1.5
        assert torch.nn.functional.cosine_similarity(results[0], expected).min() > 0.9999
        assert all(torch.equal(result, results[0]) for result in results[1:])


def test_fused_kernel_gives_the_same_bits_alone_chunked_and_in_a_batch(tiny_engine, tmp_path):
    config, _, models = make_models(tiny_engine, tmp_path, threads=(2, 2, 2))
    whole = run(models[0], config, [(0, 0, 600)])
    parts = torch.cat([run(models[1], config, [(0, a, b - a)]) for a, b in ((0, 7), (7, 300), (300, 301), (301, 600))])
    assert torch.equal(whole, parts)
    mixed = run(models[2], config, [(1, 0, 9), (0, 0, 600)])
    assert torch.equal(whole, mixed[9:])


@pytest.mark.parametrize("hidden", [192, 256])  # groups of 64 with a half block at the end of a row, and of 128
def test_fused_int4_matches_reference_and_gives_the_same_bits_in_any_batch(hidden, tmp_path):
    config = ModelConfig(512, hidden, 384, 2, hidden // 32, 2, 32, 1024)
    weights = random_weights(config, "cpu", scheme=INT4)
    assert weights.layers[0].qkv.group == (64 if hidden == 192 else 128)
    for linear in (weights.layers[0].o, weights.layers[1].down):
        linear.scale.neg_()
    reference, models = models_of(config, weights, tmp_path, (1, 2, 3))
    spans = [(0, 0, 300), (1, 0, 33)]
    expected = run(reference, config, spans)
    results = [run(model, config, spans) for model in models]
    assert (results[0] - expected).abs().max() <= 2e-3 * expected.abs().max()
    assert all(torch.equal(result, results[0]) for result in results[1:])
    alone = [run(models[0], config, [(0, start, count)]) for start, count in ((0, 7), (7, 1), (8, 292))]
    assert torch.equal(torch.cat(alone), results[0][:300])


def test_fused_halves_match_the_reference_and_give_the_same_bits_in_any_batch(tmp_path):
    config = ModelConfig(512, 192, 384, 2, 6, 2, 32, 1024)
    reference, models = models_of(config, random_weights(config, "cpu", scheme=FP16), tmp_path, (1, 2, 3))
    spans = [(0, 0, 300), (1, 0, 33)]
    expected = run(reference, config, spans)
    results = [run(model, config, spans) for model in models]
    torch.testing.assert_close(results[0], expected, atol=float(1e-3 * expected.abs().max()), rtol=1e-3)
    assert all(torch.equal(result, results[0]) for result in results[1:])
    alone = [run(models[0], config, [(0, start, count)]) for start, count in ((0, 7), (7, 1), (8, 292))]
    assert torch.equal(torch.cat(alone), results[0][:300])


def test_unsupported_geometry_falls_back(tiny_engine):
    info = load_engine_json(tiny_engine)
    weights = load_weights(tiny_engine, info.model, "cpu")
    assert fused.supported(info.model, EngineConfig(tokens_per_block=16), weights)
    assert not fused.supported(info.model, EngineConfig(tokens_per_block=8), weights)


@pytest.mark.parametrize("int8_head", [False, True])
@pytest.mark.parametrize("kernels", ["fused", "torch"])
def test_values_beyond_fp16_end_their_own_request_with_an_error(tmp_path, kernels, int8_head):
    weights = overflow.overflowing("cpu", int8_head)
    if kernels == "torch":
        model = TorchModel(overflow.CONFIG, overflow.ENGINE, weights)
    else:
        assert fused.supported(overflow.CONFIG, overflow.ENGINE, weights)
        library = fused.compile_library(tmp_path)
        if library is None:
            pytest.skip("no C++ compiler on this machine")
        model = fused.CpuModel(library, overflow.CONFIG, overflow.ENGINE, weights, 2)
    overflow.check_overflow_ends_its_own_request(HostExecutor(model, overflow.CONFIG, overflow.ENGINE, weights))
