"""Quantization schemes: how a matrix is held, and how it is multiplied. Everything that depends on it asks here.

A :class:`~llama_engine.model.weights.Linear` has exactly one scheme, found from what its tensors are; bytes that no
scheme describes are refused by name, so that no kernel reads one format as another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from llama_engine.errors import InputError

ExecutorName = Literal["torch", "cpu", "gpu"]


@dataclass(frozen=True)
class Scheme:
    """One way to hold and multiply a weight matrix ``[N, K]``.

    ``scale``: "row", one float32 for each output channel, or None. ``activations``: what the weights are multiplied
    with: in FP8 by every executor, otherwise by the fast kernels, while the PyTorch reference uses floating point.
    ``executors`` run it in the decoder layers, ``lm_head_executors`` as lm_head. ``quant_algo``: TensorRT-LLM's name
    for it in a checkpoint's config, None for unquantized weights.
    """

    name: str
    weight_dtype: torch.dtype
    scale: Literal["row"] | None
    activations: str
    executors: frozenset[ExecutorName]
    lm_head_executors: frozenset[ExecutorName]
    quant_algo: str | None = None

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix, its scales included: what one decode step reads of it."""
        return rows * columns * self.weight_dtype.itemsize + (4 * rows if self.scale else 0)

    def dequantize(self, weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The matrix ``[N, K]`` that the stored values stand for, in ``dtype``."""
        return weight.to(dtype) if scale is None else (weight.float() * scale[:, None]).to(dtype)


REFERENCE: frozenset[ExecutorName] = frozenset(("torch",))
EVERYWHERE: frozenset[ExecutorName] = frozenset(("torch", "cpu", "gpu"))
GPU = REFERENCE | {"gpu"}
FP8_ROWWISE = "FP8_PER_CHANNEL_PER_TOKEN"  # of a checkpoint that TensorRT-LLM loads
FP8_ALL = f"{FP8_ROWWISE}_ALL"  # ours: the same format in every linear layer, under a name that TensorRT-LLM refuses
INT8 = Scheme("int8", torch.int8, "row", "16-bit fixed point, one scale per token", EVERYWHERE, EVERYWHERE, "W8A16")
FP8 = Scheme("fp8", torch.float8_e4m3fn, "row", "e4m3, one scale per token", GPU, REFERENCE, FP8_ROWWISE)
FP16 = Scheme("fp16", torch.float16, None, "float16", GPU, EVERYWHERE)
BF16 = Scheme("bf16", torch.bfloat16, None, "bfloat16", GPU, GPU)  # on a GPU it becomes fp16
SCHEMES = {scheme.name: scheme for scheme in (INT8, FP8, FP16, BF16)}
DIGITS_MAX = 32512  # 127 * 256: the largest 16-bit fixed-point activation whose two digits both fit a signed byte
E4M3_MAX = 448.0
E4M3_MIN_SCALE = 1 / (448 * 512)  # TensorRT-LLM's least scale, of weights and of activations


def scheme_of(weight: torch.Tensor, scale: torch.Tensor | None) -> Scheme:
    """The scheme of a matrix ``[N, K]`` with these tensors. Raises :class:`InputError` where there is none."""
    layout = None if scale is None else "row"
    for scheme in SCHEMES.values():
        if (scheme.weight_dtype, scheme.scale) == (weight.dtype, layout):
            if scale is not None and (tuple(scale.shape) != weight.shape[:1] or scale.dtype != torch.float32):
                raise InputError(
                    f"{scheme.name} weights {tuple(weight.shape)} need float32 scales {tuple(weight.shape[:1])}, got "
                    f"{scale.dtype} {tuple(scale.shape)}"
                )
            return scheme
    what = f"{str(weight.dtype).removeprefix('torch.')} weights with{'out' if scale is None else ''} scales"
    raise InputError(f"no quantization scheme has {what}: this engine knows {', '.join(SCHEMES)}")


def quantize_e4m3(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations ``[T, K]`` as e4m3 ``[T, K]`` and one float32 scale a row ``[T]``, as the FP8 scheme defines them.

    scale = max|x| / 448, at least :data:`E4M3_MIN_SCALE`; the value is x times 1 / scale, nearest, ties to even.
    """
    wide = x.float()
    largest = wide.abs().amax(dim=-1)
    # Divided by a tensor: on a GPU PyTorch multiplies by the inverse of a number, which rounds otherwise.
    scale = (largest / torch.full_like(largest, E4M3_MAX)).clamp(min=E4M3_MIN_SCALE)
    return (wide * (1 / scale)[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def scheme_for(quant_algo: str | None, dtype: torch.dtype) -> Scheme:
    """The scheme of a checkpoint's quantized linear layers (of all, where none is), by its ``quant_algo`` and dtype.

    Raises :class:`InputError`.
    """
    if quant_algo == FP8_ALL:
        return FP8
    for scheme in SCHEMES.values():
        if scheme.quant_algo == quant_algo and (quant_algo or scheme.weight_dtype == dtype):
            return scheme
    known = ", ".join(scheme.quant_algo for scheme in SCHEMES.values() if scheme.quant_algo)
    raise InputError(f"quant_algo {quant_algo!r} is not supported: {known}, or none with float16 or bfloat16 weights")
