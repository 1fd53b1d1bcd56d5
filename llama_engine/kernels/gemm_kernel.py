# ruff: noqa: ANN001, ANN201, ANN202 (Triton kernels take untyped pointers)
"""The Triton program of :func:`llama_engine.kernels.gemm.gemm`: one tile, or one part of its K, a program."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

STORE, RESIDUAL, SILU_MUL, LOGITS = range(4)  # what follows the product
_STORE, _RESIDUAL, _SILU_MUL, _LOGITS = (tl.constexpr(i) for i in range(4))


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
            judged = tl.where(y == y, y, float("inf"))  # a maximum may drop NaN, but not infinity
            best, index = tl.max(tl.where(mask, judged, float("-inf")), axis=axis, return_indices=True)
            tiles = tl.cdiv(N, BN)
            tl.store(best_ptr + offs_m * tiles + pid_n, best, mask=offs_m < M)
            tl.store(index_ptr + offs_m * tiles + pid_n, index + pid_n * BN, mask=offs_m < M)


@triton.jit
def _halves(packed, scale):
    """The low nibbles q & 15 of ``packed`` (int16) as float16 q * scale: 0x6400 is 1024, whose last bits count ones."""
    return ((((packed & 15) ^ 0x6408).to(tl.float16, bitcast=True)) - 1032.0) * scale[:, None]


@triton.jit
def _last_to_arrive(count_ptr, SPLIT: tl.constexpr):
    """Whether this is the last of the SPLIT programs of a tile, whose partial sums are then all to be seen."""
    tl.debug_barrier()
    last = tl.atomic_add(count_ptr, 1, sem="acq_rel") == SPLIT - 1
    if last:
        tl.store(count_ptr, 0)
    return last


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
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
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
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
    if GROUP:  # of INT4, as long as a step; its first half's values are the low nibbles of its bytes
        offs_half = tl.arange(0, GROUP // 2)
        packed_ptrs = w_ptr + rows[:, None] * (K // 2) + offs_half[None, :]
        half_ptrs = a_ptr + offs_m[:, None] * K + offs_half[None, :]
        group_scale = w_scale_ptr + rows * (K // GROUP) + first // GROUP
    a_ptrs = a_ptr + offs_m[:, None] * K + offs_k[None, :]
    if PDL:
        gdc_launch_dependents()
    # Scales are read long before their use: where memory is busy a small load takes microseconds.
    if SCALED:
        w_scale = tl.load(w_scale_ptr + rows)
    if GROUP:
        w_scale = tl.load(group_scale)
    if PDL:
        gdc_wait()
    if SCALED:
        a_scale = tl.load(a_scale_ptr + offs_m, mask=offs_m < M, other=0.0)
    size: tl.constexpr = BM * BN
    if SWAP:
        inner = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    else:
        inner = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    done = True
    if INT8:
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
        if SPLIT > 1:
            base = partial_ptr + pid * (SPLIT * 2 * size) + inner
            tl.store(base + split * (2 * size), high)
            tl.store(base + split * (2 * size) + size, low)
            done = _last_to_arrive(count_ptr + pid, SPLIT)
            if done:
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
            if GROUP:
                packed = tl.load(packed_ptrs + k // 2, eviction_policy=evict).to(tl.int16)
                a_low, a_high = tl.load(half_ptrs + k), tl.load(half_ptrs + k + GROUP // 2)
                group_scale += 1
                following = tl.load(group_scale, mask=rows * 0 + k + BK < last, other=0.0)
                w_low, w_high = _halves(packed, w_scale), _halves(packed >> 4, w_scale)
                if SWAP:
                    acc = tl.dot(w_high, tl.trans(a_high), tl.dot(w_low, tl.trans(a_low), acc))
                else:
                    acc = tl.dot(a_high, tl.trans(w_high), tl.dot(a_low, tl.trans(w_low), acc))
                w_scale = following
            else:
                w = tl.load(w_ptrs + k, eviction_policy=evict)
                a = tl.load(a_ptrs + k)
                if SWAP:
                    acc = tl.dot(w, tl.trans(a), acc)
                else:
                    acc = tl.dot(a, tl.trans(w), acc)
        if SPLIT > 1:
            base = partial_ptr + pid * (SPLIT * size) + inner
            tl.store(base + split * size, acc)
            done = _last_to_arrive(count_ptr + pid, SPLIT)
            if done:  # in order, whichever came last
                acc = tl.load(base, cache_modifier=".cg")
                for other in range(1, SPLIT):
                    acc += tl.load(base + other * size, cache_modifier=".cg")
        if done:
            if SCALED:
                if SWAP:
                    acc = acc * a_scale[None, :] * w_scale[:, None]
                else:
                    acc = acc * a_scale[:, None] * w_scale[None, :]
            _epilogue(acc, offs_m, offs_n, pid_n, out_ptr, best_ptr, index_ptr, M, N, EPILOGUE, BM, BN, SWAP)
