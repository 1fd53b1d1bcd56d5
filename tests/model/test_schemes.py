"""A matrix has the scheme its tensors say, and no kernel reads one format as another."""

import pytest
import torch

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.errors import InputError
from llama_engine.model.schemes import BF16, FP16, INT8, SCHEMES, scheme_for
from llama_engine.model.weights import Linear, random_weights


@pytest.mark.parametrize(
    ("dtype", "scaled", "scheme"),
    [(torch.int8, True, INT8), (torch.float16, False, FP16), (torch.bfloat16, False, BF16)],
)
def test_a_matrix_has_the_scheme_its_tensors_say(dtype, scaled, scheme):
    linear = Linear(torch.zeros(6, 4, dtype=dtype), torch.ones(6) if scaled else None)
    assert linear.scheme is scheme
    assert linear.nbytes == linear.weight.nbytes + (linear.scale.nbytes if scaled else 0)


@pytest.mark.parametrize(
    ("weight", "scale", "message"),
    [
        (torch.zeros(6, 4).to(torch.float8_e4m3fn), torch.ones(6), "float8_e4m3fn weights with scales"),
        (torch.zeros(6, 4, dtype=torch.int8), None, "int8 weights without scales"),
        (torch.zeros(6, 4, dtype=torch.float16), torch.ones(6), "float16 weights with scales"),
        (torch.zeros(6, 4, dtype=torch.int8), torch.ones(4), r"need float32 scales \(6,\)"),
        (torch.zeros(6, 4, dtype=torch.int8), torch.ones(6).half(), "need float32 scales"),
    ],
)
def test_other_bytes_are_refused_by_name(weight, scale, message):
    with pytest.raises(InputError, match=message):
        Linear(weight, scale)


def test_dequantized_rows_are_values_times_their_scale():
    weight = torch.tensor([[1, -2], [3, 127]], dtype=torch.int8)
    linear = Linear(weight, torch.tensor([0.5, 2.0]))
    assert linear.dequantize().tolist() == [[0.5, -1.0], [6.0, 254.0]]


def test_a_checkpoints_quant_algo_names_the_scheme():
    assert scheme_for("W8A16", torch.float16) is INT8
    assert scheme_for(None, torch.float16) is FP16
    assert scheme_for(None, torch.bfloat16) is BF16
    with pytest.raises(InputError, match="'W4A16_AWQ' is not supported: W8A16"):
        scheme_for("W4A16_AWQ", torch.float16)


def test_kernels_take_the_schemes_that_name_them():
    pytest.importorskip("triton")
    from llama_engine.cpu import fused
    from llama_engine.gpu.chain import GpuModel
    from llama_engine.kernels.tiles import Tiles

    config = ModelConfig(64, 32, 64, 1, 2, 1, 32, 128)
    engine = EngineConfig(2, 64, 64, 16, num_kv_blocks=3)
    for scheme in SCHEMES.values():
        weights = random_weights(config, "cpu")
        layer = weights.layers[0]
        if scheme is not INT8:
            layer.down = Linear(layer.down.dequantize(scheme.weight_dtype))
        assert fused.supported(config, engine, weights) == ("cpu" in scheme.executors)
        if "gpu" in scheme.executors:
            GpuModel(config, engine, weights, Tiles(None, ""))
        else:
            with pytest.raises(InputError, match=f"down is {scheme.name}, not INT8"):
                GpuModel(config, engine, weights, Tiles(None, ""))
