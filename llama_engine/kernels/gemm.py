"""Linear layers: INT8 weights times fixed-point activations on the integer tensor cores; FP8 times e4m3; 16 bits; INT4
widened to those in registers.

``y[m, n] = (256 * sum_k hi[m, k] W[n, k] + sum_k lo[m, k] W[n, k]) * row_scale[m] * weight_scale[n]``. Both sums are
exact in int32 for K <= 65,536, so the result does not depend on tiling, on split-K or on the batch's other rows.
Other products are summed in float32, FP8's inside the tensor cores, which on Hopper keep 14 bits of a sum: that adds
one part in a hundred to what FP8 loses, and saves 5 to 10 % of a large batch (docs/LOG.md). Last bits depend on the
tiling, which is a matter of the number of rows, but never on the other rows' values nor on timing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from llama_engine.errors import InputError
from llama_engine.kernels.common import launch_options, shared_memory
from llama_engine.kernels.gemm_kernel import gemm_kernel
from llama_engine.model.schemes import FP8, FP16, INT4, INT8
from llama_engine.model.weights import Linear

MAX_SPLIT, MAX_TILES, MAX_PARTIAL = 16, 4096, 1 << 22
LM_HEAD_ROWS = 512  # rows of logits computed at once


@dataclass(frozen=True)
class Tile:
    """How one matrix is cut: ``m`` activation rows by ``n`` weight rows by ``k`` a step, ``split`` ways along K.

    ``swap`` puts the weights on the matrix unit's 64-row side, which few activation rows would leave idle.
    ``library``: leave the matrix to cuBLAS (:mod:`llama_engine.kernels.library`), which has its own.
    """

    m: int = 16
    n: int = 64
    k: int = 128
    split: int = 1
    swap: bool = True
    warps: int = 4
    stages: int = 4
    library: bool = False


class Workspace:
    """Split-K partial sums and arrival counters, shared by all matrices of one stream."""

    def __init__(self, device: torch.device) -> None:
        self.partial = torch.empty(MAX_PARTIAL, dtype=torch.int32, device=device)
        self.count = torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def fit(tile: Tile, linear: Linear, num_rows: int) -> Tile:
    """``tile`` with its K step made a divisor of K, its stages made to fit this GPU's shared memory, and its split
    bounded by the workspace. Raises :class:`InputError` for a K that no step divides."""
    if tile.library:
        return tile
    n, k = linear.shape
    step, stages = linear.group or tile.k, tile.stages
    # bytes of one k
    column = tile.n + 2 * tile.m if linear.scheme is INT8 else linear.weight.element_size() * (tile.n + tile.m)
    if linear.scheme is INT4:
        column = tile.n // 2 + 2 * tile.m
    # Asynchronous matrix instructions, chosen from 64 rows of weights on, keep one stage more.
    buffers = 0 if (tile.n if tile.swap else tile.m) >= 64 and tile.m >= 16 else 1
    room = shared_memory(linear.weight.device)
    while k % step or (step > 32 and not linear.group and (min(stages, 2) - buffers) * step * column > room):
        step //= 2
    while stages > 2 and (stages - buffers) * step * column > room:
        stages -= 1
    if step < 16:
        raise InputError(f"linear layer with {k} inputs: the GPU kernels need a multiple of 16")
    tiles = -(-n // tile.n) * -(-num_rows // tile.m)
    split = min(tile.split, k // step, MAX_SPLIT)
    while split > 1 and (tiles > MAX_TILES or tiles * split * 2 * tile.m * tile.n > MAX_PARTIAL):
        split //= 2
    return replace(tile, k=step, stages=stages, split=split)


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

    ``a``: digits int8 ``[2, capacity, K]`` for INT8 weights or e4m3 ``[capacity, K]`` for FP8, each with ``a_scale``
    float32 ``[capacity]``, else (also of INT4) fp16 ``[capacity, K]``; capacity must be ``num_rows`` rounded up to
    ``tile.m`` or more.
    ``out``: ``[*, N]``, or ``[*, N / 2]`` for SILU_MUL over stacked ``[gate; up]`` rows; RESIDUAL adds to what it
    holds. LOGITS also writes the maximum of each tile (infinity where there is NaN) and its column to ``partials``
    (float32 and int32 ``[rows, tiles]``, tiles = ceil(N / tile.n)).
    """
    n, k = linear.shape
    if linear.scheme not in (INT8, FP8, FP16, INT4):
        raise InputError(f"gemm: no kernel for {linear.scheme.name} weights")
    int8 = linear.scheme is INT8
    form = torch.float16 if linear.scheme is INT4 else linear.weight.dtype
    if linear.group and tile.k != linear.group:
        raise InputError(f"gemm: a step of {tile.k} is not the weights' group of {linear.group}")
    capacity = a.shape[-2]
    tiles_m = -(-num_rows // tile.m)
    if a.shape[-1] != k or capacity < tiles_m * tile.m or (a.dim() == 3) != int8 or a.dtype != form:
        raise InputError(f"gemm: activations {tuple(a.shape)} do not fit weights {n}x{k} and {tile}")
    if not (a.is_contiguous() and linear.weight.is_contiguous() and out.is_contiguous()):
        raise InputError("gemm: operands must be contiguous")
    grid = (tiles_m * -(-n // tile.n), tile.split)
    _launch(gemm_kernel, grid, compile_only)(
        a,
        a_scale,
        linear.weight,
        linear.scale,
        out,
        *(partials or (None, None)),
        workspace.partial if int8 else workspace.partial.view(torch.float32),
        workspace.count,
        num_rows,
        n,
        a.stride(0) if int8 else 0,
        K=k,
        INT8=int8,
        GROUP=linear.group,
        SCALED=linear.scale is not None and not linear.group,
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


def gemm_reference(a: torch.Tensor, a_scale: torch.Tensor, linear: Linear) -> torch.Tensor:
    """float32 ``[M, N]`` of digits ``[2, M, K]`` times the INT8 or INT4 ``linear``, or of e4m3 ``[M, K]`` times the FP8
    one, exact up to the final scaling."""
    values = a.double() if linear.scheme is FP8 else 256 * a[0].double() + a[1].double()
    if linear.scheme is INT4:
        return (values @ linear.dequantize(torch.float64).T * a_scale[:, None]).float()
    return (values @ linear.weight.double().T * a_scale[:, None] * linear.scale[None, :]).float()
