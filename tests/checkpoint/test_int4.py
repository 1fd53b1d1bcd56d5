"""INT4: values by hand, what the checkpoints hold, activation-aware scaling, and the engines built from them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from llama_engine import trtllm
from llama_engine.checkpoint import convert as conversion
from llama_engine.checkpoint.awq import best_scale, search
from llama_engine.checkpoint.build import build_native
from llama_engine.checkpoint.convert import ConvertOptions, convert
from llama_engine.checkpoint.hf import HFModel
from llama_engine.checkpoint.packing import LEVELS, quantize, quantize_int4
from llama_engine.checkpoint.reader import Checkpoint
from llama_engine.config import EngineConfig
from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import InputError
from llama_engine.model.llama import TorchModel
from llama_engine.model.schemes import INT4, pack_int4
from llama_engine.model.weights import LINEARS, Linear, load_weights
from llama_engine.native import load_engine
from tests.checkpoint.test_convert import read_rank

SMALL = EngineConfig(max_batch_size=4, max_seq_len=128, tokens_per_block=16, num_kv_blocks=9)
GROUPS = ConvertOptions(int4="group", calibration="")


def test_group_scales_have_the_least_error_of_the_levels():
    weight = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    weight[0, 5], weight[1, 130] = 9.0, -9.0
    weight[2, :64] = 0
    q, scale = quantize_int4(weight, 64, torch.ones(256))
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float16)
    for row in range(3):
        for group in range(4):
            values = weight[row, 64 * group :][:64].tolist()
            largest = max(values, key=abs)
            errors = {}
            for level in LEVELS:
                s = torch.tensor(largest / -level).half().item()
                rounded = [max(-8, min(7, round(value / s))) if s else 0 for value in values]  # halves to even
                errors[level] = sum((s * r - value) ** 2 for r, value in zip(rounded, values)), s, rounded
            error, s, rounded = min(errors.values())
            got = sum((float(scale[row, group]) * r - v) ** 2 for r, v in zip(q[row, 64 * group :].tolist(), values))
            assert got == pytest.approx(error, rel=1e-4)
            if s == scale[row, group].item():
                assert q[row, 64 * group :][:64].tolist() == rounded
    assert scale[0, 0] < 0 < scale[1, 2]
    assert scale[2, 0] == 0
    assert not q[2, :64].any()


def test_importance_moves_the_error_to_inputs_that_matter_less():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(128)
    importance[:16] = 1e3

    def error(*args):
        q, scale = quantize_int4(weight, 128, *args)
        return (Linear(pack_int4(q, 128), scale).dequantize() - weight).square()[:, :16].mean()

    assert error(importance) < 0.9 * error(torch.ones(128))


def test_without_importance_nothing_is_clipped():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    q, scale = quantize_int4(weight, 64)
    largest = weight.unflatten(1, (2, 64)).abs().amax(2)
    assert torch.equal(scale.abs(), (largest / 8).half())
    assert torch.equal(q.unflatten(1, (2, 64)).amin(2), torch.full((8, 2), -8, dtype=torch.int8))


def test_a_scale_is_found_that_spares_strong_inputs():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 128, generator=generator), torch.randn(96, 128, generator=generator)
    x[:, 7] *= 60
    x[:, 50] *= 30

    def error(scale):
        q, s = quantize_int4(weight * scale, 128, x.square().mean(0) / scale.square())
        return (F.linear(x, Linear(pack_int4(q, 128), s).dequantize() / scale) - F.linear(x, weight)).square().mean()

    scale = best_scale(x, weight, 128)
    assert scale.argmax() == 7
    assert error(scale) < 0.8 * error(torch.ones(128))


def test_scaling_changes_nothing_but_the_rounding(tiny_model):
    model, ids = HFModel(tiny_model), torch.arange(40) * 11
    scaling = search(model, ids, 128)
    c = model.config
    for name, shape in model.shapes.items():
        data = model.tensor(name, torch.float32)
        whole = scaling.apply(name, data, 0)
        assert torch.equal(scaling.apply(name, data[8:24], 8), whole[8:24])
        assert whole.shape == shape
        assert ("_proj" in name or "layernorm" in name) == (whole is not data)

    def layer(name, x):
        return F.linear(x, scaling.apply(name, model.tensor(name, torch.float32), 0))

    # up before down, v before o: the factors of one undo those of the other
    x = torch.randn(3, c.hidden_size, generator=torch.Generator().manual_seed(1))
    here = "model.layers.1."
    norm = scaling.rows[f"{here}post_attention_layernorm.weight"]
    up = layer(f"{here}mlp.up_proj.weight", x * norm)
    plain = F.linear(x, model.tensor(f"{here}mlp.up_proj.weight", torch.float32))
    down = model.tensor(f"{here}mlp.down_proj.weight", torch.float32)
    torch.testing.assert_close(layer(f"{here}mlp.down_proj.weight", up), F.linear(plain, down))
    values = torch.randn(3, c.num_kv_heads, c.head_size, generator=torch.Generator().manual_seed(2))
    heads = values.repeat_interleave(c.num_heads // c.num_kv_heads, 1).flatten(1)
    scaled = values * scaling.rows[f"{here}self_attn.v_proj.weight"].view(c.num_kv_heads, c.head_size)
    scaled = scaled.repeat_interleave(c.num_heads // c.num_kv_heads, 1).flatten(1)
    o = f"{here}self_attn.o_proj.weight"
    torch.testing.assert_close(layer(o, scaled), F.linear(heads, model.tensor(o, torch.float32)))


def test_group_wise_checkpoints_hold_what_the_engine_runs(tiny_model, tmp_path):
    convert(tiny_model, tmp_path / "c", GROUPS)
    source, tensors = HFModel(tiny_model), read_rank(tmp_path / "c" / "rank0.safetensors")
    weight = source.tensor("model.layers.1.mlp.down_proj.weight", torch.float16)
    q, scale = quantize_int4(weight, 128)
    assert torch.equal(tensors["transformer.layers.1.mlp.proj.weight"], pack_int4(q, 128))
    assert torch.equal(tensors["transformer.layers.1.mlp.proj.per_channel_scale"], scale)
    quantization = json.loads((tmp_path / "c" / "config.json").read_text())["quantization"]
    assert (quantization["quant_algo"], quantization["group_size"]) == ("W4A16_GROUPWISE", 128)
    build_native(tmp_path / "c", tmp_path / "e", SMALL)
    info = load_engine_json(tmp_path / "e")
    weights = load_weights(tmp_path / "e", info.model, "cpu")
    assert {getattr(layer, name).scheme for layer in weights.layers for name in LINEARS} == {INT4}
    assert torch.equal(weights.layers[1].down.weight, pack_int4(q, 128))
    assert len(info.activation_losses) == info.model.num_layers
    engine = load_engine(tmp_path / "e", device="cpu")
    assert engine.executor.kernels.startswith("cpu-")
    engine.add_request([5, 17, 300], 4)
    tokens = []
    while engine.has_unfinished:
        tokens += [token for output in engine.step() for token in output.token_ids]
    assert len(tokens) == 4


@pytest.mark.parametrize("options", [{"target_arch": "sm80"}, {"target_arch": "sm90", "trtllm_version": "1.2.1"}])
def test_channel_wise_checkpoints_are_tensorrt_llms_and_run_in_groups(tiny_model, tmp_path, options):
    convert(tiny_model, tmp_path / "c", ConvertOptions(int4="channel", **options))
    tensors = read_rank(tmp_path / "c" / "rank0.safetensors")
    stored = tensors["transformer.layers.0.mlp.proj.weight"]
    assert (stored.dtype, tuple(stored.shape)) == (torch.int8, (384, 128 // 2))  # (in, out / 2)
    quantization = json.loads((tmp_path / "c" / "config.json").read_text())["quantization"]
    assert quantization["quant_algo"] == "W4A16"
    weight = HFModel(tiny_model).tensor("model.layers.0.mlp.down_proj.weight", torch.float16)
    q, scale = quantize(weight, 4)
    assert torch.equal(Checkpoint(tmp_path / "c").read("transformer.layers.0.mlp.proj.weight", (8, 40)), q[8:40])
    build_native(tmp_path / "c", tmp_path / "e", SMALL)
    down = load_weights(tmp_path / "e", load_engine_json(tmp_path / "e").model, "cpu").layers[0].down
    assert down.scheme is INT4
    assert torch.equal(down.dequantize(), q * scale.half().float()[:, None])


def test_calibration_lowers_the_loss_of_a_model_with_strong_inputs(tiny_model, tmp_path, monkeypatch):
    strong = shutil.copytree(tiny_model, tmp_path / "strong")
    tensors = load_file(strong / "model.safetensors")
    for name in tensors:
        if "layernorm" in name:
            tensors[name][7:128:31] *= 40
    save_file(tensors, strong / "model.safetensors")
    ids = torch.arange(64) * 7
    monkeypatch.setattr(conversion, "text_ids", lambda *_: ids)
    logits = {}
    for name, options in {"16": ConvertOptions(), "plain": GROUPS, "awq": ConvertOptions(int4="group")}.items():
        convert(strong, tmp_path / f"c{name}", options)
        build_native(tmp_path / f"c{name}", tmp_path / f"e{name}", SMALL)
        config = load_engine_json(tmp_path / f"e{name}").model
        model = TorchModel(config, SMALL, load_weights(tmp_path / f"e{name}", config, "cpu"))
        positions = torch.arange(64, dtype=torch.int32)
        table = torch.arange(1, 9, dtype=torch.int32)[None]
        logits[name] = model.forward(ids.int(), positions, positions * 0, table, positions)
    error = {name: (logits[name] - logits["16"]).square().mean() for name in ("plain", "awq")}
    assert error["awq"] < 0.7 * error["plain"]


def test_tensorrt_llm_does_not_get_the_engines_groups(installed, tiny_model, tmp_path):
    convert(tiny_model, tmp_path / "c", GROUPS)
    with pytest.raises(InputError, match=r"W4A16_GROUPWISE.*--weight_only_precision int4"):
        trtllm.build(tmp_path / "c", tmp_path / "e", SMALL, {})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--group_size", "128"], "--group_size needs --weight_only_precision int4"),
        (["--weight_only_precision", "int4", "--calibration_text", "x"], "--calibration_text needs --group_size"),
        (["--weight_only_precision", "int4", "--group_size", "128", "--target_arch", "sm90"], "INT4 has none"),
        (["--weight_only_precision", "int4", "--group_size", "64", "--tp_size", "2"], "give --tp_size 1"),
        (["--weight_only_precision", "int4", "--group_size", "64", "--calibration_text", "/none"], "cannot be read"),
        (["--weight_only_precision", "int4", "--use_fp8_rowwise"], "--weight_only_precision needs --use_weight_only"),
        (["--weight_only_precision", "int4", "--quantize_at_build"], "--quantize_at_build needs"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(tiny_model, tmp_path, run_script, flags, message):
    done = run_script(
        "scripts/convert_checkpoint.py", "--model_dir", tiny_model, "--output_dir", tmp_path / "c", *flags
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "c").exists()


def test_the_script_takes_both_forms(tiny_model, tmp_path, run_script):
    for flags, what in (([], "INT4, layout column_major_interleaved"), (["--group_size", "auto"], "INT4 in groups")):
        args = ("--model_dir", tiny_model, "--output_dir", tmp_path / "c", "--force", "--target_arch", "sm80")
        args = (*(args if not flags else args[:-2]), "--weight_only_precision", "int4", *flags)
        done = run_script("scripts/convert_checkpoint.py", *args)
        assert done.returncode == 0, done.stderr
        assert what in done.stdout
