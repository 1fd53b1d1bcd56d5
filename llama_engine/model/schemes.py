"""Quantization schemes: how a matrix is held, and how it is multiplied. Everything that depends on it asks here.

A :class:`~llama_engine.model.weights.Linear` has exactly one scheme, found from what its tensors are; bytes that no
scheme describes are refused by name, so that no kernel reads one format as another.

INT4
----
Symmetric and group-wise. ``G`` inputs of a row (64 or 128: :data:`GROUP_SIZES`; it divides K) share one float16 scale,
``w[n, k] = scale[n, k // G] * q[n, k]`` with q from -8 to 7. The weight is uint8 ``[N, K / 2]`` and the scale float16
``[N, K / G]``, both row-major. A group is ``G / 2`` consecutive bytes: **byte j holds q of the group's element j in its
low nibble and of element j + G / 2 in its high nibble**, both in two's complement (q & 15). Hence four neighbouring
bytes, widened at once, are four neighbouring inputs twice:

* signed bytes, 16 times too large: ``(word << 4) & 0xF0F0F0F0`` and ``word & 0xF0F0F0F0`` (the scale absorbs the 16);
* unsigned bytes q + 8: ``(word & 0x0F0F0F0F) ^ 0x08080808`` and ``((word >> 4) & 0x0F0F0F0F) ^ 0x08080808``;
* halves 1032 + q, two at once: ``(word & 0x000F000F) ^ 0x64086408``, and so on with shifts.

A zero point would cost 0.125 bits a weight and a correction in every kernel; the quantizer instead lets a group's scale
be negative, so that its largest value, of either sign, can use the -8.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch

from llama_engine.errors import InputError

ExecutorName = Literal["torch", "cpu", "gpu"]


@dataclass(frozen=True)
class Scheme:
    """One way to hold and multiply a weight matrix ``[N, K]``.

    ``scale``: "row", one float32 for each output channel; "group", one float16 for each group of a row; or None.
    ``packed``: values that share a stored element. ``activations``: what the weights are multiplied
    with: in FP8 by every executor, otherwise by the fast kernels, while the PyTorch reference uses floating point.
    ``executors`` run it in the decoder layers, ``lm_head_executors`` as lm_head. ``quant_algo``: TensorRT-LLM's name
    for it in a checkpoint's config, None for unquantized weights.
    """

    name: str
    weight_dtype: torch.dtype
    scale: Literal["row", "group"] | None
    activations: str
    executors: frozenset[ExecutorName]
    lm_head_executors: frozenset[ExecutorName]
    quant_algo: str | None = None
    packed: int = 1

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float16 if self.scale == "group" else torch.float32

    def dequantize(self, weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The matrix ``[N, K]`` that the stored values stand for, in ``dtype``."""
        if self.scale == "group":
            values = unpack_int4(weight, group_size(weight, scale)).unflatten(1, (scale.shape[1], -1))
            return (values * scale.float()[..., None]).flatten(1).to(dtype)
        return weight.to(dtype) if scale is None else (weight.float() * scale[:, None]).to(dtype)


REFERENCE: frozenset[ExecutorName] = frozenset(("torch",))
EVERYWHERE: frozenset[ExecutorName] = frozenset(("torch", "cpu", "gpu"))
GPU = REFERENCE | {"gpu"}
FP8_ROWWISE = "FP8_PER_CHANNEL_PER_TOKEN"  # of a checkpoint that TensorRT-LLM loads
FP8_ALL = f"{FP8_ROWWISE}_ALL"  # ours: the same format in every linear layer, under a name that TensorRT-LLM refuses
INT4_CHANNEL = "W4A16"  # TensorRT-LLM's: one scale a row, which the engine holds as equal scales of its groups
INT4_GROUPS = f"{INT4_CHANNEL}_GROUPWISE"  # ours
INT8 = Scheme("int8", torch.int8, "row", "16-bit fixed point, one scale per token", EVERYWHERE, EVERYWHERE, "W8A16")
FP8 = Scheme("fp8", torch.float8_e4m3fn, "row", "e4m3, one scale per token", GPU, REFERENCE, FP8_ROWWISE)
FP16 = Scheme("fp16", torch.float16, None, "float16, on a CPU float32", EVERYWHERE, EVERYWHERE)
BF16 = Scheme("bf16", torch.bfloat16, None, "bfloat16", GPU, GPU)  # on a GPU it becomes fp16
INT4 = Scheme("int4", torch.uint8, "group", "float16 or fixed point", EVERYWHERE, frozenset(), INT4_GROUPS, packed=2)
SCHEMES = {scheme.name: scheme for scheme in (INT8, FP8, INT4, FP16, BF16)}
GROUP_SIZES = (128, 64)
DIGITS_MAX = 32512  # 127 * 256: the largest 16-bit fixed-point activation whose two digits both fit a signed byte
E4M3_MAX = 448.0
KV_DTYPES = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn}  # by EngineConfig.kv_cache
E4M3_MIN_SCALE = 1 / (448 * 512)  # TensorRT-LLM's least scale, of weights and of activations


