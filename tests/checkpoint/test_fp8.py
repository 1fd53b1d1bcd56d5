"""FP8 row-wise: values by hand, what the checkpoint holds, and the engine built from it."""

import json
from fractions import Fraction

import pytest
import torch

from llama_engine import trtllm
from llama_engine.checkpoint.build import build_native
from llama_engine.checkpoint.convert import ConvertOptions, convert
from llama_engine.checkpoint.hf import HFModel
from llama_engine.checkpoint.packing import quantize_fp8
from llama_engine.checkpoint.reader import Checkpoint
from llama_engine.checkpoint.unified import FP8_CLAMP
from llama_engine.config import EngineConfig
from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import InputError
from llama_engine.model.schemes import FP8, FP8_ALL, FP8_ROWWISE, FP16, quantize_e4m3
from llama_engine.model.weights import LINEARS, load_weights
from llama_engine.native import load_engine
from tests.checkpoint.test_convert import read_rank, write_model

SMALL = EngineConfig(max_batch_size=4, max_seq_len=128, tokens_per_block=16)
MLP = ("fc", "gate", "proj")


def e4m3(x: Fraction) -> float:
    """The e4m3 value nearest to ``x``, ties to the even mantissa: 4 exponent bits of bias 7, 3 mantissa bits."""
    exponent = -6
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    step = Fraction(2) ** (exponent - 3)
    return float(round(x / step) * step)  # Python rounds halves to even


