# ruff: noqa: ANN001, ANN202 (Triton kernels take untyped pointers)
"""Linear layers: INT8 weights times fixed-point activations on the integer tensor cores, and the fp16 lm_head.

``y[m, n] = (256 * sum_k hi[m, k] W[n, k] + sum_k lo[m, k] W[n, k]) * row_scale[m] * weight_scale[n]``. Both sums are
exact in int32 for K <= 65,536, so the result does not depend on tiling, on split-K or on the batch's other rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_engine.errors import InputError
from llama_engine.kernels.common import launch_options, shared_memory
from llama_engine.model.schemes import FP16, INT8
from llama_engine.model.weights import Linear

STORE, RESIDUAL, SILU_MUL, LOGITS = range(4)
_STORE, _RESIDUAL, _SILU_MUL, _LOGITS = (tl.constexpr(i) for i in range(4))
MAX_SPLIT, MAX_TILES, MAX_PARTIAL = 16, 4096, 1 << 22
LM_HEAD_ROWS = 512  # rows of logits computed at once


@dataclass(frozen=True)
class Tile:
    """How one matrix is cut: ``m`` activation rows by ``n`` weight rows by ``k`` a step, ``split`` ways along K.

    ``swap`` puts the weights on the matrix unit's 64-row side, which few activation rows would leave idle.
    """

    m: int = 16
    n: int = 64
    k: int = 128
    split: int = 1
    swap: bool = True
    warps: int = 4
    stages: int = 4


@triton.jit
def _epilogue(
    y,
    offs_m,
    offs_n,
    pid_n,
    out_ptr,
    best_ptr,
    index_ptr,
    M,
    N,
    EPILOGUE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Finish the tile ``y`` (float32 ``[BN, BM]`` if SWAP, else ``[BM, BN]``)."""
    if EPILOGUE == _SILU_MUL:
        # Columns alternate gate and up.
        if SWAP:
            y = tl.trans(y)
        gate, up = tl.split(tl.reshape(y, (BM, BN // 2, 2)))
        value = gate / (1.0 + tl.exp(-gate)) * up
        columns = pid_n * (BN // 2) + tl.arange(0, BN // 2)
        mask = (offs_m < M)[:, None] & (columns < N // 2)[None, :]
        at = out_ptr + offs_m[:, None].to(tl.int64) * (N // 2) + columns[None, :]
        tl.store(at, value.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        if SWAP:
            at = out_ptr + offs_m[None, :].to(tl.int64) * N + offs_n[:, None]
            mask = (offs_n < N)[:, None] & (offs_m < M)[None, :]
        else:
            at = out_ptr + offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
            mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        if EPILOGUE == _RESIDUAL:
            y += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, y.to(out_ptr.dtype.element_ty), mask=mask)
        if EPILOGUE == _LOGITS:
            axis: tl.constexpr = 0 if SWAP else 1
            best, index = tl.max(tl.where(mask, y, float("-inf")), axis=axis, return_indices=True)
            tiles = tl.cdiv(N, BN)
            tl.store(best_ptr + offs_m * tiles + pid_n, best, mask=offs_m < M)
            tl.store(index_ptr + offs_m * tiles + pid_n, index + pid_n * BN, mask=offs_m < M)


@triton.jit(do_not_specialize=["M"])
def _gemm(
    a_ptr,
    a_scale_ptr,
    w_ptr,
    w_scale_ptr,
    out_ptr,
    best_ptr,
    index_ptr,
    partial_ptr,
    count_ptr,
    M,
    N,
    plane,
    K: tl.constexpr,
    INT8: tl.constexpr,
    EPILOGUE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    REUSED: tl.constexpr,
    PDL: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    pid_m = pid % tiles_m  # neighbours share the weight tile
    pid_n = pid // tiles_m
    offs_m = pid_m * BM + tl.arange(0, BM)
    offs_n = pid_n * BN + tl.arange(0, BN)
    if EPILOGUE == _SILU_MUL:
        half = tl.minimum(pid_n * (BN // 2) + tl.arange(0, BN) // 2, N // 2 - 1)
        rows = half + (tl.arange(0, BN) % 2) * (N // 2)
    else:
        rows = tl.minimum(offs_n, N - 1)
    steps: tl.constexpr = K // BK
    first = split * steps // SPLIT * BK
    last = (split + 1) * steps // SPLIT * BK
    offs_k = tl.arange(0, BK)
    evict: tl.constexpr = "" if REUSED else "evict_first"
    w_ptrs = w_ptr + rows[:, None] * K + offs_k[None, :]
    a_ptrs = a_ptr + offs_m[:, None] * K + offs_k[None, :]
    if PDL:
        gdc_launch_dependents()
    # Scales are read long before their use: where memory is busy a small load takes microseconds.
    if INT8:
        w_scale = tl.load(w_scale_ptr + rows)
    if PDL:
        gdc_wait()
    if INT8:
        a_scale = tl.load(a_scale_ptr + offs_m, mask=offs_m < M, other=0.0)
        if SWAP:
            high = tl.zeros((BN, BM), tl.int32)
            low = tl.zeros((BN, BM), tl.int32)
        else:
            high = tl.zeros((BM, BN), tl.int32)
            low = tl.zeros((BM, BN), tl.int32)
        for k in range(first, last, BK):
            w = tl.load(w_ptrs + k, eviction_policy=evict)
            hi = tl.load(a_ptrs + k)
            lo = tl.load(a_ptrs + plane + k)
            if SWAP:
                high = tl.dot(w, tl.trans(hi), high, out_dtype=tl.int32)
                low = tl.dot(w, tl.trans(lo), low, out_dtype=tl.int32)
            else:
                high = tl.dot(hi, tl.trans(w), high, out_dtype=tl.int32)
                low = tl.dot(lo, tl.trans(w), low, out_dtype=tl.int32)
        done = True
        if SPLIT > 1:
            size: tl.constexpr = BM * BN
            if SWAP:
                inner = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
            else:
                inner = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
            base = partial_ptr + pid * (SPLIT * 2 * size) + inner
            tl.store(base + split * (2 * size), high)
            tl.store(base + split * (2 * size) + size, low)
            tl.debug_barrier()
            done = tl.atomic_add(count_ptr + pid, 1, sem="acq_rel") == SPLIT - 1
            if done:
                tl.store(count_ptr + pid, 0)
                for other in range(SPLIT):
                    if other != split:
                        high += tl.load(base + other * (2 * size), cache_modifier=".cg")
                        low += tl.load(base + other * (2 * size) + size, cache_modifier=".cg")
        if done:
            y = high.to(tl.float32) * 256.0 + low.to(tl.float32)
            if SWAP:
                y = y * a_scale[None, :] * w_scale[:, None]
            else:
                y = y * a_scale[:, None] * w_scale[None, :]
            _epilogue(y, offs_m, offs_n, pid_n, out_ptr, best_ptr, index_ptr, M, N, EPILOGUE, BM, BN, SWAP)
    else:
        if SWAP:
            acc = tl.zeros((BN, BM), tl.float32)
        else:
            acc = tl.zeros((BM, BN), tl.float32)
        for k in range(first, last, BK):
            w = tl.load(w_ptrs + k, eviction_policy=evict)
            a = tl.load(a_ptrs + k)
            if SWAP:
                acc = tl.dot(w, tl.trans(a), acc)
            else:
                acc = tl.dot(a, tl.trans(w), acc)
        _epilogue(acc, offs_m, offs_n, pid_n, out_ptr, best_ptr, index_ptr, M, N, EPILOGUE, BM, BN, SWAP)


class Workspace:
    """Split-K partial sums and arrival counters, shared by all matrices of one stream."""

    def __init__(self, device: torch.device) -> None:
        self.partial = torch.empty(MAX_PARTIAL, dtype=torch.int32, device=device)
        self.count = torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def fit(tile: Tile, linear: Linear, num_rows: int) -> Tile:
    """``tile`` with its K step made a divisor of K, its stages made to fit this GPU's shared memory, and its split
    bounded by the workspace. Raises :class:`InputError` for a K that no step divides."""
    n, k = linear.weight.shape
    int8 = linear.scheme is INT8
    step, stages = tile.k, tile.stages
    column = tile.n + 2 * tile.m if int8 else 2 * (tile.n + tile.m)  # bytes of one k
    # Asynchronous matrix instructions, chosen from 64 rows of weights on, keep one stage more.
    buffers = 0 if (tile.n if tile.swap else tile.m) >= 64 and tile.m >= 16 else 1
    room = shared_memory(linear.weight.device)
    while k % step or (step > 32 and (min(stages, 2) - buffers) * step * column > room):
        step //= 2
    while stages > 2 and (stages - buffers) * step * column > room:
        stages -= 1
    if step < 16:
        raise InputError(f"linear layer with {k} inputs: the GPU kernels need a multiple of 16")
    tiles = -(-n // tile.n) * -(-num_rows // tile.m)
    split = min(tile.split, k // step, MAX_SPLIT)
    while split > 1 and (tiles > MAX_TILES or tiles * split * 2 * tile.m * tile.n > MAX_PARTIAL):
        split //= 2
    return replace(tile, k=step, stages=stages, split=split if int8 else 1)


def _launch(kernel: Any, grid: tuple[int, int], compile_only: bool) -> Any:
    return partial(kernel.warmup, grid=grid) if compile_only else kernel[grid]


def gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor | None,
    linear: Linear,
    out: torch.Tensor,
    num_rows: int,
    epilogue: int,
    tile: Tile,
    workspace: Workspace,
    partials: tuple[torch.Tensor, torch.Tensor] | None = None,
    compile_only: bool = False,
) -> None:
    """``out = epilogue(a @ W.T)`` for the first ``num_rows`` rows.

    ``a``: digits int8 ``[2, capacity, K]`` with ``a_scale`` float32 ``[capacity]`` for INT8 weights, else fp16
    ``[capacity, K]``; capacity must be ``num_rows`` rounded up to ``tile.m`` or more. ``out``: ``[*, N]``, or
    ``[*, N / 2]`` for SILU_MUL over stacked ``[gate; up]`` rows; RESIDUAL adds to what it holds. LOGITS also writes the
    maximum of each tile and its column to ``partials`` (float32 and int32 ``[rows, tiles]``, tiles = ceil(N / tile.n)).
    """
    n, k = linear.weight.shape
    if linear.scheme not in (INT8, FP16):
        raise InputError(f"gemm: no kernel for {linear.scheme.name} weights")
    int8 = linear.scheme is INT8
    capacity = a.shape[-2]
    tiles_m = -(-num_rows // tile.m)
    if a.shape[-1] != k or capacity < tiles_m * tile.m or (a.dim() == 3) != int8:
        raise InputError(f"gemm: activations {tuple(a.shape)} do not fit weights {n}x{k} and {tile}")
    if not (a.is_contiguous() and linear.weight.is_contiguous() and out.is_contiguous()):
        raise InputError("gemm: operands must be contiguous")
    grid = (tiles_m * -(-n // tile.n), tile.split)
    _launch(_gemm, grid, compile_only)(
        a,
        a_scale,
        linear.weight,
        linear.scale,
        out,
        *(partials or (None, None)),
        workspace.partial,
        workspace.count,
        num_rows,
        n,
        a.stride(0) if int8 else 0,
        K=k,
        INT8=int8,
        EPILOGUE=epilogue,
        BM=tile.m,
        BN=tile.n,
        BK=tile.k,
        SPLIT=tile.split,
        SWAP=tile.swap,
        REUSED=tiles_m > 1,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **launch_options(a.device),
    )


def gemm_reference(digits: torch.Tensor, a_scale: torch.Tensor, linear: Linear) -> torch.Tensor:
    """float32 ``[M, N]`` of digits ``[2, M, K]`` times the INT8 ``linear``, exact up to the final scaling."""
    high, low = (plane.double() @ linear.weight.double().T for plane in digits)
    assert linear.scheme is INT8
    return ((256 * high + low) * a_scale[:, None] * linear.scale[None, :]).float()
