"""Linear layers of up to 32 rows on Hopper GPUs: ``stream.cu``, whose weights are on their way before their turn comes.

With INT8 bitwise equal to :func:`llama_engine.kernels.gemm.gemm`, which runs everything else and is the off-switch
(``kernels="tiled"``). FP8 is summed in another order, and INT4 multiplies INT8's fixed-point activations where gemm
takes fp16. The reference of all is :func:`llama_engine.kernels.gemm.gemm_reference`.
"""

from __future__ import annotations

import ctypes
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_engine.errors import InputError, RunError
from llama_engine.kernels import nvrtc
from llama_engine.kernels.common import multiprocessors
from llama_engine.kernels.gemm_kernel import RESIDUAL, SILU_MUL, STORE
from llama_engine.model.schemes import FP8, INT4, INT8
from llama_engine.model.weights import Linear

SOURCE = Path(__file__).with_name("stream.cu")
HEADERS = (SOURCE.with_name("stream_tile.cuh"),)
ROW_BUCKETS = (8, 16, 32)  # activation rows a kernel is compiled for
SHARED_BYTES = 112 * 1024  # two blocks on a multiprocessor, so that the next matrix loads while this one runs
MAX_STAGES = 8
STEP = 128  # of K in a stage; INT4's group
FLIGHT_BYTES = 64 * 1024  # of weights on their way to one block


class _Params(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "weight_scale", "digits", "scale", "out")),
        *((name, ctypes.c_int) for name in ("rows", "plane")),
    )


@dataclass(frozen=True)
class Shape:
    """How a matrix is cut: blocks of ``16 * slabs`` weight rows, K in ``split`` parts."""

    slabs: int
    split: int
    blocks: int


def shape_of(n: int, k: int, epilogue: int, processors: int, steps: int = 1) -> Shape | None:
    """The cut of ``n`` by ``k`` weights that occupies most of ``processors`` with one block each, or None if the kernel
    cannot run the matrix. A part of K is a multiple of ``steps`` stages."""
    unit = STEP * steps
    if k % unit or n % 16 or n * k >= 1 << 32:
        return None
    gated = epilogue == SILU_MUL
    splits = [split for split in ((1,) if gated else (1, 2, 4)) if k % (unit * split) == 0]
    choices = [
        Shape(slabs, split, -(-n // (16 * slabs)) * split) for split in splits for slabs in range(1, 17 if gated else 9)
    ]
    fitting = [shape for shape in choices if shape.blocks <= processors]
    # Most blocks first, then the widest, which reads the activations least often.
    return max(fitting, key=lambda shape: (shape.blocks, shape.slabs), default=None)


class StreamGemm:
    """The kernels of one GPU, compiled when first used."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._processors = multiprocessors(device)
        self._functions: dict[tuple[int, int, int, int, str], nvrtc.Function | None] = {}
        self._params = _Params()

    def runs(self, linear: Linear, rows: int, epilogue: int) -> bool:
        """Whether :meth:`launch` takes this matrix with so many rows."""
        return self._function(linear, rows, epilogue) is not None

    def _function(self, linear: Linear, rows: int, epilogue: int) -> nvrtc.Function | None:
        bucket = next((bucket for bucket in ROW_BUCKETS if rows <= bucket), None)
        if bucket is None or linear.scheme not in (INT8, FP8, INT4) or epilogue not in (STORE, RESIDUAL, SILU_MUL):
            return None
        packed = linear.scheme is INT4
        if packed and linear.group != STEP:
            return None
        n, k = linear.shape
        key = n, k, epilogue, bucket, linear.scheme.name
        if key not in self._functions:
            shape, self._functions[key] = shape_of(n, k, epilogue, self._processors, 8 if packed else 1), None
            try:
                self._functions[key] = shape and self._compile(*key, shape)
            except RunError as error:
                warnings.warn(f"{error}; a matrix of {n}x{k} runs the tiled kernel instead", stacklevel=2)
        return self._functions[key]

    def _compile(self, n: int, k: int, epilogue: int, bucket: int, scheme: str, shape: Shape) -> nvrtc.Function | None:
        rows, columns = 16 * shape.slabs, bucket if scheme == FP8.name else 2 * bucket
        packed, groups = scheme == INT4.name, -(-rows // 64)
        row = STEP // 2 if packed else STEP
        stage = rows * row + columns * STEP
        # Behind the ring: what the last warpgroup reads beyond its rows, and group scales.
        behind = 64 * groups * (k // shape.split // STEP) * 2 if packed else max(0, 64 * groups * row - stage)
        stages = min(MAX_STAGES, (SHARED_BYTES - behind) // stage)
        if stages < 3:  # blocks so tall (fewer processors) that the ring does not turn
            return None
        macros = {"N": n, "K": k, "SILU": int(epilogue == SILU_MUL), "RESIDUAL": int(epilogue == RESIDUAL)}
        macros |= {"FP8": int(scheme == FP8.name), "INT4": int(packed), "SLABS": shape.slabs, "SPLIT": shape.split}
        macros |= {"MB": bucket, "KC": STEP, "STAGES": stages, "FLIGHT": FLIGHT_BYTES}
        cubin = nvrtc.compile_cubin(SOURCE, macros, nvrtc.architecture(self.device) + "a", HEADERS)
        attributes = {nvrtc.PROGRAMMATIC: (1,)} | ({nvrtc.CLUSTER: (shape.split, 1, 1)} if shape.split > 1 else {})
        return nvrtc.Function(
            cubin,
            "stream_gemm",
            self.device,
            grid=shape.blocks,
            threads=128 * groups,
            shared=stages * stage + behind,
            attributes=attributes,
        )

    def launch(
        self, digits: torch.Tensor, scale: torch.Tensor, linear: Linear, out: torch.Tensor, rows: int, epilogue: int
    ) -> None:
        """As :func:`llama_engine.kernels.gemm.gemm` with epilogue STORE, RESIDUAL or SILU_MUL.

        ``digits`` int8 ``[2, capacity, K]`` for INT8 and INT4, e4m3 ``[capacity, K]`` for FP8, and ``scale`` float32
        ``[capacity]`` with a capacity of at least 32; ``out`` fp16 ``[*, N]`` (``[*, N / 2]`` for SILU_MUL). Raises
        :class:`InputError` for other shapes.
        """
        n, k = linear.shape
        function = self._function(linear, rows, epilogue)
        if function is None:
            raise InputError(f"the streaming kernel does not run {rows} rows of a {n}x{k} matrix")
        width = n // 2 if epilogue == SILU_MUL else n
        planes, form = ((), FP8.weight_dtype) if linear.scheme is FP8 else ((2,), torch.int8)
        fits = digits.dtype == form and (*digits.shape[:-2], digits.shape[-1]) == (*planes, k)
        if not fits or digits.shape[-2] < ROW_BUCKETS[-1] or out.shape[-1] != width:
            raise InputError(f"digits {tuple(digits.shape)} and out {tuple(out.shape)} do not fit weights {n}x{k}")
        if out.dtype != torch.float16 or not all(t.is_contiguous() for t in (digits, linear.weight, out)):
            raise InputError("operands must be contiguous, the result float16")
        params = self._params
        params.weight, params.weight_scale = linear.weight.data_ptr(), linear.scale.data_ptr()
        params.digits, params.scale, params.out = digits.data_ptr(), scale.data_ptr(), out.data_ptr()
        params.rows, params.plane = rows, digits.stride(0)
        function.launch(params)


def supported(device: torch.device) -> bool:
    """Whether ``device`` is a GPU that runs this kernel: compute capability 9.0 (clusters, dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
