import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llama_engine.checkpoint.hf import HFModel, model_identity
from llama_engine.errors import InputError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


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
