import copy

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_engine.checkpoint.hf_config import model_config
from llama_engine.config import ModelConfig
from llama_engine.errors import InputError
from llama_engine.model.rope import rope_frequencies

HF = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
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
    old = model_config(HF | {"rope_theta": 500000.0, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}})
    new = model_config(
        HF | {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 500000.0}},
    )
    assert old == new
    assert old.rope_scaling.factor == 8.0
    assert old.head_size == 32


def test_round_trip_through_json_types():
    config = model_config(HF | {"rope_scaling": LLAMA3 | {"type": "llama3"}, "eos_token_id": [1, 2]})
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config.eos_token_ids == (1, 2)


LLAMA31_ENDS = {"eos_token_id": [128001, 128008, 128009]}


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 128001}, LLAMA31_ENDS, (128001, 128008, 128009)),
        ({"eos_token_id": 1}, {"eos_token_id": 0}, (0,)),
        ({"eos_token_id": [2, 0]}, {"eos_token_id": None}, (2, 0)),
        ({"eos_token_id": 0}, None, (0,)),
        ({"eos_token_id": None}, {}, ()),
    ],
)
def test_end_of_sequence_ids_come_from_the_generation_config_first(config, generation, expected):
    assert model_config(HF | config, generation).eos_token_ids == expected


@pytest.mark.parametrize("eos", ["2", [1, -1], [1, 2.0], True])
def test_bad_end_of_sequence_ids_name_their_file(eos):
    with pytest.raises(InputError, match=r"^config\.json: eos_token_id"):
        model_config(HF | {"eos_token_id": eos})
    with pytest.raises(InputError, match=r"^generation_config\.json: eos_token_id"):
        model_config(HF, {"eos_token_id": eos})


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
        ({"num_attention_heads": 3}, "hidden_size 128 is not a multiple of num_attention_heads 3"),
        ({"num_key_value_heads": 0}, "num_kv_heads must be a positive integer, got 0"),
        ({"head_dim": 0}, "head_size must be a positive integer, got 0"),
        ({"model_type": "mistral"}, "model_type is 'mistral'; only 'llama' is supported"),
        ({"attention_bias": None}, "attention_bias=None is not supported"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be a bool, got 'false'"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number, got '1e-5'"),
        ({"rope_theta": None}, "rope_theta must be a positive number, got None"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number"),
        ({"rope_scaling": "llama3"}, "rope_scaling must be an object or null, got 'llama3'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters for each type of layer"),
        (
            {
                "rope_scaling": LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": None},
                "original_max_position_embeddings": 4096,
            },
            "lacks original_max_position_embeddings",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights is not supported"),
        ({"per_layer_config": {"0": {"num_key_value_heads": 1}}}, "per_layer_config is not supported"),
    ],
)
def test_unsupported_models_are_named_and_refused(change, message):
    with pytest.raises(InputError, match=message):
        model_config(HF | change)


def test_missing_keys_are_named():
    with pytest.raises(InputError, match="intermediate_size"):
        model_config({key: value for key, value in HF.items() if key != "intermediate_size"})


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "yarn", "factor": 2.0},
            "^config.json: rope_type 'yarn' is not supported \\(only 'default' and 'llama3'\\)$",
        ),
        ({"rope_type": None}, "^config.json: rope_type None is not supported \\(only 'default' and 'llama3'\\)$"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "^config.json: rope_scaling of rope_type 'llama3' lacks original_max_position_embeddings$",
        ),
        (
            {"type": "llama3", "original_max_position_embeddings": 8192},
            "^config.json: rope_scaling of rope_type 'llama3' lacks factor, low_freq_factor, high_freq_factor$",
        ),
        (LLAMA3 | {"rope_type": "llama3", "factor": "8"}, "^rope_scaling: factor must be a positive number, got '8'$"),
    ],
)
def test_a_rotary_embedding_that_is_not_supported_is_one_true_sentence(rope, message):
    with pytest.raises(InputError, match=message):
        model_config(HF | {"rope_scaling": rope})


ABSENT = object()


def mostly(*usable, refused=()):
    """Draw one of the usable values, seldom one that must be refused; refusing all would test nothing."""
    return st.sampled_from([*usable] * 12 + [*refused])


