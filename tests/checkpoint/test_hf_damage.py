"""Hugging Face directories that are damaged, incomplete or of another kind: one clear error each."""

import shutil

import pytest
import torch

from llama_engine.checkpoint.convert import ConvertOptions, convert
from llama_engine.checkpoint.hf import HFModel
from llama_engine.checkpoint.prepare import prepare_local
from llama_engine.errors import InputError
from tests.checkpoint.test_hf import change, shard


def bad_missing_dir(model, edit_json):
    shutil.rmtree(model)
    return "does not exist: run scripts/prepare_model.py"


def bad_no_config(model, edit_json):
    (model / "config.json").unlink()
    return "config.json is missing"


def bad_json(model, edit_json):
    (model / "config.json").write_text("{half")
    return "not valid JSON"


def bad_architecture(model, edit_json):
    edit_json(model / "config.json", {"architectures": ["MistralForCausalLM"]})
    return "only 'LlamaForCausalLM' is supported"


def bad_bias(model, edit_json):
    edit_json(model / "config.json", {"attention_bias": True})
    return "attention_bias"


def bad_mlp_bias(model, edit_json):
    edit_json(model / "config.json", {"mlp_bias": True})
    return "mlp_bias"


def bad_activation(model, edit_json):
    edit_json(model / "config.json", {"hidden_act": "gelu"})
    return "hidden_act 'gelu'"


def bad_rope(model, edit_json):
    edit_json(model / "config.json", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}})
    return "rope_type 'yarn'"


def bad_quantized(model, edit_json):
    edit_json(model / "config.json", {"quantization_config": {"quant_method": "gptq"}})
    return "already quantized"


def bad_pickle(model, edit_json):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    return r"pickled weights .*can run code.*\.safetensors"


def bad_no_weights(model, edit_json):
    (model / "model.safetensors").unlink()
    return "download is incomplete"


def bad_missing_shard(model, edit_json):
    shard(model)
    (model / "model-00002-of-00003.safetensors").unlink()
    return "1 of 3 shards missing, first model-00002"


def bad_escaping_shard(model, edit_json):
    shard(model)
    index = model / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002", "../model-00002"))
    return "file names without a path"


def bad_index(model, edit_json):
    shard(model)
    edit_json(model / "model.safetensors.index.json", {"weight_map": ["model.safetensors"]})
    return "weight_map must map"


def bad_kind(model, edit_json):
    edit_json(model / "config.json", {"num_attention_heads": 0, "head_dim": None})
    return "config.json: num_attention_heads must be a positive integer, got 0"


def bad_rope_kind(model, edit_json):
    edit_json(model / "config.json", {"rope_scaling": "llama3"})
    return "config.json"


def bad_head_type(model, edit_json):
    edit_json(model / "config.json", {"num_attention_heads": "32", "head_dim": None})
    return "config.json: num_attention_heads must be a positive integer, got '32'"


def bad_adapter(model, edit_json):
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    return "^{model} is a LORA adapter of org/base, not a model: merge the two .* and give its directory$"


def bad_gguf_directory(model, edit_json):
    (model / "config.json").unlink()
    (model / "model.gguf").write_bytes(b"GGUF")
    return r"^{model} holds a model as a GGUF file: give a directory in Hugging Face format \(.*\)$"


def bad_gguf_file(model, edit_json):
    shutil.rmtree(model)
    model.write_bytes(b"GGUF")
    return r"^{model} is a GGUF file: give a directory in Hugging Face format \(.*\)$"


def bad_file(model, edit_json):
    shutil.rmtree(model)
    model.write_bytes(b"")
    return "^{model} is a file: give a directory in Hugging Face format"


def bad_truncated(model, edit_json):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "not a complete .safetensors file"


def bad_missing_tensor(model, edit_json):
    change(model, model__layers__1__mlp__up_proj__weight=None)
    return "1 tensors missing, first model.layers.1.mlp.up_proj.weight"


def bad_shape(model, edit_json):
    change(model, model__norm__weight=torch.ones(127))
    return r"model.norm.weight has shape \[127\], expected \[128\]"


def bad_dtype(model, edit_json):
    change(model, model__norm__weight=torch.ones(128, dtype=torch.int8))
    return "is I8; fp16, bf16 or fp32 is needed"


@pytest.mark.parametrize("damage", [value for name, value in sorted(globals().items()) if name.startswith("bad_")])
def test_bad_directories_are_one_clear_error(model, edit_json, damage):
    if damage is bad_gguf_file:
        model = model.rename(model.with_suffix(".gguf"))
    message = damage(model, edit_json).replace("{model}", str(model))
    with pytest.raises(InputError, match=message):
        HFModel(model)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "contains NaN or Inf: the weights are damaged$"),
        (float("-inf"), "contains NaN or Inf: the weights are damaged$"),
        (3.4e38, "contains 3.4e[+]38, which bfloat16 cannot hold: the weights are damaged$"),
    ],
)
def test_values_that_cannot_be_used_are_named(model, value, message):
    weight = torch.randn(128, 128)
    weight[77, 5] = value
    change(model, model__layers__0__self_attn__q_proj__weight=weight)
    with pytest.raises(InputError, match=f"layers.0.self_attn.q_proj.weight {message}"):
        prepare_local(model)


def test_a_weight_beyond_fp16_says_which_dtype_holds_it(model, tmp_path):
    weight = torch.randn(128, 128).bfloat16()
    weight[77, 5] = -1e6
    change(model, model__layers__0__self_attn__q_proj__weight=weight)
    assert prepare_local(model) == model
    message = r"q_proj.weight contains 9.994e\+05, which float16 cannot hold: convert with --dtype bfloat16$"
    with pytest.raises(InputError, match=message):
        convert(model, tmp_path / "c", ConvertOptions(int8=True))
    convert(model, tmp_path / "c", ConvertOptions("bfloat16", int8=True))
