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

    ``scale``: "row", one float32 for each output channel, or None. ``activations``: what the fast kernels multiply the
    weights with; the PyTorch reference always uses floating point. ``executors`` run it in the decoder layers,
    ``lm_head_executors`` as lm_head. ``quant_algo``: TensorRT-LLM's name for it in a checkpoint's config, None for
    unquantized weights.
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
INT8 = Scheme("int8", torch.int8, "row", "16-bit fixed point, one scale per token", EVERYWHERE, EVERYWHERE, "W8A16")
FP16 = Scheme("fp16", torch.float16, None, "float16", REFERENCE, EVERYWHERE)
BF16 = Scheme("bf16", torch.bfloat16, None, "bfloat16", REFERENCE, REFERENCE | {"gpu"})  # a GPU's lm_head becomes fp16
SCHEMES = {scheme.name: scheme for scheme in (INT8, FP16, BF16)}


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


def scheme_for(quant_algo: str | None, dtype: torch.dtype) -> Scheme:
    """The scheme of a checkpoint's linear layers, by its ``quant_algo`` and dtype. Raises :class:`InputError`."""
    for scheme in SCHEMES.values():
        if scheme.quant_algo == quant_algo and (quant_algo or scheme.weight_dtype == dtype):
            return scheme
    known = ", ".join(scheme.quant_algo for scheme in SCHEMES.values() if scheme.quant_algo)
    raise InputError(f"quant_algo {quant_algo!r} is not supported: {known}, or none with float16 or bfloat16 weights")
