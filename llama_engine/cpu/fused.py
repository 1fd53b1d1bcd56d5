"""The fused CPU kernel: compile ``step.cpp`` for this processor, load it, run steps through it.

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
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.errors import RunError
from llama_engine.model.rope import rope_tables
from llama_engine.model.weights import LINEARS, EngineWeights, Linear
from llama_engine.sampling import SamplingParams

SOURCE = Path(__file__).with_name("step.cpp")
HEADERS = sorted(SOURCE.parent.glob("*.h"))
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-w", "-shared", "-fPIC", "-pthread")
MAX_K = 16384  # 512 pairs of 15-bit by 8-bit products fill an int32 lane


_INT, _POINTER = ctypes.c_int32, ctypes.c_void_p


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _LinearView(ctypes.Structure):
    _fields_ = (*_fields(_POINTER, "weight scale"), ("group", ctypes.c_int64))


class _LayerView(ctypes.Structure):
    _fields_ = (
        *_fields(_POINTER, "input_norm post_norm"),
        *_fields(_LinearView, "qkv o gate_up down"),
        *_fields(_POINTER, "k_cache v_cache"),
    )


class _ModelView(ctypes.Structure):
    _fields_ = (
        *_fields(_INT, "hidden intermediate layers heads kv_heads head_size"),
        *_fields(_INT, "vocab tokens_per_block max_tokens max_context"),
        ("eps", ctypes.c_float),
        *_fields(_POINTER, "embedding final_norm"),
        ("lm_head", _LinearView),
        *_fields(_POINTER, "cos sin"),
        ("layer", ctypes.POINTER(_LayerView)),
    )


class _StepView(ctypes.Structure):
    _fields_ = (
        *_fields(_INT, "tokens logit_rows table_stride"),
        *_fields(_POINTER, "ids positions slots block_tables rows logits"),
    )


class SampleView(ctypes.Structure):
    """What a slot asks of its rows; ``keep`` are the arrays that it points to."""

    _fields_ = (
        *_fields(_POINTER, "logits record counts bias_ids biases phrase_ids phrase_ends recent"),
        ("position", ctypes.c_int64),
        *_fields(_INT, "vocab token"),
    )
    keep: tuple[object, ...] = ()

    @classmethod
    def of(cls, params: SamplingParams, counts: Tensor | None = None, recent: np.ndarray | None = None) -> SampleView:
        """``counts`` int16 ``[vocab]``, contiguous and needed when penalized, and ``recent`` int32 ``[RECENT]``, needed
        with bad words of several tokens, take in the tokens drawn."""
        ids, values = np.array(list(params.biases), np.int32), np.array(list(params.biases.values()), np.float32)
        counted = None if counts is None else counts.data_ptr()
        arrays = ids, values, *params.phrase_table, recent
        pointers = (None if array is None else array.ctypes.data for array in arrays)
        view = cls(None, params.record.ctypes.data, counted, *pointers)
        view.keep = (params.record, counts, *arrays)
        return view


class CpuSampler:
    """:func:`llama_engine.model.sampler.sample` in the compiled ``library``, the rows shared out among the threads of
    ``engine``, a handle of ``llama_create``; without one on the thread that calls."""

    def __init__(self, library: Path, engine: int | None = None) -> None:
        self._engine, self._sample = engine, ctypes.CDLL(str(library)).llama_sample
        self._sample.argtypes, self._sample.restype = (ctypes.c_void_p, ctypes.POINTER(SampleView), ctypes.c_int), None

    def sample(self, logits: Tensor, views: Sequence[SampleView], positions: Sequence[int]) -> list[int]:
        """The token of each row of ``logits`` float32 ``[rows, vocab]``, contiguous; a row is overwritten when
        penalized, biased or banned."""
        rows = (SampleView * len(views))(*views)
        base, vocab = logits.data_ptr(), logits.shape[-1]
        for i, (row, position) in enumerate(zip(rows, positions)):
            row.logits, row.position, row.vocab = base + 4 * vocab * i, position, vocab
        self._sample(self._engine, rows, len(rows))
        return [row.token for row in rows]


def fingerprint() -> str:
    """Identifies source, flags and this processor's instruction set: a library is loaded only where it matches."""
    text = "".join(path.read_text() for path in (SOURCE, *HEADERS)) + " ".join(FLAGS) + platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        text += platform.processor()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compile_library(directory: Path) -> Path | None:
    """Compile into ``directory`` with ``$CXX``, g++ or clang++, unless the matching library is there.

    None when there is no compiler. Raises :class:`RunError` when it fails.
    """
    library = directory / f"cpu_step-{fingerprint()}.so"
    if library.is_file():
        return library
    compilers = map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))
    cxx = next(filter(None, compilers), None)
    if cxx is None:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        target = Path(scratch) / library.name
        command = [cxx, *FLAGS, "-o", str(target), str(SOURCE)]
        # The compiler may print what is not ASCII, which the interpreter inside Triton Inference Server expects.
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise RunError(f"{cxx} could not compile {SOURCE.name}: {done.stderr.strip().splitlines()[-1:]}")
        os.replace(target, library)
    return library


