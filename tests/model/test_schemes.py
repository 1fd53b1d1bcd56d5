"""A matrix has the scheme its tensors say, and no kernel reads one format as another."""

import pytest
import torch

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.errors import InputError
from llama_engine.model.llama import TorchModel
from llama_engine.model.schemes import BF16, FP8, FP8_ALL, FP16, INT8, SCHEMES, scheme_for
from llama_engine.model.weights import Linear, random_weights


@pytest.mark.parametrize(
    ("dtype", "scaled", "scheme"),
    [
        (torch.int8, True, INT8),
        (torch.float8_e4m3fn, True, FP8),
        (torch.float16, False, FP16),
        (torch.bfloat16, False, BF16),
    ],
)
def test_a_matrix_has_the_scheme_its_tensors_say(dtype, scaled, scheme):
    linear = Linear(torch.zeros(6, 4, dtype=dtype), torch.ones(6) if scaled else None)
    assert linear.scheme is scheme
    assert linear.nbytes == linear.weight.nbytes + (linear.scale.nbytes if scaled else 0)


@pytest.mark.parametrize(
    ("weight", "scale", "message"),
    [
        (torch.zeros(6, 4).to(torch.float8_e5m2), torch.ones(6), "float8_e5m2 weights with scales"),
        (torch.zeros(6, 4).to(torch.float8_e4m3fn), None, "float8_e4m3fn weights without scales"),
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
    assert scheme_for("FP8_PER_CHANNEL_PER_TOKEN", torch.float16) is scheme_for(FP8_ALL, torch.bfloat16) is FP8
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
        weights.layers[0].down = random_weights(config, "cpu", scheme=scheme).layers[0].down
        assert weights.layers[0].down.scheme is scheme
        assert fused.supported(config, engine, weights) == ("cpu" in scheme.executors)
        model = GpuModel(config, engine, weights, Tiles(None, ""))
        assert model.weights.layers[0].down.scheme is (FP16 if scheme is BF16 else scheme)
        assert model.weights.layers[0].qkv.scheme is INT8


def test_fp8_is_refused_by_name_on_gpus_that_lack_it(monkeypatch):
    pytest.importorskip("triton")
    from llama_engine.gpu.linears import checked_weights

    config = ModelConfig(64, 32, 64, 1, 2, 1, 32, 128)
    weights = random_weights(config, "cpu", scheme=FP8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(weights, "embedding", type("OnGpu", (), {"device": torch.device("cuda")}))
    with pytest.raises(InputError, match="layer 0 qkv is fp8, and this GPU is sm86: FP8 needs sm89"):
        checked_weights(config, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_reference_multiplies_the_quantized_values_exactly(dtype):
    config = ModelConfig(64, 32, 64, 1, 2, 1, 32, 128)
    linear = random_weights(config, "cpu", scheme=FP8).layers[0].qkv
    model = TorchModel(config, EngineConfig(2, 64, 64, 16, num_kv_blocks=3), random_weights(config, "cpu"), dtype)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    scale = (x.double().abs().amax(1) / 448).float().double()
    values = (x.double() * (1 / scale).float().double()[:, None]).float().to(torch.float8_e4m3fn).double()
    want = values * scale[:, None] @ (linear.weight.double() * linear.scale.double()[:, None]).T
    got = model.linear(x, linear)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() < (1e-6 if dtype == torch.float32 else 5e-4) * want.abs().max()
    # and so it differs from floating-point activations by e4m3's steps
    assert (got.double() - x.double() @ linear.dequantize().double().T).abs().max() > 5e-3 * want.abs().max()
