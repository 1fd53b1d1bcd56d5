import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_engine.checkpoint.hf import HFModel, model_identity
from llama_engine.checkpoint.prepare import prepare_local
from llama_engine.errors import InputError


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def change(model, **tensors):
    data = load_file(model / "model.safetensors")
    for name, value in tensors.items():
        name = name.replace("__", ".")
        if value is None:
            del data[name]
        else:
            data[name] = value
    save_file(data, model / "model.safetensors")


def shard(model, count=3):
    data = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    weight_map = {}
    for i in range(count):
        names = sorted(data)[i::count]
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: data[name] for name in names}, model / file)
        weight_map |= dict.fromkeys(names, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sharded", [False, True])
def test_reads_every_tensor_of_every_supported_form(model, dtype, sharded):
    data = {name: value.to(dtype) for name, value in load_file(model / "model.safetensors").items()}
    save_file(data, model / "model.safetensors")
    if sharded:
        shard(model)
    hf = HFModel(model)
    assert set(hf.shapes) == set(data)
    for name, value in data.items():
        assert torch.equal(hf.tensor(name, torch.float32), value.float())
    down = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(hf.read(down, (3, 9), dtype, (128, 256)), data[down][3:9, 128:256])


def test_tied_embeddings_need_no_lm_head(model, edit_json):
    edit_json(model / "config.json", {"tie_word_embeddings": True})
    change(model, lm_head__weight=None)
    assert "lm_head.weight" not in HFModel(model).shapes


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
    return "config.json lacks a value or holds one of the wrong kind"


def bad_rope_kind(model, edit_json):
    edit_json(model / "config.json", {"rope_scaling": "llama3"})
    return "config.json"


def bad_head_type(model, edit_json):
    edit_json(model / "config.json", {"num_attention_heads": "32", "head_dim": None})
    return "config.json lacks a value or holds one of the wrong kind"


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
    message = damage(model, edit_json)
    with pytest.raises(InputError, match=message):
        HFModel(model)


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "contains NaN or Inf"), (float("-inf"), "contains NaN or Inf"), (1e6, "torch.float16 cannot hold")],
)
def test_values_that_cannot_be_used_are_named(model, value, message):
    weight = torch.randn(128, 128)
    weight[77, 5] = value
    change(model, model__layers__0__self_attn__q_proj__weight=weight)
    with pytest.raises(InputError, match=f"layers.0.self_attn.q_proj.weight contains .*{message.split()[-1]}"):
        prepare_local(model)


def test_identity_is_recorded_and_noticed_when_stale(model):
    first = model_identity(model)
    assert first["name"] == "synthetic-tiny"
    assert first["source"] == "synthetic"
    (model / "prepared.json").rename(model / "elsewhere.json")
    computed = model_identity(model)
    assert computed["sha256"] == first["sha256"]
    (model / "elsewhere.json").rename(model / "prepared.json")
    change(model, model__norm__weight=torch.full((128,), 2.0, dtype=torch.float16))
    assert model_identity(model)["sha256"] != first["sha256"]
