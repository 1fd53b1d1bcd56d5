import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llama_engine.checkpoint.convert import ConvertOptions, convert
from llama_engine.checkpoint.hf import HFModel, model_identity
from llama_engine.checkpoint.prepare import prepare_local
from llama_engine.errors import InputError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


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


def loaded(model):
    """Every tensor that transformers and this product load, embedding and head always both."""
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    hf = HFModel(model)
    ours = {name: hf.tensor(name, torch.float32) for name in hf.shapes}
    if hf.config.tie_word_embeddings:
        assert HEAD not in ours
        ours[HEAD] = ours[EMBEDDING]
    return theirs, ours


def assert_same_weights(model):
    theirs, ours = loaded(model)
    assert theirs.keys() == ours.keys()
    assert [name for name in theirs if not torch.equal(theirs[name], ours[name])] == []


@pytest.mark.parametrize(
    ("single", "index", "shards", "pickled"),
    itertools.product([True, False], [True, False], ["all", "some", "none"], [True, False]),
)
def test_the_weights_are_those_that_transformers_loads(model, single, index, shards, pickled):
    data = load_file(model / "model.safetensors")
    others = {name: value.flip(0) + 1 for name, value in data.items()}
    if pickled:
        torch.save(others, model / "pytorch_model.bin")
    save_file(others, model / "model.safetensors")
    shard(model)
    if single:
        save_file(data, model / "model.safetensors")
    if not index:
        (model / "model.safetensors.index.json").unlink()
    for i, path in enumerate(sorted(model.glob("model-*.safetensors"))):
        if shards == "none" or (shards == "some" and i == 1):
            path.unlink()
    if single or (index and shards == "all"):
        assert_same_weights(model)
        return
    if index or not pickled:  # else transformers opens the pickle, which is refused here
        with pytest.raises(OSError, match=r"does not exist|no file|No such file"):
            AutoModelForCausalLM.from_pretrained(model)
    message = "shards missing" if index else "pickled weights" if pickled else "incomplete or not a model"
    with pytest.raises(InputError, match=message):
        HFModel(model)


def test_of_a_tensor_in_two_shards_the_last_one_counts_as_for_transformers(model):
    data = load_file(model / "model.safetensors")
    shard(model)
    norm = "model.norm.weight"
    holders = [path for path in sorted(model.glob("model-*")) if norm in load_file(path)]
    for path in sorted(model.glob("model-*.safetensors")):
        value = torch.full_like(data[norm], 2 + int(path not in holders) + path.name.count("3"))
        save_file(load_file(path) | {norm: value}, path)
    assert_same_weights(model)


@pytest.mark.parametrize("head", ["none", "same", "other"])
@pytest.mark.parametrize("tied", [True, False, None])
@pytest.mark.parametrize("embedding", [True, False])
def test_embedding_and_head_are_tied_as_by_transformers(model, edit_json, tied, head, embedding):
    edit_json(model / "config.json", {"tie_word_embeddings": tied})
    data = load_file(model / "model.safetensors")
    values = {"none": None, "same": data[EMBEDDING].clone(), "other": data[EMBEDDING].flip(0).contiguous()}
    change(model, lm_head__weight=values[head])
    if not embedding:
        change(model, model__embed_tokens__weight=None)
    if (tied and (embedding or head != "none")) or (embedding and head != "none"):
        assert_same_weights(model)
        assert HFModel(model).config.tie_word_embeddings == bool(tied and (head != "other" or not embedding))
    else:  # transformers goes on with random values
        missing = EMBEDDING if not embedding else HEAD
        with pytest.raises(InputError, match=f"tensors missing, first {missing}"):
            HFModel(model)


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


def test_a_snapshot_in_the_cache_is_named_after_its_repository(model, tmp_path):
    snapshot = tmp_path / "models--meta-llama--Llama-3.2-1B/snapshots/4e20de362430cd3b72f300e6b0f18e50e7166e08"
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    (snapshot / "prepared.json").unlink()
    assert HFModel(snapshot).config.name == model_identity(snapshot)["name"] == "Llama-3.2-1B"
    (tmp_path / "link").symlink_to(snapshot)
    assert HFModel(tmp_path / "link").config.name == "Llama-3.2-1B"


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