THETAS = mostly(ABSENT, 10000.0, 500000, 0.5, refused=[None, 0, "1e4", True])
OLD_LENGTHS = mostly(8192, 1024, 8, refused=[None])
ROPE = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": mostly("default", "llama3", refused=["linear", "yarn", None]),
        "type": mostly("default", "llama3", refused=["linear"]),
        "rope_theta": mostly(10000.0, 250000, refused=[None, 0]),
        "factor": mostly(8.0, 32.0, 2, 1.0, refused=[0.5]),
        "low_freq_factor": mostly(1.0, 1, 2.0),
        "high_freq_factor": mostly(4.0, 3, 2.5, refused=[0.5]),
        "original_max_position_embeddings": OLD_LENGTHS,
        "partial_rotary_factor": mostly(1.0, refused=[0.5]),
        "attention_factor": st.just(1.5),
    },
)
ROPES = st.one_of(
    st.sampled_from([ABSENT, None, {}]),
    ROPE,
    ROPE.map(lambda rope: LLAMA3 | {"rope_type": "llama3"} | rope),
    ROPE.map(lambda rope: {key: value for key, value in rope.items() if "type" not in key}),
)
KEYS = {
    "num_key_value_heads": mostly(ABSENT, None, 1, 2, 4, refused=[3, 0]),
    "head_dim": mostly(ABSENT, None, 32, 64, refused=[0, 15]),
    "max_position_embeddings": mostly(ABSENT, 2048, 131072, refused=[None]),
    "original_max_position_embeddings": mostly(ABSENT, ABSENT, 4096, refused=[None]),
    "rms_norm_eps": mostly(ABSENT, 1e-6, 1e-5, 0.1, refused=[0.0, None]),
    "hidden_act": mostly(ABSENT, "silu", refused=["gelu", None]),
    "tie_word_embeddings": mostly(ABSENT, True, False, refused=[None]),
    "attention_bias": mostly(ABSENT, False, refused=[True, None]),
    "mlp_bias": mostly(ABSENT, False, refused=[True, None]),
    "partial_rotary_factor": mostly(ABSENT, None, 1.0, refused=[0.25]),
    "layer_types": st.sampled_from([ABSENT, ["full_attention"] * 2]),
    "rope_theta": THETAS,
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
}


@settings(max_examples=400, deadline=None)
@given(st.fixed_dictionaries(KEYS))
def test_every_key_means_what_transformers_makes_of_it_or_is_refused(drawn):
    hf = {key: value for key, value in (HF | drawn).items() if value is not ABSENT}
    try:
        ours = model_config(copy.deepcopy(hf))
    except InputError:
        event("refused")
        return
    event("accepted")
    theirs = LlamaConfig(**copy.deepcopy(hf))  # writes into the dicts that it is given
    assert (ours.num_kv_heads, ours.head_size) == (theirs.num_key_value_heads, theirs.head_dim)
    assert (ours.rms_norm_eps, ours.max_position_embeddings) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert (ours.tie_word_embeddings, "silu") == (theirs.tie_word_embeddings, theirs.hidden_act)
    assert not theirs.attention_bias
    assert not theirs.mlp_bias
    rotary = LlamaRotaryEmbedding(theirs)
    assert rotary.attention_scaling == 1
    torch.testing.assert_close(rope_frequencies(ours), rotary.inv_freq, rtol=1e-5, atol=0)
    rope = theirs.rope_parameters
    assert (ours.rope_theta, ours.rope_scaling is not None) == (rope["rope_theta"], rope["rope_type"] == "llama3")
    if ours.rope_scaling:
        assert ours.rope_scaling.to_dict().items() <= rope.items()


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": LLAMA3 | {"rope_type": "llama3"}, "rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 1e4, "rope_scaling": {}},
        {"rope_scaling": LLAMA3 | {"type": "default", "rope_type": "llama3"}, "rope_theta": 500000},
        {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "original_max_position_embeddings": 1024},
        {"rope_scaling": LLAMA3 | {"rope_type": "llama3", "beta_fast": 32}},
        {},
    ],
)
def test_contradicting_rotary_settings_are_resolved_as_transformers_does(changes):
    ours = rope_frequencies(model_config(copy.deepcopy(HF | changes)))
    theirs = LlamaRotaryEmbedding(LlamaConfig(**copy.deepcopy(HF | changes))).inv_freq
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
