import pytest
import torch


def test_digits_restore_the_row_and_match_the_reference(device):
    from llama_engine.kernels.quant import quantize_reference, quantize_rows

    k = 576
    x = torch.randn(5, k, device=device).half()
    x[3] = 0
    x[4, 7] = 900.0  # an outlier, as Llama's residual stream has
    digits = torch.full((2, 16, k), 99, dtype=torch.int8, device=device)
    scale = torch.full((16,), float("nan"), device=device)
    quantize_rows(x, digits, scale, 5)
    expected, expected_scale = quantize_reference(x)
    assert torch.equal(scale[:5], expected_scale)
    value = (digits[0].int() * 256 + digits[1].int())[:5]
    wanted = expected[0].int() * 256 + expected[1].int()
    assert (value - wanted).abs().max() <= 1  # a division rounds differently in the last place
    assert (value * scale[:5, None] - x.float()).abs().amax(1).le(scale[:5] * 0.51).all()
    assert (digits[:, 5:] == 99).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_makes_the_whole_row_so_and_no_other(device, bad, weighted):
    from llama_engine.kernels.quant import norm, quantize_rows

    x = torch.randn(3, 320, device=device).half()
    x[1, 200] = bad
    digits = torch.empty((2, 3, 320), dtype=torch.int8, device=device)
    scale = torch.empty(3, device=device)
    if weighted:
        norm(x, torch.rand(320, device=device).half(), 1e-5, digits, scale, 3)
    else:
        quantize_rows(x, digits, scale, 3)
    assert scale.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("rows", [None, [2, 0]])
def test_norm_matches_the_reference(device, rows):
    from llama_engine.kernels.quant import norm
    from llama_engine.model.llama import rms_norm as reference

    k = 320
    x = (torch.randn(3, k, device=device) * 3).half()
    weight = torch.rand(k, device=device).half()
    index = None if rows is None else torch.tensor(rows, dtype=torch.int32, device=device)
    n = 3 if rows is None else len(rows)
    want = reference(x.float(), weight, 1e-5)[slice(None) if rows is None else rows]
    out = torch.empty((n, k), dtype=torch.float16, device=device)
    norm(x, weight, 1e-5, out, None, n, index)
    assert (out.float() - want).abs().max() < 2e-3 * want.abs().max()
    digits = torch.empty((2, n, k), dtype=torch.int8, device=device)
    scale = torch.empty(n, device=device)
    norm(x, weight, 1e-5, digits, scale, n, index)
    got = (digits[0].int() * 256 + digits[1].int()) * scale[:, None]
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_embedding_by_row_and_by_slot(device):
    from llama_engine.kernels.quant import gather_rows

    table = torch.randn(11, 40, device=device).half()
    ids = torch.tensor([3, 10, 0], dtype=torch.int32, device=device)
    x = torch.empty((3, 40), dtype=torch.float16, device=device)
    gather_rows(table, ids, x, 3)
    assert torch.equal(x, table[ids.long()])
    slots = torch.tensor([2, 1], dtype=torch.int32, device=device)
    gather_rows(table, ids, x, 2, slots)
    assert torch.equal(x[:2], table[[0, 10]])
