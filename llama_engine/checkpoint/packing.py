"""Symmetric per-channel INT8 and the byte orders in which TensorRT-LLM's kernels want it; FP8, whose order is plain.

Weights come as ``[N, K]`` (out, in), one scale a row. A packed matrix is what a checkpoint holds where its shape is
reported as ``(K, N)``: always N-major, so any even range of rows packs to one contiguous range of bytes.

Sources: ``symmetric_quantize`` and ``preprocess_weights_for_mixed_gemm`` in TensorRT-LLM's cutlass_preprocessors.cpp,
``fp8_per_channel_quant_weight_gpu`` in its models/llama/convert.py (see docs/TENSORRT_LLM.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llama_engine.errors import InputError
from llama_engine.model.schemes import E4M3_MAX, E4M3_MIN_SCALE

TARGET_ARCHES = ("sm80", "sm86", "sm89", "sm90")


class Layout(NamedTuple):
    """How an INT8 matrix lies in a checkpoint.

    ``permuted``: in-rows of every 16 reordered for LDSM; ``interleaved``: pairs of columns alternate every 64 rows;
    ``biased``: stored as q + 128 with bytes 1 and 2 of every four swapped.
    """

    name: str
    permuted: bool = False
    interleaved: bool = False
    biased: bool = False


_LAYOUTS = (
    Layout("column_major"),  # sm90, 0.15
    Layout("column_major_permuted", permuted=True),  # sm90, 0.16
    Layout("column_major_permuted_biased", permuted=True, biased=True),  # sm90, 0.17 and later
    Layout("column_major_interleaved", permuted=True, interleaved=True, biased=True),  # sm75 to sm89
)
LAYOUTS = {layout.name: layout for layout in _LAYOUTS}


def visible_arch() -> str | None:
    """The compute capability of the visible GPU, such as "sm90"; None where there is none."""
    return "sm{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def release_of(version: str) -> tuple[int, ...]:
    """(0, 15) of TensorRT-LLM "0.15.0". Raises :class:`InputError` for what is older or no version."""
    try:
        release = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        release = ()
    if len(release) != 2 or release < (0, 15):
        raise InputError(f"TensorRT-LLM version {version!r} is not supported: 0.15.0 or later, written like 0.15.0")
    return release


def layout_for(arch: str, version: str) -> Layout:
    """The layout that TensorRT-LLM ``version`` ("0.15.0") uses on ``arch`` ("sm80")."""
    if arch not in TARGET_ARCHES:
        raise InputError(f"target arch {arch!r} is not supported: choose one of {', '.join(TARGET_ARCHES)}")
    release = release_of(version)
    if arch != "sm90":
        return LAYOUTS["column_major_interleaved"]
    if release == (0, 15):
        return LAYOUTS["column_major"]
    return LAYOUTS["column_major_permuted" if release == (0, 16) else "column_major_permuted_biased"]


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[N, K]`` floating point to int8 ``[N, K]`` and float32 scales ``[N]``.

    scale = max|w| / 128; q = w / scale rounded half away from zero, clamped to [-128, 127]; a zero row gives zeros.
    The division uses the float32 scale, before it is stored in the model's dtype.
    """
    weight = weight.float()
    scale = weight.abs().amax(dim=1) / 128
    ratio = weight / torch.where(scale == 0, 1.0, scale)[:, None]
    # trunc(x + 0.5) would be off by one just below a half; the fraction left by trunc is exact.
    whole = ratio.trunc()
    whole += ratio.sub_(whole).abs_().ge_(0.5).copysign_(weight)
    return whole.clamp_(-128, 127).to(torch.int8), scale


def quantize_fp8(weight: torch.Tensor, clamp: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """``[N, K]`` floating point to float8_e4m3fn ``[N, K]`` and float32 scales ``[N]``.

    Of the values clamped to ``clamp``: scale = max|w| / 448, at least 1 / (448 * 512); q = w / scale, clamped to
    [-448, 448] and rounded half to even. All in float32.
    """
    weight = weight.float().clamp(*clamp)
    scale = (weight.abs().amax(dim=1) / E4M3_MAX).clamp(min=E4M3_MIN_SCALE)
    return (weight / scale[:, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def check_packable(n: int, k: int, layout: Layout, name: str) -> None:
    """Raise :class:`InputError` for a shape that TensorRT-LLM's preprocessing refuses."""
    k_multiple = 64 if layout.interleaved else 32
    if k % k_multiple or n % 32:
        raise InputError(
            f"{name} is {k} x {n} (in x out), but layout {layout.name} packs multiples of {k_multiple} x 32 alone: "
            "convert with --quantize_at_build, which the native engine builds from"
        )


def pack(q: torch.Tensor, layout: Layout) -> torch.Tensor:
    """int8 ``[N, K]`` to the ``N * K`` bytes (int8) that a checkpoint holds."""
    n, k = q.shape
    data = q.contiguous()
    if layout.permuted:
        # The permutation keeps pairs of rows together: 2 by 4 of them, transposed.
        data = _transpose(data, torch.int16, (-1, 2, 4))
    if layout.interleaved:
        data = _transpose(data, torch.int64, (n // 2, 2, k // 64, 8))
    if layout.biased:
        data = _swap_middle(data) ^ -128
    return data.view(-1)


def unpack(data: torch.Tensor, n: int, k: int, layout: Layout) -> torch.Tensor:
    """The inverse of :func:`pack`: bytes (int8, any shape) to int8 ``[N, K]``."""
    if layout.biased:
        data = _swap_middle(data ^ -128)
    if layout.interleaved:
        data = _transpose(data, torch.int64, (n // 2, k // 64, 2, 8))
    if layout.permuted:
        data = _transpose(data, torch.int16, (-1, 4, 2))
    return data.reshape(n, k)


def _transpose(data: torch.Tensor, unit: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Swap dimensions 1 and 2 of ``data`` seen as ``unit``s in ``shape``; bytes again, flat."""
    return data.reshape(-1).view(unit).view(shape).transpose(1, 2).contiguous().view(-1).view(torch.int8)


def _swap_middle(data: torch.Tensor) -> torch.Tensor:
    """Bytes 1 and 2 of every four change places."""
    words = data.reshape(-1).view(torch.int32)
    up, down = (words & 0x0000FF00) << 8, (words >> 8) & 0x0000FF00
    return ((words & ~0x00FFFF00) | up | down).view(torch.int8)