def scheme_of(weight: torch.Tensor, scale: torch.Tensor | None) -> Scheme:
    """The scheme of a matrix ``[N, K]`` with these tensors. Raises :class:`InputError` where there is none."""
    layout = None if scale is None else "row" if scale.dim() == 1 else "group"
    for scheme in SCHEMES.values():
        if (scheme.weight_dtype, scheme.scale) == (weight.dtype, layout):
            if layout == "group" and (
                scale.dtype != scheme.scale_dtype
                or len(weight) != len(scale)
                or not any(2 * weight.shape[1] == size * scale.shape[1] for size in GROUP_SIZES)
            ):
                raise InputError(
                    f"{scheme.name} weights {tuple(weight.shape)} need float16 scales, one for every "
                    f"{' or '.join(map(str, GROUP_SIZES))} inputs of a row, got {scale.dtype} {tuple(scale.shape)}"
                )
            if layout == "row" and (tuple(scale.shape) != weight.shape[:1] or scale.dtype != torch.float32):
                raise InputError(
                    f"{scheme.name} weights {tuple(weight.shape)} need float32 scales {tuple(weight.shape[:1])}, got "
                    f"{scale.dtype} {tuple(scale.shape)}"
                )
            return scheme
    what = f"{str(weight.dtype).removeprefix('torch.')} weights with{'out' if scale is None else ''} scales"
    raise InputError(f"no quantization scheme has {what}: this engine knows {', '.join(SCHEMES)}")


def default_group(widths: Collection[int], wanted: int | None = None) -> int:
    """The largest of :data:`GROUP_SIZES` that divides every K in ``widths``, or ``wanted`` if it does.

    Raises :class:`InputError` where there is none.
    """
    sizes = GROUP_SIZES if wanted is None else [size for size in GROUP_SIZES if size == wanted]
    for size in sizes:
        if all(width % size == 0 for width in widths):
            return size
    raise InputError(
        f"INT4 groups are {' or '.join(map(str, GROUP_SIZES))} inputs long, which does not divide the "
        f"model's matrices of {sorted(set(widths))} inputs: use INT8"
    )


def held_shape(scheme: Scheme, shape: tuple[int, ...], group: int = 128) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the tensors, weight and scale, that hold a matrix ``shape`` (N, K), INT4 in groups of ``group``."""
    n, k = shape
    return (n, k // scheme.packed), (n, k // group) if scheme.scale == "group" else (n,)


def group_size(weight: torch.Tensor, scale: torch.Tensor) -> int:
    """Inputs that share a scale, of INT4 tensors."""
    return 2 * weight.shape[1] // scale.shape[1]


def pack_int4(values: torch.Tensor, group: int) -> torch.Tensor:
    """``values`` int8 ``[N, K]`` from -8 to 7 as the uint8 ``[N, K / 2]`` of the INT4 scheme in groups of ``group``."""
    low, high = (values.view(torch.uint8) & 15).unflatten(1, (-1, 2, group // 2)).unbind(2)
    return (low | high << 4).flatten(1)


def unpack_int4(weight: torch.Tensor, group: int) -> torch.Tensor:
    """The inverse of :func:`pack_int4`: int8 ``[N, K]``."""
    signed = weight.view(torch.int8).unflatten(1, (-1, group // 2))
    return torch.stack((signed << 4 >> 4, signed >> 4), 2).flatten(1)


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
    if quant_algo in (FP8_ALL, INT4_CHANNEL):
        return FP8 if quant_algo == FP8_ALL else INT4
    for scheme in SCHEMES.values():
        if scheme.quant_algo == quant_algo and (quant_algo or scheme.weight_dtype == dtype):
            return scheme
    known = ", ".join(scheme.quant_algo for scheme in SCHEMES.values() if scheme.quant_algo)
    raise InputError(f"quant_algo {quant_algo!r} is not supported: {known}, or none with float16 or bfloat16 weights")
