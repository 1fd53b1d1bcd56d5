"""Symmetric per-channel INT8 and INT4 and the byte orders in which TensorRT-LLM's kernels want them; FP8 and
group-wise INT4, whose order is the engine's.

Weights come as ``[N, K]`` (out, in), one scale a row. A packed matrix is what a checkpoint holds where its shape is
reported as ``(K, N)``: always N-major, so any even range of rows packs to one contiguous range of bytes.

Sources: ``symmetric_quantize`` and ``preprocess_weights_for_mixed_gemm`` in TensorRT-LLM's cutlass_preprocessors.cpp,
``fp8_per_channel_quant_weight_gpu`` in its models/llama/convert.py (see docs/TENSORRT_LLM.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from llama_engine.errors import InputError
from llama_engine.model.schemes import E4M3_MAX, E4M3_MIN_SCALE

# Where in -8 .. 7 a group's largest value may come to lie; beyond 8 it is clipped, for the sake of the others.
LEVELS = (8.0, 8.5, 9.0, 9.5, 10.0)
TARGET_ARCHES = ("sm80", "sm86", "sm89", "sm90")


class Layout(NamedTuple):
    """How an INT8 or INT4 matrix lies in a checkpoint.

    ``permuted``: in-rows of every 16 (INT4: 32) reordered for LDSM; ``interleaved``: pairs (fours) of columns alternate
    every 64 rows; ``biased``: stored as q + 128 (q + 8), of every four bytes (eight nibbles) the even ones first.
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


def quantize(weight: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """``[N, K]`` floating point to int8 ``[N, K]`` of 8 or 4 ``bits`` and float32 scales ``[N]``.

    scale = max|w| / 128; q = w / scale rounded half away from zero, clamped to [-128, 127]; a zero row gives zeros.
    Of 4 bits the limits are 8 and [-8, 7]. The division uses the float32 scale, before it is stored in the model's
    dtype.
    """
    weight, limit = weight.float(), 1 << (bits - 1)
    scale = weight.abs().amax(dim=1) / limit
    ratio = weight / torch.where(scale == 0, 1.0, scale)[:, None]
    # trunc(x + 0.5) would be off by one just below a half; the fraction left by trunc is exact.
    whole = ratio.trunc()
    whole += ratio.sub_(whole).abs_().ge_(0.5).copysign_(weight)
    return whole.clamp_(-limit, limit - 1).to(torch.int8), scale


def quantize_fp8(weight: torch.Tensor, clamp: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """``[N, K]`` floating point to float8_e4m3fn ``[N, K]`` and float32 scales ``[N]``.

    Of the values clamped to ``clamp``: scale = max|w| / 448, at least 1 / (448 * 512); q = w / scale, clamped to
    [-448, 448] and rounded half to even. All in float32.
    """
    weight = weight.float().clamp(*clamp)
    scale = (weight.abs().amax(dim=1) / E4M3_MAX).clamp(min=E4M3_MIN_SCALE)
    return (weight / scale[:, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def check_packable(n: int, k: int, layout: Layout, name: str, bits: int = 8) -> None:
    """Raise :class:`InputError` for a shape that TensorRT-LLM's preprocessing refuses."""
    n_multiple = 256 // bits  # 32 bytes
    k_multiple = 64 if layout.interleaved else n_multiple
    if k % k_multiple or n % n_multiple:
        advice = "convert with --quantize_at_build, which the native engine builds from"
        raise InputError(
            f"{name} is {k} x {n} (in x out), but layout {layout.name} packs multiples of {k_multiple} x {n_multiple} "
            f"alone: {'give --group_size' if bits == 4 else advice}"
        )


def pack(q: torch.Tensor, layout: Layout, bits: int = 8) -> torch.Tensor:
    """int8 ``[N, K]`` of 8 or 4 ``bits`` to the ``N * K * bits / 8`` bytes (int8) that a checkpoint holds."""
    n, k = q.shape
    data, together = q.contiguous(), 16 // bits
    if layout.permuted:
        # The permutation keeps pairs of rows together: 2 (4) by 4 of them, transposed.
        data = _transpose(data, torch.int16, (-1, together, 4))
    if layout.interleaved:
        data = _transpose(data, torch.int64, (n // together, together, k // 64, 8))
    if layout.biased:
        data = _swap_middle(data) if bits == 8 else _transpose(data, torch.int8, (-1, 4, 2))
        data = data ^ -(1 << (bits - 1))
    if bits == 4:
        low, high = data.view(-1, 2).unbind(1)
        data = low & 15 | high << 4
    return data.view(-1)


def unpack(data: torch.Tensor, n: int, k: int, layout: Layout, bits: int = 8) -> torch.Tensor:
    """The inverse of :func:`pack`: bytes (int8, any shape) to int8 ``[N, K]``."""
    together = 16 // bits
    if bits == 4:
        data = torch.stack((data << 4, data), -1) >> 4
    if layout.biased:
        data = data ^ -(1 << (bits - 1))
        if bits == 4:
            data = data << 4 >> 4
        data = _swap_middle(data) if bits == 8 else _transpose(data, torch.int8, (-1, 2, 4))
    if layout.interleaved:
        data = _transpose(data, torch.int64, (n // together, k // 64, together, 8))
    if layout.permuted:
        data = _transpose(data, torch.int16, (-1, 4, together))
    return data.reshape(n, k)


def quantize_int4(
    weight: torch.Tensor, group: int, importance: torch.Tensor | None = None, levels: Sequence[float] = LEVELS
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[N, K]`` floating point to int8 ``[N, K]`` from -8 to 7 and float16 scales ``[N, K / group]``.

    Of the scales that put a group's largest value at one of ``levels``, the one with the least squared error, each
    input weighed by its ``importance`` ``[K]``; without it nothing is clipped, because the least error of the weights
    alone makes a worse model (docs/LOG.md). A scale has the sign that makes the level negative; a group of zeros gets
    scale 0.
    """
    groups = weight.float().unflatten(1, (-1, group))
    weigh = None if importance is None else importance.float().unflatten(0, (-1, group))
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    best_error = best_scale = best_values = None
    for level in levels if importance is not None else levels[:1]:
        scale = (largest / -level).half().float()
        values = (groups / torch.where(scale == 0, 1.0, scale)).round_().clamp_(-8, 7)
        error = (values * scale).sub_(groups).square_()
        error = error.sum(2, keepdim=True) if weigh is None else (error * weigh).sum(2, keepdim=True)
        if best_error is None:
            best_error, best_scale, best_values = error, scale, values
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_values = torch.where(better, scale, best_scale), torch.where(better, values, best_values)
    return best_values.flatten(1).to(torch.int8), best_scale.squeeze(2).half()


def _transpose(data: torch.Tensor, unit: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Swap dimensions 1 and 2 of ``data`` seen as ``unit``s in ``shape``; bytes again, flat."""
    return data.reshape(-1).view(unit).view(shape).transpose(1, 2).contiguous().view(-1).view(torch.int8)


def _swap_middle(data: torch.Tensor) -> torch.Tensor:
    """Bytes 1 and 2 of every four change places."""
    words = data.reshape(-1).view(torch.int32)
    up, down = (words & 0x0000FF00) << 8, (words >> 8) & 0x0000FF00
    return ((words & ~0x00FFFF00) | up | down).view(torch.int8)
