"""Checkpoint to native engine, and engine.json."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_engine.checkpoint.build import build_native
from llama_engine.checkpoint.convert import ConvertOptions, convert
from llama_engine.checkpoint.hf import HFModel, model_identity
from llama_engine.checkpoint.packing import quantize
from llama_engine.checkpoint.reader import Checkpoint
from llama_engine.config import EngineConfig
from llama_engine.engine.step import Chunk, Step
from llama_engine.engine_dir import ACTIVATION_BUDGET, load_engine_json
from llama_engine.errors import InputError
from llama_engine.model.weights import Linear, load_weights
from llama_engine.native import load_engine, prepare_machine
from tests.model.test_llama import dequantized_transformers

SMALL = EngineConfig(max_batch_size=4, max_seq_len=128)
EVERY_FORM = [
    ConvertOptions(int8=True, target_arch="sm80"),
    ConvertOptions(int8=True, target_arch="sm90", trtllm_version="0.15.0"),
    ConvertOptions(int8=True, target_arch="sm90", trtllm_version="0.16.0"),
    ConvertOptions(int8=True, target_arch="sm90", trtllm_version="1.2.1"),
    ConvertOptions(int8=True, quantize_at_build=True),
]


@pytest.fixture
def engine(tiny_engine, tmp_path):
    return shutil.copytree(tiny_engine, tmp_path / "engine")


def dequantized_tokens(model_dir, directory):
    """A prompt, and the greedy tokens of transformers on the INT8 weights, dequantized in float32."""
    shutil.copytree(model_dir, directory)
    weights = {}
    for name, value in load_file(directory / "model.safetensors").items():
        weights[name] = value.float()
        if "_proj" in name:
            q, scale = quantize(value)
            weights[name] = Linear(q, scale.half().float()).dequantize()
    save_file(weights, directory / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = torch.tensor([[5, 17, 300, 42, 8]])
    model.generation_config.eos_token_id = None
    return prompt[0].tolist(), model.generate(prompt, max_new_tokens=24, do_sample=False)[0, 5:].tolist()


def generate(engine_dir, prompt, count):
    engine = load_engine(engine_dir, device="cpu", kernels="torch")
    engine.add_request(prompt, count)
    tokens = []
    while engine.has_unfinished:
        for output in engine.step():
            tokens += output.token_ids
    return tokens


def test_every_layout_builds_the_same_weights_which_give_the_tokens_of_the_dequantized_model(tiny_model, tmp_path):
    digests = set()
    for i, options in enumerate(EVERY_FORM):
        convert(tiny_model, tmp_path / f"c{i}", options)
        build_native(tmp_path / f"c{i}", tmp_path / f"e{i}", SMALL)
        digests.add(load_engine_json(tmp_path / f"e{i}").weights_sha256)
    assert len(digests) == 1
    prompt, expected = dequantized_tokens(tiny_model, tmp_path / "dequantized")
    assert generate(tmp_path / "e0", prompt, len(expected)) == expected


def test_weights_are_the_quantized_originals(tiny_model, engine):
    info, source = load_engine_json(engine), HFModel(tiny_model)
    weights = load_weights(engine, info.model, "cpu")

    def hf(name):
        return source.tensor(f"model.layers.1.{name}.weight", torch.float16)

    layer = weights.layers[1]
    for linear, parts in (
        (layer.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        (layer.o, ("self_attn.o_proj",)),
        (layer.gate_up, ("mlp.gate_proj", "mlp.up_proj")),
        (layer.down, ("mlp.down_proj",)),
    ):
        q, scale = quantize(torch.cat([hf(part) for part in parts]))
        assert torch.equal(linear.weight, q)
        assert linear.scale.dtype == torch.float32
        assert torch.equal(linear.scale, scale.half().float())
    assert torch.equal(layer.post_norm, hf("post_attention_layernorm"))
    assert torch.equal(weights.lm_head.weight, source.tensor("lm_head.weight", torch.float16))
    assert weights.lm_head.scale is None


def test_lm_head_can_be_int8(tiny_model, tiny_checkpoint, tmp_path):
    build_native(tiny_checkpoint, tmp_path / "e", EngineConfig(lm_head="int8"))
    head = load_weights(tmp_path / "e", load_engine_json(tmp_path / "e").model, "cpu").lm_head
    q, scale = quantize(HFModel(tiny_model).tensor("lm_head.weight", torch.float16))
    assert torch.equal(head.weight, q)
    assert torch.equal(head.scale, scale)


def test_sixteen_bit_checkpoints_build_sixteen_bit_engines(tiny_model, tmp_path):
    convert(tiny_model, tmp_path / "c", ConvertOptions())
    build_native(tmp_path / "c", tmp_path / "e", SMALL)
    weights = load_weights(tmp_path / "e", load_engine_json(tmp_path / "e").model, "cpu")
    assert weights.layers[0].down.weight.dtype == torch.float16
    assert weights.layers[0].down.scale is None


def test_the_engine_records_where_it_came_from(tiny_model, tiny_checkpoint, engine):
    info = load_engine_json(engine)
    assert info.checkpoint_sha256 == Checkpoint(tiny_checkpoint).sha256()
    assert info.identity == model_identity(tiny_model)
    assert info.model == HFModel(tiny_model).config
    assert info.engine.to_dict() == json.loads((engine / "engine.json").read_text())["engine"]
    assert load_engine_json(engine, backend="auto").backend == info.backend == "native"


def test_the_engine_directory_can_serve_text(smollm2_engine):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_engine)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def bad_not_an_engine(engine, edit_json):
    (engine / "engine.json").unlink()
    return "is not an engine .*run scripts/build_engine.sh"


def bad_version(engine, edit_json):
    edit_json(engine / "engine.json", {"format_version": 99})
    return "format_version 99, expected 3"


def bad_key(engine, edit_json):
    edit_json(engine / "engine.json", {"surprise": 1})
    return r"keys \['surprise'\]"


def bad_engine_key(engine, edit_json):
    edit_json(engine / "engine.json", {"engine": {"max_batches": 1}})
    return "EngineConfig: unknown keys"


def bad_backend(engine, edit_json):
    edit_json(engine / "engine.json", {"backend": "tensorrt_llm"})
    return "this needs one of backend native: build one with scripts/build_engine.sh --backend native"


def bad_unknown_backend(engine, edit_json):
    edit_json(engine / "engine.json", {"backend": "onnx"})
    return "unknown backend 'onnx'"


def bad_truncated(engine, edit_json):
    path = engine / "engine.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return "does not belong to"


def bad_missing(engine, edit_json):
    (engine / "engine.safetensors").unlink()
    return "engine.safetensors is missing"


@pytest.mark.parametrize("damage", [value for name, value in sorted(globals().items()) if name.startswith("bad_")])
def test_bad_engines_are_one_clear_error(engine, edit_json, damage):
    message = damage(engine, edit_json)
    with pytest.raises(InputError, match=message):
        load_engine_json(engine)


def test_split_checkpoints_and_too_long_sequences_are_refused(tiny_model, tiny_checkpoint, tmp_path):
    convert(tiny_model, tmp_path / "c", ConvertOptions(int4="channel", tp_size=2))
    with pytest.raises(InputError, match="tensor parallelism is for INT8 and 16-bit matrices"):
        build_native(tmp_path / "c", tmp_path / "e", SMALL)
    with pytest.raises(InputError, match="--max_seq_len 200000 is more than"):
        build_native(tiny_checkpoint, tmp_path / "e", EngineConfig(max_seq_len=200000))
    assert not (tmp_path / "e").exists()


def test_the_script_says_which_backend_and_which_flags_do_not_apply(tiny_checkpoint, tmp_path, run_script):
    args = ("--checkpoint_dir", tiny_checkpoint, "--output_dir", tmp_path / "e")
    done = run_script(
        *("scripts/build_engine.sh", *args, "--max_batch_size", 4, "--max_seq_len", 99, "--max_prefill_tokens", 50),
        *("--gemm_plugin", "auto"),
    )
    assert done.returncode == 0, done.stderr
    assert "backend: native (TensorRT-LLM is not installed)" in done.stdout
    assert "apply to tensorrt_llm only: --gemm_plugin auto\n" in done.stdout
    engine = json.loads((tmp_path / "e" / "engine.json").read_text())["engine"]
    assert (engine["max_batch_size"], engine["max_seq_len"], engine["max_num_tokens"]) == (4, 99, 2048)
    assert engine["max_prefill_tokens"] == 50
    done = run_script(
        "scripts/build_engine.py", *args, "--max_prefill_tokens", 50, "--backend", "tensorrt_llm", "--dry-run"
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    done = run_script("scripts/build_engine.py", *args)
    assert done.returncode == 2
    assert "--force" in done.stderr


@pytest.mark.parametrize("output", ["c", ".", "c/e", "link"])
def test_the_script_never_writes_over_its_input(tiny_checkpoint, tmp_path, run_script, output):
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "c")
    (tmp_path / "link").symlink_to(checkpoint)
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    args = ("--checkpoint_dir", checkpoint, "--output_dir", tmp_path / output, "--backend", "native", "--force")
    done = run_script("scripts/build_engine.py", *args)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "overlaps the input" in done.stderr
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "link"]


def test_only_an_engine_is_replaced_with_all_that_its_machine_added(engine, tiny_model, tiny_checkpoint, tmp_path):
    (engine / "kernels").mkdir(exist_ok=True)
    (engine / "kernels/cpu.so").write_text("")
    (engine / "tuning.json").write_text("{}")
    build_native(tiny_checkpoint, engine, SMALL, force=True)
    assert load_engine_json(engine).engine == SMALL
    (engine / "other-engine").mkdir()
    model = shutil.copytree(tiny_model, tmp_path / "model")
    for kept, message in ((engine, "also holds other-engine"), (model, "not written by this command")):
        with pytest.raises(InputError, match=message):
            build_native(tiny_checkpoint, kept, SMALL, force=True)
    assert (engine / "other-engine").is_dir()
    HFModel(model)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--max_batch_size", 0), "max_batch_size must be a positive integer"),
        (("--max_seq_len", -1), "max_seq_len must be a positive integer"),
        (("--tokens_per_block", 48), "power of two"),
        (("--dry-run",), "give --backend tensorrt_llm"),
        (("--backend", "tensorrt_llm"), "TensorRT-LLM is not installed: source scripts/setup.sh --trtllm"),
        (("--backend", "tensorrt_llm", "--lm_head", "int8"), "--lm_head int8 is a native option"),
    ],
)
def test_bad_flags_are_one_line_and_exit_2(tiny_checkpoint, tmp_path, run_script, args, message):
    done = run_script(
        "scripts/build_engine.py", "--checkpoint_dir", tiny_checkpoint, "--output_dir", tmp_path / "e", *args
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "e").exists()


def with_outlier_channel(model_dir, directory):
    """A channel 8,192 times larger than those beside it, which no weight reads: one scale a token drowns the others."""
    shutil.copytree(model_dir, directory)
    weights = load_file(directory / "model.safetensors")
    for name, value in weights.items():
        if "post_attention_layernorm" in name:
            value[3] *= 8192
        elif "gate_proj" in name or "up_proj" in name:
            value[:, 3] = 0
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def all_logits(engine, ids):
    engine.executor.set_block_table(0, range(1, 1 + -(-len(ids) // engine.config.tokens_per_block)))
    return engine.executor.submit(Step((Chunk(0, 0, ids),), "all")).logits()


@pytest.mark.parametrize("lm_head", ["checkpoint", "int8"])
def test_channels_that_integer_activations_cannot_hold_are_found_at_build_and_run_in_float(
    tiny_model, tmp_path, capsys, lm_head
):
    model = with_outlier_channel(tiny_model, tmp_path / "model")
    convert(model, tmp_path / "checkpoint", ConvertOptions(int8=True))
    build_native(tmp_path / "checkpoint", tmp_path / "engine", dataclasses.replace(SMALL, lm_head=lm_head))
    info = load_engine_json(tmp_path / "engine")
    assert len(info.activation_losses) == info.model.num_layers + (lm_head == "int8")
    assert max(info.activation_losses) > 0.05
    capsys.readouterr()
    engine = load_engine(tmp_path / "engine", device="cpu")
    assert engine.executor.kernels == "torch"
    note = capsys.readouterr().err
    assert note.startswith("note: integer activations lose ")
    assert note.count("\n") == 1
    ids = [(31 * i + 3) % 512 for i in range(60)]
    with torch.inference_mode():
        expected = dequantized_transformers(model, tmp_path / "engine")(torch.tensor([ids])).logits[0]
    assert torch.nn.functional.cosine_similarity(all_logits(engine, ids), expected).min() > 0.999
    assert prepare_machine(tmp_path / "engine")[0].startswith("PyTorch operations")


def test_a_normal_model_loses_far_less_than_the_budget_and_keeps_its_kernels(tiny_engine, smollm2_engine):
    for engine in (tiny_engine, smollm2_engine):
        info = load_engine_json(engine)
        assert min(info.activation_losses) > 0
        assert max(info.activation_losses) < ACTIVATION_BUDGET / 4
        assert not info.needs_float_activations


def test_tiles_of_another_geometry_are_refused_before_anything_is_built(
    tiny_checkpoint, smollm2_engine, tmp_path, run_script
):
    tiles = ("--tiles", smollm2_engine)
    done = run_script(
        "scripts/build_engine.py", "--checkpoint_dir", tiny_checkpoint, "--output_dir", tmp_path / "e", *tiles
    )
    assert done.returncode == 2
    assert "is of another model" in done.stderr
    assert not (tmp_path / "e").exists()
