"""The converter and the checkpoint reader, against the original weights."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from llama_engine.checkpoint.convert import ConvertOptions, convert
from llama_engine.checkpoint.hf import HFModel, model_identity, tensor_shapes
from llama_engine.checkpoint.hf_config import model_config
from llama_engine.checkpoint.packing import LAYOUTS, quantize, unpack
from llama_engine.checkpoint.prepare import GEOMETRIES
from llama_engine.checkpoint.reader import Checkpoint
from llama_engine.checkpoint.unified import targets
from llama_engine.tensor_files import TensorFileWriter

INT8 = ConvertOptions(int8=True)


def write_model(target, **changes):
    """A model directory with random weights in any geometry."""
    target.mkdir()
    hf_config = GEOMETRIES["tiny"] | changes
    (target / "config.json").write_text(json.dumps(hf_config))
    config = model_config(hf_config)
    specs = {name: (torch.float32, shape) for name, shape in tensor_shapes(config)}
    generator = torch.Generator().manual_seed(5)
    writer = TensorFileWriter(target / "model.safetensors", specs)
    for name, (_, shape) in specs.items():
        writer.write(name, 0, torch.randn(shape, generator=generator) / 8)
    return target


def read_rank(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_config_is_complete_and_llama3_rope_is_kept(tiny_checkpoint):
    data = json.loads((tiny_checkpoint / "config.json").read_text())
    assert data["architecture"] == "LlamaForCausalLM"
    assert data["position_embedding_type"] == "rope_gpt_neox"
    assert data["rotary_base"] == 500000.0
    assert data["rotary_scaling"] == {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    assert (data["num_key_value_heads"], data["head_size"], data["intermediate_size"]) == (2, 32, 384)
    assert data["quantization"]["quant_algo"] == "W8A16"
    assert data["mapping"]["world_size"] == data["mapping"]["tp_size"] == 1


def test_values_scales_and_names_are_those_of_the_written_rules(tiny_model, tiny_checkpoint):
    source = HFModel(tiny_model)
    tensors = read_rank(tiny_checkpoint / "rank0.safetensors")
    layout = LAYOUTS["column_major_interleaved"]

    def hf(name):
        return source.tensor(f"model.layers.1.{name}.weight", torch.float16)

    expected = {
        "attention.qkv": torch.cat([hf("self_attn.q_proj"), hf("self_attn.k_proj"), hf("self_attn.v_proj")]),
        "attention.dense": hf("self_attn.o_proj"),
        "mlp.fc": hf("mlp.gate_proj"),
        "mlp.gate": hf("mlp.up_proj"),
        "mlp.proj": hf("mlp.down_proj"),
    }
    for name, weight in expected.items():
        stored = tensors[f"transformer.layers.1.{name}.weight"]
        n, k = weight.shape
        assert stored.dtype == torch.int8
        assert stored.shape == (k, n)
        q, scale = quantize(weight)
        assert torch.equal(unpack(stored, n, k, layout), q)
        assert torch.equal(tensors[f"transformer.layers.1.{name}.per_channel_scale"], scale.half())
    for name, there in {
        "transformer.vocab_embedding.weight": "model.embed_tokens.weight",
        "transformer.ln_f.weight": "model.norm.weight",
        "transformer.layers.0.post_layernorm.weight": "model.layers.0.post_attention_layernorm.weight",
        "lm_head.weight": "lm_head.weight",
    }.items():
        assert torch.equal(tensors[name], source.tensor(there, torch.float16))
    assert len(tensors) == 3 + 2 * (2 + 2 * 5)


def test_tied_models_get_an_lm_head(tmp_path):
    model = write_model(tmp_path / "m", tie_word_embeddings=True)
    convert(model, tmp_path / "c", INT8)
    tensors = read_rank(tmp_path / "c" / "rank0.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["transformer.vocab_embedding.weight"])


def test_a_head_in_the_file_goes_before_the_tied_flag(tmp_path):
    model = write_model(tmp_path / "m")
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": True}
    (model / "config.json").write_text(json.dumps(config))
    convert(model, tmp_path / "c", INT8)
    head = read_rank(tmp_path / "c" / "rank0.safetensors")["lm_head.weight"]
    assert torch.equal(head, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).lm_head.weight)
    assert not Checkpoint(tmp_path / "c").config.tie_word_embeddings


def test_the_layout_and_source_are_recorded(tiny_model, tmp_path):
    options = ConvertOptions(int8=True, target_arch="sm90", trtllm_version="0.17.0")
    convert(tiny_model, tmp_path / "c", options)
    checkpoint = Checkpoint(tmp_path / "c")
    assert checkpoint.layout.name == "column_major_permuted_biased"
    assert checkpoint.record["target_arch"] == "sm90"
    assert checkpoint.record["trtllm_version"] == "0.17.0"
    assert checkpoint.identity == model_identity(tiny_model)
    assert checkpoint.config == HFModel(tiny_model).config


@pytest.mark.parametrize(
    ("arch", "version"), [("sm80", "0.15.0"), ("sm90", "0.15.0"), ("sm90", "0.16.0"), ("sm90", "1.2.1")]
)
def test_the_reader_undoes_every_layout_for_any_rows(tiny_model, tmp_path, arch, version):
    convert(tiny_model, tmp_path / "c", ConvertOptions("float16", True, arch, version))
    checkpoint, source = Checkpoint(tmp_path / "c"), HFModel(tiny_model)
    for target in targets(source.config):
        if target.linear:
            weight = torch.cat([source.tensor(piece.source, torch.float16) for piece in target.pieces])
            q, scale = quantize(weight)
            assert torch.equal(checkpoint.read(target.name, (0, target.shape[0])), q)
            assert torch.equal(checkpoint.read(target.name, (6, 52)), q[6:52])
            assert torch.equal(checkpoint.scale(target.name), scale.half())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("at_build", [False, True])
def test_sixteen_bit_checkpoints_keep_the_weights(tiny_model, tmp_path, dtype, at_build):
    convert(tiny_model, tmp_path / "c", ConvertOptions(dtype, at_build, quantize_at_build=at_build))
    checkpoint = Checkpoint(tmp_path / "c")
    assert checkpoint.quant_algo == ("W8A16" if at_build else None)
    assert checkpoint.layout is None
    name = "transformer.layers.0.mlp.proj.weight"
    stored = checkpoint.read(name, (0, 128))
    kind = getattr(torch, dtype)
    assert torch.equal(stored, HFModel(tiny_model).tensor("model.layers.0.mlp.down_proj.weight", kind))


def reassemble(model, ranks, tp):
    """Every original tensor, put together again from what the ranks hold (checks that copies agree)."""
    whole = {name: torch.full(shape, torch.nan) for name, shape in model.shapes.items()}
    for rank, tensors in enumerate(ranks):
        for target in targets(model.config, rank, tp):
            for piece in target.pieces:
                (first, last), columns = piece.rows, slice(*(piece.columns or (None, None)))
                part = tensors[target.name][piece.start : piece.start + last - first].float()
                place = whole[piece.source][first:last]
                place = place[:, columns] if place.dim() == 2 else place
                assert (place.isnan() | (place == part)).all()
                place.copy_(part)
    return whole


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_shards_reassemble_to_the_original(tmp_path, tp):
    # 4 KV heads: one rank in two shares one at tp 8. A vocabulary of 509 needs padding.
    model_dir = write_model(
        tmp_path / "m",
        vocab_size=509,
        num_attention_heads=8,
        num_key_value_heads=4,
        hidden_size=256,
        intermediate_size=512,
    )
    options = ConvertOptions(int8=True, quantize_at_build=True, tp_size=tp)
    convert(model_dir, tmp_path / "c", options)
    model = HFModel(model_dir)
    ranks = [read_rank(tmp_path / "c" / f"rank{rank}.safetensors") for rank in range(tp)]
    for name, value in reassemble(model, ranks, tp).items():
        assert torch.equal(value, model.tensor(name, torch.float16).float()), name
    heads = 8 // tp + 2 * max(4 // tp, 1)
    assert ranks[-1]["transformer.layers.0.attention.qkv.weight"].shape == (heads * 32, 256)
    rows = -(-509 // tp)
    assert all(rank["lm_head.weight"].shape == (rows, 256) for rank in ranks)
    assert not ranks[-1]["lm_head.weight"][509 - rows * tp :].any() or tp == 1
    assert json.loads((tmp_path / "c" / "config.json").read_text())["mapping"]["world_size"] == tp
    assert Checkpoint(tmp_path / "c").tp_size == tp


def test_scales_are_taken_after_splitting(tmp_path):
    model_dir = write_model(tmp_path / "m")
    convert(model_dir, tmp_path / "c", ConvertOptions(int8=True, tp_size=2))
    down = HFModel(model_dir).tensor("model.layers.0.mlp.down_proj.weight", torch.float16)
    checkpoint, name = Checkpoint(tmp_path / "c"), "transformer.layers.0.mlp.proj.weight"
    for rank in range(2):
        q, scale = quantize(down[:, rank * 192 : (rank + 1) * 192])
        assert torch.equal(checkpoint.read(name, (0, 128), rank), q)
        assert torch.equal(checkpoint.scale(name, rank), scale.half())
    assert not torch.equal(checkpoint.scale(name, 0), checkpoint.scale(name, 1))


def test_conversion_does_not_depend_on_chunks(tiny_model, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("llama_engine.tensor_files.CHUNK_ELEMENTS", 1000)
    convert(tiny_model, tmp_path / "c", INT8)
    assert Checkpoint(tmp_path / "c").sha256() == Checkpoint(tiny_checkpoint).sha256()


@pytest.mark.parametrize(
    ("seen", "flags", "arch", "said"),
    [
        ("sm90", [], "sm90", "layout column_major,"),
        ("sm90", ["--target_arch", "auto"], "sm90", "layout column_major,"),
        (None, [], "sm80", "no GPU is visible: packed for sm80"),
        (None, ["--target_arch", "auto"], None, "the visible GPU is none at all: give --target_arch sm80 or"),
        ("sm75", [], None, "the visible GPU is sm75: give --target_arch sm80 or"),
        ("sm75", ["--quantize_at_build"], None, ""),
    ],
)
def test_bytes_are_packed_for_the_gpu_that_is_seen_or_named(
    tiny_model, tmp_path, run_script, monkeypatch, seen, flags, arch, said
):
    monkeypatch.setattr("llama_engine.checkpoint.packing.visible_arch", lambda: seen)
    done = run_script(
        "scripts/convert_checkpoint.py", "--model_dir", tiny_model, "--output_dir", tmp_path / "c", *flags
    )
    assert done.returncode == (2 if "give --target_arch" in said and not arch else 0)
    assert said in done.stdout + done.stderr
    if done.returncode == 0:
        assert Checkpoint(tmp_path / "c").record["target_arch"] == arch


def test_the_scripts_convert_and_refuse_to_overwrite(tiny_model, tmp_path, run_script):
    args = ("--model_dir", tiny_model, "--output_dir", tmp_path / "c", "--target_arch", "sm90")
    done = run_script("scripts/convert_checkpoint.sh", *args)
    assert done.returncode == 0, done.stderr
    assert "INT8, layout column_major," in done.stdout
    done = run_script("scripts/convert_checkpoint.py", *args)
    assert done.returncode == 2
    assert "--force" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    before = content(tmp_path / "c")
    assert run_script("scripts/convert_checkpoint.py", *args, "--force").returncode == 0
    assert content(tmp_path / "c") == before  # both scripts have the same defaults
    assert run_script("scripts/convert_checkpoint.py", *args[:4], "--no-use_weight_only", "--force").returncode == 0
    assert Checkpoint(tmp_path / "c").layout is None
