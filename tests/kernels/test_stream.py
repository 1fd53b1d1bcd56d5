"""The streaming kernel against the exact reference, and to the bit against the Triton kernel that it stands in for."""

import pytest
import torch
from torch.nn import functional as F

from llama_engine.errors import InputError
from llama_engine.kernels.stream import shape_of
from llama_engine.model.weights import Linear

GEOMETRIES = {  # name: (N, K, epilogue); 8B, 1B, and sizes that leave the last block part empty
    "8b qkv": (6144, 4096, 0),
    "8b o": (4096, 4096, 1),
    "8b gate_up": (28672, 4096, 2),
    "8b down": (4096, 14336, 1),
    "1b qkv": (3072, 2048, 0),
    "1b down": (2048, 8192, 1),
    "ragged": (1040, 1536, 1),
    "ragged gate_up": (2 * 1104, 384, 2),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("processors", [132, 114, 16])
def test_a_cut_covers_the_matrix_with_one_block_a_processor(geometry, processors):
    n, k, epilogue = GEOMETRIES[geometry]
    shape = shape_of(n, k, epilogue, processors)
    if shape is None:
        assert processors == 16
        return
    assert shape.blocks <= processors
    assert shape.blocks % shape.split == 0
    covered = shape.blocks // shape.split * shape.slabs * 16
    assert n <= covered < n + shape.slabs * 16
    assert k % (128 * shape.split) == 0


@pytest.mark.parametrize(("n", "k"), [(576, 576), (4096, 1500), (1001, 4096)])
def test_what_it_cannot_cut_is_left_to_the_other_kernel(n, k):
    assert shape_of(n, k, 0, 132) is None


@pytest.fixture
def hopper():
    from llama_engine.kernels.stream import supported

    device = torch.device("cuda")
    if not supported(device):
        pytest.skip("needs compute capability 9.0")
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 8, 13, 16, 31, 32])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_equals_triton_to_the_bit_and_the_reference(hopper, geometry, rows):
    from llama_engine.kernels.gemm import Tile, Workspace, fit, gemm, gemm_reference
    from llama_engine.kernels.gemm_kernel import SILU_MUL
    from llama_engine.kernels.quant import quantize_reference
    from llama_engine.kernels.stream import StreamGemm

    device = hopper
    torch.manual_seed(rows)
    n, k, epilogue = GEOMETRIES[geometry]
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
    linear = Linear(weight, torch.rand(n, device=device) * 1e-4)
    digits, scale = quantize_reference(torch.randn(rows, k, device=device))
    padded = torch.randint(-128, 128, (2, 128, k), dtype=torch.int8, device=device)
    padded[:, :rows] = digits
    scales = torch.full((128,), float("nan"), device=device)
    scales[:rows] = scale
    width = n // 2 if epilogue == SILU_MUL else n
    before = torch.randn(rows + 1, width, device=device).half()
    got, want = before.clone(), before.clone()
    stream = StreamGemm(device)
    assert stream.runs(linear, rows, epilogue)
    for _ in range(2):
        stream.launch(padded, scales, linear, got, rows, epilogue)
        gemm(padded, scales, linear, want, rows, epilogue, fit(Tile(16, 64, 128), linear, rows), Workspace(device))
    assert torch.equal(got, want)
    assert torch.equal(got[rows], before[rows])  # no row beyond the last
    exact = gemm_reference(digits, scale, linear)
    if epilogue == SILU_MUL:
        exact = F.silu(exact[:, : n // 2]) * exact[:, n // 2 :]
    elif epilogue == 1:
        exact = before[:rows].float() + 2 * exact
    assert (got[:rows].float() - exact).abs().max() <= 2e-3 * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 13, 16, 32])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("scheme", ["fp8", "int4"])
