# ruff: noqa: ANN001, ANN201, ANN202 (Triton kernels take untyped pointers)
"""Embedding, RMSNorm, SiLU * mul and the forms of activations: 16-bit fixed point, e4m3 or plain; INT4 weights as fp16.

For an INT8 matrix a row ``x`` becomes ``a = 256 * hi + lo`` with ``a = round(x / scale)``, half away from zero,
``scale = max|x| / DIGITS_MAX`` and both digits in -128 .. 127, so that the matrix multiplies it exactly in two integer
products. For an FP8 matrix it becomes e4m3 as :func:`llama_engine.model.schemes.quantize_e4m3` says.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_engine.kernels.common import launch_options
from llama_engine.kernels.exchange import Added, add_parts, add_pushed, meet, parts_arguments
from llama_engine.model.schemes import DIGITS_MAX
from llama_engine.model.weights import Linear

_LIMIT = tl.constexpr(float(DIGITS_MAX))


@triton.jit
def round_e4m3(x):
    """float32 ``x`` at e4m3's nearest value, ties to even, |x| at most 448: what casts exactly, also by truncation, as
    Triton's interpreter casts."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    subnormal = (x + 24576.0) - 24576.0  # multiples of 2**-9
    return tl.where(tl.abs(x) < 0.015625, subnormal, normal)


@triton.jit
def as_cached(x, kv_ptr):
    """fp16 ``x`` as the KV cache at ``kv_ptr`` holds it: fp16, or the nearest e4m3."""
    if kv_ptr.dtype.element_ty == tl.float8e4nv:
        wide = tl.minimum(tl.maximum(x.to(tl.float32), -448.0), 448.0)
        return round_e4m3(wide).to(tl.float8e4nv)
    else:
        return x


