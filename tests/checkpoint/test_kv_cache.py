"""An FP8 KV cache, from the converter's flag to the engine's bytes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llama_engine.checkpoint.build import build_native
from llama_engine.checkpoint.convert import ConvertOptions, convert
from llama_engine.checkpoint.reader import Checkpoint
from llama_engine.config import EngineConfig
from llama_engine.engine.step import Chunk, Step
from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import InputError
from llama_engine.native import load_engine
from llama_engine.sampling import SamplingParams

PROMPT = [5, 17, 300, 42, 8]


def logits(engine):
    """After a prompt, and after the token that follows it."""
    executor = engine.executor
    executor.bind(0, SamplingParams())
    executor.set_block_table(0, [1])
    first = executor.submit(Step((Chunk(0, 0, PROMPT),), "last")).logits()
    return torch.cat([first, executor.submit(Step((Chunk(0, len(PROMPT)),), "last")).logits()])


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("kv") / "checkpoint"
    convert(tiny_model, directory, ConvertOptions(int8=True, kv_cache="fp8"))
    return directory


def test_the_checkpoint_says_so_in_the_names_of_tensorrt_llm(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["quantization"]["kv_cache_quant_algo"] == "FP8"
    tensors = load_file(checkpoint / "rank0.safetensors")
    for layer in range(config["num_hidden_layers"]):
        scale = tensors[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"]
        assert torch.equal(scale, torch.ones(1))
    assert Checkpoint(checkpoint).kv_cache == "fp8"


def test_an_engine_of_it_holds_half_the_bytes_and_nearly_the_same_logits(checkpoint, tiny_engine, tmp_path):
    build_native(checkpoint, tmp_path / "engine", EngineConfig(max_batch_size=2, max_seq_len=64))
    assert load_engine_json(tmp_path / "engine").engine.kv_cache == "fp8"
    half = load_engine(tmp_path / "engine", device="cpu")
    whole = load_engine(tiny_engine, device="cpu", kernels="torch")
    assert half.executor.kernels == "torch"  # the compiled CPU step reads fp16 alone
    assert half.executor.kv_nbytes_per_token * 2 == whole.executor.kv_nbytes_per_token
    got, want = logits(half), logits(whole)
    assert 0 < (got - want).abs().max() < 0.1 * want.abs().max()


def test_other_caches_are_refused():
    with pytest.raises(InputError, match="kv_cache must be fp16 or fp8, got 'int4'"):
        EngineConfig(kv_cache="int4")


def test_what_an_engine_may_hold_is_not_the_users_to_change_in_the_checkpoint(checkpoint, tmp_path):
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in checkpoint.iterdir():
        (changed / path.name).symlink_to(path)
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization"]["kv_cache_quant_algo"] = None
    (changed / "config.json").unlink()
    (changed / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quantization changed"):
        Checkpoint(changed)
