"""What the converter and the checkpoint reader refuse, and what they leave behind then."""

import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llama_engine.checkpoint.build import build_native
from llama_engine.checkpoint.convert import ConvertOptions, convert
from llama_engine.checkpoint.reader import Checkpoint
from llama_engine.config import EngineConfig
from llama_engine.errors import InputError
from llama_engine.native import load_engine
from tests.checkpoint.test_convert import INT8, content, read_rank, write_model
from tests.conftest import ROOT


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
    deadline = time.monotonic() + 300
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
