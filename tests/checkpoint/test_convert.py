"""The converter and the checkpoint reader, against the original weights."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from llama_engine.checkpoint.build import build_native
from llama_engine.checkpoint.convert import ConvertOptions, convert
from llama_engine.checkpoint.hf import HFModel, model_identity, tensor_shapes
from llama_engine.checkpoint.hf_config import model_config
from llama_engine.checkpoint.packing import LAYOUTS, quantize, unpack
from llama_engine.checkpoint.prepare import GEOMETRIES
from llama_engine.checkpoint.reader import Checkpoint
from llama_engine.checkpoint.unified import targets
from llama_engine.config import EngineConfig
from llama_engine.errors import InputError
from llama_engine.native import load_engine
from llama_engine.tensor_files import TensorFileWriter
from tests.conftest import ROOT

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
    ("changes", "options", "message"),
    [
        (
            {"hidden_size": 96, "head_dim": 24},
            {},
            r"^transformer.layers.0.attention.qkv.weight is 96 x 192 \(in x out\), but layout column_major_interleaved "
            "packs multiples of 64 x 32 alone: convert with --quantize_at_build, which the native engine builds from$",
        ),
        ({}, {"tp_size": 3}, "--tp_size 3 does not fit 4 heads"),
        ({}, {"tp_size": 0}, "--tp_size 0"),
    ],
)
def test_what_cannot_be_packed_or_split_is_refused(tmp_path, changes, options, message):
    model = write_model(tmp_path / "m", **changes)
    with pytest.raises(InputError, match=message):
        convert(model, tmp_path / "c", ConvertOptions(int8=True, **options))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_what_cannot_be_packed_converts_and_builds_as_advised(tmp_path):
    model = write_model(tmp_path / "m", intermediate_size=200)
    with pytest.raises(InputError, match="with --quantize_at_build, which the native engine builds from"):
        convert(model, tmp_path / "c", INT8)
    convert(model, tmp_path / "c", ConvertOptions(int8=True, quantize_at_build=True))
    build_native(tmp_path / "c", tmp_path / "e", EngineConfig(max_seq_len=64))
    engine = load_engine(tmp_path / "e", device="cpu")
    engine.add_request([1, 2, 3], 4)
    assert sum(len(output.token_ids) for _ in range(8) if engine.has_unfinished for output in engine.step()) == 4


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("output", ["m", ".", "m/c", "link", "link/c"])
def test_the_script_never_writes_over_its_input(tmp_path, run_script, output):
    model = write_model(tmp_path / "m")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "thesis.tex").write_text("years of work")
    before = content(tmp_path)
    done = run_script(
        "scripts/convert_checkpoint.py", "--model_dir", model, "--output_dir", tmp_path / output, "--force"
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "overlaps the input" in done.stderr
    assert content(tmp_path) == before


def test_the_script_replaces_earlier_checkpoints_alone(tiny_model, tiny_engine, tiny_checkpoint, tmp_path, run_script):
    args = ("scripts/convert_checkpoint.py", "--model_dir", tiny_model, "--force", "--output_dir")
    other = shutil.copytree(tiny_model, tmp_path / "other")
    engine = shutil.copytree(tiny_engine, tmp_path / "engine")
    foreign = shutil.copytree(tiny_checkpoint, tmp_path / "foreign")
    save_file(read_rank(foreign / "rank0.safetensors"), foreign / "rank0.safetensors")
    for kept in (other, engine, foreign):
        before = content(kept)
        done = run_script(*args, kept)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert "was not written by this command, so it is never replaced" in done.stderr
        assert content(kept) == before


def test_a_linked_output_is_followed_on_every_run(tiny_model, tmp_path, run_script):
    args = ("scripts/convert_checkpoint.py", "--model_dir", tiny_model, "--force", "--output_dir", tmp_path / "c")
    (tmp_path / "disk").mkdir()
    (tmp_path / "c").symlink_to("disk/c")
    for run in range(3):
        done = run_script(*args, *([] if run == 1 else ["--no-use_weight_only"]))
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "c").is_symlink()
        assert (Checkpoint(tmp_path / "disk/c").layout is not None) == (run == 1)
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"c"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, "--dtype 'float32' is not supported"),
        ({"quantize_at_build": True}, "needs --use_weight_only"),
        ({"target_arch": "sm70"}, "target arch 'sm70'"),
        ({"trtllm_version": "0.9"}, "version '0.9'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ConvertOptions(**options)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--no-use_weight_only", "--weight_only_precision", "int8"],
            "--weight_only_precision needs --use_weight_only",
        ),
        (["--no-use-weight-only", "--target_arch", "sm90"], "16-bit weights have none"),
        (["--quantize_at_build", "--trtllm_version", "0.17.0"], "16-bit weights have none"),
    ],
)
def test_flags_without_effect_are_refused(tiny_model, tmp_path, run_script, flags, message):
    args = ("--model_dir", tiny_model, "--output_dir", tmp_path / "c", *flags)
    done = run_script("scripts/convert_checkpoint.py", *args)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "c").exists()


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


def test_damaged_weights_leave_no_checkpoint(tmp_path):
    model = write_model(tmp_path / "m")
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"lm_head.weight contains NaN"):
        convert(model, tmp_path / "c", INT8)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_killed_conversion_leaves_nothing_and_starts_again(smollm2_model, tmp_path, run_script):
    args = ["--model_dir", str(smollm2_model), "--output_dir", str(tmp_path / "c")]
    process = subprocess.Popen(
        [sys.executable, "scripts/convert_checkpoint.py", *args], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / ".c.partial" / "rank0.safetensors").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (tmp_path / "c").exists()
    assert run_script("scripts/convert_checkpoint.py", *args).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"c"}
    Checkpoint(tmp_path / "c")


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "GPTForCausalLM"}, "architecture changed"),
        ({"qk_layernorm": True}, "qk_layernorm changed"),
        ({"quantization": {"quant_algo": "W4A16"}}, "quantization changed"),
        ({"mapping": {"tp_size": 2}}, "rank1.safetensors missing"),
        ({"num_hidden_layers": 3, "intermediate_size": 512}, "intermediate_size, num_hidden_layers changed"),
        ({"dtype": "bfloat16"}, r"is \('F16', .*expected \('BF16'"),
        ({"architectures": ["LlamaForCausalLM"]}, "is a Hugging Face model, .* convert it first"),
        ({"mapping": [1]}, "lacks a value or holds one of the wrong kind"),
        ({"dtype": None}, "lacks a value or holds one of the wrong kind: 'dtype'"),
        ({"dtype": "float32"}, "lacks a value or holds one of the wrong kind: 'float32'"),
        ({"mapping": {"tp_size": 0}}, "lacks a value or holds one of the wrong kind"),
        ({"vocab_size": None}, "vocab_size changed"),
    ],
)
def test_bad_checkpoints_are_one_clear_error(tiny_model, tmp_path, edit_json, changes, message):
    convert(tiny_model, tmp_path / "c", INT8)
    edit_json(tmp_path / "c" / "config.json", changes)
    with pytest.raises(InputError, match=message):
        Checkpoint(tmp_path / "c")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("transformer.layers.1.mlp.fc.weight", None, "mlp.fc.weight is missing"),
        ("transformer.layers.1.mlp.fc.per_channel_scale", None, "mlp.fc.per_channel_scale is missing"),
        ("transformer.ln_f.weight", torch.ones(127).half(), r"ln_f.weight is .*127.*, expected .*128"),
        ("transformer.ln_f.weight", torch.ones(128), "'F32', .* expected .*'F16'"),
        (None, None, "byte layout is not recorded"),
    ],
)
def test_weights_that_are_not_whole_or_from_elsewhere_are_refused(tiny_checkpoint, tmp_path, name, value, message):
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    path = tiny_checkpoint / "rank0.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() if name else None
    tensors = {key: old for key, old in (read_rank(path) | {name: value}).items() if old is not None}
    save_file(tensors, tmp_path / path.name, metadata)
    with pytest.raises(InputError, match=message):
        Checkpoint(tmp_path)
