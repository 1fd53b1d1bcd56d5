"""The fused CPU kernel: compile ``cpu_step.cpp`` for this processor, load it, run steps through it.

Off-switch: ``kernels="torch"`` when loading an engine. Without a C++ compiler the engine runs on PyTorch operations.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from llama_engine.config import ModelConfig
from llama_engine.errors import RunError
from llama_engine.model import rope_tables
from llama_engine.weights import EngineWeights, Linear

SOURCE = Path(__file__).with_name("cpu_step.cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-w", "-shared", "-fPIC", "-pthread")
MAX_K = 16384  # 512 pairs of 15-bit by 8-bit products fill an int32 lane


class _Struct(ctypes.Structure):
    """Keeps the tensors that its pointers refer to alive."""

    keep: tuple[object, ...] = ()


class _LinearView(_Struct):
    _fields_ = (("weight", ctypes.c_void_p), ("scale", ctypes.c_void_p))


class _LayerView(_Struct):
    _fields_ = (
        ("input_norm", ctypes.c_void_p),
        ("post_norm", ctypes.c_void_p),
        ("qkv", _LinearView),
        ("o", _LinearView),
        ("gate_up", _LinearView),
        ("down", _LinearView),
        ("k_cache", ctypes.c_void_p),
        ("v_cache", ctypes.c_void_p),
    )


class _ModelView(_Struct):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("hidden", "intermediate", "layers", "heads", "kv_heads", "head_size")),
        *((name, ctypes.c_int32) for name in ("vocab", "tokens_per_block", "max_tokens", "max_context")),
        ("eps", ctypes.c_float),
        ("embedding", ctypes.c_void_p),
        ("final_norm", ctypes.c_void_p),
        ("lm_head", _LinearView),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("layer", ctypes.POINTER(_LayerView)),
    )


class _StepView(_Struct):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("tokens", "logit_rows", "table_stride")),
        *((name, ctypes.c_void_p) for name in ("ids", "positions", "slots", "block_tables", "rows", "logits")),
    )


def fingerprint() -> str:
    """Identifies source, flags and this processor's instruction set: a library is loaded only where it matches."""
    text = SOURCE.read_text() + " ".join(FLAGS) + platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        text += platform.processor()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compiler() -> str | None:
    """The C++ compiler to use: ``$CXX``, else g++, else clang++, else None."""
    return next(
        (path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None
    )


def compile_library(directory: Path) -> Path | None:
    """Compile into ``directory`` unless the matching library is there. None when no compiler can.

    Raises :class:`RunError` when the compiler fails.
    """
    library = Path(directory) / f"cpu_step-{fingerprint()}.so"
    if library.is_file():
        return library
    cxx = compiler()
    if cxx is None:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        target = Path(scratch) / library.name
        done = subprocess.run([cxx, *FLAGS, "-o", str(target), str(SOURCE)], capture_output=True, text=True)
        if done.returncode:
            raise RunError(f"{cxx} could not compile {SOURCE.name}: {done.stderr.strip().splitlines()[-1:]}")
        os.replace(target, library)
    return library


def supported(config: ModelConfig, weights: EngineWeights, tokens_per_block: int) -> bool:
    """Whether the kernel's vector widths divide this geometry; other models run on PyTorch operations."""
    widths = (config.hidden_size, config.q_size, config.intermediate_size)
    return (
        all(width % 32 == 0 and width <= MAX_K for width in widths)
        and config.vocab_size % 32 == 0
        and config.qkv_size % 32 == 0
        and config.head_size % 32 == 0
        and config.num_heads // config.num_kv_heads <= 8
        and tokens_per_block % 16 == 0
        and weights.embedding.dtype == torch.float16
        and all(layer.qkv.scale is not None for layer in weights.layers)
    )


class CpuModel:
    """Forward passes through the compiled library; same face as :class:`llama_engine.model.TorchModel`."""

    def __init__(
        self,
        library: Path,
        config: ModelConfig,
        weights: EngineWeights,
        *,
        num_blocks: int,
        tokens_per_block: int,
        max_seq_len: int,
        max_num_tokens: int,
        threads: int,
    ) -> None:
        self._lib = ctypes.CDLL(str(library))
        self._lib.llama_create.restype = ctypes.c_void_p
        self._lib.llama_create.argtypes = (ctypes.POINTER(_ModelView), ctypes.c_int)
        self._lib.llama_forward.argtypes = (ctypes.c_void_p, ctypes.POINTER(_StepView))
        self._lib.llama_destroy.argtypes = (ctypes.c_void_p,)
        self._lib.llama_isa.restype = ctypes.c_char_p
        self.name = f"cpu-{self._lib.llama_isa().decode()}"
        self.config = config
        self._keep: list[torch.Tensor] = []
        kv_shape = (num_blocks, config.num_kv_heads, tokens_per_block, config.head_size)
        layers = (_LayerView * config.num_layers)(
            *(
                _LayerView(
                    self._hold(layer.input_norm.float()),
                    self._hold(layer.post_norm.float()),
                    *(self._linear(getattr(layer, name)) for name in ("qkv", "o", "gate_up", "down")),
                    self._hold(torch.zeros(kv_shape, dtype=torch.float16)),
                    self._hold(torch.zeros(kv_shape, dtype=torch.float16)),
                )
                for layer in weights.layers
            )
        )
        cos, sin = rope_tables(config, max_seq_len)
        view = _ModelView(
            config.hidden_size,
            config.intermediate_size,
            config.num_layers,
            config.num_heads,
            config.num_kv_heads,
            config.head_size,
            config.vocab_size,
            tokens_per_block,
            max_num_tokens,
            max_seq_len,
            config.rms_norm_eps,
            self._hold(weights.embedding),
            self._hold(weights.final_norm.float()),
            self._linear(weights.lm_head),
            self._hold(cos),
            self._hold(sin),
            layers,
        )
        self._handle = self._lib.llama_create(ctypes.byref(view), threads)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._lib.llama_destroy(self._handle)
            self._handle = None

    def _hold(self, tensor: torch.Tensor) -> int:
        tensor = tensor.contiguous()
        self._keep.append(tensor)
        return tensor.data_ptr()

    def _linear(self, linear: Linear) -> _LinearView:
        scale = None if linear.scale is None else self._hold(linear.scale.float())
        weight = linear.weight if linear.scale is not None else linear.weight.half()
        return _LinearView(self._hold(weight), scale)

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        block_tables: torch.Tensor,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """As :meth:`llama_engine.model.ForwardModel.forward`; all tensors contiguous int32 on the CPU."""
        logits = torch.empty((len(rows), self.config.vocab_size), dtype=torch.float32)
        step = _StepView(
            len(ids),
            len(rows),
            block_tables.stride(0),
            *(tensor.data_ptr() for tensor in (ids, positions, slots, block_tables, rows, logits)),
        )
        self._lib.llama_forward(self._handle, ctypes.byref(step))
        return logits
