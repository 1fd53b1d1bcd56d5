import pytest

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.errors import InputError

HF = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def test_both_spellings_of_rope_give_the_same_config():
    old = ModelConfig.from_hf(HF | {"rope_theta": 500000.0, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}})
    new = ModelConfig.from_hf(
        HF | {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 500000.0}},
    )
    assert old == new
    assert old.rope_scaling.factor == 8.0
    assert old.head_size == 32


def test_round_trip_through_json_types():
    config = ModelConfig.from_hf(HF | {"rope_scaling": LLAMA3 | {"type": "llama3"}, "eos_token_id": [1, 2]})
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config.eos_token_ids == (1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"hidden_size": 0}, "hidden_size"),
    ],
)
def test_unsupported_models_are_named_and_refused(change, message):
    with pytest.raises(InputError, match=message):
        ModelConfig.from_hf(HF | change)


def test_missing_keys_are_named():
    with pytest.raises(InputError, match="intermediate_size"):
        ModelConfig.from_hf({key: value for key, value in HF.items() if key != "intermediate_size"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_seq_len": -1}, "max_seq_len"),
        ({"tokens_per_block": 48}, "power of two"),
        ({"max_num_tokens": 2}, "max_num_tokens"),
        ({"kv_cache_free_gpu_memory_fraction": 0}, "fraction"),
        ({"lm_head": "fp4"}, "lm_head"),
        ({"enable_prefix_cache": 1}, "enable_prefix_cache must be a bool"),
    ],
)
def test_bad_engine_settings_are_named(change, message):
    with pytest.raises(InputError, match=message):
        EngineConfig(**change)


def test_unknown_keys_are_refused():
    with pytest.raises(InputError, match="paged"):
        EngineConfig.from_dict({"paged": True})