@triton.jit
def store_row(x, out_ptr, scale_ptr, row, offs, mask, K, plane):
    """Store the row ``x`` (float32, zero where masked; element ``offs``) in the form that the type of ``out_ptr`` asks
    for: int8 takes digits and their scale, e4m3 values and their scale, any other the row as it is."""
    at = out_ptr + row * K + offs
    if out_ptr.dtype.element_ty == tl.int8:
        _store_digits(x, at, scale_ptr + row, mask, plane)
    elif out_ptr.dtype.element_ty == tl.float8e4nv:
        amax = _largest(x)
        scale = tl.maximum(tl.div_rn(amax, 448.0), 1.0 / (448.0 * 512.0))
        scale = tl.where(amax < float("inf"), scale, amax)
        y = tl.minimum(tl.maximum(x * tl.div_rn(1.0, scale), -448.0), 448.0)
        tl.store(at, round_e4m3(y).to(tl.float8e4nv), mask=mask)
        tl.store(scale_ptr + row, scale)
    else:
        tl.store(at, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _largest(x):
    """The largest magnitude of ``x``; NaN or infinite where ``x`` holds such a value: then so is the row's scale, and
    every product with the row."""
    # magnitudes by their bits: the order of floats, NaN above infinity, where a float's maximum drops NaN
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _store_digits(x, at, scale_ptr, mask, plane):
    amax = _largest(x)
    inverse = _LIMIT / tl.maximum(amax, 1e-30)
    magnitude = tl.minimum(tl.floor(tl.abs(x) * inverse + 0.5), _LIMIT)
    a = tl.where(x < 0, -magnitude, magnitude).to(tl.int32)
    lo = ((a + 128) & 255) - 128
    hi = (a - lo) >> 8
    tl.store(at, hi.to(tl.int8), mask=mask)
    tl.store(at + plane, lo.to(tl.int8), mask=mask)
    tl.store(scale_ptr, amax / _LIMIT)


@triton.jit
def _rows_kernel(
    x_ptr,
    norm_ptr,
    rows_ptr,
    add_ptr,
    out_ptr,
    scale_ptr,
    mine_ptr,
    pushes_ptr,
    inbox_ptr,
    parts_ptr,
    signal_ptr,
    flags_ptr,
    count_ptr,
    error_ptr,
    K,
    plane,
    eps,
    NORM: tl.constexpr,
    GATHER: tl.constexpr,
    ADD: tl.constexpr,
    RANKS: tl.constexpr,
    PUSHED: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    mask = offs < K
    if NORM:
        gain = tl.load(norm_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    source = row
    if GATHER:
        source = tl.load(rows_ptr + row)
    if GATED:
        at = x_ptr + source.to(tl.int64) * (2 * K) + offs
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        x = gate / (1.0 + tl.exp(-gate)) * tl.load(at + K, mask=mask, other=0.0).to(tl.float32)
    else:
        x = tl.load(x_ptr + source * K + offs, mask=mask, other=0.0).to(tl.float32)
    if PUSHED:
        x = add_pushed(x, mine_ptr, pushes_ptr, inbox_ptr, count_ptr, error_ptr, row, K, PUSHED, RANKS, BLOCK)
    elif RANKS > 1:
        meet(signal_ptr, flags_ptr, count_ptr, error_ptr, row, RANKS)
        x = add_parts(x, parts_ptr, row * K + offs, mask, RANKS)
    if ADD:
        x += tl.load(add_ptr + row * K + offs, mask=mask, other=0.0).to(tl.float32)
    if ADD or RANKS > 1:
        total = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + row * K + offs, total, mask=mask)
        x = total.to(tl.float32)
    if NORM:
        x = x * tl.rsqrt(tl.sum(x * x, axis=0) / K + eps) * gain
    store_row(x, out_ptr, scale_ptr, row, offs, mask, K, plane)


@triton.jit
def _gather_kernel(
    ids_ptr,
    slots_ptr,
    table_ptr,
    x_ptr,
    K,
    BY_SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    if PDL:
        # In this order, so that no later kernel of the step starts before the previous step's state is written.
        gdc_wait()
        gdc_launch_dependents()
    at = row
    if BY_SLOT:
        at = tl.load(slots_ptr + row)
    token = tl.load(ids_ptr + at).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < K
    value = tl.load(table_ptr + token * K + offs, mask=mask)
    tl.store(x_ptr + row * K + offs, value.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _widen_kernel(weight_ptr, scale_ptr, out_ptr, K, GROUP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_wait()  # the buffer may still be read
        gdc_launch_dependents()
    half: tl.constexpr = GROUP // 2
    for first in range(0, K // 2, BLOCK):
        byte = first + tl.arange(0, BLOCK)
        mask = byte < K // 2
        packed = tl.load(weight_ptr + row * (K // 2) + byte, mask=mask, other=0).to(tl.int8, bitcast=True)
        scale = tl.load(scale_ptr + row * (K // GROUP) + byte // half, mask=mask, other=0.0)
        at = out_ptr + row * K + byte // half * GROUP + byte % half
        tl.store(at, ((packed << 4) >> 4).to(tl.float16) * scale, mask=mask)
        tl.store(at + half, (packed >> 4).to(tl.float16) * scale, mask=mask)


def _warps(block: int) -> int:
    return max(1, min(16, block // 256))


def gather_rows(
    table: torch.Tensor, ids: torch.Tensor, x: torch.Tensor, num_rows: int, slots: torch.Tensor | None = None
) -> None:
    """``x[r] = table[ids[r]]``, or ``table[ids[slots[r]]]``. table ``[vocab, K]``, ids and slots int32."""
    block = triton.next_power_of_2(x.shape[1])
    _gather_kernel[(num_rows,)](
        ids,
        slots,
        table,
        x,
        x.shape[1],
        BY_SLOT=slots is not None,
        BLOCK=block,
        num_warps=_warps(block),
        **launch_options(x.device),
    )


def widen(linear: Linear, out: torch.Tensor) -> None:
    """The INT4 matrix as fp16 ``[N, K]``, each value rounded once."""
    n, k = linear.shape
    options = launch_options(out.device)
    _widen_kernel[(n,)](linear.weight, linear.scale, out, k, GROUP=linear.group, BLOCK=1024, num_warps=4, **options)


def norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    num_rows: int,
    rows: torch.Tensor | None = None,
    add: Added | None = None,
) -> None:
    """RMSNorm of the rows of ``x`` ``[*, K]`` (or ``x[rows]``) by ``weight`` ``[K]``, in the form of ``out`` as
    :func:`quantize_rows` has it. ``add`` ``[num_rows, K]``, or the sum over ranks, is first added to ``x`` itself,
    whose rows are then not to be chosen."""
    _launch(x, weight, eps, out, scale, num_rows, rows, False, add)


def add_rows(x: torch.Tensor, add: Added, num_rows: int) -> None:
    """``x[:num_rows] += add``, as :func:`norm` does it."""
    _launch(x, None, 0.0, x, None, num_rows, None, False, add)


def quantize_rows(
    x: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    num_rows: int,
    rows: torch.Tensor | None = None,
    gated: bool = False,
) -> None:
    """The rows of ``x`` ``[*, K]`` (or ``x[rows]``) in the form that ``out`` decides: int8 ``[2, capacity, K]`` takes
    the planes of hi and lo, float8_e4m3fn ``[capacity, K]`` e4m3 values, both with ``scale`` float32 ``[capacity]`` for
    the row scales; a plain ``[*, K]`` takes its own dtype.

    ``gated``: ``x`` is ``[*, 2 K]``, gate and up, of which ``silu(gate) * up`` is taken.
    """
    _launch(x, None, 0.0, out, scale, num_rows, rows, gated, None)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    num_rows: int,
    rows: torch.Tensor | None,
    gated: bool,
    add: Added | None,
) -> None:
    add, exchanged, constants = parts_arguments(add, num_rows)
    width = x.shape[-1] // 2 if gated else x.shape[-1]
    block = triton.next_power_of_2(width)
    _rows_kernel[(num_rows,)](
        x,
        weight,
        rows,
        add,
        out,
        scale,
        *exchanged,
        width,
        out.stride(0),  # to the plane of lo
        eps,
        NORM=weight is not None,
        GATHER=rows is not None,
        ADD=add is not None,
        **constants,
        GATED=gated,
        BLOCK=block,
        num_warps=_warps(block),
        **launch_options(x.device),
    )


def quantize_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The digits int8 ``[2, M, K]`` and scales float32 ``[M]`` of ``x`` ``[M, K]``."""
    x = x.float()
    amax = x.abs().amax(dim=-1)
    inverse = torch.where(amax > 0, DIGITS_MAX / amax, 0.0)
    a = (torch.floor(x.abs() * inverse[:, None] + 0.5).clamp(max=DIGITS_MAX) * x.sign()).to(torch.int32)
    lo = ((a + 128) & 255) - 128
    return torch.stack(((a - lo) >> 8, lo)).to(torch.int8), amax / DIGITS_MAX