def supported(config: ModelConfig, engine: EngineConfig, weights: EngineWeights) -> bool:
    """Whether the kernel's vector widths divide this geometry; other models run on PyTorch operations."""
    widths = (config.hidden_size, config.q_size, config.intermediate_size)
    return (
        all(width % 32 == 0 and width <= MAX_K for width in widths)
        and config.vocab_size % 32 == 0
        and config.qkv_size % 32 == 0
        and config.head_size % 32 == 0
        and config.num_heads // config.num_kv_heads <= 8
        and engine.tokens_per_block % 16 == 0
        and engine.kv_cache == "fp16"
        and weights.embedding.dtype == torch.float16
        and all("cpu" in getattr(layer, name).scheme.executors for layer in weights.layers for name in LINEARS)
        and "cpu" in weights.lm_head.scheme.lm_head_executors
    )


class CpuModel:
    """Forward passes through the compiled library; same face as :class:`llama_engine.model.llama.TorchModel`."""

    def __init__(
        self,
        library: Path,
        config: ModelConfig,
        engine: EngineConfig,
        weights: EngineWeights,
        threads: int,
    ) -> None:
        self._lib = ctypes.CDLL(str(library))
        self._lib.llama_create.restype = ctypes.c_void_p
        self._lib.llama_create.argtypes = (ctypes.POINTER(_ModelView), ctypes.c_int)
        self._lib.llama_forward.argtypes = (ctypes.c_void_p, ctypes.POINTER(_StepView))
        self._lib.llama_destroy.argtypes = (ctypes.c_void_p,)
        self._lib.llama_isa.restype = ctypes.c_char_p
        self.name = f"cpu-{self._lib.llama_isa().decode()}"
        c = self.config = config
        self._keep: list[torch.Tensor] = []
        kv_shape = (engine.num_kv_blocks, c.num_kv_heads, engine.tokens_per_block, c.head_size)
        layers = [
            _LayerView(
                *(self._hold(norm.float()) for norm in (layer.input_norm, layer.post_norm)),
                *(self._linear(linear) for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)),
                *(self._hold(torch.zeros(kv_shape, dtype=torch.float16)) for _ in "kv"),
            )
            for layer in weights.layers
        ]
        view = _ModelView(
            *(c.hidden_size, c.intermediate_size, c.num_layers, c.num_heads, c.num_kv_heads, c.head_size),
            *(c.vocab_size, engine.tokens_per_block, engine.max_num_tokens, engine.max_seq_len, c.rms_norm_eps),
            self._hold(weights.embedding),
            self._hold(weights.final_norm.float()),
            self._linear(weights.lm_head),
            *map(self._hold, rope_tables(c, engine.max_seq_len)),
            (_LayerView * c.num_layers)(*layers),
        )
        self._handle = self._lib.llama_create(ctypes.byref(view), threads)
        self.sampler = CpuSampler(library, self._handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._lib.llama_destroy(self._handle)
            self._handle = None

    def _hold(self, tensor: torch.Tensor) -> int:
        tensor = tensor.contiguous()
        self._keep.append(tensor)
        return tensor.data_ptr()

    def _linear(self, linear: Linear) -> _LinearView:
        scale = None if linear.scale is None else self._hold(linear.scale)
        return _LinearView(self._hold(linear.weight), scale, linear.group)

    def forward(self, ids: Tensor, positions: Tensor, slots: Tensor, block_tables: Tensor, rows: Tensor) -> Tensor:
        """As :meth:`llama_engine.model.llama.TorchModel.forward`; all tensors contiguous int32 on the CPU."""
        logits = torch.empty((len(rows), self.config.vocab_size), dtype=torch.float32)
        pointers = (tensor.data_ptr() for tensor in (ids, positions, slots, block_tables, rows, logits))
        step = _StepView(len(ids), len(rows), block_tables.stride(0), *pointers)
        self._lib.llama_forward(self._handle, ctypes.byref(step))
        return logits
