import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from torch.nn import functional as F

from llama_engine.errors import InputError
from llama_engine.model.weights import Linear
from tests.conftest import ROOT


def _problem(device, m, n, k):
    from llama_engine.kernels.quant import quantize_reference

    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
    linear = Linear(weight, torch.rand(n, device=device) * 0.01)
    x = torch.randn(m, k, device=device)
    digits, scale = quantize_reference(x)
    capacity = -(-m // 64) * 64
    padded = torch.randint(-128, 128, (2, capacity, k), dtype=torch.int8, device=device)
    padded[:, :m] = digits
    full_scale = torch.full((capacity,), float("nan"), device=device)
    full_scale[:m] = scale
    return linear, x, padded, full_scale, digits, scale


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(("m", "n", "k"), [(5, 96, 192), (17, 64, 64)])
def test_int8_gemm_is_exact_and_adds_the_residual(device, m, n, k, split, swap):
    from llama_engine.kernels.gemm import Tile, Workspace, fit, gemm, gemm_reference
    from llama_engine.kernels.gemm_kernel import RESIDUAL, STORE

    linear, x, a, a_scale, digits, scale = _problem(device, m, n, k)
    tile = fit(Tile(m=16, n=64, k=64, split=split, swap=swap), linear, m)
    workspace = Workspace(device)
    want = gemm_reference(digits, scale, linear)
    out = torch.full((m, n), float("nan"), device=device)
    gemm(a, a_scale, linear, out, m, STORE, tile, workspace)
    assert torch.allclose(out, want, rtol=1e-6, atol=1e-6 * want.abs().max())
    dense = x @ linear.dequantize().T
    assert (out - dense).abs().max() < 2e-4 * dense.abs().max()
    residual = torch.randn(m, n, device=device).half()
    total = residual.clone()
    for _ in range(2):  # the second call finds the arrival counters as the first left them
        gemm(a, a_scale, linear, total, m, RESIDUAL, tile, workspace)
    assert (total.float() - residual.float() - 2 * want).abs().max() < 4e-3 * want.abs().max()


@pytest.mark.parametrize("swap", [True, False])
def test_a_row_does_not_depend_on_its_batch_or_the_tiling(device, swap):
    from llama_engine.kernels.gemm import Tile, Workspace, gemm
    from llama_engine.kernels.gemm_kernel import STORE

    linear, _, a, a_scale, _, _ = _problem(device, 33, 128, 192)
    workspace = Workspace(device)
    results = []
    for rows, tile in [
        (1, Tile(16, 64, 64, 1, swap)),
        (33, Tile(16, 128, 32, 2, swap)),
        (33, Tile(32, 32, 96 // 3, 1)),
    ]:
        out = torch.empty((33, 128), device=device)
        gemm(a, a_scale, linear, out, rows, STORE, tile, workspace)
        results.append(out[0].clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("swap", [True, False])
def test_silu_mul_over_stacked_rows(device, swap):
    from llama_engine.kernels.gemm import Tile, Workspace, gemm, gemm_reference
    from llama_engine.kernels.gemm_kernel import SILU_MUL

    linear, _, a, a_scale, digits, scale = _problem(device, 6, 2 * 48, 64)
    out = torch.full((6, 48), float("nan"), device=device)
    gemm(a, a_scale, linear, out, 6, SILU_MUL, Tile(16, 32, 64, 1, swap), Workspace(device))
    gate, up = gemm_reference(digits, scale, linear).chunk(2, dim=-1)
    want = F.silu(gate) * up
    assert (out - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("int8", [True, False])
def test_logits_argmax_and_slot_state(device, int8):
    from llama_engine.kernels.gemm import Tile, Workspace, gemm, gemm_reference
    from llama_engine.kernels.gemm_kernel import LOGITS
    from llama_engine.kernels.greedy import greedy

    m, n, k = 3, 200, 64
    linear, x, a, a_scale, digits, scale = _problem(device, m, n, k)
    tile = Tile(16, 64, 64, 1, True)
    want = gemm_reference(digits, scale, linear)
    if not int8:
        linear = Linear(torch.randn(n, k, device=device).half())
        a = torch.zeros((64, k), dtype=torch.float16, device=device)
        a[:m], a_scale = x, None
        want = a[:m].float() @ linear.weight.float().T
    tiles = -(-n // tile.n)
    partials = (torch.empty((m, tiles), device=device), torch.empty((m, tiles), dtype=torch.int32, device=device))
    logits = torch.full((m, n), float("nan"), device=device)
    gemm(a, a_scale, linear, logits, m, LOGITS, tile, Workspace(device), partials)
    assert (logits - want).abs().max() < 1e-3 * want.abs().max()
    slots = torch.tensor([2, 0, 4], dtype=torch.int32, device=device)
    last = torch.full((5,), -1, dtype=torch.int32, device=device)
    position = torch.arange(5, dtype=torch.int32, device=device)
    sampled = torch.empty(m, dtype=torch.int32, device=device)
    greedy(partials, tiles, sampled, slots, last, position, m)
    assert sampled.tolist() == logits.argmax(-1).tolist()
    assert last.tolist() == [sampled[1], -1, sampled[0], -1, -1]  # slot 4 is the padding's
    assert position.tolist() == [1, 1, 3, 3, 4]
    greedy(
        partials, tiles, sampled, slots, last, position, m, torch.tensor([9, 8, 7], dtype=torch.int32, device=device)
    )
    assert position.tolist() == [8, 1, 9, 3, 4]


@pytest.mark.parametrize("swap", [True, False])
def test_a_maximum_that_is_not_finite_is_no_token_and_the_slot_still_holds_an_id(device, swap):
    from llama_engine.kernels.gemm import Tile, Workspace, gemm
    from llama_engine.kernels.gemm_kernel import LOGITS
    from llama_engine.kernels.greedy import greedy

    m, n, k = 6, 200, 64
    a = torch.zeros((64, k), dtype=torch.float16, device=device)
    a[:m] = torch.randn(m, k, device=device)
    weight = torch.randn(n, k, device=device).half()
    weight[:, 0] = 60000
    a[1:5, 0] = torch.tensor([60000, float("nan"), float("inf"), -float("inf")])
    tile = Tile(16, 64, 64, 1, swap)
    tiles = -(-n // tile.n)
    partials = (torch.empty((m, tiles), device=device), torch.empty((m, tiles), dtype=torch.int32, device=device))
    logits = torch.empty((m, n), device=device)
    slots = torch.arange(m, dtype=torch.int32, device=device)
    position = torch.zeros(m + 1, dtype=torch.int32, device=device)
    for column in (None, 0, 70, 199):  # then NaN in one column of every row
        if column is not None:
            weight[column, 5] = float("nan")
        gemm(a, None, Linear(weight), logits, m, LOGITS, tile, Workspace(device), partials)
        last = torch.full((m + 1,), 50, dtype=torch.int32, device=device)
        sampled = torch.empty(m, dtype=torch.int32, device=device)
        greedy(partials, tiles, sampled, slots, last, position, m)
        best = logits.argmax(-1).tolist()
        expected = [best[0], best[1], -1, -1, -1, best[5]] if column is None else [-1] * m
        assert sampled.tolist() == expected
        assert last.tolist() == [max(token, 0) for token in expected] + [50]
        weight[column or 0, 5] = 1


def test_tiles_shrink_until_they_fit_a_smaller_gpu(monkeypatch):
    from llama_engine.kernels import gemm
    from llama_engine.kernels.tiles import default_tile

    linear = Linear(torch.zeros((64, 14336), dtype=torch.int8), torch.zeros(64))
    cases = [(90, 232448, "qkv", rows) for rows in (64, 1000)]  # compute capability, bytes a block may have
    cases += [(86, 101376, name, rows) for name in ("qkv", "gate_up") for rows in (1, 16, 32, 64, 1000)]
    tiles = []
    for capability, room, name, rows in cases:
        monkeypatch.setattr(gemm, "shared_memory", lambda _, room=room: room)
        tiles.append(gemm.fit(default_tile(name, rows), linear, rows))
        assert capability != 90 or tiles[-1] == default_tile(name, rows)
    jobs = json.dumps([(case[0], 14336, asdict(tile)) for case, tile in zip(cases, tiles)])
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled"],
        input=jobs, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for case, tile, nbytes in zip(cases, tiles, json.loads(done.stdout)):
        assert 0 < nbytes <= case[1], (case, tile)


def test_misfit_operands_are_refused(device):
    from llama_engine.kernels.gemm import Tile, Workspace, fit, gemm
    from llama_engine.kernels.gemm_kernel import STORE

    linear, _, a, a_scale, _, _ = _problem(device, 5, 64, 64)
    with pytest.raises(InputError, match="do not fit"):
        gemm(a[:, :8], a_scale, linear, torch.empty((5, 64), device=device), 5, STORE, Tile(), Workspace(device))
    with pytest.raises(InputError, match="multiple of 16"):
        fit(Tile(), Linear(torch.zeros((8, 24), dtype=torch.int8), torch.zeros(8)), 1)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336), (960, 576), (576, 1536)])
@pytest.mark.parametrize("m", [1, 8, 33, 64, 1000])
def test_real_shapes_against_the_dequantized_reference(n, k, m):
    from llama_engine.kernels.gemm import Workspace, fit, gemm
    from llama_engine.kernels.gemm_kernel import STORE
    from llama_engine.kernels.tiles import default_tile

    device = torch.device("cuda")
    linear, x, a, a_scale, _, _ = _problem(device, m, n, k)
    capacity = -(-m // 128) * 128
    wide = torch.zeros((2, capacity, k), dtype=torch.int8, device=device)
    wide[:, : a.shape[1]] = a
    out = torch.full((m, n), float("nan"), dtype=torch.float16, device=device)
    gemm(wide, a_scale, linear, out, m, STORE, fit(default_tile("qkv", m), linear, m), Workspace(device))
    want = x.double() @ linear.dequantize().double().T
    assert (out.double() - want).abs().max() <= want.abs().max() / 128 * 1.5


@pytest.mark.gpu
def test_logits_of_a_row_do_not_depend_on_how_many_rows_there_are():
    from llama_engine.kernels.gemm import Workspace, fit, gemm
    from llama_engine.kernels.gemm_kernel import LOGITS
    from llama_engine.kernels.tiles import default_tile

    device, n, k = torch.device("cuda"), 128256, 4096
    linear = Linear(torch.randn(n, k, device=device).half())
    a = torch.randn(512, k, device=device).half()
    results = []
    for rows in (1, 20, 64, 100, 512):
        tile = fit(default_tile("lm_head", rows), linear, rows)
        partials = (torch.empty(512 * 8192, device=device), torch.empty(512 * 8192, dtype=torch.int32, device=device))
        out = torch.full((rows, n), float("nan"), device=device)
        gemm(a, None, linear, out, rows, LOGITS, tile, Workspace(device), partials)
        results.append(out[0].clone())
    assert all(torch.equal(result, results[0]) for result in results)
