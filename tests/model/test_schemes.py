"""A matrix has the scheme its tensors say, and no kernel reads one format as another."""

import pytest
import torch

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.errors import InputError
from llama_engine.model.llama import TorchModel
from llama_engine.model.schemes import (
    BF16,
    FP8,
    FP8_ALL,
    FP16,
    GROUP_SIZES,
    INT4,
    INT8,
    SCHEMES,
    default_group,
    pack_int4,
    scheme_for,
    unpack_int4,
)
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
    assert linear.shape == (6, 4)
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
        (torch.zeros(6, 64, dtype=torch.uint8), None, "uint8 weights without scales"),
        (torch.zeros(6, 64, dtype=torch.uint8), torch.ones(6), "uint8 weights with scales"),
        (torch.zeros(6, 64, dtype=torch.uint8), torch.ones(6, 4).half(), "float16 scales, one for every 128 or 64"),
        (torch.zeros(6, 64, dtype=torch.uint8), torch.ones(6, 1), "got torch.float32"),
        (torch.zeros(6, 64, dtype=torch.uint8), torch.ones(5, 1).half(), "need float16 scales"),
    ],
)
def test_other_bytes_are_refused_by_name(weight, scale, message):
    with pytest.raises(InputError, match=message):
        Linear(weight, scale)


def test_dequantized_rows_are_values_times_their_scale():
    weight = torch.tensor([[1, -2], [3, 127]], dtype=torch.int8)
    linear = Linear(weight, torch.tensor([0.5, 2.0]))
    assert linear.dequantize().tolist() == [[0.5, -1.0], [6.0, 254.0]]


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_int4_lies_as_its_docstring_says(group):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 8, (3, 3 * group), dtype=torch.int8, generator=generator)
    packed = pack_int4(values, group)
    for k in range(3 * group):
        start, j = k // group * group // 2, k % group
        byte = packed[:, start + j % (group // 2)].int()
        nibble = byte & 15 if j < group // 2 else byte >> 4
        assert (nibble - 16 * (nibble > 7)).tolist() == values[:, k].tolist()
    assert torch.equal(unpack_int4(packed, group), values)
    scale = torch.rand(3, 3, generator=generator).half() - 0.5
    linear = Linear(packed, scale)
    assert linear.scheme is INT4
    assert linear.shape == (3, 3 * group)
    assert linear.nbytes == packed.nbytes + scale.nbytes
    wanted = [[float(scale[n, k // group]) * int(values[n, k]) for k in range(3 * group)] for n in range(3)]
    assert linear.dequantize().tolist() == wanted


def test_int4_groups_divide_every_matrix():
    assert default_group([4096, 14336]) == 128
    assert default_group([576, 1536]) == 64
    with pytest.raises(
        InputError, match=r"64 inputs long, which does not divide the model's matrices of .96, 128. inp"
    ):
        default_group([128, 96])


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

    config = ModelConfig(64, 64, 64, 1, 2, 1, 32, 128)
    engine = EngineConfig(2, 64, 64, 16, num_kv_blocks=3)
    for scheme in SCHEMES.values():
        weights = random_weights(config, "cpu")
        weights.layers[0].down = random_weights(config, "cpu", scheme=scheme).layers[0].down
        assert weights.layers[0].down.scheme is scheme
        assert fused.supported(config, engine, weights) == ("cpu" in scheme.executors)
        if "gpu" not in scheme.executors:
            with pytest.raises(InputError, match=f"layer 0 down is {scheme.name}, which no GPU kernel runs"):
                GpuModel(config, engine, weights, Tiles(None, ""))
            continue
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


def test_an_fp8_cache_is_refused_by_name_on_gpus_that_lack_it(monkeypatch):
    pytest.importorskip("triton")
    from llama_engine.gpu import chain
    from llama_engine.kernels.tiles import Tiles

    config = ModelConfig(64, 32, 64, 1, 2, 1, 32, 128)
    engine = EngineConfig(2, 64, 64, 16, num_kv_blocks=3, kv_cache="fp8")
    monkeypatch.setattr(chain, "has_e4m3", lambda device: False)
    with pytest.raises(InputError, match="holds no FP8 KV cache: that needs sm89"):
        chain.GpuModel(config, engine, random_weights(config, "cpu"), Tiles(None, ""))


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


def test_the_reference_multiplies_int4():
    config = ModelConfig(64, 64, 64, 1, 2, 1, 32, 128)
    weights = random_weights(config, "cpu", scheme=INT4)
    model = TorchModel(config, EngineConfig(2, 64, 64, 16, num_kv_blocks=3), weights)
    linear = weights.layers[0].qkv
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    want = x.double() @ (unpack_int4(linear.weight, 64).double() * linear.scale.double()).T
    assert (model.linear(x, linear).double() - want).abs().max() < 1e-6 * want.abs().max()
