"""Large FP8, INT4 and 16-bit products through cuBLAS, which takes INT4 widened to fp16.

Its result leaves in fp16 before anything is added or gated, so it is rounded once more than in
:mod:`llama_engine.kernels.gemm`, whose reference holds here too.
"""

from __future__ import annotations

import functools

import torch

from llama_engine.kernels.quant import widen
from llama_engine.model.schemes import FP8, FP16, INT4
from llama_engine.model.weights import Linear


@functools.cache
def _scales_rows(device: torch.device) -> bool:
    """Whether cuBLAS takes one scale a row: on Hopper since CUDA 12.9. Elsewhere PyTorch has a kernel of its own, which
    writes bfloat16."""
    version = tuple(int(part) for part in (torch.version.cuda or "0").split(".")[:2])
    return version >= (12, 9) and torch.cuda.get_device_capability(device)[0] == 9


def runs(linear: Linear) -> bool:
    """Whether :func:`matmul` takes this matrix on the device that holds it."""
    if linear.weight.device.type != "cuda" or any(size % 16 for size in linear.weight.shape):
        return False
    return linear.scheme in (FP16, INT4) or (linear.scheme is FP8 and _scales_rows(linear.weight.device))


def matmul(
    a: torch.Tensor,
    a_scale: torch.Tensor | None,
    linear: Linear,
    out: torch.Tensor,
    scratch: torch.Tensor | None = None,
) -> None:
    """``out = a @ W.T``, fp16 ``[M, N]``, all contiguous: ``a`` e4m3 ``[M, K]`` with ``a_scale`` float32 ``[M]``, or
    fp16 and None. ``scratch``: fp16 room for the N * K weights of an INT4 matrix. Can be captured into a CUDA graph."""
    if a_scale is None:
        weight = linear.weight
        if linear.scheme is INT4:
            weight = scratch[: linear.shape[0] * linear.shape[1]].view(linear.shape)
            widen(linear, weight)
        torch.mm(a, weight.t(), out=out)
        return
    scales = a_scale[:, None], linear.scale[None, :]
    torch._scaled_mm(a, linear.weight.t(), *scales, out_dtype=out.dtype, use_fast_accum=True, out=out)
