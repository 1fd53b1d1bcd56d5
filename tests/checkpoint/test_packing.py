import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_engine.checkpoint.packing import LAYOUTS, check_packable, layout_for, pack, quantize, unpack
from llama_engine.errors import InputError
from llama_engine.model.weights import Linear
from tests.golden import make_oracle

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "layouts.json").read_text())


def round_half_away(x: float) -> int:
    return int(math.copysign(math.floor(abs(x) + 0.5), x))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_quantize_follows_the_formula(dtype, bits):
    weight, limit = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)).to(dtype), 2 ** (bits - 1)
    q, scale = quantize(weight, bits)
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    for row, values, s in zip(q.tolist(), weight.float().tolist(), scale.tolist()):
        assert s == max(abs(v) for v in values) / limit
        for got, value in zip(row, values):
            # Nearest float32 quotient, as the C++ computes it, then exact rounding in double.
            quotient = torch.tensor(value, dtype=torch.float32).div(torch.tensor(s, dtype=torch.float32)).item()
            assert got == max(-limit, min(limit - 1, round_half_away(quotient)))


def test_halves_go_away_from_zero_and_the_maximum_is_clamped():
    weight = torch.tensor([[128.0, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 0.49999997, -0.49999997, 127.5]])
    q, scale = quantize(weight)
    assert scale.tolist() == [1.0]
    assert q.tolist() == [[127, 1, -1, 2, -2, 3, -3, 0, 0, 127]]
    assert quantize(-weight)[0].tolist() == [[-128, -1, 1, -2, 2, -3, 3, 0, 0, -128]]


def test_a_zero_channel_gives_zeros():
    weight = torch.zeros(2, 64)
    weight[1, 3] = 1.0
    q, scale = quantize(weight)
    assert scale[0] == 0
    assert not q[0].any()
    assert not Linear(q, scale).dequantize()[0].any()


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 200), st.floats(1e-6, 1e4))
@settings(max_examples=60, deadline=None)
def test_dequantized_error_is_at_most_one_step(seed, n, k, size):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * size
    q, scale = quantize(weight)
    error = (Linear(q, scale).dequantize() - weight).abs()
    # Half a step, except the clamped maximum: 128 * scale comes back as 127 * scale.
    assert (error <= scale[:, None] * 1.0001).all()
    inside = weight < 127.4 * scale[:, None]
    assert (error[inside] <= (scale[:, None] * 0.5001).expand_as(error)[inside]).all()


def golden_input(rows: int, columns: int) -> torch.Tensor:
    k, n = torch.arange(rows)[:, None], torch.arange(columns)[None]
    value = (131 * k + 71 * n + (k * n) % 251 + 7 * (k // 16) * (n // 2)) % 256 - 128
    return value.to(torch.int8).T.contiguous()


@pytest.mark.parametrize("name", sorted(GOLDEN))
@pytest.mark.parametrize("shape", sorted(next(iter(GOLDEN.values()))))
def test_layouts_match_digests_made_from_the_written_formulas(name, shape):
    rows, columns = map(int, shape.split("x"))
    layout, bits = name.split("/")
    packed = pack(golden_input(rows, columns) >> (8 - int(bits)), LAYOUTS[layout], int(bits))
    assert hashlib.sha256(packed.numpy().tobytes()).hexdigest() == GOLDEN[name][shape]


def test_every_layout_has_golden_digests():
    assert set(GOLDEN) == {f"{layout}/{bits}" for layout in LAYOUTS for bits in (8, 4)}


def test_bytes_are_those_that_nvidias_own_code_was_seen_to_make():
    kept = json.loads(make_oracle.FILE.read_text())
    assert len(kept) == 48 + 20
    assert {name: made for name, made in make_oracle.cases() if kept[name] != made} == {}


@given(
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from([8, 4]),
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(0, 9999),
)
@settings(max_examples=80, deadline=None)
def test_unpack_undoes_pack(name, bits, n32, k64, seed):
    n, k, limit = 32 * n32, 64 * k64, 1 << (bits - 1)
    q = torch.randint(-limit, limit, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    packed = pack(q, LAYOUTS[name], bits)
    assert packed.dtype == torch.int8
    assert packed.numel() == n * k * bits // 8
    assert torch.equal(unpack(packed.view(k, -1), n, k, LAYOUTS[name], bits), q)


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_range_of_rows_packs_to_its_own_bytes(name):
    q = golden_input(128, 96)
    whole = pack(q, LAYOUTS[name])
    assert torch.equal(pack(q[10:34], LAYOUTS[name]), whole[10 * 128 : 34 * 128])
    whole = pack(q >> 4, LAYOUTS[name], 4)
    assert torch.equal(pack(q[12:36] >> 4, LAYOUTS[name], 4), whole[12 * 64 : 36 * 64])


@pytest.mark.parametrize(
    ("arch", "version", "name"),
    [
        ("sm80", "0.15.0", "column_major_interleaved"),
        ("sm86", "0.17.0", "column_major_interleaved"),
        ("sm89", "1.2.1", "column_major_interleaved"),
        ("sm90", "0.15.0", "column_major"),
        ("sm90", "0.16.0", "column_major_permuted"),
        ("sm90", "0.17.0.post1", "column_major_permuted_biased"),
        ("sm90", "1.2.1", "column_major_permuted_biased"),
    ],
)
def test_layout_of_each_target_and_release(arch, version, name):
    assert layout_for(arch, version).name == name


@pytest.mark.parametrize(("arch", "version"), [("sm70", "0.15.0"), ("sm80", "0.14.0"), ("sm80", "new")])
def test_unknown_targets_are_refused(arch, version):
    with pytest.raises(InputError, match="is not supported"):
        layout_for(arch, version)


def test_shapes_that_the_kernels_refuse_are_named():
    with pytest.raises(InputError, match=r"layers.0.*96 x 64.*multiples of 64 x 32"):
        check_packable(64, 96, LAYOUTS["column_major_interleaved"], "layers.0")
    check_packable(64, 96, LAYOUTS["column_major"], "layers.0")
    with pytest.raises(InputError, match=r"64 x 96.*multiples of 64 x 64 alone: give --group_size"):
        check_packable(96, 64, LAYOUTS["column_major"], "layers.0", 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1024, 512), (16, 576, 1536), (64, 256, 768)])
@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_matmul_error_is_within_nvidias_own_bound(dtype, shape, name):
    m, k, n = shape
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(m, k, generator=generator).to(dtype).float()
    q, scale = quantize(torch.randn(n, k, generator=generator).to(dtype) / 16)
    scale = scale.to(dtype).float()
    # Through the packed bytes, with an identity matmul, back to the reference.
    restored = (
        torch.eye(k).to(dtype).float()
        @ Linear(unpack(pack(q, LAYOUTS[name]), n, k, LAYOUTS[name]), scale).dequantize().T
    )
    reference = x @ Linear(q, scale).dequantize().T
    got = (x @ restored).to(dtype).float()
    assert (got - reference).abs().max() <= reference.abs().max() / 128 * 1.5