def test_fp8_and_int4_are_the_reference_and_every_launch_the_same(hopper, scheme, geometry, rows):
    from llama_engine.kernels.gemm import gemm_reference
    from llama_engine.kernels.quant import quantize_reference
    from llama_engine.kernels.stream import StreamGemm
    from llama_engine.model.schemes import quantize_e4m3

    device = hopper
    torch.manual_seed(rows)
    n, k, epilogue = GEOMETRIES[geometry]
    stream, results, x = StreamGemm(device), [], torch.randn(rows, k, device=device)
    if scheme == "fp8":
        weight = (torch.randn(n, k, device=device) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        linear, (values, scale) = Linear(weight, torch.rand(n, device=device) * 1e-3), quantize_e4m3(x)
        padded = torch.full((128, k), 0x7F, dtype=torch.uint8, device=device)  # NaN, in rows that are not asked for
        padded[:rows] = values.view(torch.uint8)
        padded = padded.view(weight.dtype)
    else:
        weight = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
        group_scale = (torch.rand(n, k // 128, device=device) - 0.5).half() * 0.02
        linear, (values, scale) = Linear(weight, group_scale), quantize_reference(x)
        padded = torch.randint(-128, 128, (2, 128, k), dtype=torch.int8, device=device)
        padded[:, :rows] = values
        if k % 1024:
            assert not stream.runs(linear, rows, epilogue)  # group scales are loaded eight at a time
            return
    scales = torch.full((128,), float("nan"), device=device)
    scales[:rows] = scale
    before = torch.randn(rows + 1, n // 2 if epilogue == 2 else n, device=device).half()
    assert stream.runs(linear, rows, epilogue)
    for _ in range(3):
        results.append(before.clone())
        stream.launch(padded, scales, linear, results[-1], rows, epilogue)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0][rows], before[rows])
    exact = gemm_reference(values, scale, linear)
    if epilogue == 2:
        exact = F.silu(exact[:, : n // 2]) * exact[:, n // 2 :]
    elif epilogue == 1:
        exact = before[:rows].float() + exact
    assert (results[0][:rows].float() - exact).abs().max() <= 2e-3 * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [8, 16, 32])
def test_a_chain_of_overlapping_kernels_equals_triton_to_the_bit(hopper, rows):
    """Alone a kernel forgives a missing fence; beside the next one's loads its last stores land late."""
    from llama_engine.kernels.gemm import Tile, Workspace, fit, gemm
    from llama_engine.kernels.stream import StreamGemm

    device = hopper
    torch.manual_seed(rows)
    matrices = []
    for n, k, epilogue in (GEOMETRIES[f"8b {name}"] for name in ("o", "gate_up", "down")):
        weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
        digits = torch.randint(-128, 128, (2, 128, k), dtype=torch.int8, device=device)
        matrices.append((digits, Linear(weight, torch.rand(n, device=device) * 1e-6), epilogue))
    scale, workspace, stream = torch.rand(128, device=device), Workspace(device), StreamGemm(device)
    x, hidden = (torch.zeros(rows, width, dtype=torch.float16, device=device) for width in (4096, 14336))

    def chain(fused: bool) -> torch.Tensor:
        x.zero_()
        for _ in range(32):
            for digits, linear, epilogue in matrices:
                out = hidden if epilogue == 2 else x
                if fused:
                    stream.launch(digits, scale, linear, out, rows, epilogue)
                else:
                    gemm(digits, scale, linear, out, rows, epilogue, fit(Tile(16, 64, 128), linear, rows), workspace)
        return x.clone()

    want = chain(fused=False)
    assert want.isfinite().all()
    chain(fused=True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(fused=True)
    for _ in range(20):
        graph.replay()
        assert torch.equal(x, want)


@pytest.mark.gpu
def test_shapes_are_checked(hopper):
    from llama_engine.kernels.stream import StreamGemm

    device = hopper
    linear = Linear(torch.zeros(4096, 4096, dtype=torch.int8, device=device), torch.ones(4096, device=device))
    digits, scale = torch.zeros(2, 128, 4096, dtype=torch.int8, device=device), torch.ones(128, device=device)
    out = torch.zeros(128, 4096, dtype=torch.float16, device=device)
    stream = StreamGemm(device)
    assert not stream.runs(linear, 33, 0)
    with pytest.raises(InputError, match="does not run 33 rows"):
        stream.launch(digits, scale, linear, out, 33, 0)
    with pytest.raises(InputError, match="do not fit"):
        stream.launch(digits[:, :16], scale, linear, out, 8, 0)
    with pytest.raises(InputError, match="contiguous"):
        stream.launch(digits, scale, linear, out.float(), 8, 0)