def f32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float64).float().item()


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    """Four layers: two of them neither first nor last."""
    return write_model(tmp_path_factory.mktemp("fp8") / "deep", num_hidden_layers=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_follow_the_formula(dtype):
    weight = (torch.randn(12, 64, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    weight[3] *= 1e-4  # many of the row's values end among e4m3's subnormal numbers
    weight[4, :4] = torch.tensor([5000.0, -1300.0, 1200.0, 3.0])
    weight[5] = 0
    weight[6] = 2e-6  # its scale would be below the least
    q, scale = quantize_fp8(weight, FP8_CLAMP)
    assert (q.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    for row, values, s in zip(q.float().tolist(), weight.double().tolist(), scale.tolist()):
        clamped = [max(-1200.0, min(1200.0, value)) for value in values]
        assert s == max(f32(max(map(abs, clamped)) / 448), f32(1 / (448 * 512)))
        for got, value in zip(row, clamped):
            quotient = max(-448.0, min(448.0, f32(value / s)))
            assert got == e4m3(Fraction(quotient))
    assert scale[4] == f32(1200 / 448)
    assert q[4, :2].float().tolist() == [448.0, -448.0]
    assert not q[5].float().any()


def test_activations_follow_the_formula():
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    x[1] = 0
    x[2, 5] = 3000.0  # is not clamped: the row's scale grows
    x[3] = torch.linspace(-1, 1, 96) ** 9
    q, scale = quantize_e4m3(x)
    for row, values, s in zip(q.float().tolist(), x.double().tolist(), scale.tolist()):
        assert s == max(f32(max(map(abs, values)) / 448), f32(1 / (448 * 512)))
        for got, value in zip(row, values):
            product = max(-448.0, min(448.0, f32(value * f32(1 / s))))
            assert got == e4m3(Fraction(product))
    assert (q.float() * scale[:, None])[2, 5] == pytest.approx(3000.0)


@pytest.mark.parametrize(("recipe", "quant_algo"), [("nvidia", FP8_ROWWISE), ("all", FP8_ALL)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_recipe_decides_which_matrices_are_e4m3(deep_model, tmp_path, recipe, quant_algo, dtype):
    convert(deep_model, tmp_path / "c", ConvertOptions(dtype, fp8=recipe))
    tensors, source = read_rank(tmp_path / "c" / "rank0.safetensors"), HFModel(deep_model)
    held = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    if recipe == "nvidia":  # TensorRT-LLM: MLP alone, without the first and the last layer
        expected = {f"transformer.layers.{i}.mlp.{part}.weight" for i in (1, 2) for part in MLP}
    else:
        parts = ["attention.qkv", "attention.dense", *(f"mlp.{part}" for part in MLP)]
        expected = {f"transformer.layers.{i}.{part}.weight" for i in range(4) for part in parts}
    assert held == expected
    scales = {name for name in tensors if name.endswith("per_channel_scale")}
    assert scales == {name.replace("weight", "per_channel_scale") for name in held}
    kind = getattr(torch, dtype)
    for there, name in (("gate_proj", "fc"), ("up_proj", "gate"), ("down_proj", "proj")):
        weight = source.tensor(f"model.layers.2.mlp.{there}.weight", kind)
        q, scale = quantize_fp8(weight, (-1200, 1200))
        stored = tensors[f"transformer.layers.2.mlp.{name}.weight"]
        assert stored.shape == weight.shape  # (out, in), unlike INT8
        assert torch.equal(stored.float(), q.float())
        found = tensors[f"transformer.layers.2.mlp.{name}.per_channel_scale"]
        assert found.dtype == torch.float32
        assert torch.equal(found, scale)
    assert {tensors[name].dtype for name in tensors if name not in held | scales} == {kind}
    quantization = json.loads((tmp_path / "c" / "config.json").read_text())["quantization"]
    assert quantization["quant_algo"] == quant_algo
    assert quantization["clamp_val"] == [-1200.0, 1200.0]
    assert quantization["exclude_modules"] is None
    assert "use_meta_recipe" not in quantization


def test_later_releases_are_told_the_recipe(deep_model, tmp_path):
    convert(deep_model, tmp_path / "c", ConvertOptions(fp8="nvidia", trtllm_version="0.16.0"))
    quantization = json.loads((tmp_path / "c" / "config.json").read_text())["quantization"]
    assert quantization["use_meta_recipe"] is True
    assert Checkpoint(tmp_path / "c").quant_algo == FP8_ROWWISE


def test_scales_are_taken_after_splitting_and_chunks_leave_no_trace(deep_model, tmp_path, monkeypatch):
    options = ConvertOptions(fp8="nvidia", tp_size=2)
    convert(deep_model, tmp_path / "whole", options)
    monkeypatch.setattr("llama_engine.tensor_files.CHUNK_ELEMENTS", 1000)
    convert(deep_model, tmp_path / "c", options)
    assert Checkpoint(tmp_path / "c").sha256() == Checkpoint(tmp_path / "whole").sha256()
    down = HFModel(deep_model).tensor("model.layers.1.mlp.down_proj.weight", torch.float16)
    checkpoint, name = Checkpoint(tmp_path / "c"), "transformer.layers.1.mlp.proj.weight"
    for rank in range(2):
        q, scale = quantize_fp8(down[:, rank * 192 : (rank + 1) * 192], FP8_CLAMP)
        assert torch.equal(checkpoint.read(name, (0, 128), rank).float(), q.float())
        assert torch.equal(checkpoint.scale(name, rank), scale)
    assert not torch.equal(checkpoint.scale(name, 0), checkpoint.scale(name, 1))


@pytest.mark.parametrize("recipe", ["nvidia", "all"])
def test_the_engine_holds_the_checkpoints_values_and_runs(deep_model, tmp_path, capsys, recipe):
    convert(deep_model, tmp_path / "c", ConvertOptions(fp8=recipe))
    build_native(tmp_path / "c", tmp_path / "e", SMALL)
    weights = load_weights(tmp_path / "e", load_engine_json(tmp_path / "e").model, "cpu")
    for i, layer in enumerate(weights.layers):
        mlp = FP8 if recipe == "all" or i in (1, 2) else FP16
        expected = {"gate_up": mlp, "down": mlp}
        expected |= dict.fromkeys(("qkv", "o"), FP8 if recipe == "all" else FP16)
        assert {name: getattr(layer, name).scheme for name in LINEARS} == expected
    checkpoint = Checkpoint(tmp_path / "c")
    parts = [f"transformer.layers.1.mlp.{part}.weight" for part in ("fc", "gate")]
    stacked = torch.cat([checkpoint.read(part, (0, 384)).float() for part in parts])
    assert torch.equal(weights.layers[1].gate_up.weight.float(), stacked)
    assert torch.equal(weights.layers[1].gate_up.scale, torch.cat([checkpoint.scale(part) for part in parts]))

    engine = load_engine(tmp_path / "e", device="cpu")
    assert capsys.readouterr().err == (
        "note: FP8 matrices run on a CPU by exact emulation in PyTorch operations, slowly\n"
    )
    assert engine.executor.kernels == "torch"
    engine.add_request([5, 17, 300], 4)
    tokens = []
    while engine.has_unfinished:
        tokens += [token for output in engine.step() for token in output.token_ids]
    assert len(tokens) == 4


def test_a_changed_recipe_is_noticed(deep_model, tmp_path, edit_json):
    convert(deep_model, tmp_path / "c", ConvertOptions(fp8="all"))
    config = tmp_path / "c" / "config.json"
    quantization = json.loads(config.read_text())["quantization"] | {"quant_algo": FP8_ROWWISE}
    edit_json(config, {"quantization": quantization})
    with pytest.raises(InputError, match="quantization changed"):
        Checkpoint(tmp_path / "c")


def test_tensorrt_llm_gets_nvidias_recipe_alone_and_in_its_releases_words(
    installed,
    deep_model,
    tmp_path,
    run_script,
):
    convert(deep_model, tmp_path / "ours", ConvertOptions(fp8="all"))
    with pytest.raises(InputError, match=r"FP8_PER_CHANNEL_PER_TOKEN_ALL.*--fp8_recipe nvidia"):
        trtllm.build(tmp_path / "ours", tmp_path / "e", SMALL, {})
    args = ("--checkpoint_dir", tmp_path / "ours", "--output_dir", tmp_path / "e")
    done = run_script("scripts/build_engine.py", *args, "--backend", "tensorrt_llm", "--dry-run")
    assert done.returncode == 2
    assert "FP8_PER_CHANNEL_PER_TOKEN_ALL" in done.stderr
    convert(deep_model, tmp_path / "later", ConvertOptions(fp8="nvidia", trtllm_version="0.16.0"))
    with pytest.raises(InputError, match=r"written for TensorRT-LLM 0\.16\.0.*--trtllm_version 0\.15\.0"):
        trtllm.build(tmp_path / "later", tmp_path / "e", SMALL, {})
    convert(deep_model, tmp_path / "c", ConvertOptions(fp8="nvidia"))
    trtllm.build(tmp_path / "c", tmp_path / "e", SMALL, {})


def test_a_model_without_inner_layers_has_nothing_to_quantize(tiny_model, tmp_path):
    with pytest.raises(InputError, match=r"first and the last layer in 16 bits, .* --fp8_recipe all"):
        convert(tiny_model, tmp_path / "c", ConvertOptions(fp8="nvidia"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fp8_recipe", "all"], "--fp8_recipe needs --use_fp8_rowwise"),
        (["--use_fp8_rowwise", "--use_weight_only"], "are two quantizations"),
        (["--use_fp8_rowwise", "--target_arch", "sm90"], "byte order of INT8: FP8 has none"),
        (["--use_fp8_rowwise", "--quantize_at_build"], "--quantize_at_build needs --use_weight_only"),
        (["--use_fp8_rowwise", "--trtllm_version", "0.9"], "version '0.9'"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(tiny_model, tmp_path, run_script, flags, message):
    args = ("--model_dir", tiny_model, "--output_dir", tmp_path / "c", *flags)
    done = run_script("scripts/convert_checkpoint.py", *args)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "c").exists()


def test_the_shell_script_takes_the_flag_too(deep_model, tmp_path, run_script):
    args = ("--model_dir", deep_model, "--output_dir", tmp_path / "c", "--use_fp8_rowwise")
    done = run_script("scripts/convert_checkpoint.sh", *args)
    assert done.returncode == 0, done.stderr
    assert "FP8, nvidia recipe" in done.stdout
    assert Checkpoint(tmp_path / "c").quant_algo == FP8_ROWWISE
